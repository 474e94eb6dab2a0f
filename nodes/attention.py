# SPDX-License-Identifier: Apache-2.0
"""Node that chooses how a model's attention is computed."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..host.compute.attention import AUTO, BY_COMPUTE, choices, use_attention


class NVFP4Attention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Attention",
            display_name="NVFP4 Attention",
            category="NVFP4",
            description="Computes a model's attention with the kernel that a trial on this GPU finds fastest, or with "
            "the one that you choose. For models of any loader; NVFP4 Model Loader has the same choice built in.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose attention is chosen; it is not changed itself."),
                io.Combo.Input(
                    "attention",
                    options=[name for name in choices() if name != BY_COMPUTE],
                    default=AUTO,
                    tooltip="auto: torch's kernels are compared and timed on the model's own shapes in the first step, "
                    "and the fastest accurate one is kept for each shape. host: ComfyUI's own. sdpa and the others: "
                    "that one, and ComfyUI's own where it cannot run.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with that attention."),
                io.String.Output("report", display_name="report", tooltip="What to expect, and trials already made."),
            ],
            search_aliases=["attention", "cudnn", "sdpa", "sage", "faster"],
        )

    @classmethod
    def execute(cls, model, attention) -> io.NodeOutput:
        patcher = model.clone()
        return io.NodeOutput(patcher, f"attention: {use_attention(patcher, attention)}")
