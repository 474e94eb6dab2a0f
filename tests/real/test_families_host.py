# SPDX-License-Identifier: Apache-2.0
"""The check of built models, on the models that a real ComfyUI builds: whole ones load, of every family that is known.

families_in_process.py gathers the facts in the host's own Python, once for all tests of this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import families_in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def all_facts() -> dict:
    """Family or topic -> what families_in_process.py found."""
    return facts_in_host(Path(families_in_process.__file__), mark=families_in_process.MARK, timeout=600)


def of(all_facts: dict, topic: str) -> dict:
    facts = all_facts[topic]
    assert "failed" not in facts, facts["failed"]
    if facts.get("unknown"):
        pytest.skip(f"ComfyUI {all_facts['version']} does not know {topic}")
    return facts


@pytest.mark.parametrize("family", families_in_process.FAMILIES)
def test_a_whole_model_of_any_family_loads_and_one_without_a_norm_in_a_block_does_not(all_facts: dict, family: str):
    found = of(all_facts, family)
    assert found["lacks"] == "" and found["parameters"] > 20
    assert found["refused"] in (True, None), "the layer that lacks a parameter is named"


def test_most_families_have_a_parameter_in_a_block_that_can_be_lacking(all_facts: dict):
    refused = [name for name in families_in_process.FAMILIES if all_facts[name].get("refused")]
    assert len(refused) > len(families_in_process.FAMILIES) // 2


def test_what_no_file_has_may_be_built_if_it_is_not_used(all_facts: dict):
    found = of(all_facts, "not used")
    assert found["lacks"].startswith("nothing of norm_final, ") and "no table, " in found["lacks"]
    assert found["finite"]


def test_a_norm_that_the_file_lacks_and_the_model_uses_is_an_error_that_names_it(all_facts: dict):
    found = of(all_facts, "used")
    assert "flux.safetensors, layer norm_final: the model needs it" in found["error"]
