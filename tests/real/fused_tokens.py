# SPDX-License-Identifier: Apache-2.0
"""Gemma's blocks in few launches in a real ComfyUI on the CPU; a topic of text_encoder_child.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from nvfp4_video.host.compute import token_block, token_graphs
from nvfp4_video.tests.real import compiled_loop
from nvfp4_video.tests.support import token_twins


def fused(scene: Any, logits_of: Callable) -> dict:
    """By the plain torch that defines those launches: logits of every token, with and without a hook on a block."""
    if token_graphs._classes() is None:
        return {"unsupported": scene.ours("comfy")[1].decode}
    seen: list = []
    clip = scene.ours("comfy")[0]
    with compiled_loop.forced(token_graphs, clip.cond_stage_model.gemma3_12b.transformer.model):
        wanted = logits_of(scene, clip, seen)
    with token_twins.in_plain_torch(token_block) as runs:
        clip = scene.ours("comfy")[0]
        layers = clip.cond_stage_model.gemma3_12b.transformer.model.layers

        def ran() -> list[int]:
            found = [index for index, layer in enumerate(layers) if any(layer is one for one in runs)]
            runs.clear()
            return found

        with compiled_loop.forced(token_graphs, clip.cond_stage_model.gemma3_12b.transformer.model):
            found = logits_of(scene, clip, seen)
            without = ran()
            hook = layers[5].mlp.register_forward_hook(lambda *_: None)
            logits_of(scene, clip, seen)
            hook.remove()
    llama = importlib.import_module("comfy.text_encoders.llama")
    config = clip.cond_stage_model.gemma3_12b.transformer.model.config
    return {
        "tokens": seen[0] == seen[1] == seen[2],
        "largest": wanted.abs().max().item(),
        "difference": (wanted - found).abs().max().item(),
        "packed": [i for i, layer in enumerate(layers) if layer.mlp.up_proj.__dict__.get("nvfp4_mode")],
        "ran": without,
        "ran_with_a_hook": ran(),
        "obstacle": token_block.obstacle(llama, config, "auto", scene.torch.device("cpu")),
    }
