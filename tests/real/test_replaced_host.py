# SPDX-License-Identifier: Apache-2.0
"""Sampling functions of other packs are tried in a real ComfyUI: its own pass, those for plain latents are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real.harness import facts_in_host

MARK = "facts: "
WHOSE = "ComfyUI_Old/sampling.py"


@pytest.fixture(scope="module")
def found() -> dict:
    """What replaced_in_process.py found."""
    return facts_in_host(Path(__file__).with_name("replaced_in_process.py"), mark=MARK)


def test_the_host_s_own_functions_pass(found: dict):
    assert found["own"] == [[], "no"]
    assert "sample_euler" in found["judged"] and len(found["judged"]) > 20
    assert found["wrong"] == []


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("sample without_packing", "comfy.samplers.CFGGuider.sample"),
        ("fix_empty_latent_channels counts", "comfy.sample.fix_empty_latent_channels"),
        ("sample_euler of_pictures", "comfy.k_diffusion.sampling.sample_euler"),
    ],
)
def test_a_function_for_plain_latents_is_named_with_its_pack(found: dict, case: str, name: str):
    value, text = found[case]
    assert value == [[name, WHOSE]] and "stops on a joint latent" in text


@pytest.mark.parametrize("case", ["sample passes_on", "sample_euler needs_more", "sample_of_a_pack of_pictures"])
def test_one_that_passes_on_or_cannot_be_tried_or_replaces_nothing_is_not(found: dict, case: str):
    assert found[case] == [[], "no"]
