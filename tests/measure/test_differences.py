# SPDX-License-Identifier: Apache-2.0
"""What Compare says: identity first, then frames, flicker and seams by name; copies that only lost detail stay one."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")

from nvfp4_video.measure.compare import compare_clips  # noqa: E402
from nvfp4_video.tests.support.clips import enlarged  # noqa: E402

FRAMES = 13


def moving(name: str = "astronaut") -> np.ndarray:
    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return np.stack([image[40 : 40 + 144, 2 * t : 2 * t + 192] for t in range(FRAMES)])


@pytest.fixture(scope="module", params=["astronaut", "coffee", "chelsea", "motorcycle"])
def clip(request) -> np.ndarray:
    return moving(request.param)


def bytes_of(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def each(change: Callable) -> Callable:
    return lambda clip: np.stack([change(frame) for frame in clip])


def jpeg(frame: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_UNCHANGED)


def grain(deviation: float) -> Callable:
    return lambda clip: bytes_of(clip + np.random.default_rng(0).normal(0, deviation, clip.shape[:3])[..., None])


def swelling(clip: np.ndarray) -> np.ndarray:
    """A slow change of brightness, different in each place, as other rounding in the model makes it."""
    place = cv2.resize(np.random.default_rng(1).normal(0, 1, (5, 7)), clip.shape[2:0:-1], interpolation=cv2.INTER_CUBIC)
    return bytes_of(clip + (8 * np.sin(np.arange(FRAMES) / 5)[:, None, None] * place)[..., None])


def flickering(clip: np.ndarray, share: float = 0.02) -> np.ndarray:
    return bytes_of(clip * (1 + share * (-1.0) ** np.arange(FRAMES))[:, None, None, None])


def flickering_corner(clip: np.ndarray) -> np.ndarray:
    other = clip.copy()
    other[:, :60, :80] = flickering(clip, 0.05)[:, :60, :80]
    return other


def seam(clip: np.ndarray) -> np.ndarray:
    """The second half, as decoded apart, 4 levels brighter."""
    return np.concatenate([clip[:6], bytes_of(clip[6:] + 4.0)])


def ghost(clip: np.ndarray) -> np.ndarray:
    """Where two pieces overlap, each is half there, and 4 frames out of step."""
    other = clip.astype(float)
    for frame in (6, 7, 8):
        other[frame] = (clip[frame - 4] + clip[frame + 4].astype(float)) / 2
    return bytes_of(other)


def with_frames(new: Callable) -> Callable:
    def change(clip: np.ndarray) -> np.ndarray:
        other = clip.copy()
        other[5:8] = new(clip[5:8])
        return other

    return change


NOISE = np.random.default_rng(2).integers(0, 256, (FRAMES, 144, 192, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grain", grain(3)),
        ("JPEG", each(jpeg)),
        ("a slow change", swelling),
        ("rounding", lambda clip: clip // 4 * 4 + 2),
    ],
)
def test_a_copy_that_differs_a_little_agrees(clip, name, change):
    found = compare_clips(clip, change(clip))
    assert found.agree, found.verdict
    assert "are about equally sharp" in found.findings[-1] and len(found.findings) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (each(lambda frame: cv2.GaussianBlur(frame, (0, 0), 4)), "of A's sharpness: it looks like a preview decode"),
        (each(lambda frame: enlarged(frame, 2.5)), "of A's sharpness: it looks like a preview decode"),
        (grain(25), "times A's sharpness, more than a picture has: it is full of grain."),
        (lambda clip: bytes_of(clip * 0.6), "B has 0.60 of A's contrast."),
        (lambda clip: bytes_of(clip * 0.7 + 70), "B is brighter than A by"),
    ],
)
def test_a_spoiled_copy_still_shows_the_same_and_its_fault_is_said(clip, change, words):
    found = compare_clips(clip, change(clip))
    assert found.findings[0].startswith("The pictures show the same and differ in detail: SSIM 0.")
    assert words in found.verdict
    assert not found.other_frames and not found.agree
    assert "flickers" not in found.verdict and "jumps" not in found.verdict


def test_less_contrast_alone_is_not_called_a_preview(clip):
    found = compare_clips(clip, bytes_of(clip * 0.6))
    assert found.sharpness_ratio < 0.5
    assert "preview" not in found.verdict and "equally sharp at equal contrast" in found.verdict


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (NOISE, "B is noise, A is not."),
        (NOISE * 0, "B is black, A is not."),
        (NOISE * 0 + 90, "B is of one colour, A is not."),
    ],
)
def test_no_picture_is_told_by_identity_and_kind_in_both_orders(clip, other, words):
    found, turned = compare_clips(clip, other), compare_clips(other, clip)
    assert found.findings[0].startswith("The pictures are not the same: SSIM 0.")
    assert words in found.findings
    assert words.translate(str.maketrans("AB", "BA")) in turned.findings
    for one in (found, turned):
        assert "preview" not in one.verdict and "sharp" not in one.verdict and not one.agree


def test_other_pictures_are_not_the_same_whatever_their_sharpness():
    for other in (moving("coffee"), np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in moving("coffee")])):
        found = compare_clips(moving(), other)
        assert found.findings[0].startswith("The pictures are not the same: SSIM 0.")
        assert "sharp" not in found.verdict


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (np.zeros_like, "B is black in frames 5 to 7, A is not."),
        (lambda part: NOISE[: len(part)], "B is noise in frames 5 to 7, A is not."),
    ],
)
def test_frames_that_are_no_picture_are_named(clip, new, words):
    found = compare_clips(clip, with_frames(new)(clip))
    assert found.findings[0].startswith("In 3 of 13 frames the pictures are not the same, frames 5 to 7: SSIM 0.")
    assert words in found.findings and not found.agree
    assert "flickers" not in found.verdict and "jumps" not in found.verdict


def test_a_frozen_clip_stands_still_and_a_repeated_frame_is_named(clip):
    frozen = compare_clips(clip, np.repeat(clip[:1], FRAMES, axis=0))
    assert "B stands still where A moves: frames 1 to 12." in frozen.findings and not frozen.agree
    repeated = clip.copy()
    repeated[5] = clip[4]
    assert "B repeats the frame before where A moves: frame 5." in compare_clips(clip, repeated).findings
    still = np.repeat(clip[:1], FRAMES, axis=0)
    assert compare_clips(still, each(jpeg)(still)).agree


@pytest.mark.parametrize("change", [flickering, flickering_corner])
def test_flicker_of_the_clip_under_test_is_heard_over_any_of_the_trusted_one(clip, change):
    assert "B flickers against A, by" in compare_clips(clip, change(clip)).verdict
    lamp = flickering(clip, 0.04)
    assert compare_clips(lamp, each(jpeg)(lamp)).agree
    assert "flickers" in compare_clips(lamp, change(lamp)).verdict


def test_a_seam_between_decoded_pieces_is_a_jump_of_brightness_at_its_frame(clip):
    found = compare_clips(clip, seam(clip))
    assert "B jumps in brightness against A, by up to 4.0 of 255: frame 6." in found.findings
    assert list(found.steps) == [6]
    cut = np.concatenate([clip[:6], clip[:7] // 2])  # a cut in both clips is no seam
    assert not compare_clips(cut, each(jpeg)(cut)).steps


def test_a_ghost_between_decoded_pieces_stands_out_by_its_frames(clip):
    found = compare_clips(clip, ghost(clip))
    assert "Less alike than the rest: frames 6 to 8." in found.findings and not found.agree
    dissolve = ghost(clip)  # in both clips it is part of the film
    assert compare_clips(dissolve, each(jpeg)(dissolve)).agree


def test_other_frame_rates_and_lengths_are_said(clip):
    found = compare_clips(clip, clip, fps=(24.0, 25.0))
    assert "A plays at 24 frames a second, B at 25." in found.findings and not found.agree
    assert compare_clips(clip, clip, fps=(24.0, 24.0)).agree and compare_clips(clip, clip, fps=(24.0, None)).agree
    shorter = compare_clips(clip, clip[:9], common_prefix=True)
    assert "A has 13 frames, B 9; the first 9 were compared." in shorter.findings and not shorter.agree


def test_the_record_holds_the_findings_as_json(clip):
    record = json.loads(json.dumps(compare_clips(clip, seam(clip)).to_dict(), allow_nan=False))
    assert record["findings"][0] == record["verdict"][: len(record["findings"][0])]
    assert list(record["steps"]) == ["6"] and record["other_frames"] == [] and record["agree"] is False
    for key in ("flicker", "brighter", "contrast", "sameness"):
        assert key in record
