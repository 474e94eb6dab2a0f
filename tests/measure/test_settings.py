# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of distilled settings: what is moved to what, and that nothing is moved without a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_video.measure.ltx import VERSIONS, audio_latents, latent_size
from nvfp4_video.measure.settings import CARDS, ONE_STAGE, STAGES, TWO_STAGES, distilled_settings


@pytest.mark.parametrize(("fps", "latents"), [(24, 126), (25, 121), (30, 101), (50, 60), (23.976, 126)])
def test_121_frames_have_as_many_audio_latents_as_the_host_allocates(fps, latents):
    assert audio_latents(121, fps) == latents
    assert distilled_settings(768, 512, 121, fps).audio_latents == latents


@pytest.mark.parametrize(
    ("wish", "stages", "size"),
    [
        ((768, 512), ONE_STAGE, (768, 512)),
        ((1280, 720), ONE_STAGE, (1280, 704)),
        ((1281, 721), ONE_STAGE, (1280, 736)),
        ((1, 1), ONE_STAGE, (64, 64)),
        ((1920, 1080), TWO_STAGES, (1920, 1088)),
        ((1280, 720), TWO_STAGES, (1280, 704)),
        ((800, 96), TWO_STAGES, (768, 128)),
    ],
)
def test_sides_move_to_the_nearest_multiple_and_to_the_smaller_of_two(wish, stages, size):
    found = distilled_settings(*wish, stages=stages)
    assert (found.final_width, found.final_height) == size
    moved = f"{wish[0]}x{wish[1]} -> {size[0]}x{size[1]}"
    assert any(moved in note for note in found.notes) == (wish != size)


@pytest.mark.parametrize(
    ("wish", "frames"), [(1, 1), (4, 1), (5, 1), (6, 9), (97, 97), (120, 121), (125, 121), (126, 129)]
)
def test_frame_counts_move_to_the_nearest_8k_plus_1(wish, frames):
    found = distilled_settings(768, 512, wish)
    assert found.frames == frames
    assert any(f"frames: {wish} -> {frames}" in note for note in found.notes) == (wish != frames)


def test_seconds_decide_instead_of_frames_where_they_are_given():
    found = distilled_settings(768, 512, 9, 25, seconds=5)
    assert (found.frames, found.audio_latents, found.seconds) == (121, 121, 4.84)
    assert any("5 s at 25 fps are 125 frames -> 121" in note for note in found.notes)


def test_two_stages_sample_at_half_the_size_first():
    found = distilled_settings(1920, 1088, stages=TWO_STAGES)
    assert (found.width, found.height) == (960, 544)
    assert "8 steps at 960x544" in str(found)
    assert "sigmas of stage 2: 0.85" in str(found)
    one = distilled_settings(1920, 1088)
    assert (one.width, one.height) == (1920, 1088)
    assert "stage 2" not in str(one)


def test_sigmas_are_the_published_ones_of_each_version():
    first = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
    second = {
        "2.0": (0.909375, 0.725, 0.421875, 0.0),
        "2.3": (0.85, 0.725, 0.4219, 0.0),
        "2.5": (0.85, 0.725, 0.4219, 0),
    }
    for version in VERSIONS:
        found = distilled_settings(768, 512, version=version)
        assert (found.sigmas, found.sigmas_stage_2, found.cfg) == (first, second[version], 1.0)
        assert (len(found.sigmas) - 1, len(found.sigmas_stage_2) - 1) == (8, 3)


def test_a_clip_that_needed_no_change_has_nothing_but_its_numbers_in_the_text():
    text = str(distilled_settings(768, 512, 121, 24))
    assert len(text.splitlines()) == 3, text


def test_a_broken_frame_rate_is_warned_of_and_has_a_whole_neighbour():
    found = distilled_settings(768, 512, fps=29.97)
    assert found.frame_rate == 30
    assert any("29.97 is not whole" in note for note in found.notes)
    assert not any("not whole" in note for note in distilled_settings(768, 512, fps=30.0).notes)


def test_what_lies_beyond_the_model_s_positions_is_said():
    notes = " ".join(distilled_settings(4096, 512, 1025, 24).notes)
    assert "end at 20 s" in notes and "end at 2048 pixels" in notes and "1000 at most" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"frames": -1}, "frames is -1"),
        ({"seconds": -0.5}, "seconds is -0.5"),
        ({"stages": "three"}, "stages is 'three'; expected one of one stage, two stages"),
        ({"version": "1.0"}, "version is '1.0'; expected one of 2.3, 2.5, 2.0"),
    ],
)
def test_values_without_meaning_are_errors_that_name_the_input(change, message):
    with pytest.raises(ValueError, match=message):
        distilled_settings(**({"width": 768, "height": 512} | change))


def test_another_count_of_audio_latents_is_taken_as_it_is():
    assert distilled_settings(768, 512, count_audio=lambda frames, fps: 127).audio_latents == 127


@given(
    st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 2000), st.floats(1, 120), st.sampled_from(STAGES)
)  # fmt: skip
def test_whatever_is_wished_the_model_can_make_what_comes_out(width, height, frames, fps, stages):
    found = distilled_settings(width, height, frames, fps, stages=stages)
    assert found.width % 32 == found.height % 32 == 0
    assert found.frames % 8 == 1
    assert abs(found.frames - frames) <= 4
    scale = 2 if stages == TWO_STAGES else 1
    assert (found.width * scale, found.height * scale) == (found.final_width, found.final_height)
    assert max(abs(found.final_width - width), abs(found.final_height - height)) <= max(16 * scale, 64 * scale - 1)
    assert abs(found.audio_latents / 25 - found.seconds) <= 0.02 + 1e-9
    again = distilled_settings(found.final_width, found.final_height, found.frames, fps, stages=stages)
    assert (again.width, again.height, again.frames) == (found.width, found.height, found.frames)


def test_the_latent_of_a_clip_has_one_frame_for_the_first_and_one_for_each_eight():
    assert latent_size(768, 512, 121) == (16, 16, 24)
    assert latent_size(1280, 704, 121) == (16, 22, 40)
    assert latent_size(767, 511, 120) == (15, 15, 23)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("card", CARDS)
def test_a_card_decides_size_and_length_whatever_else_is_set_and_nothing_has_to_be_moved(card: str, stages: str):
    found = distilled_settings(100, 100, 9, 24.0, seconds=3.0, stages=stages, card=card)
    assert (found.final_width, found.final_height, found.frames) == CARDS[card][stages]
    assert found.notes[0].startswith(f"card: the size and length for {card};")
    assert not any(note.startswith(("size", "frames:")) for note in found.notes)
