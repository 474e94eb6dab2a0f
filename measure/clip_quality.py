# SPDX-License-Identifier: Apache-2.0
"""One clip of ``bench`` against the reference's: latents, frames and sound as the row's process saved them.

``video_error``, ``audio_error`` (latents) and ``sound_error`` (waveform) are the norm of the difference over the norm
of the reference's. Frames: compare.py; without OpenCV only PSNR.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .media import MediaError

NO_OPENCV = "OpenCV is not installed, so SSIM and sharpness are missing: pip install opencv-python."


def clip_quality(reference: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Two folders with video.npy, audio.npy and perhaps frames.npy, sound.npz -> numbers, and notes on what lacks."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    for name in ("video", "audio"):
        found[f"{name}_error"] = relative_error(np.load(reference / f"{name}.npy"), np.load(folder / f"{name}.npy"))
    if found["video_error"] is None or found["audio_error"] is None:
        notes.append("its latents or the reference's hold NaN or infinity")
    frames = [side / "frames.npy" for side in (reference, folder)]
    try:
        if all(path.is_file() for path in frames):
            found |= _frames(*(np.load(path, mmap_mode="r") for path in frames), notes)
        if all((side / "sound.npz").is_file() for side in (reference, folder)):
            found |= _sound(reference / "sound.npz", folder / "sound.npz")
    except MediaError as error:
        notes.append(str(error))
    return found, notes


def relative_error(expected: np.ndarray, found: np.ndarray) -> float | None:
    """Norm of the difference over the norm of what is expected; None where that is no finite number."""
    expected, found = (values.astype(np.float64).ravel() for values in (expected, found))
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(found - expected)) / norm if norm else math.nan
    return error if math.isfinite(error) else None


def _frames(a: np.ndarray, b: np.ndarray, notes: list[str]) -> dict[str, Any]:
    from .compare import compare_clips

    try:
        found = compare_clips(a, b)
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        notes.append(NO_OPENCV)
        pairs = [np.square(x.astype(np.float32) - y).mean(dtype=np.float64) for x, y in zip(a, b, strict=True)]
        mean = float(np.mean(pairs))
        return {"psnr_db": 10 * math.log10(255**2 / mean) if mean else None, "identical_frames": not mean}
    return {
        "psnr_db": found.psnr_db,
        "ssim": found.ssim,
        "lowest_ssim": min(found.ssim_per_frame),
        "sharpness": found.sharpness[1].median,
        "reference_sharpness": found.sharpness[0].median,
        "sharpness_ratio": found.sharpness_ratio,
        "identical_frames": found.identical,
    }


def _sound(reference: Path, folder: Path) -> dict[str, Any]:
    from .sound import compare_audio

    sounds = []
    for path in (reference, folder):
        with np.load(path) as stored:
            sounds.append((stored["wave"], int(stored["rate"])))
    found = compare_audio(*sounds)
    return {
        "sound_error": relative_error(sounds[0][0], sounds[1][0]),
        "sound_spectral_distance_db": found.spectral_distance_db,
    }
