# SPDX-License-Identifier: Apache-2.0
"""What LTX makes anew in every step, kept, against a real ComfyUI: the same bits, and no wait for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import positions_in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What positions_in_process.py found."""
    folder = str(tmp_path_factory.mktemp("positions"))
    facts = facts_in_host(Path(positions_in_process.__file__), folder, mark=positions_in_process.MARK, timeout=400)
    if facts["ltx"] is None:
        pytest.skip(f"ComfyUI {facts['version']} builds the embeddings connectors in their released size only")
    assert "failed" not in facts["positions"], facts["positions"]["failed"]
    return facts["positions"]


def test_every_call_gives_the_host_s_bits_whatever_came_before_it(found: dict):
    assert [name for name, call in found["calls"].items() if not call["equal"]] == []


def test_where_the_host_s_input_is_known_a_step_of_the_shape_before_waits_for_nothing(found: dict):
    if not found["known"]:
        pytest.skip("this ComfyUI takes latents in by other code")
    calls = found["calls"]
    for name in ("again", "large again", "hooked", "last"):
        assert calls[name]["waits"] == {} and calls[name]["host's"], name
    assert calls["mask of a frame"]["waits"].get("__bool__", 0) <= 1 < calls["mask of a frame"]["host's"]["__bool__"]


def test_coordinates_that_shapes_do_not_tell_are_compared(found: dict):
    for name in ("keyframe", "keyframe elsewhere", "audio"):
        assert found["calls"][name]["waits"].get("equal"), name
