# SPDX-License-Identifier: Apache-2.0
"""Nodes for checkpoint files: look into them, take them apart."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.identify.components import COMPONENTS, VIDEO_VAE
from ..checkpoint.identify.dialects import AUTO, DIALECTS
from ..checkpoint.identify.report import inspect_checkpoint
from ..checkpoint.write.split import BF16, KEEP, split
from ..draw.compact import compact_inspection
from ..draw.inspect import inspection_picture
from ..host import files
from ..host.files import ALL_FOLDERS, SAME_FILE, file_names, file_path, fingerprint
from ..host.show import show, tell_files, to_image

DIALECT_TOOLTIP = "How the file stores its NVFP4 weights, if it does not say so itself."
SOURCE_TOOLTIP = "A safetensors file of any model folder; of a sharded checkpoint any one of its files."


class NVFP4Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Inspect",
            display_name="NVFP4 Inspect Checkpoint",
            category="NVFP4",
            description="What is in a checkpoint: components, formats by block, what is missing, which node loads it, "
            "and what stock ComfyUI would do with it. Reads only the header.",
            inputs=[
                io.Combo.Input("file_name", options=file_names(ALL_FOLDERS), tooltip=SOURCE_TOOLTIP),
                io.Combo.Input(
                    "dialect", options=[AUTO, *DIALECTS], default=AUTO, optional=True, tooltip=DIALECT_TOOLTIP,
                    advanced=True,
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="What the node shows."),
                io.Image.Output("picture", display_name="picture", tooltip="Bytes and formats by component and block."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["checkpoint info", "safetensors header", "nvfp4 dialect"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file_name, dialect=AUTO) -> str:
        return fingerprint((file_name,), ALL_FOLDERS, dialect)

    @classmethod
    def execute(cls, file_name, dialect=AUTO) -> io.NodeOutput:
        found = inspect_checkpoint(file_path(file_name, ALL_FOLDERS), dialect)
        picture = to_image(inspection_picture(found))
        shown = show(cls, str(found), to_image(compact_inspection(found)), picture)
        return io.NodeOutput(str(found), picture, ui=shown)


class NVFP4Split(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        parts = [
            io.Boolean.Input(part, default=part == VIDEO_VAE, tooltip=f"Write a file of its own with: {title}.")
            for part, title in COMPONENTS.items()
        ]
        return io.Schema(
            node_id="NVFP4Split",
            display_name="NVFP4 Split Checkpoint",
            category="NVFP4",
            description="Writes components of a full checkpoint to files of their own below ComfyUI's output folder, "
            "where loaders list them at once. Quantized VAE weights are restored to BF16.",
            inputs=[
                io.Combo.Input("file_name", options=file_names(ALL_FOLDERS), tooltip=SOURCE_TOOLTIP),
                *parts,
                io.String.Input(
                    "name", default="", tooltip="How the new names begin. Empty: with the checkpoint's name."
                ),
                io.Combo.Input("dtype", options=[KEEP, BF16], default=KEEP, tooltip="bf16 converts FP32 and FP16."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace files that exist."),
                io.Combo.Input(
                    "config_from", options=[SAME_FILE, *file_names(ALL_FOLDERS)], default=SAME_FILE, optional=True,
                    tooltip="A file of the same model version, whose `config` is put into the new files.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "dialect", options=[AUTO, *DIALECTS], default=AUTO, optional=True, tooltip=DIALECT_TOOLTIP,
                    advanced=True,
                ),
                io.String.Input(
                    "vae_prefix", default="", optional=True, advanced=True,
                    tooltip="For a checkpoint with several VAEs: how the tensor names of the wanted one begin.",
                ),
            ],
            outputs=[io.String.Output("files", display_name="files", tooltip="Names of the new files, one a line.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["extract vae", "split checkpoint", "audio vae", "text projection"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file_name, config_from=SAME_FILE, **options) -> str:
        return fingerprint((file_name, config_from), ALL_FOLDERS, sorted(options.items()))

    @classmethod
    def execute(
        cls, file_name, name, dtype, overwrite, config_from=SAME_FILE, dialect=AUTO, vae_prefix="", **parts
    ) -> io.NodeOutput:
        targets = files.output_targets(file_name, name, [part for part in COMPONENTS if parts[part]])
        config = files.optional_path(config_from, ALL_FOLDERS)
        written = split(
            file_path(file_name, ALL_FOLDERS), targets, base=files.output_folder(), dtype=dtype, dialect=dialect,
            vae_prefix=vae_prefix or None, config_from=config, overwrite=overwrite, device=files.restore_device(),
            on_bytes=files.progress(),
        )  # fmt: skip
        tell_files()
        return io.NodeOutput("\n".join(targets.values()), ui=show(cls, "\n".join(map(str, written))))
