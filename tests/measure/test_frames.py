# SPDX-License-Identifier: Apache-2.0
"""Frames that are no moving picture: noise, black, flat and frozen ones are counted; grain, confetti, stars are not."""

from __future__ import annotations

import json

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")

from nvfp4_video.measure.frames import runs, spans  # noqa: E402
from nvfp4_video.measure.sharpness import measure_sharpness  # noqa: E402
from nvfp4_video.tests.support.clips import enlarged  # noqa: E402

SHAPE = (192, 256)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "gravel", "grass", "moon", "page")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(name: str) -> np.ndarray:
    return getattr(data, name)()[: SHAPE[0], : SHAPE[1]]


def moving(name: str = "coffee", frames: int = 9) -> np.ndarray:
    image = getattr(data, name)()
    return np.stack([image[: SHAPE[0], 3 * t : 3 * t + SHAPE[1]] for t in range(frames)])


def grainy(image: np.ndarray, deviation: float) -> np.ndarray:
    return np.clip(image + rng(1).normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


def noise(frames: int = 5, channels: int = 3) -> np.ndarray:
    return rng(2).integers(0, 256, (frames, *SHAPE, channels), dtype=np.uint8)


def gaussian(deviation: float) -> np.ndarray:
    return np.clip(128 + rng(3).normal(0, deviation, (3, *SHAPE, 3)), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_UNCHANGED)


def confetti(side: int, background: np.ndarray) -> np.ndarray:
    image, random = background.copy(), rng(4)
    for _ in range(3000):
        y, x = random.integers(0, SHAPE[0] - side), random.integers(0, SHAPE[1] - side)
        image[y : y + side, x : x + side] = random.integers(0, 256, 3)
    return image


def stars() -> np.ndarray:
    sky = np.full((*SHAPE, 3), 6, np.uint8)
    sky[rng(5).integers(0, SHAPE[0], 150), rng(6).integers(0, SHAPE[1], 150)] = 230
    return sky


@pytest.mark.parametrize("reference", [None, 100.0, 1e5])
@pytest.mark.parametrize(
    "bad", [noise(), noise(channels=1), gaussian(5), gaussian(60), np.stack([jpeg(frame) for frame in noise(2)])]
)
def test_noise_is_called_noise_with_and_without_a_reference(bad, reference):
    found = measure_sharpness(bad, reference)
    assert (found.verdict, found.warns, found.soft) == ("noise", True, False)
    assert found.frames_of("noise") == list(range(len(bad)))
    assert found.text.startswith(f"Verdict: noise. {len(bad)} of {len(bad)} frames are noise.")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("deviation", [0, 4, 8, 16, 32])
def test_photographs_with_film_grain_are_never_called_noise(name, deviation):
    found = measure_sharpness([grainy(photograph(name), deviation)])
    assert found.kinds == ("",)
    assert not found.warns


@pytest.mark.parametrize("side", [1, 2, 3, 6, 12])
def test_confetti_is_never_called_noise(side):
    for background in (photograph("astronaut"), np.full((*SHAPE, 3), (60, 90, 160), np.uint8)):
        found = measure_sharpness([confetti(side, background)])
        assert (found.kinds, found.warns) == (("",), False)


def test_a_starry_sky_is_neither_black_nor_noise():
    for sky in (stars(), cv2.GaussianBlur(stars(), (0, 0), 0.8)):
        found = measure_sharpness([sky])
        assert (found.kinds, found.warns) == (("",), False)


def test_more_fine_detail_than_a_picture_has_is_undecided_and_says_why():
    found = measure_sharpness([grainy(photograph("moon"), 16)])
    assert found.detail[0] > 2.5
    assert (found.verdict, found.warns) == ("undecided", False)
    assert "more fine detail than a picture has" in found.text and "white noise 4" in found.text


def test_grain_on_an_enlarged_picture_hides_softness_but_does_not_make_it_sharp():
    found = measure_sharpness([grainy(enlarged(data.chelsea(), 4), 12)])
    assert found.verdict == "undecided"


def test_a_grainy_clip_beside_its_grainy_reference_is_sharp():
    clip = [grainy(photograph("moon"), 16)]
    value = measure_sharpness(clip).median
    assert measure_sharpness(clip, value).verdict == "sharp"
    assert measure_sharpness(clip, value / 3).verdict == "undecided"


@pytest.mark.parametrize("reference", [None, 200.0])
@pytest.mark.parametrize(("level", "kind", "words"), [(0, "black", "are black"), (140, "flat", "are of one colour")])
def test_blank_clips_are_counted_and_called_neither_soft_nor_sharp(reference, level, kind, words):
    found = measure_sharpness(np.full((6, *SHAPE, 3), level, np.uint8), reference)
    assert (found.verdict, found.warns, found.frames_of(kind)) == ("undecided", True, [0, 1, 2, 3, 4, 5])
    assert f"6 of 6 frames {words}." in found.text and "preview" not in found.text


def test_black_frames_with_a_codec_s_noise_are_black():
    frames = np.clip(rng(7).normal(2, 2, (3, *SHAPE, 3)), 0, 255).astype(np.uint8)
    assert measure_sharpness(frames).kinds == ("black",) * 3


def test_a_gradient_has_no_detail_but_is_no_flat_frame():
    gradient = np.tile(np.linspace(20, 230, SHAPE[1]).astype(np.uint8)[None, :, None], (SHAPE[0], 1, 3))
    found = measure_sharpness([gradient])
    assert (found.verdict, found.kinds, found.warns) == ("undecided", ("",), False)
    assert measure_sharpness([gradient], 300.0).verdict == "blurred"


def test_blank_frames_do_not_move_the_median_and_are_named():
    clip = moving()
    value = measure_sharpness(clip).median
    faded = np.concatenate([np.zeros_like(clip), clip])
    found = measure_sharpness(faded, value)
    assert (found.median, found.verdict) == (value, "sharp")
    assert "9 of 18 frames are black: frames 0 to 8." in found.text
    assert not found.warns  # half of the clip, as a fade has it
    assert measure_sharpness(np.concatenate([np.zeros_like(clip), faded])).warns


def test_a_few_frames_of_noise_are_named_and_warned_of():
    clip = moving()
    clip[4:6] = noise(2)
    found = measure_sharpness(clip)
    assert (found.verdict, found.warns) == ("sharp", True)
    assert "2 of 9 frames are noise: frames 4 to 5." in found.text


def test_a_frozen_clip_stands_still_also_when_a_codec_changed_it_a_little():
    still = np.repeat(moving()[:1], 9, axis=0)
    touched = np.clip(still + rng(8).integers(-2, 3, still.shape), 0, 255).astype(np.uint8)
    for clip in (still, touched):
        found = measure_sharpness(clip)
        assert found.repeated == tuple(range(1, 9))
        assert (found.stands_still, found.warns) == (True, True)
        assert "The clip stands still: 8 of 9 frames repeat the one before: frames 1 to 8." in found.text


def test_a_clip_that_moves_in_one_small_place_does_not_stand_still():
    clip = np.repeat(moving()[:1], 9, axis=0)
    for t, frame in enumerate(clip):
        frame[40:46, 40 + 3 * t : 46 + 3 * t] = 255
    found = measure_sharpness(clip)
    assert (found.repeated, found.warns) == ((), False)


@pytest.mark.parametrize("pixels", [0.1, 0.03])
def test_a_slow_pan_does_not_stand_still(pixels):
    image = data.coffee()
    clip = [
        cv2.warpAffine(image, np.float32([[1, 0, -pixels * t], [0, 1, 0]]), (600, 400), flags=cv2.INTER_CUBIC)
        for t in range(13)
    ]
    found = measure_sharpness(np.stack(clip)[:, 20:212, 20:276])
    assert not found.stands_still and not found.warns


def test_film_on_twos_repeats_frames_and_does_not_stand_still():
    found = measure_sharpness(np.repeat(moving(), 2, axis=0))
    assert len(found.repeated) == 9
    assert not found.warns


def test_a_clip_that_freezes_in_its_middle_is_told_from_where():
    clip = moving(frames=16)
    clip[6:] = clip[5]
    found = measure_sharpness(clip)
    assert found.stands_still and "frames 6 to 15" in found.text


def test_one_picture_is_not_frozen_and_frames_of_other_size_repeat_nothing():
    image = photograph("coffee")
    assert measure_sharpness([image]).repeated == ()
    assert measure_sharpness([image, image[:100], image]).repeated == ()


def test_the_record_counts_the_frames_as_json():
    clip = moving()
    clip[3] = 0
    clip[7] = clip[6]
    record = json.loads(json.dumps(measure_sharpness(clip).to_dict(), allow_nan=False))
    assert (record["black"], record["flat"], record["noise"], record["repeated"]) == ([3], [], [], [7])


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([3], "frame 3"),
        ([3, 4, 5], "frames 3 to 5"),
        ([0, 2, 3], "frames 0 and 2 to 3"),
        ([1, 3, 5, 7, 9, 10], "frames 1, 3, 5, 7 and 2 more"),
    ],
)
def test_frame_numbers_are_written_as_runs(frames, text):
    assert spans(frames) == text
    assert sum(last - first + 1 for first, last in runs(frames)) == len(frames)
