# SPDX-License-Identifier: Apache-2.0
"""Two clips of the same seed, in numbers: picture (PSNR, SSIM, sharpness, difference) and sound (sound.py).

Definitions, A being the one to trust and B the one under test:

* PSNR    10 log10(255^2 / MSE) over the RGB bytes of all frames; identical clips have none (infinite): None.
* SSIM    Wang et al. 2004 (doi 10.1109/TIP.2003.819861) on 8-bit grey: Gaussian window of 11x11, sigma 1.5,
          K1 = 0.01, K2 = 0.03, population covariance, mean over the pixels whose window lies inside. The clip's value
          is the mean over the frames. Equal to scikit-image's ``structural_similarity(..., gaussian_weights=True,
          use_sample_covariance=False, data_range=255)``, which the tests use as the judge.
* the rest   what both show, flicker, steps, contrast and the sentences: differences.py

Why no scikit-image and no matplotlib here: the pack lives in other people's environments, where each further package
can move a pinned NumPy. OpenCV does the filtering and the heat map, NumPy the spectra, and ComfyUI's own Pillow
draws (draw/compare.py). scikit-image is a test dependency only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import differences
from .media import MediaError, gray, to_frames
from .sharpness import Sharpness, measure_sharpness
from .sound import AudioComparison, compare_audio

if TYPE_CHECKING:
    import torch

    from .sound import Sound

    Images = np.ndarray | torch.Tensor

_WINDOW = 11


@dataclass(frozen=True)
class Comparison:
    """Picture and sound of two clips.

    ``difference`` is the mean absolute difference per pixel over frames and channels, (H, W) float32 in 0..255.
    ``left_out`` counts the frames beyond the common length, ``audio_note`` says why ``audio`` or part of it is None.
    ``sameness``: correlation of each pair of coarse frames. ``flicker``, ``steps``: of B against A, see
    differences.py; ``flicker_a``: A's own. ``brighter``, ``contrast``: B's mean grey less A's, and its deviation over
    A's, of the coarse frames that show the same.
    ``fps``: frame rates, None where not known.
    """

    names: tuple[str, str]
    frames: int
    left_out: tuple[int, int]
    psnr_db: float | None
    psnr_per_frame: tuple[float | None, ...]
    ssim: float
    ssim_per_frame: tuple[float, ...]
    mean_difference: float
    max_difference: int
    sharpness: tuple[Sharpness, Sharpness]
    audio: AudioComparison | None
    audio_note: str
    sameness: tuple[float, ...]
    flicker: float
    flicker_a: float
    steps: Mapping[int, float]
    brighter: float
    contrast: float
    fps: tuple[float | None, float | None]
    difference: np.ndarray = field(repr=False, compare=False)

    @property
    def identical(self) -> bool:
        """True if every byte of every frame agrees."""
        return self.max_difference == 0

    @property
    def sharpness_ratio(self) -> float | None:
        """Median sharpness of B over that of A; None if A has none."""
        return self.sharpness[1].median / self.sharpness[0].median if self.sharpness[0].median > 0 else None

    @property
    def worst_frame(self) -> int:
        """Index of the frame with the lowest SSIM."""
        return int(np.argmin(self.ssim_per_frame))

    @property
    def other_frames(self) -> list[int]:
        """Numbers of the frames in which A and B do not show the same."""
        pairs = enumerate(zip(self.sameness, self.ssim_per_frame, strict=True))
        return [index for index, values in pairs if max(values) < differences.SAME]

    @property
    def findings(self) -> list[str]:
        """Sentences, the most important first: whether both show the same, then what is wrong."""
        return differences.findings(self)[0]

    @property
    def faults(self) -> list[str]:
        """The findings that tell of more than a little detail."""
        return differences.findings(self)[1]

    @property
    def agree(self) -> bool:
        """Whether nothing but a little detail tells the clips apart."""
        return not self.faults

    @property
    def verdict(self) -> str:
        """The findings in one line."""
        return " ".join(self.findings)

    def rows(self) -> list[tuple[str, str]]:
        """The numbers as (label, text), in the order of the card."""
        worst, lowest = self.worst_frame, min(self.ssim_per_frame)
        a, b = self.sharpness
        rows = [
            ("PSNR", "identical" if self.psnr_db is None else f"{self.psnr_db:.2f} dB"),
            ("SSIM", f"{self.ssim:.4f}" + (f"  (lowest {lowest:.4f}, frame {worst})" if self.frames > 1 else "")),
            ("Sharpness A / B", f"{a.median:.1f} / {b.median:.1f}"),
            ("Sharpness ratio B / A", "-" if self.sharpness_ratio is None else f"{self.sharpness_ratio:.2f}"),
            ("Difference mean / max", f"{self.mean_difference:.2f} / {self.max_difference} of 255"),
            ("Flicker of B against A", f"{self.flicker:.2f} of 255"),
        ]
        if self.audio is None:
            return [*rows, ("Sound", self.audio_note)]
        sound = self.audio
        return [
            *rows,
            ("Sound level A / B", f"{_level(sound.level_a_dbfs)} / {_level(sound.level_b_dbfs)}"),
            ("Spectral distance", _number(sound.spectral_distance_db, "dB")),
            ("Sync offset of B", sound.sync_text),
        ]

    @property
    def head(self) -> str:
        """What was compared."""
        a = self.sharpness[0]
        frames = f"{self.frames} frame{'s' * (self.frames != 1)}"
        head = f"{self.names[0]} (A) and {self.names[1]} (B): {frames} of {a.width}x{a.height}."
        if any(self.left_out):
            head += f" Compared over the common part; left out: {self.left_out[0]} of A, {self.left_out[1]} of B."
        return head

    @property
    def text(self) -> str:
        """The findings, a line each, and the numbers."""
        return "\n".join([*self.findings, self.head, *(f"{label}: {value}" for label, value in self.rows())])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record without NaN or infinity."""
        a, b = self.sharpness
        return {
            "a": self.names[0], "b": self.names[1], "frames": self.frames, "left_out": list(self.left_out),
            "width": a.width, "height": a.height, "identical": self.identical,
            "psnr_db": self.psnr_db, "ssim": self.ssim,
            "mean_difference": self.mean_difference, "max_difference": self.max_difference,
            "worst_frame": self.worst_frame, "sharpness_ratio": self.sharpness_ratio,
            "sharpness_a": a.to_dict(), "sharpness_b": b.to_dict(),
            "psnr_per_frame": list(self.psnr_per_frame), "ssim_per_frame": list(self.ssim_per_frame),
            "audio": self.audio.to_dict() if self.audio else None, "audio_note": self.audio_note,
            "sameness": list(self.sameness), "other_frames": self.other_frames,
            "flicker": self.flicker, "flicker_a": self.flicker_a,
            "steps": {str(frame): size for frame, size in self.steps.items()}, "brighter": self.brighter,
            "contrast": self.contrast, "fps": list(self.fps), "findings": self.findings, "faults": self.faults,
            "agree": self.agree,
            "verdict": self.verdict,
        }  # fmt: skip


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Two (H, W) uint8 grey pictures of at least 11x11 -> mean structural similarity, see the module docstring."""
    import cv2

    if min(a.shape) < _WINDOW:
        raise MediaError(f"found a picture of {a.shape[1]}x{a.shape[0]}; expected at least 11x11, the window of SSIM.")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y, square_x, square_y, product = (
        cv2.GaussianBlur(m, (_WINDOW, _WINDOW), 1.5, borderType=cv2.BORDER_REFLECT) for m in (x, y, x * x, y * y, x * y)
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_product, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    value = (2 * mean_product + c1) * (2 * (product - mean_product) + c2)
    value /= (mean_squares + c1) * (square_x + square_y - mean_squares + c2)
    inside = _WINDOW // 2
    return float(value[inside:-inside, inside:-inside].mean())


def compare_clips(
    a: Images,
    b: Images,
    audio_a: Sound | None = None,
    audio_b: Sound | None = None,
    names: tuple[str, str] = ("A", "B"),
    common_prefix: bool = False,
    fps: tuple[float | None, float | None] = (None, None),
    on_frame: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Two clips as ``media.to_frames`` takes them, sounds as ``media.to_sound`` does, frame rates -> Comparison.

    ``on_frame(done, total)`` reports progress and may raise to interrupt.
    Raises MediaError where the sizes differ, or the lengths, unless ``common_prefix`` cuts both to the shorter.
    """
    import cv2

    a, b = to_frames(a), to_frames(b)
    if a.shape[1:] != b.shape[1:]:
        raise MediaError(
            f"found {names[0]} of {a.shape[2]}x{a.shape[1]} and {names[1]} of {b.shape[2]}x{b.shape[1]}; expected "
            "the same size. Render both at one size; resizing one would change its sharpness."
        )
    count = min(len(a), len(b))
    left_out = (len(a) - count, len(b) - count)
    if any(left_out) and not common_prefix:
        raise MediaError(
            f"found {len(a)} frames in {names[0]} and {len(b)} in {names[1]}; expected the same length. "
            f"Set `common_prefix` to compare the first {count}."
        )
    a, b = a[:count], b[:count]
    errors, similarity, pairs, sameness, parts, gaps = [], [], [], [], [], []
    total = np.zeros(a.shape[1:], np.float64)
    largest = 0
    for left, right in zip(a, b, strict=True):
        difference = cv2.absdiff(left, right)
        errors.append(cv2.norm(left, right, cv2.NORM_L2SQR) / left.size)
        cv2.accumulate(difference, total)
        largest = max(largest, int(difference.max()))
        pair = gray(left), gray(right)
        similarity.append(ssim(*pair))
        reduced = [differences.coarse(grey) for grey in pair]
        sameness.append(differences.correlation(*reduced))
        pairs.append([(float(one.mean()), float(one.std())) for one in reduced])
        parts.append(differences.cells(reduced[0]))
        gaps.append(differences.cells(reduced[1]) - parts[-1])
        if on_frame:
            on_frame(len(errors), count)
    total = total.mean(axis=2) / count
    sharp_a = measure_sharpness(a)
    sharp_b = measure_sharpness(b)
    alike = [pair for pair, value in zip(pairs, sameness, strict=True) if value >= differences.SAME]
    brighter = float(np.median([b[0] - a[0] for a, b in alike])) if alike else 0.0
    contrast = float(np.median([b[1] / a[1] for a, b in alike if a[1] > 0] or [1.0]))
    gaps, parts = np.stack(gaps), np.stack(parts)
    audio, note = None, "none"
    if audio_a is not None and audio_b is not None:
        audio = compare_audio(audio_a, audio_b, names, common_prefix or any(left_out))
        note = audio.note
    elif audio_a is not None or audio_b is not None:
        note = f"only in {'A' if audio_b is None else 'B'}"
    return Comparison(
        names, count, left_out, _psnr(float(np.mean(errors))), tuple(map(_psnr, errors)), float(np.mean(similarity)),
        tuple(similarity), float(total.mean()), largest, (sharp_a, sharp_b), audio, note,
        tuple(sameness), differences.flicker(gaps), differences.flicker(parts), differences.steps(gaps),
        brighter, contrast, fps, total.astype(np.float32),
    )  # fmt: skip


def _psnr(mse: float) -> float | None:
    return 10.0 * math.log10(255.0**2 / mse) if mse > 0 else None


def _level(value: float | None) -> str:
    return "silent" if value is None else f"{value:.1f} dBFS"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f} {unit}"
