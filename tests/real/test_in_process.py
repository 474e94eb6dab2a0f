# SPDX-License-Identifier: Apache-2.0
"""The pack inside a real ComfyUI process: memory, torch.compile, reloading, saving, low VRAM, another family.

in_process.py gathers the facts in the host's own Python, once for all tests of this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what in_process.py found."""
    folder = str(tmp_path_factory.mktemp("in_process"))
    return facts_in_host(Path(in_process.__file__), folder, mark=in_process.MARK, timeout=600)


def facts_of(all_facts: dict, topic: str) -> dict:
    if topic not in all_facts:
        pytest.skip(f"ComfyUI {all_facts['version']} builds the embeddings connectors in their released size only")
    found = all_facts[topic]
    assert "failed" not in found, found["failed"]
    return found


def test_latents_are_those_of_the_decoded_weights_and_no_packed_layer_takes_the_host_s_forward(all_facts: dict):
    found = facts_of(all_facts, "equality")
    assert found["finite"]
    assert found["comfy_markers"] and found["modelopt"] and found["again"]
    assert found["calls_of_host_s_forward"]["nvfp4"] == 0
    assert found["calls_of_host_s_forward"]["plain"] > 0


def test_packed_weights_of_the_native_dialect_stay_in_the_mapped_file(all_facts: dict):
    found = facts_of(all_facts, "memory")
    assert found["packed"]["mapped"] > 0
    assert found["packed"]["copied"] == 0


def test_torch_compile_finds_no_reason_to_break_a_graph_in_the_pack(all_facts: dict):
    found = facts_of(all_facts, "compiling")
    assert found["linear"] == {"graphs": 1, "breaks": [], "equal": True}
    assert [reason for reason in found["block"]["breaks"] if reason["own"]] == []


def test_a_model_compiled_the_host_s_way_gives_the_latents_of_the_eager_one(all_facts: dict):
    found = facts_of(all_facts, "compiling")
    assert found["difference"] <= 1e-5 * found["largest"]
    assert found["eager_again"]


def test_every_kind_of_clone_can_load_the_model_again(all_facts: dict):
    found = facts_of(all_facts, "reloading")
    layers = found.pop("layers")
    assert {"factory"} <= found.keys()
    for name, clone in found.items():
        assert clone["equal"], f"{name} gives other latents"
        assert clone["packed"] == layers, f"{name} does not keep the weights packed"
        # On a CPU there is no DynamicVRAM to leave, so a clone without it shares the weights.
        assert clone["own_weights"] == (name != "disable_dynamic"), name


def test_a_saved_model_is_read_back_by_the_pack_and_by_the_host(all_facts: dict):
    found = facts_of(all_facts, "saving")
    assert "config" not in found["header"]
    assert "`config`" in found["refusal"] and "config_from" in found["refusal"]
    for reader in ("ours", "stock"):
        assert found[reader] == {"weights": True, "packed": found["layers"], "latents": True}, reader


def test_layers_left_offloaded_compute_exactly_also_with_a_lora(all_facts: dict):
    found = facts_of(all_facts, "low_vram")
    for name in ("plain", "lora"):
        assert found[name]["low_vram"], "the budget was meant to be too small"
        assert found[name]["error"] < 0.01, name
        assert found[name]["waiting"] == 0, "the host would patch the weight in every step"
    assert found["plain"]["equal_stock"] == found["layers"]


def test_a_flux_whose_first_layers_are_packed_is_detected_by_its_logical_shapes(all_facts: dict):
    found = facts_of(all_facts, "flux")
    assert found["class"] == "Flux"
    assert found["first_layers"]
    assert found["detected"] == found["expected"]


def test_a_flux_computes_what_the_host_computes_from_its_decoded_weights(all_facts: dict):
    found = facts_of(all_facts, "flux")
    assert found["packed"] == found["layers"] > 0
    assert found["finite"]
    assert found["equal"]
