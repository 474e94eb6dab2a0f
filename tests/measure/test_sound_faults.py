# SPDX-License-Identifier: Apache-2.0
"""What an ear hears in the sound under test: silence, antiphase, a radio's band, drift, gaps; and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
from nvfp4_video.measure.sound import compare_audio
from nvfp4_video.tests.support.sounds import RATE, SECONDS, SOUNDS, band, music, speech, stereo, stretched, tilted, wind


@pytest.fixture(scope="module", params=SOUNDS)
def sound(request) -> np.ndarray:
    return stereo(SOUNDS[request.param]())


def findings(a: np.ndarray, b: np.ndarray) -> str:
    return " ".join(compare_audio((a, RATE), (b, RATE)).findings)


def hiss(sound: np.ndarray, share: float) -> np.ndarray:
    return sound + np.random.default_rng(5).normal(0, share * sound.std(), sound.shape).astype(np.float32)


def gap(sound: np.ndarray) -> np.ndarray:
    other = sound.copy()
    other[:, RATE : 2 * RATE] = 0
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda sound: sound,
        lambda sound: hiss(sound, 0.01),
        lambda sound: tilted(sound, -12),
        lambda sound: tilted(sound, 6),
        lambda sound: sound / 2,
        lambda sound: sound * np.float32([[1], [0.7]]),
        lambda sound: band(sound, 80, RATE),
        lambda sound: band(sound, 0, 7_500),
        lambda sound: np.roll(sound, RATE // 100, axis=1),
        lambda sound: sound.mean(axis=0, keepdims=True),
        lambda sound: -sound,
    ],
    ids="same hiss dull bright quieter turned bass-cut mp3 10ms mono inverted".split(),
)
def test_what_an_ear_does_not_mind_is_not_said(sound, change):
    assert findings(sound, change(sound)) == ""


def test_antiphase_is_said_and_no_longer_cancels_what_is_measured(sound):
    other = sound * np.float32([[1], [-1]])
    found = compare_audio((sound, RATE), (other, RATE))
    assert "B's channels are in antiphase and cancel each other: mixed to mono, it loses" in found.findings[0]
    assert (found.sync_offset_ms, found.spectral_distance_db) == (0.0, pytest.approx(0, abs=1e-6))
    assert "A's channels are in antiphase" in findings(other, sound)
    assert findings(other, other) == ""
    whole = np.repeat(sound[:1], 2, axis=0) * np.float32([[1], [-1]])
    assert "nothing is left of it" in findings(np.repeat(sound[:1], 2, axis=0), whole)


def test_channels_that_have_nothing_in_common_are_not_in_antiphase():
    wide = np.concatenate([wind(1), wind(2)])
    assert findings(np.repeat(wind(1), 2, axis=0), wide) == ""


def test_an_inverted_sound_is_aligned_and_named(sound):
    found = compare_audio((sound, RATE), (-np.roll(sound, 240, axis=1), RATE))
    assert found.sync_method == "waveform, inverted"
    assert found.sync_offset_ms == pytest.approx(10.0)


def test_a_silent_channel_is_named(sound):
    assert "Channel 2 of 2 of B is silent." in findings(sound, sound * np.float32([[1], [0]]))


@pytest.mark.parametrize(("low", "high", "words"), [(300, 3400, "above 3.7 kHz"), (0, 5000, "above 5.3 kHz")])
def test_a_radio_s_band_is_named_with_what_the_trusted_sound_has(sound, low, high, words):
    said = findings(sound, band(sound, low, high))
    assert "B has no sound" in said and words in said and "A from 0 Hz to 12.0 kHz." in said
    assert "A has no sound" in findings(band(sound, low, high), sound)


def test_a_telephone_lacks_the_bass_too():
    assert "B has no sound below 215 Hz and above 3.7 kHz" in findings(speech(), band(speech(), 300, 3400))


@pytest.mark.parametrize("factor", [1.04, 0.96, 48 / 44.1, 1.01])
def test_drift_is_told_in_seconds_and_direction(sound, factor):
    found = compare_audio((sound, RATE), (stretched(sound, factor), RATE))
    expected = (factor - 1) * SECONDS * 1000
    assert found.drift_ms == pytest.approx(expected, abs=25)
    assert f"{'later' if factor > 1 else 'earlier'} against A than at its start" in " ".join(found.findings)
    assert found.sync_offset_ms is None and "drifts" in found.sync_text


def test_a_gap_is_told_where_and_how_long(sound):
    said = findings(sound, gap(sound))
    assert "B is silent for " in said and "s where A is not, first at 1." in said
    assert "A is silent for " in findings(gap(sound), sound)
    assert findings(gap(sound), gap(sound)) == ""


def test_silence_level_and_lateness_are_said(sound):
    assert findings(sound, sound * 0) == "B has a silent sound track, A has sound."
    assert findings(sound * 0, sound) == "A has a silent sound track, B has sound."
    assert findings(sound * 0, sound * 0) == ""
    assert findings(sound, sound / 10) == "B is 20 dB quieter than A."
    assert findings(sound, np.roll(sound, RATE // 10, axis=1)) == "B's sound is 100 ms late against A's."


def test_another_sound_is_said_and_the_same_wind_blown_again_is_not():
    for other in (wind(), speech(3)):
        assert "The sounds are not the same: no common signal" in findings(speech(), other)
    assert "The sounds are not the same" in findings(music(), wind())
    assert findings(wind(), wind(9)) == ""


def test_other_lengths_are_said_when_the_common_part_was_asked_for():
    sound = music()
    found = compare_audio((sound, RATE), (sound[:, : 3 * RATE], RATE), common_prefix=True)
    assert found.findings == ("A's sound lasts 4.00 s, B's 3.00 s.",)
