# SPDX-License-Identifier: Apache-2.0
"""NVFP4Sharpness and NVFP4Compare on the stubbed host: their numbers are OpenCV's, their verdicts a person's."""

from __future__ import annotations

import json

import comfy.model_management as management
import cv2
import numpy as np
import pytest
import torch
from nvfp4_video.measure.compare import compare_clips
from nvfp4_video.measure.media import MediaError
from nvfp4_video.nodes.measure import NVFP4Compare, NVFP4Sharpness
from skimage import data

RATE = 16000


def clip(*pictures: np.ndarray) -> torch.Tensor:
    """8-bit pictures -> IMAGE."""
    return torch.from_numpy(np.stack(pictures)).float() / 255.0


def preview_like(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return data.coffee()[:256, :384]


@pytest.fixture(autouse=True)
def host(stub_comfy):
    return stub_comfy


def variance(picture: np.ndarray) -> float:
    return cv2.Laplacian(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()


def tone(seconds: float = 1.0, gain: float = 0.5) -> dict:
    time = torch.arange(int(seconds * RATE)) / RATE
    wave = gain * torch.sin(2 * torch.pi * 440 * time * (1 + time))
    return {"waveform": wave[None, None], "sample_rate": RATE}


def test_the_median_is_opencv_s_and_the_images_pass_through_untouched(photograph):
    images = clip(photograph, preview_like(photograph), photograph)
    passed, median, text, plot = NVFP4Sharpness.execute(images).args
    assert passed is images
    assert median == variance(photograph)
    assert "Verdict: sharp" in text and "over 3 frames of 384x256" in text
    assert plot.ndim == 4 and plot.shape[-1] == 3


def test_the_verdicts_are_those_a_person_would_give(photograph):
    def verdict(picture, reference=0.0):
        return NVFP4Sharpness.execute(clip(picture), reference).args[2].split("Verdict: ")[1].split(".")[0]

    assert verdict(photograph) == "sharp"
    assert verdict(preview_like(photograph)) == "preview-like"
    assert verdict(cv2.GaussianBlur(photograph, (0, 0), 4)) == "blurred"
    assert verdict(preview_like(photograph), variance(photograph)) == "preview-like"
    assert verdict(preview_like(photograph), variance(preview_like(photograph))) == "sharp"


def test_text_and_plot_are_shown_on_the_node(photograph):
    result = NVFP4Sharpness.execute(clip(photograph))
    assert result.ui["text"] == (result.args[2],)
    assert result.ui["text"][0].startswith("Verdict: sharp. ")
    (shown,) = result.ui["images"]
    assert shown["size"][1] == 620


def test_alpha_one_channel_and_a_single_frame_are_taken(photograph):
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
    opaque = np.dstack([photograph, np.full(photograph.shape[:2], 255, np.uint8)])
    assert NVFP4Sharpness.execute(clip(opaque)).args[1] == variance(photograph)
    assert NVFP4Sharpness.execute(clip(grey[..., None])).args[1] == cv2.Laplacian(grey, cv2.CV_64F).var()


def test_a_failed_decode_is_an_error_that_says_so():
    with pytest.raises(MediaError, match="NaN or infinity in frame 1"):
        NVFP4Sharpness.execute(torch.stack([torch.zeros(32, 32, 3), torch.full((32, 32, 3), torch.nan)]))


def test_a_comparison_gives_card_text_and_json_of_the_same_numbers(photograph):
    a, b = clip(photograph, photograph), clip(preview_like(photograph), photograph)
    result = NVFP4Compare.execute(a, b, False, tone(), tone(gain=0.25))
    card, text, record = result.args
    found = compare_clips(a, b, tone(), tone(gain=0.25))
    assert json.loads(record) == found.to_dict()
    assert text == found.text and result.ui["text"] == (text,) and text.startswith("\n".join(found.findings))
    assert json.loads(record)["audio"]["level_difference_db"] == pytest.approx(-6.02, abs=0.01)
    assert card.shape[0] == 1 and card.shape[2] == 1600
    assert float(card.std()) > 0.05


def test_without_sound_or_with_one_sound_the_picture_is_still_compared(photograph):
    images = clip(photograph)
    assert "The pictures are identical" in NVFP4Compare.execute(images, images, False).args[1]
    one = json.loads(NVFP4Compare.execute(images, images, False, audio_b=tone()).args[2])
    assert (one["audio"], one["audio_note"]) == (None, "only in B")


def test_silence_is_compared_without_numbers_that_do_not_exist(photograph):
    images = clip(photograph)
    record = json.loads(NVFP4Compare.execute(images, images, False, tone(gain=0), tone(gain=0)).args[2])
    assert record["audio"]["level_a_dbfs"] is None
    assert record["audio"]["sync_offset_ms"] is None


def test_clips_of_other_length_are_compared_on_request_and_of_other_size_never(photograph):
    long, short = clip(photograph, photograph), clip(photograph)
    with pytest.raises(MediaError, match="common_prefix"):
        NVFP4Compare.execute(long, short, False)
    assert json.loads(NVFP4Compare.execute(long, short, True).args[2])["left_out"] == [1, 0]
    with pytest.raises(MediaError, match="expected the same size"):
        NVFP4Compare.execute(short, clip(photograph[:128]), True)


def test_the_user_can_cancel_both(photograph):
    images = clip(photograph, photograph)
    for call in (lambda: NVFP4Sharpness.execute(images), lambda: NVFP4Compare.execute(images, images, False)):
        management.interrupt_current_processing()
        with pytest.raises(management.InterruptProcessingException):
            call()
