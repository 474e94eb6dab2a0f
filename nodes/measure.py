# SPDX-License-Identifier: Apache-2.0
"""Nodes that measure clips."""

from __future__ import annotations

import json

from comfy_api.v0_0_2 import io

from ..draw.compact import compact_comparison, compact_sharpness
from ..draw.compare import comparison_card, sharpness_plot
from ..host.files import progress
from ..host.show import show, to_image
from ..measure.compare import compare_clips
from ..measure.sharpness import measure_sharpness


class NVFP4Sharpness(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Sharpness",
            display_name="NVFP4 Sharpness",
            category="NVFP4",
            description="Sharpness of a clip, frame by frame: the variance of the Laplacian on 8-bit grey, as OpenCV "
            "computes it. Warns when the clip looks like a preview decode, is noise, black or frozen, and passes the "
            "images through.",
            inputs=[
                io.Image.Input("images", tooltip="The clip to measure."),
                io.Float.Input(
                    "reference",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    optional=True,
                    tooltip="The median of a clip of the same scene and size that is known to be good; a warning comes "
                    "below half of it. 0: judge the clip by its own fine detail, which is less certain.",
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The clip, unchanged."),
                io.Float.Output("median", display_name="median", tooltip="The median of the frames' sharpness."),
                io.String.Output("text", display_name="text", tooltip="The verdict and its reason."),
                io.Image.Output("plot", display_name="plot", tooltip="Sharpness frame by frame."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["laplacian", "blur detection", "vae quality"],
        )

    @classmethod
    def execute(cls, images, reference=0.0) -> io.NodeOutput:
        on_step = progress()
        found = measure_sharpness(images, reference or None, lambda done: on_step(done, len(images)))
        plot = to_image(sharpness_plot(found))
        shown = show(cls, found.text, to_image(compact_sharpness(found)), plot)
        return io.NodeOutput(images, found.median, found.text, plot, ui=shown)


class NVFP4Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Compare",
            display_name="NVFP4 Compare Clips",
            category="NVFP4",
            description="Two clips of the same seed: whether they show the same, which frames do not, and in numbers "
            "PSNR, SSIM, sharpness, flicker, and for sound level, spectral distance and sync. A is the one to trust, "
            "B the one under test.",
            inputs=[
                io.Image.Input("images_a", tooltip="The clip to trust."),
                io.Image.Input("images_b", tooltip="The clip under test."),
                io.Audio.Input("audio_a", optional=True, tooltip="The sound of the clip to trust."),
                io.Audio.Input("audio_b", optional=True, tooltip="The sound of the clip under test."),
                io.Boolean.Input(
                    "common_prefix",
                    default=False,
                    tooltip="Clips of different length: compare the frames that both have.",
                ),
            ],
            outputs=[
                io.Image.Output("card", display_name="card", tooltip="Numbers, difference, crops and curves."),
                io.String.Output("text", display_name="text", tooltip="The findings in words."),
                io.String.Output("json", display_name="json", tooltip="All numbers, for scripts."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["psnr", "ssim", "difference", "a/b test"],
        )

    @classmethod
    def execute(cls, images_a, images_b, common_prefix, audio_a=None, audio_b=None) -> io.NodeOutput:
        found = compare_clips(images_a, images_b, audio_a, audio_b, common_prefix=common_prefix, on_frame=progress())
        card = to_image(comparison_card(found, images_a, images_b))
        shown = show(cls, found.text, to_image(compact_comparison(found, images_a, images_b)), card)
        return io.NodeOutput(card, found.text, json.dumps(found.to_dict()), ui=shown)
