# SPDX-License-Identifier: Apache-2.0
"""LoRA in a real ComfyUI, on the CPU: what a branch beside the packed weight gives, and what stays the host's."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import lora_in_process
from nvfp4_video.tests.real.harness import facts_in_host

BF16 = 0.004  # roundings of the output, of x A^T and of the adapters
PACKED = 12  # layers that the LoRAs change and that are NVFP4; one more is BF16


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what lora_in_process.py found."""
    folder = str(tmp_path_factory.mktemp("lora"))
    facts = facts_in_host(Path(lora_in_process.__file__), folder, mark=lora_in_process.MARK, timeout=600)
    if facts["ltx"] != "ltx23":
        pytest.skip(f"ComfyUI {facts['version']} does not build the small LTX-2.3")
    return facts


def of(all_facts: dict, topic: str) -> dict:
    facts = all_facts[topic]
    assert "failed" not in facts, facts["failed"]
    return facts


def test_layers_are_off_by_rounding_only_where_the_host_packs_the_sum_again(all_facts: dict):
    layers = of(all_facts, "errors")["layers"]
    assert layers["ours"]["branches"] == PACKED
    assert max(layers["ours"]["bf16_decoded"] + layers["ours"]["many tokens"]) < BF16
    assert min(layers["stock"]["bf16_decoded"][1:]) > 0.1
    # Against the unquantised model both have what packing once costs.
    for ours, stock in zip(layers["ours"]["bf16"][1:], layers["stock"]["bf16"][1:], strict=True):
        assert ours < 0.7 * stock


def test_latents_are_those_of_a_lora_merged_into_the_decoded_weights(all_facts: dict):
    latents = of(all_facts, "errors")["latents"]
    assert latents["ours"]["bf16_decoded"] < 0.01
    assert latents["stock"]["bf16_decoded"] > 0.2
    assert latents["ours"]["bf16"] < latents["stock"]["bf16"]


def test_unloading_the_model_drops_the_branches(all_facts: dict):
    assert of(all_facts, "errors")["layers"]["ours"]["branches left"] == 0


def test_loras_of_any_strength_add_up(all_facts: dict):
    errors = of(all_facts, "strengths")["errors"]
    assert len(errors) == 6
    assert all(error < BF16 for error in errors.values()), errors


def test_another_strength_leaves_the_adapters_where_they_are(all_facts: dict):
    assert of(all_facts, "strengths")["another strength moves nothing"]


def test_strength_0_and_taking_a_lora_off_give_the_bits_of_no_lora(all_facts: dict):
    found = of(all_facts, "strengths")
    assert found["zero"] and found["removed"]
    assert found["differs"] and found["put back"]


def test_a_branch_keeps_its_addresses_while_the_patches_stay(all_facts: dict):
    assert of(all_facts, "strengths")["addresses stay"]


def test_a_lora_of_one_conditioning_does_what_it_does_on_the_model(all_facts: dict):
    found = of(all_facts, "hooks")
    assert found["against the constant one"] < 0.01
    assert found["on top of another"] < 0.01


def test_a_hook_leaves_no_trace_and_none_at_strength_0(all_facts: dict):
    found = of(all_facts, "hooks")
    assert found["restored"] and found["keyframe of strength 0"] and found["constant one again"]


def test_a_saved_model_holds_the_lora_as_the_host_packs_it(all_facts: dict):
    found = of(all_facts, "saving")
    assert found["changed"] == found["layers"]
    assert found["equal"] and found["equal from offloaded layers"]
    assert found["samples as before"], "saving must not change the loaded model"


def test_offloaded_layers_have_branches_and_only_the_bf16_layer_waits_for_the_host(all_facts: dict):
    found = of(all_facts, "partial")
    for name in ("low VRAM", "unloaded"):
        assert max(found[name]) < BF16, name
        assert found[f"{name}, waiting"] == 1, name
    assert found["left"] == 0


def test_dynamic_vram_s_patcher_leaves_no_patch_for_a_layer_with_a_branch(all_facts: dict):
    found = of(all_facts, "dynamic")
    for name in ("one", "two"):
        # The host loads and patches layers of under 16 KiB itself, at once.
        assert found[name]["branches"] > 0
        assert found[name]["branches"] + found[name]["small"] == PACKED, name
        assert found[name]["waiting"] == 0
        assert max(found[name]["errors"]) < BF16
    assert found["none"]["branches"] == 0


def test_a_dora_and_a_lokr_go_the_host_s_way_with_the_host_s_result(all_facts: dict):
    found = of(all_facts, "refused")
    assert found["lokr"] == {"reason": "it is a lokr, no LoRA", "branch": False, "equal": True}
    assert found["dora"] == {"reason": "it is a DoRA", "branch": False, "equal": True}


def test_torch_compile_sees_one_graph_with_few_and_many_rows(all_facts: dict):
    found = of(all_facts, "compiling")
    assert found["branch"]
    assert found["graphs"] == [[1, 0], [1, 0]]
    assert max(*found["difference"], found["latents"]) < 1e-5


def test_in_fp8_mode_a_lora_does_what_it_does_to_merged_weights(all_facts: dict):
    found = of(all_facts, "fp8")
    assert found["layers"] > 0
    # FP8 has an error of its own; the LoRA does not add to it.
    assert found["patched"] < 1.5 * found["plain"]
    assert found["effect"] < 0.2
