# SPDX-License-Identifier: Apache-2.0
"""Nodes that plan a render: settings a distilled model can make, and what a model needs on a GPU."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..draw.compact import compact_plan
from ..draw.planner import roofline_picture
from ..host.files import file_names, file_path, fingerprint
from ..host.planning import distilled, plan_rendering
from ..host.show import show, to_image
from ..measure.gpus import DETECTED, GPUS
from ..measure.ltx import VERSIONS
from ..measure.roofline import MODES, Clip
from ..measure.settings import AS_SET, CARDS, STAGES

FOLDERS = ("diffusion_models", "checkpoints")
_SIZE = {"min": 64, "max": 8192, "step": 1}
STAGES_TOOLTIP = "two stages: sample at half the size, upscale the latent, refine in 3 steps."
CARD_TOOLTIP = "Size and length that a GPU of this memory samples within two minutes, by the planner."
_FPS = {"default": 24.0, "min": 1.0, "max": 120.0, "step": 0.001}


class NVFP4DistilledSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4DistilledSettings",
            display_name="NVFP4 Distilled Settings",
            category="NVFP4",
            description="All numbers of a distilled LTX-2.x render from one place: size, frames and fps moved to what "
            "the model can make, the audio length, the sigmas of both stages, cfg 1. The text says what was changed.",
            inputs=[
                io.Int.Input("width", default=768, tooltip="Width of the finished clip in pixels.", **_SIZE),
                io.Int.Input("height", default=512, tooltip="Height of the finished clip in pixels.", **_SIZE),
                io.Int.Input("frames", default=121, min=1, max=8193, step=1, tooltip="Becomes the nearest 8k + 1."),
                io.Float.Input(
                    "seconds", default=0.0, min=0.0, max=600.0, step=0.01,
                    tooltip="Above 0: this length decides instead of frames.",
                ),
                io.Float.Input("fps", tooltip="Frames per second, the same in all three nodes.", **_FPS),
                io.Combo.Input("stages", options=list(STAGES), default=STAGES[0], tooltip=STAGES_TOOLTIP),
                io.Combo.Input("version", options=list(VERSIONS), default=VERSIONS[0], tooltip="Version of the model."),
                io.Combo.Input("card", options=[AS_SET, *CARDS], default=AS_SET, optional=True, tooltip=CARD_TOOLTIP),
            ],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="For the first stage's empty latent."),
                io.Int.Output("height", display_name="height", tooltip="For the first stage's empty latent."),
                io.Int.Output("frames", display_name="frames", tooltip="8k + 1, for both empty latents."),
                io.Float.Output("fps", display_name="fps", tooltip="For conditioning, audio latent and video."),
                io.Int.Output("frame_rate", display_name="frame_rate (whole)", tooltip="For inputs that take INT."),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Of the first stage, 8 steps."),
                io.Sigmas.Output("sigmas_stage_2", display_name="sigmas stage 2", tooltip="Of the second, 3 steps."),
                io.Float.Output("cfg", display_name="cfg", tooltip="1, for the guider."),
                io.Int.Output("audio_latents", display_name="audio latents", tooltip="How many the sound needs."),
                io.Int.Output("final_width", display_name="final width", tooltip="Of the finished clip."),
                io.Int.Output("final_height", display_name="final height", tooltip="Of the finished clip."),
                io.String.Output("text", display_name="text", tooltip="The numbers, and what was changed."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["8 steps", "manual sigmas", "8k+1", "frames*4-3"],
        )  # fmt: skip

    @classmethod
    def execute(cls, **wishes) -> io.NodeOutput:
        found, first, second = distilled(**wishes)
        return io.NodeOutput(
            found.width, found.height, found.frames, found.fps, found.frame_rate, first, second, found.cfg,
            found.audio_latents, found.final_width, found.final_height, str(found), ui=show(cls, str(found)),
        )  # fmt: skip


class NVFP4Planner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Planner",
            display_name="NVFP4 Planner",
            category="NVFP4",
            description="Whether a model fits this GPU, or one you think of buying, what bounds a step there, and what "
            "NVFP4 therefore changes: size, speed, or both. Reads only the header.",
            inputs=[
                io.Combo.Input("file_name", options=file_names(FOLDERS), tooltip="A checkpoint or a diffusion model."),
                io.Int.Input("width", default=768, tooltip="Of the clip, in pixels.", **_SIZE),
                io.Int.Input("height", default=512, tooltip="Of the clip, in pixels.", **_SIZE),
                io.Int.Input("frames", default=121, min=1, max=8193, step=1, tooltip="Of the clip."),
                io.Float.Input("fps", tooltip="Frames per second; with frames, the length of the sound.", **_FPS),
                io.Combo.Input("gpu", options=[DETECTED, *GPUS], default=DETECTED, tooltip="detected: this machine's."),
                io.Combo.Input("compute", options=list(MODES), default=MODES[0], tooltip="How NVFP4 is multiplied."),
                io.Float.Input(
                    "text_encoder_gb", default=0.0, min=0.0, max=200.0, step=0.1, optional=True, advanced=True,
                    tooltip="Size of the text encoder's file. 0: 9 GB, that of gemma_3_12B_it_fp4_mixed.",
                ),
                io.Float.Input(
                    "memory_gib", default=0.0, min=0.0, max=1024.0, step=1.0, optional=True,
                    tooltip="GPU memory in GiB, as on the box, if the card is not in the list. 0: the card's own.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="What the node shows."),
                io.Image.Output("picture", display_name="picture", tooltip="Roofline, times, memory by phase."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["roofline", "vram calculator", "will it fit", "gpu memory"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file_name, **options) -> str:
        return fingerprint((file_name,), FOLDERS, sorted(options.items()))

    @classmethod
    def execute(cls, file_name, width, height, frames, fps, gpu, compute, **sizes) -> io.NodeOutput:
        clip = Clip(width, height, frames, fps)
        plan = plan_rendering(file_path(file_name, FOLDERS), clip, gpu, compute, **sizes)
        picture = to_image(roofline_picture(plan))
        return io.NodeOutput(str(plan), picture, ui=show(cls, str(plan), to_image(compact_plan(plan)), picture))
