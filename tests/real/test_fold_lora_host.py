# SPDX-License-Identifier: Apache-2.0
"""LoRAs folded in before packing, held against what a real ComfyUI makes of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import fold_lora_in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what fold_lora_in_process.py found."""
    script = Path(fold_lora_in_process.__file__)
    found = facts_in_host(script, str(tmp_path_factory.mktemp("fold")), mark=fold_lora_in_process.MARK, timeout=600)
    if found["ltx"] is None:
        pytest.skip(f"ComfyUI {found['version']} does not build the small LTX")
    return found


def of(facts: dict, topic: str) -> dict:
    assert "failed" not in facts[topic], facts[topic]["failed"]
    return facts[topic]


def test_every_tensor_is_changed_as_comfyui_changes_it(facts: dict):
    found = of(facts, "sums")
    assert found["same"] and found["tensors"] > 100
    assert found["worst"] < 1e-6 and found["least change"] > 1e-3


def test_the_file_is_source_and_loras_within_what_its_format_costs(facts: dict):
    found = of(facts, "end_to_end")
    assert found["ok"], found["report"]
    assert found["layers"] > 10 and found["worst"] < 0.1
    # Latents of stock's loader and of ours are the same, and move with the LoRAs as those of ComfyUI's LoRA do.
    assert found["finite"] and found["equal"] and found["folded"] < 0.5, found


def test_a_file_of_nvfp4_fp8_and_bf16_by_calibration_and_budget_loads_and_samples_alike_in_both(facts: dict):
    found = of(facts, "mixed")
    assert found["same"], "collecting must not change what is sampled"
    assert found["ok"], found["report"]
    assert found["layers"] and found["fp8"] and found["nbytes"] <= 1.1 * found["smallest"]
    assert found["gptq"]["taken"] + found["gptq"]["worse"] + found["gptq"]["unseen"] == found["layers"]
    assert found["apart"] < 0.1 * found["stock"] and found["ours"] < 0.2, found
