# SPDX-License-Identifier: Apache-2.0
"""`decode` = `fast` of small VAEs in a real ComfyUI: the same numbers in FP32, and the host's way where it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.tests.real import fast_vae_in_process
from nvfp4_video.tests.real.harness import facts_in_host

TOLERANCE = 3e-5  # FP32 in another order, over some 40 layers


@pytest.fixture(scope="module")
def facts() -> dict:
    """Topic -> what fast_vae_in_process.py found."""
    found = facts_in_host(Path(fast_vae_in_process.__file__), mark=fast_vae_in_process.MARK, timeout=600)
    if not found["in_chunks"]:
        pytest.skip(f"ComfyUI {found['version']} decodes LTX's video VAE in no chunks, and the loader says so")
    for topic in fast_vae_in_process.TOPICS:
        value = found[topic.__name__]
        assert not isinstance(value.get("error"), str), value["error"]
    return found


def test_the_pixels_are_the_host_s_for_every_config_length_and_size_of_chunks(facts):
    assert len(facts["equal"]) == 2 * len(fast_vae_in_process.CHUNKS) + 4
    for name, error in facts["equal"].items():
        assert isinstance(error, float) and error < TOLERANCE, name


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("noise", "has a shortcut, noise or another norm"),
        ("groups", "has a shortcut, noise or another norm"),
        ("version 0", "has a shortcut, noise or another norm"),
        ("cpu", "it decodes on cpu, where there is nothing to gain"),
        ("class", "by other classes than those of LTX's video VAE"),
    ],
)
def test_what_the_fast_decode_does_not_know_is_left_to_the_host_with_a_reason(facts, case, reason):
    assert reason in facts["reasons"][case]
    assert facts["reasons"]["tried"] == ""


@pytest.mark.parametrize("name", ["DepthToSpaceUpsample", "ResnetBlock3D"])
def test_a_host_whose_classes_compute_something_else_is_noticed(facts, name):
    assert facts["noticed"][name].startswith("a trial is off by 0.")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *[("hook", "has a hook or another forward"), ("forward", "has a hook or another forward")],
        ("class", "has another kernel, stride or convolution"),
    ],
)
def test_with_a_module_in_other_hands_the_decode_is_the_host_s_bit_for_bit(facts, name, reason):
    found = facts["in_other_hands"][name]
    assert found["error"] == 0
    assert reason in found["stood_down"]


def test_a_weight_that_the_host_patches_is_taken_patched(facts):
    found = facts["in_other_hands"]["patch"]
    assert found["error"] < TOLERANCE and not found["stood_down"]


def test_whole_or_in_tiles_the_host_s_vae_gives_the_same_pixels(facts):
    found = facts["whole"]
    assert found["shape"] == [2, 17, 64, 96, 3] and found["std"] > 0.1
    assert found["error"] < TOLERANCE and found["tiled"] < TOLERANCE and not found["stood_down"]


def test_only_the_host_s_own_decode_gets_finished_frames(facts):
    found = facts["whole"]
    assert found["below_zero"], "whoever asks the model gets numbers from -1 to 1"
    assert found["processed"], "and process_output brings them to 0 to 1"
    assert found["left"] == [False, True], "nothing is left behind for the next call"


def test_the_weights_stay_as_they_can_be_saved(facts):
    assert facts["whole"]["saved"]
