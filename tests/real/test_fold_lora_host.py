# SPDX-License-Identifier: Apache-2.0
"""LoRAs folded in before packing, held against what a real ComfyUI makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.tests.real import fold_lora_in_process
from nvfp4_video.tests.real.harness import run_in_host


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what fold_lora_in_process.py found."""
    script = Path(fold_lora_in_process.__file__)
    result = run_in_host(script, str(tmp_path_factory.mktemp("fold")), timeout=600)
    lines = [line for line in result.stdout.splitlines() if line.startswith(fold_lora_in_process.MARK)]
    assert lines, f"the host's Python ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    found = json.loads(lines[-1].removeprefix(fold_lora_in_process.MARK))
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
