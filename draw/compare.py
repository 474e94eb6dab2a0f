# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements: curves over the frames, heat map, frame strip, and the card of a comparison.

The colours of the heat map are OpenCV's. Every function returns (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..measure.media import to_frames
from ..measure.sharpness import REFERENCE_RATIO, Sharpness
from .canvas import BLUE, FAINT, GRID, INK, ORANGE, RED, SMOOTH, Canvas, Colour, resized, wrap

if TYPE_CHECKING:
    from ..measure.compare import Comparison

_PADDING, _MARGIN, _GAP, _WIDTH = 24, 40, 32, 1600
_TABLE, _ROW, _CURVES = 700, 46, 340
_CROP_ZOOM = 2
_MARKERS_UP_TO = 40


def sharpness_plot(sharpness: Sharpness, width: int = 1000, height: int = 460) -> np.ndarray:
    """Variance of the Laplacian over the frames, with the reference (or the median) and the warning line."""
    lines = [("median", sharpness.median, FAINT)]
    if sharpness.reference is not None:
        threshold = REFERENCE_RATIO * sharpness.reference
        lines = [("reference", sharpness.reference, FAINT), ("warning below", threshold, RED)]
    title = f"Sharpness (variance of the Laplacian): {sharpness.title}"
    plot = curves({"": sharpness.values}, title, width - 2 * _PADDING, height - 2 * _PADDING, lines)
    return np.pad(plot, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)), constant_values=255)


def curves(
    series: Mapping[str, Sequence[float]],
    title: str,
    width: int = 1000,
    height: int = 460,
    lines: Sequence[tuple[str, float, Colour]] = (),
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """One or two named series over the frame number; ``lines`` are labelled horizontal (label, value, colour)."""
    canvas = Canvas(width, height, SMOOTH)
    canvas.text(0, 0, title, 20, bold=True)
    values = [v for s in series.values() for v in s] + [value for _, value, _ in lines]
    low, high = limits or (0.0, max(values) * 1.08 or 1.0)
    marks = ticks(low, high)
    left, right, top, bottom = 72, width - 12, 44, height - 56
    count = max(len(s) for s in series.values())

    def x_of(index: float) -> float:
        return left + (right - left) * (index / (count - 1) if count > 1 else 0.5)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for tick in marks:
        canvas.line([(left, y_of(tick)), (right, y_of(tick))], GRID, 1)
        canvas.text(left - 10, y_of(tick), f"{tick:g}", 15, FAINT, anchor="rm")
    canvas.line([(left, bottom), (right, bottom)], FAINT, 1)
    for tick in ticks(0, max(count - 1, 1), whole=True):
        if tick < count:
            canvas.text(x_of(tick), bottom + 8, f"{tick:g}", 15, FAINT, anchor="mt")
    canvas.text((left + right) / 2, height - 4, "frame", 15, FAINT, anchor="ms")
    for data, colour in zip(series.values(), (BLUE, ORANGE), strict=False):
        points = [(x_of(i), y_of(v)) for i, v in enumerate(data)]
        canvas.line(points, colour, 2.5)
        if count <= _MARKERS_UP_TO:
            for point in points:
                canvas.dot(point, 4, colour)
    for label, value, colour in lines:
        for start in range(left, right, 14):
            canvas.line([(start, y_of(value)), (min(start + 8, right), y_of(value))], colour, 1.5)
        canvas.text(right, y_of(value) - 5, f"{label} {value:.4g}", 15, colour, anchor="rs", halo=True)
    x = right
    for name, colour in reversed(list(zip(series, (BLUE, ORANGE), strict=False))):
        x -= canvas.text(x, 2, name, 17, colour, anchor="ra", bold=True) + 20
    return canvas.pixels()


def heat_map(difference: np.ndarray) -> tuple[np.ndarray, float]:
    """(H, W) mean absolute difference in 0..255 -> (colours, the difference shown as the brightest colour).

    The scale ends at the 99.8th percentile, at least 1, so that a single pixel does not darken the rest.
    """
    import cv2

    top = max(float(np.percentile(difference, 99.8)), 1.0)
    levels = np.rint(np.clip(difference / top, 0.0, 1.0) * 255.0).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), top


