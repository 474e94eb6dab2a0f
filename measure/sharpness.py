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
    sharp original                                   0.24     0.51     1.16   15 of 16 sharp (brick, 0.24, is not)
    enlarged 2x, 3x or 4x, slight blur (0.5 px)      0.02     0.10     0.17   48 of 48 preview-like
    Gaussian blur of 4 px                            0.00     0.00     0.03   16 of 16 blurred

Above ``EXCESS`` = 2.5 there is more fine detail than photographs have, also when reduced to half (at most 2.06); white
noise has 4. Film grain with a deviation of 4 of 255 leaves all 16 below, one of 8 all but the smoothest (2.87). Above
it, or where the two ratios below the finest have a geometric mean above it, as enlarged noise has, nothing is decided.
Frames that are noise, black, flat, or a repeat of the one before are counted by frames.py; black and flat ones are left
out of median, min and max as long as there are others.

Enlarging 1.5x without blur lowers the plain variance 4.4 times, as much as the published preview decoder; there the
median is 0.20 and 14 of 16 are caught. What the rule cannot see: grain or noise added after the decode hides
softness, motion blur in one direction only is not recognised, and strong video compression looks soft. No decode of a
real model went into the choice; a reference beats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .frames import BLACK_FRAME, EXCESS, FLAT_FRAME, NOISE_FRAME, PICTURE, frame_kind, repeats, runs, spans
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
    ``kinds``: what each frame is, see frames.py. ``repeated``: numbers of the frames that repeat the one before.
    """

    values: tuple[float, ...]
    detail: tuple[float | None, ...]
    width: int
    height: int
    reference: float | None = None
    kinds: tuple[str, ...] = ()
    repeated: tuple[int, ...] = ()

    @property
    def shown(self) -> tuple[float, ...]:
        """Values of the frames that show something, or of all where none does."""
        pairs = zip(self.values, self.kinds, strict=False)
        return tuple(value for value, kind in pairs if kind not in (BLACK_FRAME, FLAT_FRAME)) or self.values

    @property
    def median(self) -> float:
        """Median over the frames that show something; the clip's one number."""
        return float(median(self.shown))

    @property
    def min(self) -> float:
        """The softest frame's value."""
        return min(self.shown)

    @property
    def max(self) -> float:
        """The sharpest frame's value."""
        return max(self.shown)

    def frames_of(self, kind: str) -> list[int]:
        """Numbers of the frames of a kind."""
        return [index for index, one in enumerate(self.kinds) if one == kind]

    @property
    def blank(self) -> bool:
        """True if every frame is black or flat."""
        return bool(self.kinds) and set(self.kinds) <= {BLACK_FRAME, FLAT_FRAME}

    @property
    def stands_still(self) -> bool:
        """True if one run of repeated frames takes more than half of the clip."""
        longest = max((last - first + 1 for first, last in runs(self.repeated)), default=0)
        return longest > len(self.values) / 2

    @property
    def noisy(self) -> bool:
        """True if most frames that show something are noise."""
        return 2 * len(self.frames_of(NOISE_FRAME)) > sum(kind in (NOISE_FRAME, PICTURE) for kind in self.kinds)

    @property
    def excess(self) -> bool:
        """True if there is more fine detail than photographs have."""
        fine, *coarser = self.detail
        below = None if None in coarser else math.prod(coarser) ** (1 / len(coarser))
        return max(fine or 0.0, below or 0.0) > EXCESS

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
        """"sharp", "preview-like", "blurred" (softer than a 4x enlargement), "noise", or "undecided" (no detail to
        judge, or more than a picture has).
        """
        scale, ratio = self.detail_scale, self.reference_ratio
        if self.blank:
            return "undecided"
        if self.noisy:
            return "noise"
        if self.excess and (ratio is None or ratio > 1 / REFERENCE_RATIO):
            return "undecided"
        if ratio is not None and ratio >= REFERENCE_RATIO:
            return "sharp"
        if scale is None:
            return "undecided" if ratio is None else "blurred"
        if ratio is None and scale == 1:
            return "sharp"
        return "blurred" if scale == SCALES[-1] else "preview-like"

    @property
    def soft(self) -> bool:
        """True if the clip is softer than it should be."""
        return self.verdict in ("preview-like", "blurred")

    @property
    def warns(self) -> bool:
        """True if a warning is due: soft, noise in any frame, mostly black or flat, or standing still."""
        blank = sum(kind in (BLACK_FRAME, FLAT_FRAME) for kind in self.kinds)
        noise = bool(self.frames_of(NOISE_FRAME))
        return self.soft or noise or 2 * blank > len(self.values) or self.stands_still

    @property
    def remarks(self) -> list[str]:
        """Sentences about frames that are no moving picture."""
        count, lines = len(self.values), []
        for kind, what in _KINDS.items():
            if frames := self.frames_of(kind):
                some = f"{len(frames)} of {count} frames" if count > 1 else "The frame"
                every = "" if len(frames) == count else f": {spans(frames)}"
                lines.append(f"{some} {'is' if len(frames) == 1 else 'are'} {what}{every}.")
        if self.repeated:
            still = "The clip stands still: " if self.stands_still else ""
            plural = "s" * (len(self.repeated) == 1)
            lines.append(
                f"{still}{len(self.repeated)} of {count} frames repeat{plural} the one before: {spans(self.repeated)}."
            )
        return lines

    @property
    def title(self) -> str:
        """The verdict with what calls for a warning beside it, in a few words."""
        counts = ((kind, len(self.frames_of(kind))) for kind in _KINDS)
        extra = [f"{count} of {len(self.values)} {kind}" for kind, count in counts if count]
        return ", ".join([self.verdict, *extra, *(["stands still"] if self.stands_still else [])])

    @property
    def _meaning(self) -> str:
        if self.verdict == "undecided" and self.excess and not self.blank:
            return _MORE
        return _MEANING[self.verdict]

    @property
    def text(self) -> str:
        """The verdict, the numbers, and what it rests on, in a few lines."""
        count = len(self.values)
        lines = [
            " ".join([f"Verdict: {self.verdict}.", *self.remarks, self._meaning]),
            f"Sharpness (variance of the Laplacian, 8-bit grey): median {self.median:.1f}, min {self.min:.1f}, "
            f"max {self.max:.1f} over {count} frame{'s' * (count != 1)} of {self.width}x{self.height}.",
        ]
        if self.blank:
            return "\n".join(lines)
        if self.reference_ratio is not None:
            lines.append(
                f"Reason: {self.reference_ratio:.2f} of the reference {self.reference:g}; the threshold is "
                f"{REFERENCE_RATIO:g}, midway between the published preview decoder (0.22 of the full VAE) and 1."
            )
        elif self.detail[0] is None:
            lines.append("Reason: the frames are flat or too small. Give a reference value, or measure other frames.")
        elif self.verdict in ("sharp", "preview-like", "blurred"):
            found = "at full size" if self.detail_scale == 1 else f"at 1/{self.detail_scale} of the width or less"
            lines.append(
                f"Reason: the finest detail is {self.detail[0]:.2f} of that one octave below, the threshold is "
                f"{DETAIL_RATIO:g} (sharp photographs: 0.24 to 1.16, enlarged ones: at most 0.17); the detail starts "
                f"{found}. It depends on content and resolution: a reference value from a good clip of the same "
                "scene and size decides better."
            )
        if self.verdict in ("noise", "undecided") and self.detail[0] is not None:
            ratios = ", ".join(f"{ratio:.2f}" for ratio in self.detail if ratio is not None)
            lines.append(
                f"Detail of each octave, of that one below, from the finest: {ratios}. Photographs have 0.24 to 1.16 "
                f"in the finest, white noise 4 in all; above {EXCESS:g} nothing is decided."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        return {
            "median": self.median, "min": self.min, "max": self.max, "frames": len(self.values),
            "width": self.width, "height": self.height, "verdict": self.verdict, "soft": self.soft, "warns": self.warns,
            "black": self.frames_of(BLACK_FRAME), "flat": self.frames_of(FLAT_FRAME),
            "noise": self.frames_of(NOISE_FRAME), "repeated": list(self.repeated), "stands_still": self.stands_still,
            "detail_ratio": self.detail[0], "detail_scale": self.detail_scale, "detail_threshold": DETAIL_RATIO,
            "reference": self.reference, "reference_ratio": self.reference_ratio,
            "reference_threshold": REFERENCE_RATIO, "values": list(self.values), "text": self.text,
        }  # fmt: skip


_KINDS = {BLACK_FRAME: "black", FLAT_FRAME: "of one colour", NOISE_FRAME: "noise"}
_MORE = "There is more fine detail than a picture has: grain, noise or single pixels cover what could be judged."
_MEANING = {
    "noise": "Warning: this is noise, not a picture. Look at the sampling and at how the model's weights were read.",
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
    values, octaves, kinds, repeated, size, before = [], [], [], [], None, None
    for item in images:
        for frame in to_frames(item):
            size = size or frame.shape[:2]
            grey = gray(frame)
            octave = _octave_variances(grey)
            kinds.append(frame_kind(grey, [_ratio(*pair) for pair in pairwise(octave)]))
            again = kinds[-1] in (NOISE_FRAME, PICTURE) and repeats(grey, before)
            repeated += [len(values)] if again else []
            values.append(laplacian_variance(grey))
            octaves.append(octave)
            before = before if again else grey
            if on_frame:
                on_frame(len(values))
    if size is None:
        raise MediaError("found no frames; expected at least one. Check what is linked to the input.")
    detail = []
    for index in range(len(SCALES) - 1):
        ratios = [_ratio(o[index], o[index + 1]) for o in octaves if len(o) > index + 1 and max(o) >= FLAT]
        detail.append(float(median(ratios)) if ratios else None)
    return Sharpness(tuple(values), tuple(detail), size[1], size[0], reference, tuple(kinds), tuple(repeated))


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
        inner = cv2.Laplacian(reduced, cv2.CV_32F)[1:-1, 1:-1]  # its border would see an edge where a gradient ends
        deviation = float(cv2.meanStdDev(inner)[1][0, 0])
        result.append(max(deviation**2 - _ROUNDING / scale**2, 0.0))
    return result
