# SPDX-License-Identifier: Apache-2.0
"""The Gemma text encoder in a real ComfyUI: conditioning and written tokens are those of the dequantised weights.

text_encoder_child.py gathers the facts in the host's own Python, once for all tests of this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import small_gemma, text_encoder_child
from nvfp4_video.tests.real.harness import ComfyUI, facts_in_host


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what text_encoder_child.py found."""
    folder = tmp_path_factory.mktemp("text_encoder")
    return facts_in_host(Path(text_encoder_child.__file__), str(folder), mark=text_encoder_child.MARK, timeout=900)


def facts_of(all_facts: dict, topic: str) -> dict:
    if all_facts["unbuildable"]:
        pytest.skip(f"ComfyUI {all_facts['version']} builds LTX's text encoder in its released size only")
    if topic in ("generation", "windowed", "fused", "enhancer") and all_facts["generates"]:
        pytest.skip(f"LTX's text encoder writes no text in ComfyUI {all_facts['version']}: {all_facts['generates']}")
    found = all_facts[topic]
    assert "error" not in found, found["error"]
    if "unsupported" in found:
        pytest.skip(f"ComfyUI {all_facts['version']}: {found['unsupported']}")
    return found


@pytest.mark.parametrize("name", ["comfy dual", "modelopt dual", "comfy single", "modelopt single"])
def test_conditioning_equals_that_of_the_dequantised_weights_bit_for_bit(all_facts: dict, name: str):
    found = facts_of(all_facts, "conditioning").get(name)
    if found is None:
        pytest.skip(f"ComfyUI {all_facts['version']} does not know the projection of LTX-2.3")
    assert found["varied"], "conditioning without contrast could hide a difference"
    assert found["width"] and found["equal"]
    assert f"{name.split()[0]}.safetensors: Gemma 3 12B" in found["report"]
    assert "322 nvfp4, " in found["report"]


def test_the_token_loop_writes_the_tokens_of_the_dequantised_weights(all_facts: dict):
    found = facts_of(all_facts, "generation")
    assert found["count"] > 20 and found["kinds"] > 3
    assert found["comfy"] and found["modelopt"] and found["again"] and found["without_graphs"]
    assert found["calls_of_host_s_forward"]["nvfp4"] == 0
    assert found["calls_of_host_s_forward"]["plain"] > 0


def test_the_decode_made_for_graphs_gives_the_host_s_logits_beyond_the_sliding_window(all_facts: dict):
    found = facts_of(all_facts, "windowed")
    assert found["beyond_window"] and found["tokens"]
    assert found["difference"] < 1e-4 * found["largest"]
    assert found["kinds"] == [True] and found["shared"] == 2
    assert found["units"] == small_gemma.BLOCKS
    assert found["disagreement"] == ""


def test_the_compiler_s_branch_of_the_token_loop_is_taken_with_both_rotations_in_one_buffer(all_facts: dict):
    found = facts_of(all_facts, "windowed")
    if not found["compiler"]:
        pytest.skip(f"ComfyUI {all_facts['version']} has no compiler")
    begun, ended, tokens = found["scopes"]
    assert begun == ended == tokens > 20
    assert found["rotations"] == [[2, 1, 1, 1, small_gemma.HEAD_DIM // 2, 2, 2]]


def test_blocks_in_few_launches_give_the_host_s_logits_and_leave_hooked_and_plain_blocks_to_the_host(all_facts: dict):
    found = facts_of(all_facts, "fused")
    assert found["obstacle"] == "nothing here multiplies packed weights by one row"  # so the block is one that is known
    assert found["tokens"]
    assert found["difference"] < 1e-4 * found["largest"]
    assert found["ran"] == found["packed"] == list(range(1, small_gemma.BLOCKS - 1))
    assert found["ran_with_a_hook"] == [block for block in found["packed"] if block != 5]


def test_where_nothing_can_be_captured_the_host_keeps_its_own_cache(all_facts: dict):
    found = facts_of(all_facts, "windowed")
    assert found["host_caches"] == [True, True]
    assert "graphs need an NVIDIA GPU" in found["report"]


def test_a_file_without_the_vision_tower_encodes_the_same_and_warns(all_facts: dict):
    found = all_facts.get("text_only", {})
    if "error" in found and "update ComfyUI" in found["error"]:
        pytest.skip(f"ComfyUI {all_facts['version']} builds no such model, and the loader says so")
    found = facts_of(all_facts, "text_only")
    assert found["equal"]
    assert found["warnings"] == ["it has no vision tower: the prompt enhancer cannot look at an image"]


def test_a_clone_can_load_its_own_weights_and_a_patch_comes_off_without_a_trace(all_facts: dict):
    assert all(facts_of(all_facts, "clones").values())


def test_a_lora_is_computed_beside_the_packed_weights_and_comes_off_without_a_trace(all_facts: dict):
    found = facts_of(all_facts, "lora")
    assert found["taken"] and found["branches"] == found["packed"]
    assert found["missed"] < 0.02, "of what the LoRA changes"
    assert found["restored"]


def test_a_quantised_token_embedding_keeps_its_values_and_becomes_bf16_where_the_host_needs_it(all_facts: dict):
    found = facts_of(all_facts, "embedding")
    assert found["nvfp4"]["equal"] and not found["nvfp4"]["packed"]
    assert "token embedding was NVFP4" in found["nvfp4"]["warnings"][0]
    assert found["fp8"]["equal"]
    assert found["fp8"]["packed"] == (found["fp8"]["warnings"] == [])


def test_the_host_s_prompt_enhancer_writes_the_same_text_with_either_loader(all_facts: dict):
    found = facts_of(all_facts, "enhancer")
    assert found["equal"]
    assert len(set(found["text"])) > 5


def test_the_host_shows_the_loader(host: ComfyUI):
    shown = host.object_info("NVFP4TextEncoderLoader")
    assert shown["output"] == ["CLIP", "STRING"]
    assert list(shown["input"]["required"]) == ["text_encoder", "projection"]
