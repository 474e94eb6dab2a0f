# SPDX-License-Identifier: Apache-2.0
"""Pictures of clips: heat map, card, and the curve of sharpness."""

from __future__ import annotations

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")

from nvfp4_video.draw import canvas  # noqa: E402
from nvfp4_video.draw.compare import comparison_card, heat_map, sharpness_plot  # noqa: E402
from nvfp4_video.measure import media  # noqa: E402
from nvfp4_video.measure.compare import compare_clips  # noqa: E402
from nvfp4_video.measure.sharpness import laplacian_variance, measure_sharpness  # noqa: E402
from nvfp4_video.tests.support.clips import RATE, disturbed, enlarged, noise_track, photograph_clip  # noqa: E402


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return photograph_clip()


def test_the_heat_map_is_brightest_where_the_clips_differ(clip):
    other = clip.copy()
    other[:, 40:90, 40:90] //= 2
    colours, top = heat_map(compare_clips(clip, other).difference)
    assert top > 1.0
    assert colours[45:85, 45:85].mean() > 5 * colours[100:, 100:].mean()


def test_the_card_shows_both_clips_and_grows_with_the_sound(clip):
    noise = noise_track()
    other = disturbed(clip)
    mute = comparison_card(compare_clips(clip, other), clip, other)
    sound = comparison_card(compare_clips(clip, other, (noise, RATE), (noise, RATE)), clip, other)
    assert mute.shape[1] == sound.shape[1] == 1600
    assert sound.shape[0] > mute.shape[0]
    decoded = cv2.imdecode(np.frombuffer(media.encode_png(sound), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decoded[..., ::-1], sound)
    # The magnified crop holds the clip's own bytes.
    crop = clip[compare_clips(clip, other).worst_frame].repeat(2, axis=0).repeat(2, axis=1)
    patch = crop[100:160, 100:160]
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(sound, patch, cv2.TM_SQDIFF))
    assert np.array_equal(sound[y : y + 60, x : x + 60], patch)


@pytest.mark.parametrize("shape", [(1, 11, 11), (1, 600, 40), (2, 16, 900)])
def test_cards_of_odd_shapes_are_drawn(shape):
    rng = np.random.default_rng(5)
    a, b = (rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(2))
    card = comparison_card(compare_clips(a, b, names=("x" * 300, "\u4e2d.mp4")), a, b)
    assert (card < 200).any(axis=2).mean() > 0.01


def test_the_plot_draws_the_curve_and_the_reference_line():
    camera = data.camera()
    soft = measure_sharpness([enlarged(camera, 2)] * 30, reference=laplacian_variance(camera))
    picture = sharpness_plot(soft, 800, 400)
    assert picture.shape == (400, 800, 3)
    for colour in (canvas.BLUE, canvas.RED, canvas.FAINT):
        assert (np.abs(picture.astype(int) - colour).max(axis=2) < 12).sum() > 100
    blue = np.abs(picture.astype(int) - canvas.BLUE).max(axis=2) < 12
    red = np.abs(picture.astype(int) - canvas.RED).max(axis=2) < 12
    assert np.nonzero(blue)[0].mean() > np.nonzero(red)[0].mean()  # the curve lies below the warning line
