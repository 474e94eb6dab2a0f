# SPDX-License-Identifier: Apache-2.0
"""Text encoders of several families in a real ComfyUI: hidden states and tokens are those of the dequantised weights.

encoders_child.py gathers the facts in the host's own Python, once for all tests of this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import encoders_child
from nvfp4_video.tests.real.harness import facts_in_host

FAMILIES = {
    "QWEN3_4B": 14,
    "QWEN25_7B": 14,
    "QWEN3VL_4B": 14,
    "GEMMA_2_2B": 14,
    "GEMMA_3_4B": 14,
    "LLAMA3_8": 14,
    "T5_XXL": 161,
    "GPT_OSS_20B": 138,
}


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what encoders_child.py found."""
    folder = tmp_path_factory.mktemp("encoders")
    return facts_in_host(Path(encoders_child.__file__), str(folder), mark=encoders_child.MARK, timeout=900)


def facts_of(all_facts: dict, topic: str) -> dict:
    found = all_facts[topic]
    if "unsupported" in found:
        pytest.skip(f"ComfyUI {all_facts['version']}: {found['unsupported']}")
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_of_a_family_equal_those_of_the_dequantised_weights(all_facts: dict, name: str):
    found = facts_of(all_facts, name)
    assert found["varied"], "states without contrast could hide a difference"
    assert found["equal"] and found["packed"] == FAMILIES[name]
    assert found["decoded_by_host"] == 0
    assert f"packed.safetensors: {name} for " in found["report"]
    assert not any("has not been tried" in text for text in found["warnings"])


@pytest.mark.parametrize("name", ["QWEN3_4B", "GEMMA_2_2B", "GEMMA_3_4B"])
def test_a_family_that_writes_writes_the_tokens_of_the_dequantised_weights(all_facts: dict, name: str):
    found = facts_of(all_facts, name)
    assert found["tokens"] == found["host_tokens"] and len(found["tokens"]) == 12
    # Small random Gemmas repeat themselves; Qwen3 has to show that other tokens would be seen.
    assert name != "QWEN3_4B" or len(set(found["tokens"])) > 2


def test_the_smoothing_of_nvfp4_awq_multiplies_the_input(all_facts: dict):
    found = facts_of(all_facts, "awq")
    assert found["equal"] and found["varied"]
    assert "dialect: modelopt (" in found["report"]


def test_a_text_encoder_in_shards_loads_as_the_whole_whichever_shard_is_named(all_facts: dict):
    found = facts_of(all_facts, "shards")
    assert [found[name]["equal"] for name in ("q-00001-of-00002", "q-00002-of-00002")] == [True, True]


def test_a_second_text_encoder_keeps_its_dtype_beside_the_packed_one(all_facts: dict):
    found = facts_of(all_facts, "pair")
    for inner in ("t5xxl", "clip_l"):
        assert found[inner]["equal"] and found[inner]["varied"]
    assert "second text encoder: CLIP_L from clip_l.safetensors, layers: " in found["report"]
    assert found["warnings"] == []


def test_a_file_that_is_no_whole_text_encoder_is_refused(all_facts: dict):
    found = facts_of(all_facts, "refused")
    assert "nothing for 1 parameters" in found["norm"] and "layers.1.input_layernorm.weight" in found["norm"]
    assert "layers.2.self_attn.q_proj: it has no `weight`" in found["block"]
    assert "layers.0.mlp.up_proj: its `weight` has shape (64, 2560); expected shape (128, 2560)" in found["size"]
    assert "ComfyUI does not recognise a text encoder in it" in found["other"]


def test_what_was_never_tried_and_what_has_no_place_is_said(all_facts: dict):
    found = facts_of(all_facts, "refused")
    assert found["untried"][0].startswith("QWEN3_4B has not been tried with this loader")
    assert found["extra"] == ["ComfyUI has no place for 1 of its tensors, such as model.layers.9.mlp.up_proj.weight"]
