# SPDX-License-Identifier: Apache-2.0
"""Draws a RenderPlan: the roofline of the GPU with the model's work on it, the formats side by side, and the memory.

On the roofline every dot is one kind of work of a step: across, how many FLOPs it does for each byte it moves; up, the
rate at which it is predicted to run; its area is its share of the step. Work below the slope waits for memory, work
below a roof for arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..measure.fit import Fit
from ..measure.plan import RenderPlan
from ..measure.roofline import Work, decode_work
from ..measure.text import gib
from .canvas import BLUE, FAINT, GRID, INK, ORANGE, PAPER, PURPLE, RED, SMOOTH, TEAL, Canvas, Colour, wrap

_WIDTH, _HEIGHT, _MARGIN = 1600, 900, 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 1040, 150, 800
_SIDE = 1100
_COLOURS: dict[str, Colour] = {"math": BLUE, "weights": ORANGE, "attention": PURPLE, "between": TEAL}
_NAMES = {"math": "Linears", "weights": "Linears, waiting for weights", "attention": "attention", "between": "other"}
_NAMED = 6
_TOO_CLOSE = 16


def roofline_picture(plan: RenderPlan | str) -> np.ndarray:
    """RenderPlan -> (900, 1600, 3) uint8 RGB; without predictions the memory alone, of a sentence the sentence."""
    if isinstance(plan, str):
        return notice(plan)
    canvas = Canvas(_WIDTH, _HEIGHT, SMOOTH)
    clip = plan.clip
    canvas.text(_MARGIN, 28, f"{plan.file} on {plan.gpu.name}", 30, bold=True, limit=_WIDTH - 2 * _MARGIN)
    facts = [f"{clip.width}x{clip.height}, {clip.frames} frames, {clip.tokens['video']:,} video tokens"]
    facts += [f"{plan.mode} compute: a step {plan.seconds:.2f} s, {plan.step.bound}"] if plan.step else []
    canvas.text(_MARGIN, 72, "  |  ".join(facts), 21, FAINT, limit=_WIDTH - 2 * _MARGIN)
    if plan.step:
        _roofline(canvas, plan)
        _choices(canvas, plan)
    else:
        for index, line in enumerate(wrap(". ".join(plan.notes), 21, _RIGHT - _LEFT)):
            canvas.text(_LEFT, 300 + 32 * index, line, 21, FAINT)
    _memory(canvas, plan.fit, 500)
    return canvas.pixels()


def notice(text: str) -> np.ndarray:
    """A sentence -> (H, 620, 3) uint8 RGB."""
    lines = wrap(text, 20, 580)
    canvas = Canvas(620, 28 * len(lines) + 40)
    for index, line in enumerate(lines):
        canvas.text(20, 20 + 28 * index, line, 20, RED)
    return canvas.pixels()


def _roofline(canvas: Canvas, plan: RenderPlan) -> None:
    gpu, work = plan.gpu, [one for one in plan.step.work if one.seconds > 0]
    decode = decode_work(gpu, plan.fit.sizes["text_encoder"])
    roofs = [(name, rate) for name in ("fp4", "fp8", "bf16") if (rate := getattr(gpu, name))]
    low, high = _decades([_intensity(one) for one in [*work, decode]] + [roofs[0][1] / gpu.bandwidth])
    floor, top = _decades([_rate(one) for one in [*work, decode]])[0], 2 * roofs[0][1]
    x_of = _scale(low, high, _LEFT, _RIGHT)
    y_of = _scale(floor, top, _BOTTOM, _TOP)
    _axes(canvas, (low, high), (floor, top), x_of, y_of)
    for name, rate in roofs:
        ridge = rate / gpu.bandwidth
        canvas.line([(x_of(ridge), y_of(rate)), (_RIGHT, y_of(rate))], INK, 2)
        canvas.text(_RIGHT - 6, y_of(rate) - 5, f"{name} {rate / 1e12:,.4g} TFLOP/s", 16, INK, anchor="rs", halo=True)
    start = max(low, floor / gpu.bandwidth)
    end = roofs[0][1] / gpu.bandwidth
    canvas.line([(x_of(start), y_of(start * gpu.bandwidth)), (x_of(end), y_of(end * gpu.bandwidth))], INK, 2)
    middle = 0.3 * end
    label = f"{gpu.bandwidth / 1e9:,.4g} GB/s"
    canvas.text(x_of(middle) - 14, y_of(middle * gpu.bandwidth), label, 16, INK, anchor="rm", halo=True)
    total = sum(one.seconds for one in work)
    for one in sorted(work, key=lambda one: -one.seconds):
        radius = 7 + 60 * math.sqrt(one.seconds / total / math.pi)
        canvas.dot((x_of(_intensity(one)), y_of(_rate(one))), radius, _COLOURS[one.kind])
    at = x_of(_intensity(decode)), y_of(_rate(decode))
    canvas.dot(at, 9, RED)
    canvas.text(at[0] + 16, at[1], "text encoder, one token written", 16, RED, anchor="lm", halo=True)
    _names(canvas, work[:_NAMED], total, x_of, y_of)
    x = _LEFT
    for kind in (kind for kind in _NAMES if any(one.kind == kind for one in work)):
        canvas.dot((x + 7, 122), 7, _COLOURS[kind])
        x += canvas.text(x + 20, 122, _NAMES[kind], 17, FAINT, anchor="lm") + 48


def _names(canvas: Canvas, work: list[Work], total: float, x_of: Callable, y_of: Callable) -> None:
    """The largest kinds of work by number: on their dots, and in a list below the slope."""
    spots: list[tuple[float, float, str]] = []
    y = _BOTTOM - 34 * len(work) - 60
    canvas.text(_RIGHT - 330, y, "share of the step", 17, INK, anchor="lm", halo=True)
    for number, one in enumerate(work, 1):
        y += 34
        at = x_of(_intensity(one)), y_of(_rate(one))
        same = next((spot for spot in spots if math.dist(spot[:2], at) < _TOO_CLOSE), None)
        if same:
            spots[spots.index(same)] = (*same[:2], f"{same[2]},{number}")
        else:
            spots.append((*at, str(number)))
        text = f"{number}  {one.label}: {one.seconds / total:.0%}"
        canvas.text(_RIGHT - 330, y, text, 17, _COLOURS[one.kind], anchor="lm", halo=True, limit=330)
    for x, y, text in spots:
        canvas.text(x, y, text, 16, PAPER, anchor="mm", bold=True)


def _axes(canvas: Canvas, x_range: tuple, y_range: tuple, x_of: Callable, y_of: Callable) -> None:
    for power in range(round(math.log10(x_range[0])), round(math.log10(x_range[1])) + 1):
        x = x_of(10.0**power)
        canvas.line([(x, _TOP), (x, _BOTTOM)], GRID, 1)
        canvas.text(x, _BOTTOM + 10, f"{10.0**power:,g}", 16, FAINT, anchor="mt")
    for power in range(round(math.log10(y_range[0])), math.floor(math.log10(y_range[1])) + 1):
        y = y_of(10.0**power)
        canvas.line([(_LEFT, y), (_RIGHT, y)], GRID, 1)
        canvas.text(_LEFT - 10, y, f"{10.0 ** (power - 12):,g}", 16, FAINT, anchor="rm")
    canvas.text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "FLOP for each byte moved", 18, FAINT, anchor="mt")
    canvas.text(_LEFT - 10, _TOP - 14, "TFLOP/s", 16, FAINT, anchor="rs")


def _choices(canvas: Canvas, plan: RenderPlan) -> None:
    """A bar for each format and compute mode: seconds of a step, with the floor marked in it."""
    canvas.text(_SIDE, 128, "A step by format and compute", 20, bold=True)
    longest = max(one.seconds for one in plan.choices)
    y = 166
    for one in plan.choices:
        canvas.text(_SIDE, y + 13, f"{one.stored}, {one.mode}", 17, FAINT, anchor="lm")
        wide = 230 * one.seconds / longest
        colour = BLUE if one.stored == "NVFP4" else FAINT
        canvas.box(_SIDE + 120, y, _SIDE + 120 + wide, y + 26, colour)
        mark = _SIDE + 120 + 230 * one.floor / longest
        canvas.line([(mark, y - 2), (mark, y + 28)], INK, 2)
        canvas.text(_SIDE + 130 + wide, y + 13, f"{one.seconds:.2f} s", 17, INK, anchor="lm")
        y += 44
    canvas.text(_SIDE, y + 4, "black mark: no implementation can be faster", 15, FAINT)


def _memory(canvas: Canvas, found: Fit, y: float) -> None:
    """A bar for each phase: its own weights, working memory, what the host keeps free, the others' weights."""
    canvas.text(_SIDE, y, "GPU memory in each phase", 20, bold=True)
    y += 40
    parts = (("own weights", BLUE), ("working", ORANGE), ("always free", FAINT), ("other weights", (176, 196, 222)))
    x = _SIDE
    for name, colour in parts:
        canvas.box(x, y, x + 14, y + 14, colour)
        x += canvas.text(x + 20, y + 7, name, 15, FAINT, anchor="lm") + 34
    y += 34
    longest = max(found.memory, *(found.total + one.working + one.free for one in found.phases))
    room = _WIDTH - _MARGIN - _SIDE - 90
    for one in found.phases:
        canvas.text(_SIDE, y + 17, one.name, 17, FAINT, anchor="lm")
        x = _SIDE + 80
        values = (one.weights, one.working, one.free, found.total - one.weights)
        for (_, colour), value in zip(parts, values, strict=True):
            canvas.box(x, y, x + room * value / longest, y + 34, colour)
            x += room * value / longest
        y += 54
    limit = _SIDE + 80 + room * found.memory / longest
    canvas.line([(limit, y - 172), (limit, y - 8)], RED, 2.5)
    anchor = "rt" if limit > _SIDE + 300 else "lt"
    canvas.text(limit, y, f"{gib(found.memory)} of memory", 17, RED, anchor=anchor)


def _intensity(one: Work) -> float:
    return max(one.flops, 1.0) / one.nbytes


def _rate(one: Work) -> float:
    return one.flops / one.seconds


def _decades(values: list[float]) -> tuple[float, float]:
    return 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log10(high / low)
    return lambda value: start + (end - start) * math.log10(value / low) / span
