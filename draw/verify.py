# SPDX-License-Identifier: Apache-2.0
"""Draws a Verification: the error of every quantised layer, by block and by layer type, and the worst ones by name.

With a calibration file a second map shows the outputs: their error over that of plain block maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..checkpoint.verify.verify import LayerCheck, Verification, blocks_and_kinds
from .canvas import FAINT, GRID, INK, INNER, MARGIN, SMOOTH, WIDTH, Canvas, Colour

Scale = tuple[tuple[float, Colour], ...]
_LEFT = 330
_ROW, _WORST_ROWS = 26, 8
_WRONG: Colour = (200, 40, 40)
# Error -> colour, from better than any NVFP4 to what block maxima cost and beyond; between them it is mixed.
_COLOURS: tuple[Colour, ...] = ((38, 70, 130), (64, 142, 170), (136, 190, 120), (240, 205, 90), (226, 120, 50))
_SCALE: Scale = tuple(zip((0.05, 0.075, 0.09, 0.105, 0.13), _COLOURS, strict=True))
# The same for the outputs, as shares of the error of block maxima.
_SHARES: Scale = tuple(zip((0.4, 0.6, 0.8, 1.0, 1.25), _COLOURS, strict=True))


def verification_picture(found: Verification) -> np.ndarray:
    """Verification -> (H, 1600, 3) uint8 RGB."""
    blocks, kinds = blocks_and_kinds(found.layers)
    worst = found.worst(_WORST_ROWS)
    judged = any(check.output is not None for check in found.layers)
    height = 190 + (1 + judged) * (_ROW * len(kinds) + 110) + 60 + 32 * len(worst) + MARGIN + 44 * judged
    page = Canvas(WIDTH, round(height), SMOOTH)
    page.text(MARGIN, 40, f"{found.file} against {found.source}", 30, bold=True, limit=INNER)
    wrong = sum(bool(check.verdict) for check in found.layers)
    others = [*found.changed, *found.alone, *found.missing, *found.extra, *found.faults]
    beside = f", {len(others):,} other faults" if others else ""
    state = "as good as its format allows" if found.ok else f"{wrong:,} layers worse than their format allows{beside}"
    mean = f", mean error {found.mean_error:.4f}" if found.layers else ""
    page.text(MARGIN, 88, f"{len(found.layers):,} quantized layers{mean}: {state}", 22, FAINT if found.ok else _WRONG)
    page.text(MARGIN, 132, "Relative error by block (across) and layer type (down)", 22, bold=True)
    y = _map(page, 176, blocks, kinds, lambda check: check.error, _SCALE)
    _legend(page, y + 34, _SCALE, "relative error")
    if judged:
        page.text(MARGIN, y + 110, "Error of the outputs, over that of block maxima", 22, bold=True)
        y = _map(page, y + 154, blocks, kinds, _share, _SHARES)
        _legend(page, y + 34, _SHARES, "share of that error")
    _worst(page, y + 110, worst)
    return page.pixels()


def _share(check: LayerCheck) -> float | None:
    if check.output is None:
        return None
    return check.output / check.output_plain if check.output_plain else 0.0


def colour_of(error: float, scale: Scale = _SCALE) -> Colour:
    """Error -> its colour on the scale, clamped to its ends."""
    if error <= scale[0][0]:
        return scale[0][1]
    for (low, a), (high, b) in zip(scale, scale[1:], strict=False):
        if error <= high:
            part = (error - low) / (high - low)
            return tuple(round(x + part * (y - x)) for x, y in zip(a, b, strict=True))
    return scale[-1][1]


def _map(page: Canvas, y: float, blocks: Sequence[int], kinds, value: Callable, scale: Scale) -> float:
    """One cell a layer; a failed one is red with a frame, one that is not quantised is left blank -> y below."""
    width = (INNER - _LEFT) / max(len(blocks), 12)
    for kind in sorted(kinds):
        page.text(MARGIN, y + _ROW / 2, kind, 18, anchor="lm", limit=_LEFT - 20)
        for index, block in enumerate(blocks):
            x = MARGIN + _LEFT + index * width
            check = kinds[kind].get(block)
            known = None if check is None else value(check)
            colour = GRID if known is None else _WRONG if check.verdict else colour_of(known, scale)
            inset = (_ROW / 2 - 2) if known is None else 1
            page.box(x + 1, y + inset, x + width - 1, y + _ROW - inset, colour)
        y += _ROW
    every = max(1, round(34 / width))
    for index, block in enumerate(blocks):
        if index % every == 0:
            page.text(MARGIN + _LEFT + (index + 0.5) * width, y + 6, str(block), 16, FAINT, anchor="mt")
    return y


def _legend(page: Canvas, y: float, scale: Scale, title: str) -> None:
    low, high, steps = scale[0][0], scale[-1][0], 120
    left, width = MARGIN + _LEFT, 520
    for step in range(steps):
        x = left + width * step / steps
        page.box(x, y, x + width / steps + 1, y + 18, colour_of(low + (high - low) * step / steps, scale))
    for error, _ in scale:
        page.text(left + width * (error - low) / (high - low), y + 24, f"{error:g}", 16, FAINT, anchor="mt")
    page.text(MARGIN, y + 9, title, 18, FAINT, anchor="lm")
    page.box(left + width + 60, y, left + width + 78, y + 18, _WRONG)
    page.text(left + width + 90, y + 9, "worse than the format allows", 18, FAINT, anchor="lm")


def _worst(page: Canvas, y: float, worst: Sequence[LayerCheck]) -> None:
    page.text(MARGIN, y, "Worst layers", 22, bold=True)
    y += 42
    for check in worst:
        page.text(MARGIN, y, check.layer, 19, _WRONG if check.verdict else INK, limit=720)
        numbers = f"error {check.error:.4f} (allowed {check.allowed:.4f}), {check.sqnr:.1f} dB"
        page.text(MARGIN + 760, y, numbers, 19, FAINT)
        page.text(MARGIN + 1230, y, f"{100 * check.lost:.2f} % of blocks lost", 19, FAINT)
        y += 32
