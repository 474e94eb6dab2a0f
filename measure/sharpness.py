# SPDX-License-Identifier: Apache-2.0
"""Sharpness of a clip: the variance of the Laplacian, and whether the clip looks like a preview decode.

The value is exactly ``cv2.Laplacian(gray, cv2.CV_64F).var()`` on 8-bit grey, per frame. It depends on content and
resolution: a lawn reads 5000, a sharp photograph of the moon 65. So the verdict never rests on the bare number.

With a reference value (a clip of the same scene, size and seed that is known to be good) the clip is preview-like
below ``REFERENCE_RATIO`` = 0.5 of it. The published pair is 45 for the preview decoder against 205 for the full VAE, a
ratio of 0.22; 0.5 is about the geometric middle between that and 1.

Without a reference the clip is compared with itself, made smaller: D(k) is the variance of the Laplacian of the grey
picture reduced k times by area averaging, less the variance that 8-bit rounding alone adds. Photographs keep much the
same detail on every scale, so D(1) / D(2) lies near 0.3 to 1.1; where the finest octave is missing, because the picture
was enlarged or blurred, the ratio falls towards 1/16. The same rule on the 2x and 4x reduced picture tells where the
detail ends. ``DETAIL_RATIO`` = 0.25 was chosen by measurement on the 16 sharp photographs in scikit-image's wheel
(tests/test_sharpness.py repeats it):

    D(1) / D(2)                                    lowest   median  highest   judged as expected
    sharp original                                   0.24     0.51     1.13   15 of 16 sharp (brick, 0.24, is not)
    enlarged 2x, 3x or 4x, slight blur (0.5 px)      0.02     0.10     0.17   48 of 48 preview-like
    Gaussian blur of 4 px                            0.00     0.00     0.03   16 of 16 blurred

Enlarging 1.5x without blur lowers the plain variance 4.4 times, as much as the published preview decoder; there the
median is 0.20 and 14 of 16 are caught. What the rule cannot see: grain or noise added after the decode hides
softness, motion blur in one direction only is not recognised, and strong video compression looks soft. No decode of a
real model went into the choice; a reference beats it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .media import MediaError, gray, to_frames

if TYPE_CHECKING:
    import torch

REFERENCE_RATIO = 0.5
DETAIL_RATIO = 0.25
FLAT = 10.0
SCALES = (1, 2, 4, 8)
# Rounding to 8 bits adds a variance of 1/12 per colour channel and 1/12 for the grey; the Laplacian, whose squared
# weights 1, 1, -4, 1, 1 sum to 20, multiplies the variance of white noise by that.
_ROUNDING = 20.0 * (1.0 + 0.299**2 + 0.587**2 + 0.114**2) / 12.0
_SMALLEST_SIDE = 16


@dataclass(frozen=True)
class Sharpness:
    """``values``: variance of the Laplacian per frame. ``detail``: D(k) / D(2k) for k = 1, 2, 4, frame medians,
    None where the picture is too small or has no detail. ``reference``: the value of a good clip, if given.
    """

    values: tuple[float, ...]
    detail: tuple[float | None, ...]
    width: int
    height: int
    reference: float | None = None

    @property
    def median(self) -> float:
        """Median over the frames; the clip's one number."""
        return float(median(self.values))

    @property
    def min(self) -> float:
        """The softest frame's value."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The sharpest frame's value."""
        return max(self.values)

    @property
    def reference_ratio(self) -> float | None:
        """Median relative to the reference; None without one."""
        return None if self.reference is None else self.median / self.reference

    @property
    def detail_scale(self) -> int | None:
        """How many times the picture must be reduced to be sharp: 1, 2, 4, or 8 for 8 and more; None: no detail."""
        if self.detail[0] is None:
            return None
        for scale, ratio in zip(SCALES, self.detail, strict=False):
            if ratio is None or ratio >= DETAIL_RATIO:
                return scale
        return SCALES[-1]

    @property
    def verdict(self) -> str:
        """"sharp", "preview-like", "blurred" (softer than a 4x enlargement), or "undecided" (no detail to judge)."""
        scale = self.detail_scale
        if self.reference_ratio is not None:
            if self.reference_ratio >= REFERENCE_RATIO:
                return "sharp"
            return "blurred" if scale == SCALES[-1] else "preview-like"
        if scale is None:
            return "undecided"
        return "sharp" if scale == 1 else "blurred" if scale == SCALES[-1] else "preview-like"

    @property
    def soft(self) -> bool:
        """True if a warning is due."""
        return self.verdict in ("preview-like", "blurred")

    @property
    def text(self) -> str:
        """The verdict, the numbers, and what it rests on, in a few lines."""
        count = len(self.values)
        lines = [
            f"Verdict: {self.verdict}. {_MEANING[self.verdict]}",
            f"Sharpness (variance of the Laplacian, 8-bit grey): median {self.median:.1f}, min {self.min:.1f}, "
            f"max {self.max:.1f} over {count} frame{'s' * (count != 1)} of {self.width}x{self.height}.",
        ]
        if self.reference_ratio is not None:
            lines.append(
                f"Reason: {self.reference_ratio:.2f} of the reference {self.reference:g}; the threshold is "
                f"{REFERENCE_RATIO:g}, midway between the published preview decoder (0.22 of the full VAE) and 1."
            )
        elif self.detail[0] is None:
            lines.append("Reason: the frames are flat or too small. Give a reference value, or measure other frames.")
        else:
            found = "at full size" if self.detail_scale == 1 else f"at 1/{self.detail_scale} of the width or less"
            lines.append(
                f"Reason: the finest detail is {self.detail[0]:.2f} of that one octave below, the threshold is "
                f"{DETAIL_RATIO:g} (sharp photographs: 0.24 to 1.13, enlarged ones: at most 0.17); the detail starts "
                f"{found}. It depends on content and resolution: a reference value from a good clip of the same "
                "scene and size decides better."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        return {
            "median": self.median, "min": self.min, "max": self.max, "frames": len(self.values),
            "width": self.width, "height": self.height, "verdict": self.verdict, "soft": self.soft,
            "detail_ratio": self.detail[0], "detail_scale": self.detail_scale, "detail_threshold": DETAIL_RATIO,
            "reference": self.reference, "reference_ratio": self.reference_ratio,
            "reference_threshold": REFERENCE_RATIO, "values": list(self.values), "text": self.text,
        }  # fmt: skip


_MEANING = {
    "sharp": "The finest detail is there.",
    "preview-like": "Warning: this looks like a preview decode. If a TAE (taeltx2_3 or kin) made it, use the full VAE.",
    "blurred": "Warning: softer than a preview decode explains. Look for defocus, blur, or an upscale without detail.",
    "undecided": "There is no detail to judge.",
}


def laplacian_variance(image: np.ndarray) -> float:
    """(H, W) uint8 grey, or (H, W, 3) uint8 RGB -> ``cv2.Laplacian(gray, cv2.CV_64F).var()``."""
    import cv2

    return float(cv2.Laplacian(image if image.ndim == 2 else gray(image), cv2.CV_64F).var())


def measure_sharpness(
    images: np.ndarray | torch.Tensor | Iterable[Any],
    reference: float | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Sharpness:
    """Frames -> Sharpness.

    ``images``: what ``media.to_frames`` takes, or any iterable of such frames (``media.iter_frames``: constant memory;
    frames of different sizes are allowed there, the record then holds the first size).
    ``reference``: the median of a clip known to be good, above 0. ``on_frame(done)`` reports progress and may raise to
    interrupt. Raises MediaError.
    """
    if reference is not None and not 0.0 < reference < float("inf"):
        raise MediaError(f"found the reference {reference}; expected a number above 0, the median of a good clip.")
    if hasattr(images, "shape"):
        images = to_frames(images)
    values, octaves, size = [], [], None
    for item in images:
        for frame in to_frames(item):
            size = size or frame.shape[:2]
            grey = gray(frame)
            values.append(laplacian_variance(grey))
            octaves.append(_octave_variances(grey))
            if on_frame:
                on_frame(len(values))
    if size is None:
        raise MediaError("found no frames; expected at least one. Check what is linked to the input.")
    detail = []
    for index in range(len(SCALES) - 1):
        ratios = [_ratio(o[index], o[index + 1]) for o in octaves if len(o) > index + 1 and max(o) >= FLAT]
        detail.append(float(median(ratios)) if ratios else None)
    return Sharpness(tuple(values), tuple(detail), size[1], size[0], reference)


def _ratio(fine: float, coarse: float) -> float:
    """fine / coarse, 0 where both are nothing (the detail lies deeper), at most 100 (a pattern of single pixels)."""
    return 0.0 if fine == 0.0 else fine / max(coarse, fine / 100.0)


def _octave_variances(grey: np.ndarray) -> list[float]:
    """(H, W) uint8 -> D(1), D(2), D(4), D(8), as far as the reduced picture keeps 16 pixels a side."""
    import cv2

    result = []
    for scale in SCALES:
        height, width = grey.shape[0] // scale, grey.shape[1] // scale
        if min(height, width) < _SMALLEST_SIDE:
            break
        reduced = grey[: height * scale, : width * scale].astype(np.float32)
        if scale > 1:  # whole blocks only, so that every reduced pixel is a plain mean
            reduced = cv2.resize(reduced, (width, height), interpolation=cv2.INTER_AREA)
        deviation = float(cv2.meanStdDev(cv2.Laplacian(reduced, cv2.CV_32F))[1][0, 0])
        result.append(max(deviation**2 - _ROUNDING / scale**2, 0.0))
    return result
