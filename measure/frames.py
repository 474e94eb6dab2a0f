# SPDX-License-Identifier: Apache-2.0
"""What a frame is before anyone asks how sharp it is: black, flat, noise, or a repeat of the one before.

On (H, W) uint8 grey:

* black    no pixel above ``BLACK`` = 16 of 255, so that a night sky with stars is not
* flat     one colour: a standard deviation below ``FLAT_DEVIATION`` = 2. A gradient is no flat frame
* noise    white at every scale: the detail ratios D(k) / D(2k) of sharpness.py are all at least ``EXCESS`` = 2.5
           (white noise has 4 everywhere), neighbouring pixels do not correlate, and no background covers most of the
           picture, as it does in a starry sky (kurtosis)
* repeat   in no block of 8x8 pixels the mean difference to the last frame that was no repeat exceeds ``STILL`` = 2.5,
           so that one small thing which moves is movement, and a slow pan too, since it adds up; what a codec changes
           in a frozen photograph is not (x264: at most 1.6 at crf 23, 2.3 at crf 33; a pan by 0.1 pixel: 5.5)

Measured on the 16 photographs of tests/measure/test_sharpness.py: the correlation of neighbours is 0.75 and more, and
0.13 or more under grain with a deviation of 32 of 255; noise has 0.00, as JPEG -0.05. Noise that was enlarged, or
blurred by half a pixel, is not told from a texture and stays what its sharpness says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

BLACK, FLAT_DEVIATION, STILL = 16, 2.0, 2.5
EXCESS = 2.5
BLACK_FRAME, FLAT_FRAME, NOISE_FRAME, PICTURE = "black", "flat", "noise", ""
_CORRELATION, _KURTOSIS, _BLOCK = 0.06, 6.0, 8
_NAMED = 4


def frame_kind(grey: np.ndarray, ratios: Sequence[float]) -> str:
    """(H, W) uint8 and its detail ratios, the finest first -> BLACK_FRAME, FLAT_FRAME, NOISE_FRAME or PICTURE."""
    if int(grey.max()) <= BLACK:
        return BLACK_FRAME
    deviation = float(grey.std())
    if deviation < FLAT_DEVIATION:
        return FLAT_FRAME
    if len(ratios) < 2 or min(ratios) < EXCESS:
        return PICTURE
    plain = (grey - float(grey.mean())) / deviation
    beside = [float((one * other).mean()) for one, other in ((plain[1:], plain[:-1]), (plain[:, 1:], plain[:, :-1]))]
    # The correlation of n pairs of independent pixels has a deviation of 1 / sqrt(n).
    white = max(map(abs, beside)) < _CORRELATION + 4.0 / grey.size**0.5
    return NOISE_FRAME if white and float((plain**4).mean()) < _KURTOSIS else PICTURE


def repeats(grey: np.ndarray, before: np.ndarray | None) -> bool:
    """Whether an (H, W) uint8 frame shows what the last one that was no repeat does."""
    import cv2

    if before is None or before.shape != grey.shape:
        return False
    blocks = [max(side // _BLOCK, 1) for side in grey.shape]
    height, width = (min(count * _BLOCK, side) for count, side in zip(blocks, grey.shape, strict=True))
    difference = cv2.absdiff(grey, before).astype(np.float32)
    if float(cv2.resize(difference[:height, :width], blocks[::-1], interpolation=cv2.INTER_AREA).max()) > STILL:
        return False
    rest = difference[height:], difference[:, width:]
    return all(part.size == 0 or float(part.mean()) <= STILL for part in rest)


def runs(frames: Iterable[int]) -> list[tuple[int, int]]:
    """Frame numbers in order -> (first, last) of each unbroken run."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if found and frame == found[-1][1] + 1:
            found[-1] = (found[-1][0], frame)
        else:
            found.append((frame, frame))
    return found


def spans(frames: Sequence[int]) -> str:
    """Frame numbers -> "frame 3", "frames 3 to 7 and 12", the later runs only counted."""
    found = runs(frames)
    names = [f"{first}" if first == last else f"{first} to {last}" for first, last in found[:_NAMED]]
    if len(found) > _NAMED:
        names.append(f"{sum(last - first + 1 for first, last in found[_NAMED:])} more")
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"frame{'s' * (len(frames) > 1)} {listed}"
