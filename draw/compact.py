# SPDX-License-Identifier: Apache-2.0
"""The pictures that nodes show: the same records as the large ones, so few and so large that they are legible there.

A node is about 310 pixels wide and gives a picture about 220 of its height, below the report's text, which names the
file and the verdict. Every picture is laid out at that size, with letters of 11 pixels and more, and drawn with two
pixels for each, for dense screens and for zooming in. -> (H, 620, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..checkpoint.identify.report import OUTSIDE, Inspection, size_text
from ..measure.compare import Comparison
from ..measure.fit import Fit
from ..measure.media import to_frames
from ..measure.plan import RenderPlan
from ..measure.sharpness import REFERENCE_RATIO, Sharpness
from ..measure.text import gib
from .canvas import BLUE, FAINT, GRID, INK, ORANGE, RED, Canvas, Colour, resized
from .compare import ticks
from .inspect import COMPONENT_COLOURS, FORMAT_COLOURS, OTHER_FORMAT
from .planner import notice

WIDTH, DENSITY = 310, 2
_MARGIN = 10
_INNER = WIDTH - 2 * _MARGIN
_TITLE, _TEXT, _SMALL = 14, 12, 11
_LINE = 16
_MOST_FORMATS = 4


def compact_inspection(found: Inspection) -> np.ndarray:
    """Bytes by component, and bytes by block and format."""
    blocks = {label: sizes for label, sizes in found.blocks.items() if label != OUTSIDE} or found.blocks
    canvas = _page(_MARGIN + 28 + _LINE * len(found.parts) + (96 if blocks else 0) + _MARGIN)
    total = sum(part.nbytes for part in found.parts) or 1
    x, y = float(_MARGIN), _MARGIN
    for part in found.parts:
        canvas.box(x, y, x + _INNER * part.nbytes / total, y + 20, COMPONENT_COLOURS[part.name])
        x += _INNER * part.nbytes / total
    y += 28
    for part in sorted(found.parts, key=lambda part: -part.nbytes):
        _key(canvas, _MARGIN, y, part.title, COMPONENT_COLOURS[part.name])
        canvas.text(WIDTH - _MARGIN, y, size_text(part.nbytes), _TEXT, anchor="ra", bold=True)
        y += _LINE
    if blocks:
        _blocks(canvas, y + 6, blocks)
    return canvas.pixels()


def _blocks(canvas: Canvas, y: float, blocks: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """A legend and one column a block, stacked by format, 90 high in all."""
    sums: dict[str, int] = {}
    for sizes in blocks.values():
        for name, (_, nbytes) in sizes.items():
            sums[name] = sums.get(name, 0) + nbytes
    names = sorted(sums, key=lambda name: -sums[name])
    x = _MARGIN + canvas.text(_MARGIN, y, "blocks", _TEXT, bold=True) + 12
    for name in names[:_MOST_FORMATS]:
        x += _key(canvas, x, y, name, FORMAT_COLOURS.get(name, OTHER_FORMAT)) + 12
    base, tall = y + 76, 56
    top = max(sum(nbytes for _, nbytes in sizes.values()) for sizes in blocks.values()) or 1
    pitch = _INNER / max(len(blocks), 12)
    every = max(1, round(26 / pitch))
    for index, (label, sizes) in enumerate(blocks.items()):
        left, level = _MARGIN + pitch * index, base
        for name in names:
            high = tall * sizes.get(name, (0, 0))[1] / top
            if high:
                colour = FORMAT_COLOURS.get(name, OTHER_FORMAT)
                canvas.box(left + 0.1 * pitch, level - high, left + 0.9 * pitch, level, colour)
            level -= high
        if index % every == 0:
            canvas.text(left + pitch / 2, base + 3, label, _SMALL, FAINT, anchor="mt")


def compact_plan(plan: RenderPlan | str) -> np.ndarray:
    """Memory in each phase against that of the GPU, and a step by format and compute; of a sentence the sentence."""
    if isinstance(plan, str):
        return notice(plan)
    choices = plan.choices if plan.step else ()
    canvas = _page(_MARGIN + 34 + 18 * len(plan.fit.phases) + (24 + 16 * len(choices) if choices else 0) + _MARGIN)
    y = _memory(canvas, plan.fit, _MARGIN)
    if choices:
        canvas.text(_MARGIN, y + 4, f"a step on {plan.gpu.name}", _TEXT, bold=True, limit=_INNER)
        y += 22
        longest = max(one.seconds for one in choices)
        for one in choices:
            canvas.text(_MARGIN, y, f"{one.stored}, {one.mode}", _TEXT, FAINT)
            wide = 136 * one.seconds / longest
            canvas.box(102, y + 2, 102 + wide, y + 13, BLUE if one.stored == "NVFP4" else FAINT)
            canvas.text(108 + wide, y, f"{one.seconds:.2f} s", _TEXT)
            y += 16
    return canvas.pixels()


def _memory(canvas: Canvas, found: Fit, y: float) -> float:
    """A bar a phase: weights, working memory, what stays free; a line where the memory ends -> y below."""
    x = _MARGIN + canvas.text(_MARGIN, y, "memory", _TEXT, bold=True) + 12
    parts = (("weights", BLUE), ("working", ORANGE), ("always free", FAINT))
    for name, colour in parts:
        x += _key(canvas, x, y, name, colour) + 12
    y += 20
    left, room = 62, _INNER - 112
    longest = max(found.memory, *(one.needs for one in found.phases))
    limit = left + room * found.memory / longest
    top = y
    for one in found.phases:
        canvas.text(_MARGIN, y, one.name, _TEXT, FAINT)
        x = float(left)
        for (_, colour), value in zip(parts, (one.weights, one.working, one.free), strict=True):
            canvas.box(x, y + 1, x + room * value / longest, y + 14, colour)
            x += room * value / longest
        canvas.text(max(x, limit) + 6, y, gib(one.needs), _TEXT, INK if one.alone else RED)
        y += 18
    canvas.line([(limit, top - 1), (limit, y)], RED, 1.5)
    canvas.text(limit + 6, y, f"of {gib(found.memory)}", _SMALL, RED)
    return y + 14


def compact_sharpness(found: Sharpness) -> np.ndarray:
    """The verdict, and sharpness over the frames with what it is judged by."""
    lines = [("median", found.median, FAINT)]
    if found.reference is not None:
        lines = [("reference", found.reference, FAINT), ("warning below", REFERENCE_RATIO * found.reference, RED)]
    canvas = _page(218)
    canvas.text(_MARGIN, _MARGIN, found.title, _TITLE, RED if found.warns else INK, bold=True, limit=180)
    median = f"{found.median:,.0f}" if found.median >= 100 else f"{found.median:.1f}"
    canvas.text(WIDTH - _MARGIN, _MARGIN + 1, f"median {median}", _TEXT, FAINT, anchor="ra")
    left, right, top, bottom = 52, WIDTH - _MARGIN, 40, 182
    high = max(*found.values, *(value for _, value, _ in lines)) * 1.08 or 1.0
    for tick in ticks(0, high):
        y = bottom - (bottom - top) * tick / high
        canvas.line([(left, y), (right, y)], GRID, 1)
        canvas.text(left - 6, y, f"{tick:g}", _SMALL, FAINT, anchor="rm")
    count = len(found.values)
    points = [
        (left + (right - left) * (index / (count - 1) if count > 1 else 0.5), bottom - (bottom - top) * value / high)
        for index, value in enumerate(found.values)
    ]
    for label, value, colour in lines:
        y = bottom - (bottom - top) * value / high
        canvas.line([(left, y), (right, y)], colour, 1)
        if label != "median":
            canvas.text(right, y - 3, label, _SMALL, colour, anchor="rs", halo=True)
    canvas.line(points, BLUE, 2)
    for point in points if count <= 40 else ():
        canvas.dot(point, 3, BLUE)
    canvas.text(left, bottom + 6, "frame 0", _SMALL, FAINT)
    if count > 1:
        canvas.text(right, bottom + 6, f"{count - 1}", _SMALL, FAINT, anchor="ra")
    return canvas.pixels()


def compact_comparison(found: Comparison, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The worst frame of both clips, (F, H, W, 3), and the first numbers."""
    room = (_INNER - 8) // 2
    frames = [_reduced(to_frames(clip[found.worst_frame : found.worst_frame + 1])[0], room, 106) for clip in (a, b)]
    tall = frames[0].shape[0] / DENSITY
    rows = found.rows()[:4]
    canvas = _page(_MARGIN + 18 + tall + 6 + _LINE * len(rows) + _MARGIN)
    for x, name, colour, frame in zip((_MARGIN, _MARGIN + room + 8), "AB", (BLUE, ORANGE), frames, strict=True):
        canvas.text(x, _MARGIN, f"{name}, frame {found.worst_frame}", _TEXT, colour, bold=True)
        canvas.paste(x, _MARGIN + 18, frame)
    y = _MARGIN + 24 + tall
    for label, value in rows:
        canvas.text(_MARGIN, y, label, _TEXT, FAINT)
        canvas.text(WIDTH - _MARGIN, y, value.partition("  (")[0], _TEXT, anchor="ra", bold=True)
        y += _LINE
    return canvas.pixels()


def _page(height: float) -> Canvas:
    return Canvas(WIDTH, round(height), density=DENSITY)


def _key(canvas: Canvas, x: float, y: float, name: str, colour: Colour) -> float:
    """One entry of a legend -> its width."""
    canvas.box(x, y + 3, x + 9, y + 12, colour)
    return canvas.text(x + 14, y, name, _TEXT, FAINT, limit=200) + 14


def _reduced(frame: np.ndarray, wide: float, tall: float) -> np.ndarray:
    """(H, W, 3) -> as large as it fits, in pixels."""
    scale = DENSITY * min(wide / frame.shape[1], tall / frame.shape[0])
    size = max(round(frame.shape[1] * scale), 1), max(round(frame.shape[0] * scale), 1)
    return resized(frame, *size)
