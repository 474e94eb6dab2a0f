# SPDX-License-Identifier: Apache-2.0
"""What a real ComfyUI does with the wrong graphs that the guard knows: it stops, or makes what the finding says.

joint_in_process.py runs each case once, with scaled-down models, in the host's own Python.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nvfp4_video.tests.real import in_process
from nvfp4_video.tests.real.harness import comfyui_path, facts_in_host, small_model


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> case -> what became of it."""
    if small_model(comfyui_path()) != "ltx23":
        pytest.skip("this ComfyUI cannot build a small LTX-2.3")
    script, folder = Path(__file__).with_name("joint_in_process.py"), str(tmp_path_factory.mktemp("joint"))
    return facts_in_host(script, folder, mark=in_process.MARK, timeout=600)


def of(facts: dict, topic: str) -> dict[str, str]:
    assert "error" not in facts[topic], facts[topic]["error"]
    return facts[topic]


def difference(text: str) -> float:
    return float(re.search(r"a difference of ([\d.]+)", text).group(1))


@pytest.mark.parametrize("topic", ["audio_vae_at_picture_nodes", "video_vae_at_sound_nodes", "swapped"])
def test_sound_for_picture_and_picture_for_sound_stop(topic: str, facts: dict):
    found = of(facts, topic)
    late = {"LTXVLatentUpsampler of the sound"}  # makes a latent of a shape that nothing takes
    assert [name for name, text in found.items() if not text.startswith("stops: ") and name not in late] == []


def test_only_decodes_find_their_stream_in_a_joint_latent(facts: dict):
    found = of(facts, "joint_whole")
    made = {name for name, text in found.items() if text.startswith("makes: ")}
    assert made == {"VAEDecode", "LTXVAudioVAEDecode"}


def test_batches_of_different_sizes_stop_and_equal_ones_are_sampled(facts: dict):
    found = of(facts, "batches")
    assert found["video 2, sound 1"].startswith("stops: ") and found["video 1, sound 2"].startswith("stops: ")
    assert found["video 2, sound 2"] == "makes: [[2, 128, 3, 2, 2], [2, 8, 17, 16]]"


def test_guides_that_are_not_cropped_are_eight_frames_a_latent_at_the_end(facts: dict):
    found = of(facts, "guides")
    assert found["cropped"] == "makes: [[17, 64, 64, 3]]"
    assert found["one picture, not cropped"] == "makes: [[25, 64, 64, 3]]"
    assert found["nine pictures, not cropped"] == "makes: [[33, 64, 64, 3]]"


def test_without_a_conditioning_the_model_takes_25_frames_a_second(facts: dict):
    found = of(facts, "conditioning")
    assert difference(found["without, against 25"]) == 0
    assert difference(found["without, against 50"]) > 0.001


def test_nothing_compares_rates_and_lengths_of_sound_and_picture(facts: dict):
    found = of(facts, "rates")
    assert found["sound of 9 frames, picture of 17"] == "makes: [[1, 128, 3, 2, 2], [1, 8, 9, 16]]"
    assert found["a film at 25"].startswith("makes: 0.68 s of picture, 0.6")
    assert found["a film at 50"].startswith("makes: 0.34 s of picture, 0.6")


def test_ltx_video_samples_a_video_latent_and_stops_on_a_joint_one(facts: dict):
    found = of(facts, "old_model")
    assert found["its class"] == "makes: LTXV"
    assert found["video alone"] == "makes: [[1, 128, 3, 2, 2]]"
    assert found["joint"].startswith("stops: ")


def test_another_version_s_vae_and_statistics_make_other_pictures_without_an_error(facts: dict):
    found = of(facts, "other_vaes")
    assert all(text.startswith("makes: ") and difference(text) > 0.1 for text in found.values())


def test_a_preview_vae_stops_where_its_scale_counts_and_nowhere_else(facts: dict):
    found = of(facts, "previews")
    made = {name for name, text in found.items() if text.startswith("makes: ")}
    assert made == {"VAEDecode", "VAEEncode", "LTXVImgToVideo"}


def test_plain_vae_decode_is_exact_in_chunks_and_tiles_are_not(facts: dict):
    found = of(facts, "tiles")
    exact = {name for name, text in found.items() if difference(text) == 0}
    assert exact == {"plain, in chunks", "one tile"}
