# SPDX-License-Identifier: Apache-2.0
"""The node that makes quantised files loadable by stock ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.identify.dialects import AUTO, DIALECTS
from ..checkpoint.write.repair import repair
from ..host import files
from ..host.files import LIKE_FOLDERS, SAME_FILE, file_names, file_path, fingerprint
from ..host.show import show, tell_files, telling

ONLY_REPORT, WRITE = "only report", "write a new file"


class NVFP4Repair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Repair",
            display_name="NVFP4 Repair",
            category="NVFP4",
            description="Makes a quantized file loadable by stock ComfyUI: adds what its header lacks, mends names, "
            "converts foreign dialects. Writes a new file below ComfyUI's output folder; the old one stays as it is.",
            inputs=[
                io.Combo.Input(
                    "file_name", options=file_names(LIKE_FOLDERS),
                    tooltip="The quantized file; of a sharded checkpoint any one of its files.",
                ),
                io.Combo.Input(
                    "action", options=[ONLY_REPORT, WRITE], default=ONLY_REPORT,
                    tooltip="First tell what is wrong and what can be mended; then write the mended file.",
                ),
                io.String.Input(
                    "name", default="", tooltip="Name of the new file; _repaired is added. Empty: the old one's."
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file that exists."),
                io.Combo.Input(
                    "dialect", options=[AUTO, *DIALECTS], default=AUTO, optional=True, advanced=True,
                    tooltip="How the file stores its NVFP4 weights, if it does not say so itself.",
                ),
                io.Combo.Input(
                    "config_from", options=[SAME_FILE, *file_names(LIKE_FOLDERS)], default=SAME_FILE, optional=True,
                    tooltip="A file of the same model version, whose `config` is put into the new file.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.String.Output(
                    "file", display_name="file", tooltip="The new file, below the output folder; empty without one."
                ),
                io.String.Output("report", display_name="report", tooltip="What was or can be mended; what remains."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["fix file", "convert dialect", "modelopt", "compressed-tensors", "comfy_quant"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file_name, config_from=SAME_FILE, **options) -> str:
        return fingerprint((file_name, config_from), LIKE_FOLDERS, sorted(options.items()))

    @classmethod
    def execute(
        cls, file_name, action, name, overwrite, dialect=AUTO, config_from=SAME_FILE
    ) -> io.NodeOutput:
        target = files.output_like(file_name, name, "repaired")
        done = repair(
            file_path(file_name, LIKE_FOLDERS), target, base=files.output_folder(), dialect=dialect,
            config_from=files.optional_path(config_from, LIKE_FOLDERS), overwrite=overwrite,
            dry_run=action == ONLY_REPORT, on_bytes=telling(cls, files.progress()),
        )  # fmt: skip
        written = done.method == "copy"
        if written:
            tell_files()
        text = str(done) if written else f"{done}\nNothing was written."
        return io.NodeOutput(target if written else "", text, ui=show(cls, text))
