# SPDX-License-Identifier: Apache-2.0
"""Clips of scikit-image's photographs, and what spoils them. To be imported after ``pytest.importorskip`` of both."""

from __future__ import annotations

import cv2
import numpy as np
from skimage import data

RATE = 24000


def photograph_clip() -> np.ndarray:
    """(5, 150, 200, 3) uint8: a view that moves over a photograph."""
    photograph = data.astronaut()
    return np.stack([photograph[100 : 100 + 150, 2 * i : 2 * i + 200] for i in range(5)])


def noise_track() -> np.ndarray:
    """Two seconds of noise, (2 * RATE,) fp32."""
    return np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)


def disturbed(clip: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.clip(clip + np.random.default_rng(seed).normal(0, 9, clip.shape), 0, 255).astype(np.uint8)


def enlarged(image: np.ndarray, factor: float, blur: float = 0.5) -> np.ndarray:
    """What a preview decoder gives: ``factor`` times too few pixels, enlarged, slightly blurred."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(large, (0, 0), blur) if blur else large
