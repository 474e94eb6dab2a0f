# SPDX-License-Identifier: Apache-2.0
"""What host/residency.py knows of a real ComfyUI is what that ComfyUI does, in a dynamic model loaded on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests import record_contract
from nvfp4_video.tests.real import dynamic_in_process
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What dynamic_in_process.py found."""
    folder = str(tmp_path_factory.mktemp("dynamic"))
    return facts_in_host(Path(dynamic_in_process.__file__), folder, mark=dynamic_in_process.MARK)


@pytest.fixture
def books(facts: dict) -> dict:
    if "books" not in facts:
        pytest.skip(f"ComfyUI {facts['version']} has no DynamicVRAM, or builds no small LTX-2")
    assert "failed" not in facts["books"], facts["books"]["failed"]
    return facts["books"]


def test_the_pack_finds_every_name_it_relies_on(facts: dict, books: dict):
    assert facts["checked"] == ""
    recorded = record_contract.read_contract().get(facts["version"], {}).get("layers")
    if recorded is not None:
        found = {name: books[name] for name in dynamic_in_process.RECORDED}
        assert found == recorded, f"run tests/record_contract.py with ComfyUI {facts['version']}"


def test_the_host_s_patch_of_a_dynamic_layer_is_seen_and_can_be_taken_whole(books: dict):
    assert books["patched"] and not books["patched afterwards"]
    assert books["patch left"] == ""


def test_a_weight_counts_as_resident_once_the_host_has_brought_it_and_is_the_one_it_brings(books: dict):
    assert not books["resident before it is brought"]
    assert books["what the host brings"] and books["equal"]


def test_with_a_weight_hook_a_dynamic_model_lends_its_wrappers_branches_and_clean_up_to_one_that_is_not(
    facts: dict, books: dict
):
    found = facts["hooked"]
    assert "failed" not in found, found["failed"]
    assert found == {"models": 1, "the loaded one": False, "cleaned up": True, "branches": True}
