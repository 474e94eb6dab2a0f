# SPDX-License-Identifier: Apache-2.0
"""Model loaders."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..host.compute.attention import BY_COMPUTE, choices
from ..host.files import SAME_FILE, file_names, file_path, fingerprint, optional_path
from ..host.load.model import COMPUTE_MODES, DIALECTS, load_model
from ..host.making import missing, nvfp4_of
from ..kernels.backends import BACKENDS

FOLDERS = ("diffusion_models", "checkpoints")


class NVFP4ModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4ModelLoader",
            display_name="NVFP4 Model Loader",
            category="NVFP4",
            description="Loads an NVFP4 diffusion model of any dialect. Weights stay packed in GPU memory; each layer "
            "is decoded on the GPU when it is used: by default with the result of ComfyUI's own weight-only path, on "
            "newer GPUs in FP8 or FP4.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=file_names(FOLDERS),
                    tooltip="From models/diffusion_models or models/checkpoints (a full checkpoint's model part).",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE_MODES),
                    default="bf16",
                    tooltip="bf16: weight-only, exact. int8: weights and activations in INT8, for GPUs without FP8 "
                    "(compute capability 7.5 and up); activations with outlier channels lose more in it than in FP8. "
                    "fp8: both in FP8 (8.9 and up). fp4: both in FP4, by ComfyUI's own kernels (10.0 and up, CUDA "
                    "13). auto: the fastest of these but int8 that runs here. Sensitive layers stay weight-only; the "
                    "report says how many and why.",
                ),
                io.Combo.Input(
                    "dialect",
                    options=["auto", *DIALECTS],
                    default="auto",
                    tooltip="How the file lays out its NVFP4 weights. auto reads what its writer declared, and stops "
                    "with an error where that leaves a choice.",
                ),
                io.Combo.Input(
                    "backend", options=["auto", *BACKENDS], default="auto", optional=True, advanced=True,
                    tooltip="What dequantizes. auto: Triton where it runs, torch elsewhere; the report says why.",
                ),
                io.Combo.Input(
                    "config_from", options=[SAME_FILE, *file_names(FOLDERS)], default=SAME_FILE, optional=True,
                    tooltip="For a file whose header lost its `config`: another file of the same model version.",
                    advanced=True,
                ),
                io.String.Input(
                    "layer_compute",
                    default="",
                    optional=True,
                    tooltip="Modes of single layers, as PART=MODE separated by commas, such as to_out=bf16, "
                    "blocks.0=bf16. PART is any part of the layers' names, * stands for any text; the last match "
                    "counts.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "attention",
                    options=choices(),
                    default=BY_COMPUTE,
                    optional=True,
                    tooltip="by compute mode: ComfyUI's own for bf16, whose result is then exactly ComfyUI's, and auto "
                    "for the other modes. auto: torch's kernels are compared and timed on this GPU in the first step, "
                    "and the fastest accurate one is kept for each shape. host: ComfyUI's own. sdpa and the others: "
                    "that one.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "make_nvfp4", default=False, optional=True,
                    tooltip="For a BF16, FP16, FP32 or FP8 file: its diffusion model is written as NVFP4 once, to "
                    "output/diffusion_models, which takes minutes and shows its progress, and found there ever after. "
                    "A file that is NVFP4 already is loaded as it is.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, for LoRA loaders, guiders and samplers."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how it is computed."),
            ],
            search_aliases=["nvfp4", "fp4", "ltx", "load diffusion model", "unet loader"],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model_name=None) -> bool | str:
        """Instead of the host's check of the name: tell what the file can be made from."""
        return model_name is None or model_name in file_names(FOLDERS) or missing(model_name, FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, model_name, compute, dialect, *, config_from=SAME_FILE, **options):
        return fingerprint([model_name, config_from], FOLDERS, compute, dialect, *sorted(options.items()))

    @classmethod
    def execute(
        cls, model_name, compute, dialect, backend="auto", config_from=SAME_FILE, layer_compute="",
        attention=BY_COMPUTE, make_nvfp4=False,
    ) -> io.NodeOutput:  # fmt: skip
        path, config_path = file_path(model_name, FOLDERS), optional_path(config_from, FOLDERS)
        if make_nvfp4:
            path = nvfp4_of(cls, model_name, FOLDERS)
        options = {"layer_compute": layer_compute, "attention": attention}
        patcher, report = load_model(path, compute, dialect, backend, config_path, **options)
        return io.NodeOutput(patcher, str(report))
