# SPDX-License-Identifier: Apache-2.0
"""The node that makes NVFP4 files."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.identify.components import DIFFUSION_MODEL, REST
from ..checkpoint.write.budget import PRESETS
from ..checkpoint.write.card import text_of
from ..checkpoint.write.estimate import estimate
from ..checkpoint.write.plan import QUALITIES, QuantizeSettings
from ..checkpoint.write.quantize import quantize_checkpoint
from ..checkpoint.write.recipes import AUTO, FAMILIES, Options
from ..host import files
from ..host.files import ALL_FOLDERS, LORA_FOLDERS, NO_LORA, SAME_FILE, file_names, file_path, fingerprint
from ..host.show import show, tell_files, telling

WHOLE, MODEL_ONLY = "whole checkpoint", "diffusion model only"
NO_CALIBRATION = "none"


class NVFP4Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Quantize",
            display_name="NVFP4 Quantize",
            category="NVFP4",
            description="Writes a BF16, FP16, FP32 or FP8 checkpoint as NVFP4 below ComfyUI's output folder, with a "
            "model card beside it. Needs memory for one tensor, not for the model; a cancelled run can go on.",
            inputs=[
                io.Combo.Input("file_name", options=file_names(ALL_FOLDERS), tooltip="The checkpoint to quantize."),
                io.Combo.Input("contents", options=[WHOLE, MODEL_ONLY], default=WHOLE,
                               tooltip="The VAE and all else are copied byte for byte, or left out."),
                io.Combo.Input(
                    "quality", options=[*QUALITIES], default="best",
                    tooltip="best searches the block scales with the least error; fast takes block maxima; calibrated "
                    "rounds so that outputs change least, with a calibration file. Same size.",
                ),
                io.Boolean.Input("protect_audio", default=False, tooltip="Keep the audio branch as it is."),
                io.Boolean.Input("protect_cross_attention", default=False, tooltip="Keep cross-attention as it is."),
                io.Boolean.Input("estimate_only", default=False, tooltip="Tell size and time, write nothing."),
                io.String.Input("name", default="", tooltip="Name of the new file. Empty: the checkpoint's."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file that exists."),
                io.Combo.Input("recipe", options=list(FAMILIES), default=AUTO, optional=True, advanced=True,
                               tooltip="Which layers; auto goes by the tensors."),
                io.Int.Input("keep_first_last", default=-1, min=-1, max=64, optional=True, advanced=True,
                             tooltip="Blocks kept at either end; -1: as the recipe."),
                io.String.Input(
                    "keep", default="", multiline=True, optional=True, advanced=True,
                    tooltip="Regular expressions, one a line: layers whose names they match are kept.",
                ),
                io.Boolean.Input(
                    "keep_non_finite", default=False, optional=True, advanced=True,
                    tooltip="Keep layers with NaN or infinity instead of refusing the file.",
                ),
                io.Combo.Input(
                    "config_from", options=[SAME_FILE, *file_names(ALL_FOLDERS)], default=SAME_FILE, optional=True,
                    tooltip="A file of the same model version, whose `config` is used.", advanced=True,
                ),
                io.Combo.Input("calibration", options=[NO_CALIBRATION, *file_names(ALL_FOLDERS)],
                               default=NO_CALIBRATION, optional=True, advanced=True,
                               tooltip="What the inputs of this model's layers are like: a calibration file."),
                io.Combo.Input("lora", options=[NO_LORA, *file_names(LORA_FOLDERS)], default=NO_LORA, optional=True,
                               tooltip="A LoRA to fold into the weights before they are packed."),
                io.Float.Input("lora_strength", default=1, min=-20, max=20, step=0.01, optional=True,
                               tooltip="Of that LoRA."),
                io.String.Input("more_loras", default="", multiline=True, optional=True, advanced=True,
                                tooltip="Further LoRAs to fold in, one a line: name of the file = strength."),
                io.String.Input("budget", default="", optional=True, advanced=True,
                                tooltip=f"With a calibration: {', '.join(PRESETS)}, or a size such as 20GB, spent on "
                                "layers whose outputs gain most; empty: none."),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The new file, below the output folder."),
                io.String.Output("report", display_name="report", tooltip="What was written, or would be."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["convert to nvfp4", "shrink model", "quantise"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(
        cls, file_name, config_from=SAME_FILE, calibration=NO_CALIBRATION, lora=NO_LORA, lora_strength=1.0,
        more_loras="", **options,
    ) -> str:  # fmt: skip
        names = file_name, config_from, SAME_FILE if calibration == NO_CALIBRATION else calibration
        loras = files.lora_states(lora, lora_strength, more_loras)
        return fingerprint(names, ALL_FOLDERS, sorted(options.items()), loras)

    @classmethod
    def execute(
        cls, file_name, contents, quality, protect_audio, protect_cross_attention, estimate_only, name, overwrite,
        recipe=AUTO, keep_first_last=-1, keep="", keep_non_finite=False, config_from=SAME_FILE,
        calibration=NO_CALIBRATION, lora=NO_LORA, lora_strength=1.0, more_loras="", budget="",
    ) -> io.NodeOutput:  # fmt: skip
        edges = None if keep_first_last < 0 else keep_first_last
        options = Options(protect_audio, protect_cross_attention, edges, tuple(keep.split()))
        statistics = None if calibration == NO_CALIBRATION else file_path(calibration, ALL_FOLDERS)
        settings = QuantizeSettings(
            recipe, options, contents == MODEL_ONLY, QUALITIES[quality], keep_non_finite, statistics,
            config_from=files.optional_path(config_from, ALL_FOLDERS),
            loras=files.lora_paths(lora, lora_strength, more_loras), budget=budget.strip(),
        )  # fmt: skip
        part = DIFFUSION_MODEL if settings.only_model else REST
        target = files.output_nvfp4(file_name, name, part)
        source, device = file_path(file_name, ALL_FOLDERS), files.restore_device()
        if estimate_only:
            text = text_of(estimate(source, target, settings, device=device))
            return io.NodeOutput(target, text, ui=show(cls, text))
        record = quantize_checkpoint(
            source, target, settings, base=files.output_folder(), overwrite=overwrite, device=device,
            on_step=telling(cls, files.progress()),
        )  # fmt: skip
        tell_files()
        return io.NodeOutput(target, text_of(record), ui=show(cls, text_of(record)))
