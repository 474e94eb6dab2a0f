# SPDX-License-Identifier: Apache-2.0
"""Compute modes in a real ComfyUI: whole models sampled in each, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import compute_in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What compute_in_process.py found."""
    folder = str(tmp_path_factory.mktemp("compute"))
    facts = facts_in_host(Path(compute_in_process.__file__), folder, mark=compute_in_process.MARK, timeout=400)
    if facts["ltx"] is None:
        pytest.skip(f"ComfyUI {facts['version']} builds the embeddings connectors in their released size only")
    if facts["ltx"] == "ltx20":
        pytest.skip(f"ComfyUI {facts['version']} builds the small LTX-2 only, whose few blocks all stay weight-only")
    assert "failed" not in facts["compute"], facts["compute"]["failed"]
    return facts["compute"]


def test_every_mode_gives_finite_latents(found: dict):
    assert found["finite"] and all(found["finite"].values())


def test_fp8_latents_are_near_the_weight_only_ones_and_not_the_same(found: dict):
    assert found["error"]["bf16"] == 0
    assert 0 < found["error"]["fp8"] < 0.05
    assert 0 < found["error"]["fp8 with to_out kept"] < 0.05
    assert 0 < found["error"]["int8"] < found["error"]["fp8"], "the small model's activations have no outliers"


def test_fp8_layers_compute_in_fp8_and_no_other_layer_does(found: dict):
    modes, calls = found["modes"], found["calls"]
    assert modes["bf16"].keys() == {"bf16"} and calls["bf16"]["fp8"] == calls["bf16"]["int8"] == 0
    assert modes["fp8"]["fp8"] > 0 and modes["fp8"]["bf16"] > 0, "sensitive layers stay"
    assert calls["fp8"]["fp8"] > 0 and calls["fp8"]["host"] == 0
    assert modes["int8"]["int8"] == modes["fp8"]["fp8"] and calls["int8"]["int8"] == calls["fp8"]["fp8"]
    assert calls["int8"]["fp8"] == calls["int8"]["host"] == 0
    assert modes["fp8 with to_out kept"]["fp8"] < modes["fp8"]["fp8"]
    assert 0 < calls["fp8 with to_out kept"]["fp8"] < calls["fp8"]["fp8"]


def test_fp4_layers_go_to_the_host_s_forward_and_auto_picks_the_fastest(found: dict):
    modes, calls = found["modes"], found["calls"]
    assert modes["fp4"]["fp4"] == modes["fp8"]["fp8"]
    assert calls["fp4"]["host"] > 0 and calls["fp4"]["fp8"] == 0
    assert modes["auto"] == modes["fp4"]


def test_a_lora_changes_the_output_of_an_fp8_model_and_taking_it_off_restores_it(found: dict):
    assert found["changed by lora"] > 0
    assert found["restored"]


def test_blocks_replaced_by_graphs_give_the_same_latents_and_are_freed_after_sampling(found: dict):
    graphs = found["graphs"]
    blocks = graphs["blocks"]
    assert graphs["equal"] and graphs["again"]
    assert graphs["first"] == {"captured": blocks, "replayed": 5 * blocks}, "steps four to eight"
    assert graphs["second"] == {"captured": 2 * blocks, "replayed": 13 * blocks}, "the second sampling knows"
    assert graphs["left"] == 0
    assert graphs["without"], "the wrapper is what does it"


def test_fp8_layers_share_what_they_can(found: dict):
    graphs = found["graphs"]
    assert graphs["feed-forward"] > 0
    assert graphs["sharing"] > 0 and set(graphs["places"]) == {graphs["sharing"]}


def test_a_fused_model_gives_the_latents_of_the_host_s_own_classes_but_for_rounding(found: dict):
    fused = found["fused"]
    assert 0 < fused["error"] < 0.005
    assert all(fused["calls"].values()), "every kind of pass runs, also with rows in FP8"
    assert fused["embedding known"], "its frequencies are kept"
