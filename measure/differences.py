# SPDX-License-Identifier: Apache-2.0
"""What a comparison says in words: first whether both clips show the same, then what is wrong with B, A being trusted.

SSIM falls with every loss of detail, so whether two frames show the same is asked of their grey reduced ``COARSE`` = 8
times (``coarse``): a correlation of ``SAME`` = 0.8 there, or an SSIM of 0.8. On five photographs seen in motion, blur
of 4 pixels, enlarging, grain, a shift of 3 pixels, JPEG and less contrast leave a correlation of 0.93 and more; another
of the photographs has 0.38 at most, noise and black about 0.

``cells`` are the mean grey of 4 x 4 parts of a frame. What B's are above A's, from frame to frame, is what B does by
itself, since what happens in A cancels:

* flicker   median over the frames of half the second difference, in the worst cell, in levels of 255. Brightness that
            alternates by 1 % gives 1.9 and more on the photographs; blur, grain with a deviation of 25, a shift of 3
            pixels and slow changes give up to 1.0. ``FLICKER`` = 1.5 lies between; where A flickers itself, a tenth of
            that is let pass: JPEG of a picture that flickers by 10 % gives 1.6
* step      frames in which the mean over the cells changes by 2 levels and four times its median: a seam between pieces
            that were decoded apart
* standing out   frames whose SSIM is 0.1 and four median deviations below the median: a blend of two pictures where
            pieces overlap (ghosting), a damaged frame

The same numbers of one clip alone say nothing: a dissolve in the film is a ghost, a lamp flickers.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from .frames import BLACK_FRAME, FLAT_DEVIATION, FLAT_FRAME, NOISE_FRAME, spans
from .sharpness import REFERENCE_RATIO

if TYPE_CHECKING:
    from .compare import Comparison

COARSE, SAME, NEARLY = 8, 0.8, 0.95
FLICKER, STEP, DIP = 1.5, 2.0, 0.1
_CELLS, _SMALLEST_SIDE, _COLOUR = 4, 8, 16.0
_BRIGHTER, _CONTRAST = 8.0, 1.25
_BLANK = {BLACK_FRAME: "black", FLAT_FRAME: "of one colour", NOISE_FRAME: "noise"}


def coarse(grey: np.ndarray) -> np.ndarray:
    """(H, W) uint8 -> reduced ``COARSE`` times by area averaging, less where it would be below 8 pixels; float32."""
    import cv2

    scale = max(min(COARSE, min(grey.shape) // _SMALLEST_SIDE), 1)
    height, width = grey.shape[0] // scale, grey.shape[1] // scale
    whole = grey[: height * scale, : width * scale].astype(np.float32)
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Two (H, W) float32 -> correlation of their pixels; pictures of one colour are the same if the colour is."""
    x, y = a - a.mean(), b - b.mean()
    deviations = float(x.std()), float(y.std())
    if max(deviations) < FLAT_DEVIATION:
        return float(abs(float(a.mean() - b.mean())) < _COLOUR)
    if min(deviations) < FLAT_DEVIATION / 4:
        return 0.0
    return float((x * y).mean()) / (deviations[0] * deviations[1])


def cells(picture: np.ndarray) -> np.ndarray:
    """(H, W) float32 -> (16,) means of its parts."""
    rows = np.array_split(picture, min(_CELLS, picture.shape[0]), axis=0)
    return np.array([part.mean() for row in rows for part in np.array_split(row, _CELLS, axis=1)])


def flicker(gaps: np.ndarray) -> float:
    """(F, cells), of a clip or of the difference of two -> levels of 255 by which the worst cell flickers."""
    if len(gaps) < 4:
        return 0.0
    return float((np.median(np.abs(np.diff(gaps, 2, axis=0)), axis=0) / 2).max())


def steps(gaps: np.ndarray) -> dict[int, float]:
    """(F, cells) -> frame and size of each sudden change of brightness, in levels of 255."""
    if len(gaps) < 4:
        return {}
    moves = np.diff(gaps, axis=0)
    sizes = np.abs(moves - np.median(moves, axis=0)).mean(axis=1)
    least = max(STEP, 4.0 * float(np.median(sizes)))
    return {index + 1: float(size) for index, size in enumerate(sizes) if size > least}


def standing_out(similarity: tuple[float, ...]) -> list[int]:
    """SSIM of each frame -> numbers of the frames that are much less alike than the rest."""
    middle = median(similarity)
    deviation = median(abs(value - middle) for value in similarity)
    return [index for index, value in enumerate(similarity) if value < middle - max(DIP, 4.0 * deviation)]