def strip(a: np.ndarray, b: np.ndarray, width: int = 1520, columns: int = 5, tallest: int = 320) -> np.ndarray:
    """Two clips (F, H, W, 3) -> frames spread over the clip, A above B; a single frame stands beside its twin."""
    indices = sorted({round(i) for i in np.linspace(0, len(a) - 1, min(columns, len(a)))})
    gap, label, head = 12, 28, 24
    across = max(len(indices), 2)
    cell = (width - (label if len(indices) > 1 else 2 * label) - gap * (across - 1)) // across
    scale = min(cell / a.shape[2], tallest / a.shape[1])
    wide, tall = max(round(a.shape[2] * scale), 1), max(round(a.shape[1] * scale), 1)
    spots = [(label + i * (wide + gap), head, a, index) for i, index in enumerate(indices)]
    if len(indices) > 1:
        spots += [(x, head + tall + gap, b, index) for x, _, _, index in spots]
    else:
        spots += [(2 * label + wide + gap, head, b, indices[0])]
    canvas = Canvas(width, max(y for _, y, _, _ in spots) + tall)
    for x, y, clip, index in spots:
        canvas.paste(x, y, resized(clip[index], wide, tall))
        if y == head:
            canvas.text(x, 16, f"frame {index}", 15, FAINT, anchor="ls")
    for name, colour, (x, y, _, _) in (("A", BLUE, spots[0]), ("B", ORANGE, spots[len(indices)])):
        canvas.text(x - label, y + tall / 2, name, 22, colour, anchor="lm", bold=True)
    return canvas.pixels()


