# SPDX-License-Identifier: Apache-2.0
"""Node that collects calibration statistics while a model samples."""

from __future__ import annotations

import os

from comfy_api.v0_0_2 import io

from ..host import files
from ..host.compute.calibrate import collect
from ..host.files import LIKE_FOLDERS, file_names, file_path
from ..host.show import show, tell_files


class NVFP4Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Calibrate",
            display_name="NVFP4 Calibrate",
            category="NVFP4",
            description="Watches the inputs of a model's layers while it samples, and writes a calibration file, with "
            "which NVFP4 Quantize rounds so that outputs change least.",
            inputs=[
                io.Model.Input("model", tooltip="The model in BF16 or FP8; it is not changed itself."),
                io.Combo.Input(
                    "file_name", options=file_names(LIKE_FOLDERS),
                    tooltip="The checkpoint that the model was loaded from, and that is to be quantized.",
                ),
                io.Float.Input(
                    "memory_gb", default=2.0, min=0.1, max=512.0, step=0.1,
                    tooltip="GPU memory in GB for what is collected. With more of it the calibration is better.",
                ),
                io.String.Input("name", default="", tooltip="Name of the new file. Empty: the checkpoint's."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a calibration file that exists."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, to be sampled with ordinary prompts."),
                io.String.Output("report", display_name="report", tooltip="What is collected, and where to."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["calibration", "gptq", "activation statistics"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, file_name, memory_gb, name, overwrite) -> io.NodeOutput:
        target = os.path.join(files.output_folder(), files.output_like(file_name, name, "calibration"))
        patcher = model.clone()
        source, budget = file_path(file_name, LIKE_FOLDERS), int(memory_gb * 1e9)
        text = collect(patcher, source, target, budget, overwrite, on_new=tell_files)
        return io.NodeOutput(patcher, text, ui=show(cls, text))