def findings(found: Comparison) -> tuple[list[str], list[str]]:
    """-> (sentences, the most important first; those of them that tell of a fault, not of a little detail)."""
    faults = [_blank(found, 1), _blank(found, 0), _frozen(found, 1), _frozen(found, 0)]
    if not _incomparable(found):
        faults += [*_unsteady(found), *_exposure(found)]
    sharper, even = "", True
    if not found.identical and not _incomparable(found):
        sharper, even = _sharper(found)
    sound = [*found.audio.findings] if found.audio else []
    if found.audio is None and found.audio_note != "none":
        sound.append(f"Sound is {found.audio_note}.")
    if None not in found.fps and abs(found.fps[0] - found.fps[1]) > 0.01:
        sound.append(f"A plays at {found.fps[0]:g} frames a second, B at {found.fps[1]:g}.")
    if any(found.left_out):
        lengths = [found.frames + count for count in found.left_out]
        sound.append(f"A has {lengths[0]} frames, B {lengths[1]}; the first {found.frames} were compared.")
    identity, faults = _identity(found), [*filter(None, faults)]
    wrong = [*([identity] if found.other_frames else []), *faults, *([] if even else [sharper]), *sound]
    return [identity, *faults, *filter(None, [sharper]), *sound], wrong


def _identity(found: Comparison) -> str:
    if found.identical:
        return "The pictures are identical."
    numbers = f"SSIM {found.ssim:.2f}"
    if found.frames > 1:
        numbers += f", lowest {min(found.ssim_per_frame):.2f} in frame {found.worst_frame}"
    other = found.other_frames
    if len(other) == found.frames:
        return f"The pictures are not the same: {numbers}."
    if other:
        return f"In {len(other)} of {found.frames} frames the pictures are not the same, {spans(other)}: {numbers}."
    if found.ssim >= NEARLY:
        return f"The pictures are nearly the same: {numbers}."
    return f"The pictures show the same and differ in detail: {numbers}."


def _incomparable(found: Comparison) -> bool:
    """Whether sharpness says nothing: one of the clips is no picture, or they show different things."""
    blank = any(one.blank or one.noisy for one in found.sharpness)
    return blank or 2 * len(found.other_frames) > found.frames


def _blank(found: Comparison, side: int) -> str:
    """Frames of a clip that are no picture where the other's are."""
    one, other = found.sharpness[side], found.sharpness[1 - side]
    for kind, what in _BLANK.items():
        frames = [index for index in one.frames_of(kind) if other.kinds[index] != kind]
        if frames:
            where = "" if len(frames) == found.frames else f" in {spans(frames)}"
            return f"{'AB'[side]} is {what}{where}, {'BA'[side]} is not."
    return ""


def _frozen(found: Comparison, side: int) -> str:
    """Frames of a clip that repeat the one before where the other's do not."""
    one, other = found.sharpness[side], found.sharpness[1 - side]
    blank = {index for kind in (BLACK_FRAME, FLAT_FRAME) for index in (*one.frames_of(kind), *other.frames_of(kind))}
    frames = sorted(set(one.repeated) - set(other.repeated) - blank)
    if not frames:
        return ""
    what = "stands still" if len(frames) > found.frames / 2 else "repeats the frame before"
    return f"{'AB'[side]} {what} where {'BA'[side]} moves: {spans(frames)}."


def _unsteady(found: Comparison) -> list[str]:
    other = set(found.other_frames)
    lines = []
    if found.flicker > max(FLICKER, found.flicker_a / 10) and not other:
        lines.append(f"B flickers against A, by {found.flicker:.1f} of 255 from frame to frame.")
    changed = {frame: size for frame, size in found.steps.items() if not {frame, frame - 1} & other}
    if changed and not lines:
        lines.append(f"B jumps in brightness against A, by up to {max(changed.values()):.1f} of 255: "
                     f"{spans(list(changed))}.")  # fmt: skip
    named = other | {frame for one in found.sharpness for frame in one.repeated}
    frames = [frame for frame in standing_out(found.ssim_per_frame) if frame not in named]
    if frames:
        lines.append(f"Less alike than the rest: {spans(frames)}.")
    return lines


def _exposure(found: Comparison) -> list[str]:
    lines = []
    if abs(found.brighter) >= _BRIGHTER:
        word = "brighter" if found.brighter > 0 else "darker"
        lines.append(f"B is {word} than A by {abs(found.brighter):.0f} of 255.")
    if not 1 / _CONTRAST <= found.contrast <= _CONTRAST:
        lines.append(f"B has {found.contrast:.2f} of A's contrast.")
    return lines


def _sharper(found: Comparison) -> tuple[str, bool]:
    """One sentence, and whether it is no fault. What contrast alone does to the Laplacian's variance is taken out."""
    raw, (a, b) = found.sharpness_ratio, found.sharpness
    if raw is None:
        return "", True
    ratio = raw / found.contrast**2
    beyond = "" if 1 / _CONTRAST <= found.contrast <= _CONTRAST else " at equal contrast"
    if ratio < REFERENCE_RATIO:
        return f"B has {ratio:.2f} of A's sharpness{beyond}: it looks like a preview decode or a blurred one.", False
    if ratio <= 1 / REFERENCE_RATIO:
        return f"Both are about equally sharp{beyond}.", True
    if b.excess:
        return f"B has {ratio:.1f} times A's sharpness{beyond}, more than a picture has: it is full of grain.", False
    soft = ": A looks like a preview decode or a blurred one" if a.soft else ""
    return f"B has {ratio:.1f} times A's sharpness{beyond}{soft}.", False