def comparison_card(comparison: Comparison, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Comparison and its clips, (F, H, W, 3) uint8 or longer -> one picture, 1600 wide, of all there is to see."""
    a, b = (to_frames(clip)[: comparison.frames] for clip in (a, b))
    inner, right = _WIDTH - 2 * _MARGIN, _MARGIN + _TABLE + _GAP
    table = _table(comparison, _TABLE)
    blocks = [
        _beside(table, _heat_panel(comparison, _WIDTH - _MARGIN - right, table.shape[0])),
        _crops(comparison, a, b, inner),
        strip(a, b, inner),
    ]
    if comparison.frames > 1:
        sharpness = {name: s.values for name, s in zip("AB", comparison.sharpness, strict=True)}
        low = min(*comparison.ssim_per_frame, 0.99)
        limits = (low - 0.25 * (1.0 - low), 1.0)
        half = (inner - _GAP) // 2
        blocks.append(
            _beside(
                curves(sharpness, "Sharpness (variance of the Laplacian)", half, _CURVES),
                curves({"": comparison.ssim_per_frame}, "SSIM", half, _CURVES, limits=limits),
            )
        )
    first, *others = comparison.findings
    faults = comparison.faults
    lines = [(line, 30, RED if first in faults else INK) for line in wrap(first, 30, inner)]
    lines += [(line, 20, RED if one in faults else INK) for one in others for line in wrap(one, 20, inner)]
    head = 32 + sum(size + 12 for _, size, _ in lines) + 48
    canvas = Canvas(_WIDTH, head + sum(block.shape[0] + _GAP for block in blocks) + _MARGIN - _GAP)
    y = 32
    for line, size, colour in lines:
        canvas.text(_MARGIN, y, line, size, colour, bold=True)
        y += size + 12
    canvas.text(_MARGIN, y + 4, f"A: {comparison.names[0]}", 19, BLUE, limit=_TABLE)
    canvas.text(right, y + 4, f"B: {comparison.names[1]}", 19, ORANGE, limit=_WIDTH - _MARGIN - right)
    y = head
    for block in blocks:
        canvas.paste(_MARGIN, y, block)
        y += block.shape[0] + _GAP
    return canvas.pixels()


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one height, a gap between them."""
    return np.hstack((left, np.full((left.shape[0], _GAP, 3), 255, np.uint8), right))


def _table(comparison: Comparison, width: int) -> np.ndarray:
    first = comparison.sharpness[0]
    size = f"{comparison.frames} frame{'s' * (comparison.frames != 1)} of {first.width}x{first.height}"
    if any(comparison.left_out):
        size += f"; left out {comparison.left_out[0]} of A, {comparison.left_out[1]} of B"
    rows = [("Clip", size), *comparison.rows()]
    canvas = Canvas(width, _ROW * len(rows) + 2)
    for index, (label, value) in enumerate(rows):
        y = _ROW * index
        canvas.line([(0, y), (width, y)], GRID, 1)
        canvas.text(0, y + _ROW / 2, label, 19, FAINT, anchor="lm")
        ratio = comparison.sharpness_ratio
        alarm = label.startswith("Sharpness ratio") and ratio is not None and not 0.5 <= ratio <= 2.0
        canvas.text(230, y + _ROW / 2, value, 21, RED if alarm else INK, anchor="lm", bold=True, limit=width - 230)
    return canvas.pixels()


def _heat_panel(comparison: Comparison, width: int, height: int) -> np.ndarray:
    colours, top = heat_map(comparison.difference)
    canvas = Canvas(width, height)
    canvas.text(0, 0, "Mean difference |A - B| of each pixel", 20, bold=True)
    room = height - 34 - 44
    tall, wide = colours.shape[:2]
    scale = min(width / wide, room / tall)
    picture = resized(colours, max(round(wide * scale), 1), max(round(tall * scale), 1))
    canvas.paste(0, 34, picture)
    bar, _ = heat_map(np.tile(np.linspace(0, 255, picture.shape[1]), (12, 1)))
    y = 34 + picture.shape[0] + 8
    canvas.paste(0, y, bar)
    canvas.text(0, y + 17, "0", 15, FAINT)
    canvas.text(picture.shape[1], y + 17, f"{top:.1f} of 255", 15, FAINT, anchor="ra")
    return canvas.pixels()


def _crops(comparison: Comparison, a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """The place of the largest difference in whole magnified pixels, because a reduced picture hides blur."""
    import cv2

    index = comparison.worst_frame
    height, wide = a.shape[1:3]
    side = ((width - 2 * 12) // 3, 300)
    zoom = max(_CROP_ZOOM, min(side[0] // wide, side[1] // height))
    box_w, box_h = min(wide, side[0] // zoom), min(height, side[1] // zoom)
    blurred = cv2.blur(comparison.difference, (box_w, box_h), borderType=cv2.BORDER_CONSTANT)
    cy, cx = np.unravel_index(int(blurred.argmax()), blurred.shape)
    x, y = min(max(cx - box_w // 2, 0), wide - box_w), min(max(cy - box_h // 2, 0), height - box_h)
    left, right = (clip[index, y : y + box_h, x : x + box_w] for clip in (a, b))
    gap = np.abs(left.astype(np.int16) - right)
    gain = max(1, min(64, int(255 // max(float(np.percentile(gap, 99.5)), 1.0))))
    names = (("A", BLUE), ("B", ORANGE), (f"|A - B| x {gain}", INK))
    canvas = Canvas(width, box_h * zoom + 32)
    for column, (picture, (name, colour)) in enumerate(zip((left, right, gap * gain), names, strict=True)):
        at = column * (side[0] + 12)
        used = canvas.text(at, 2, name, 20, colour, bold=True)
        where = f"frame {index}, {zoom}:1, from x {x}, y {y}" if column < 2 else ""
        canvas.text(at + used + 12, 5, where, 16, FAINT)
        pixels = np.clip(picture, 0, 255).astype(np.uint8).repeat(zoom, axis=0).repeat(zoom, axis=1)
        canvas.paste(at, 32, pixels)
    return canvas.pixels()


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
