# SPDX-License-Identifier: Apache-2.0
"""What the guard computes of a prompt is what a real ComfyUI's own nodes make; run once, in the host's Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def facts() -> dict:
    """What values_in_process.py found."""
    found = facts_in_host(Path(__file__).with_name("values_in_process.py"), mark=in_process.MARK, timeout=600)
    if "schedules" not in found:
        pytest.skip(f"ComfyUI {found['version']} has only {found['has']} of the nodes in question")
    return found


def test_expressions_come_to_what_the_host_s_evaluator_makes_of_them(facts: dict):
    for text, theirs, ours in facts["expressions"]:
        assert ours == pytest.approx(theirs), text


def test_pictures_are_as_large_as_the_host_s_nodes_make_them(facts: dict):
    assert len(facts["pictures"]) > 60
    assert [case for case in facts["pictures"] if case[2] != case[3]] == []


def test_empty_latents_hold_what_the_host_allocates(facts: dict):
    assert [case for case in facts["latents"] if case[1] != case[2]] == []


def test_schedules_are_the_host_s_and_linear_quadratic_is_the_trained_one(facts: dict):
    found = facts["schedules"]
    assert found["whole"] < 1e-6 and found["part"] < 1e-6
    assert found["simple"] > 0.01 and found["discarded"] == 9
    assert found["ltxv"] < 1e-5
    assert found["karras"][0] == found["karras"][1]


def test_every_scheduler_makes_what_the_host_s_own_node_makes(facts: dict):
    assert len(facts["schedulers"]) >= 5
    assert [case for case in facts["schedulers"] if case[1] != case[2]] == []


def test_truths_and_texts_are_what_the_host_s_nodes_make(facts: dict):
    assert [case for case in facts["plain"] if case[1] != [found for found in case[2] if found is not None]] == []
