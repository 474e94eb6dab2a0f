# SPDX-License-Identifier: Apache-2.0
"""Comparison of two clips: scikit-image is the judge of the picture, constructed signals are that of the sound."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2")
metrics = pytest.importorskip("skimage.metrics")
data = pytest.importorskip("skimage.data")

from nvfp4_video.measure import media  # noqa: E402
from nvfp4_video.measure.compare import compare_clips, ssim  # noqa: E402
from nvfp4_video.measure.sound import compare_audio, level_dbfs, spectral_distance  # noqa: E402
from nvfp4_video.tests.support.clips import RATE, disturbed, noise_track, photograph_clip  # noqa: E402


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return photograph_clip()


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return noise_track()


@pytest.mark.parametrize("shape", [(150, 200), (11, 11), (12, 37), (63, 64)])
def test_ssim_equals_scikit_image(shape):
    rng = np.random.default_rng(shape[0])
    for _ in range(3):
        a = rng.integers(0, 256, shape, np.uint8)
        b = np.clip(a + rng.normal(0, 40, shape), 0, 255).astype(np.uint8)
        judge = metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert ssim(a, b) == pytest.approx(judge, abs=1e-9)


def test_psnr_and_difference_equal_scikit_image_and_numpy(clip):
    other = disturbed(clip)
    result = compare_clips(clip, other)
    assert result.psnr_db == pytest.approx(metrics.peak_signal_noise_ratio(clip, other, data_range=255), abs=1e-9)
    for index, value in enumerate(result.psnr_per_frame):
        judge = metrics.peak_signal_noise_ratio(clip[index], other[index], data_range=255)
        assert value == pytest.approx(judge, abs=1e-9)
    expected = np.abs(clip.astype(float) - other).mean(axis=(0, 3))
    assert np.allclose(result.difference, expected, atol=1e-4)
    assert result.mean_difference == pytest.approx(expected.mean())
    assert result.max_difference == np.abs(clip.astype(int) - other).max()


def test_identical_clips_have_no_psnr_and_ssim_one(clip):
    result = compare_clips(clip, torch.from_numpy(clip).float() / 255)
    assert (result.identical, result.psnr_db, result.sharpness_ratio) == (True, None, 1.0)
    assert result.ssim == pytest.approx(1.0, abs=1e-12)
    assert result.verdict == "The pictures are identical."


def test_a_softer_second_clip_is_told_from_a_softer_first_one(clip):
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in clip])
    result = compare_clips(clip, soft)
    assert result.sharpness_ratio < 0.2
    assert result.verdict.startswith("The pictures show the same and differ in detail: SSIM 0.89")
    assert "B has 0.03 of A's sharpness: it looks like a preview decode" in result.verdict
    assert (result.sharpness[1].verdict, result.agree) == ("preview-like", False)
    assert "A looks like a preview" in compare_clips(soft, clip).verdict


def test_the_worst_frame_is_the_one_that_was_damaged(clip):
    other = clip.copy()
    other[3, 40:90, 40:90] = 0
    result = compare_clips(clip, other)
    assert result.worst_frame == 3
    assert result.psnr_per_frame[0] is None
    assert result.difference[60, 60] > 0
    assert result.difference[10, 10] == 0


def test_different_sizes_are_refused_and_never_resized(clip):
    with pytest.raises(media.MediaError, match="200x150 and small.mp4 of 100x150.*same size"):
        compare_clips(clip, clip[:, :, :100], names=("big.mp4", "small.mp4"), common_prefix=True)


def test_different_lengths_need_the_common_prefix_to_be_asked_for(clip):
    with pytest.raises(media.MediaError, match="5 frames in A and 3 in B.*common_prefix"):
        compare_clips(clip, clip[:3])
    result = compare_clips(clip, clip[:3], common_prefix=True)
    assert (result.frames, result.left_out, result.identical) == (3, (2, 0), True)
    assert "left out: 2 of A" in result.text


def test_one_frame_alpha_and_single_channel_clips_compare(clip):
    assert compare_clips(clip[0], disturbed(clip)[0]).frames == 1
    opaque = np.dstack([clip[0], np.full(clip[0].shape[:2], 255, np.uint8)])
    assert compare_clips(clip[0], opaque).identical
    grey = clip[:1, :, :, :1]
    assert compare_clips(grey, np.repeat(grey, 3, axis=3)).identical


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(media.MediaError, match="11x11"):
        compare_clips(np.zeros((1, 8, 40, 3), np.uint8), np.zeros((1, 8, 40, 3), np.uint8))


def test_black_clips_have_no_sharpness_ratio():
    result = compare_clips(np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 32, 32, 3), np.uint8))
    assert result.sharpness_ratio is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_full_scale_sine_reads_minus_three_dbfs():
    sine = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert level_dbfs(sine[None]) == pytest.approx(-3.0103, abs=1e-3)
    assert level_dbfs(sine[None] / 10) == pytest.approx(-23.0103, abs=1e-3)


@pytest.mark.parametrize("lag", [-12000, -240, 0, 1, 480, 23000])
def test_the_sync_offset_is_found_to_the_sample(noise, lag):
    late = np.roll(noise, lag)
    if lag > 0:
        late[:lag] = 0
    elif lag < 0:
        late[lag:] = 0
    result = compare_audio((noise, RATE), (late, RATE))
    assert result.sync_method == "waveform"
    assert result.sync_offset_ms == pytest.approx(1000 * lag / RATE)
    if abs(lag) <= 480:
        assert result.spectral_distance_db < 0.01


def test_equal_rhythm_on_other_carriers_is_aligned_by_the_envelope():
    rng = np.random.default_rng(3)
    gate = np.repeat(rng.random(40) > 0.5, RATE // 20).astype(np.float32)
    a, b = (gate * rng.normal(0, 0.1, gate.size) for _ in range(2))
    lag = RATE // 25
    result = compare_audio((a, RATE), (np.concatenate([np.zeros(lag), b[:-lag]]), RATE))
    assert result.sync_method == "envelope"
    assert result.sync_offset_ms == pytest.approx(40.0, abs=2.0)


def test_unrelated_sounds_have_no_sync_offset(noise):
    result = compare_audio((noise, RATE), (np.random.default_rng(9).normal(0, 0.1, noise.size), RATE))
    assert (result.sync_offset_ms, result.sync_correlation, result.sync_method) == (None, None, None)
    assert result.note == "undefined: no common signal"


def test_a_steady_tone_is_not_shifted_by_a_whole_number_of_periods():
    tone = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)
    assert compare_audio((tone, RATE), (tone, RATE)).sync_offset_ms == 0.0


def test_spectral_distance_of_a_gain_is_the_gain(noise):
    assert spectral_distance(noise, noise / 2, RATE) == pytest.approx(20 * np.log10(2), abs=0.01)
    assert spectral_distance(noise, noise, RATE) == 0.0


def test_spectral_distance_grows_when_the_treble_is_lost(noise):
    dull = np.convolve(noise, np.full(8, 1 / 8), mode="same")
    duller = np.convolve(noise, np.full(32, 1 / 32), mode="same")
    assert 1.0 < spectral_distance(noise, dull, RATE) < spectral_distance(noise, duller, RATE)


@pytest.mark.parametrize("quiet", [0.0, 1e-7])
def test_silence_is_null_with_a_reason_never_minus_infinity(clip, noise, quiet):
    silent = np.full((2, noise.size), quiet, np.float32)
    result = compare_clips(clip, clip, (noise, RATE), (silent, RATE))
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))["audio"]
    assert record["level_b_dbfs"] is None
    assert (record["silent_a"], record["silent_b"]) == (False, True)
    assert (record["sync_offset_ms"], record["spectral_distance_db"], record["note"]) == (None, None, "B is silent")
    assert compare_audio((silent, RATE), (silent, RATE)).note == "both are silent"
    assert "silent" in result.text


def test_comfyui_audio_is_taken_and_a_batch_of_sounds_refused(noise):
    comfy = {"waveform": torch.from_numpy(noise).expand(1, 2, -1), "sample_rate": RATE}
    result = compare_audio(comfy, (noise, RATE))
    assert (result.sync_offset_ms, result.sample_rate, result.seconds) == (0.0, RATE, 2.0)
    with pytest.raises(media.MediaError, match="batch"):
        compare_audio({**comfy, "waveform": torch.zeros(2, 1, 100)}, comfy)


def test_sounds_of_other_rate_or_length_are_refused(noise):
    with pytest.raises(media.MediaError, match="24000 Hz in A and 48000 Hz in B"):
        compare_audio((noise, RATE), (noise, 48000))
    with pytest.raises(media.MediaError, match="2.00 s.*1.50 s.*common_prefix"):
        compare_audio((noise, RATE), (noise[: 3 * RATE // 2], RATE))
    assert compare_audio((noise, RATE), (noise[: 3 * RATE // 2], RATE), common_prefix=True).seconds == 1.5
    assert compare_audio((noise, RATE), (noise[:-1024], RATE)).sync_offset_ms == 0.0


def test_sound_in_one_clip_only_is_said(clip, noise):
    result = compare_clips(clip, clip, audio_a=(noise, RATE))
    assert (result.audio, result.audio_note) == (None, "only in A")


def test_sound_is_read_from_a_file_as_it_was_written(tmp_path, noise):
    av = pytest.importorskip("av")
    pcm = np.stack([noise, -noise])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T.reshape(1, -1)), format="flt", layout="stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sound, rate = media.read_audio(tmp_path / "sound.wav")
    assert rate == RATE
    assert np.array_equal(sound, pcm)


def test_progress_is_reported_per_frame_and_may_interrupt(clip):
    seen = []
    compare_clips(clip, clip, on_frame=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]

    def interrupt(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        compare_clips(clip, clip, on_frame=interrupt)
