# SPDX-License-Identifier: Apache-2.0
"""Draws a Verification: the error of every quantised layer, by block and by layer type, and the worst ones by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checkpoint.verify.verify import LayerCheck, Verification, blocks_and_kinds
from .canvas import FAINT, GRID, INK, INNER, MARGIN, SMOOTH, WIDTH, Canvas, Colour

_LEFT = 330
_ROW, _WORST_ROWS = 26, 8
_WRONG: Colour = (200, 40, 40)
# Error -> colour, from better than any NVFP4 to what block maxima cost and beyond; between them it is mixed.
_SCALE: tuple[tuple[float, Colour], ...] = (
    (0.05, (38, 70, 130)),
    (0.075, (64, 142, 170)),
    (0.09, (136, 190, 120)),
    (0.105, (240, 205, 90)),
    (0.13, (226, 120, 50)),
)


def verification_picture(found: Verification) -> np.ndarray:
    """Verification -> (H, 1600, 3) uint8 RGB."""
    blocks, kinds = blocks_and_kinds(found.layers)
    worst = found.worst(_WORST_ROWS)
    height = 190 + _ROW * len(kinds) + 110 + 60 + 32 * len(worst) + MARGIN
    page = Canvas(WIDTH, round(height), SMOOTH)
    page.text(MARGIN, 40, f"{found.file} against {found.source}", 30, bold=True, limit=INNER)
    wrong = sum(bool(check.verdict) for check in found.layers)
    others = [*found.changed, *found.alone, *found.missing, *found.extra, *found.faults]
    beside = f", {len(others):,} other faults" if others else ""
    state = "as good as its format allows" if found.ok else f"{wrong:,} layers worse than their format allows{beside}"
    mean = f", mean error {found.mean_error:.4f}" if found.layers else ""
    page.text(MARGIN, 88, f"{len(found.layers):,} quantized layers{mean}: {state}", 22, FAINT if found.ok else _WRONG)
    page.text(MARGIN, 132, "Relative error by block (across) and layer type (down)", 22, bold=True)
    y = _map(page, 176, blocks, kinds)
    _legend(page, y + 34)
    _worst(page, y + 110, worst)
    return page.pixels()


def colour_of(error: float) -> Colour:
    """Error -> its colour on the scale, clamped to its ends."""
    if error <= _SCALE[0][0]:
        return _SCALE[0][1]
    for (low, a), (high, b) in zip(_SCALE, _SCALE[1:], strict=False):
        if error <= high:
            part = (error - low) / (high - low)
            return tuple(round(x + part * (y - x)) for x, y in zip(a, b, strict=True))
    return _SCALE[-1][1]


def _map(page: Canvas, y: float, blocks: Sequence[int], kinds) -> float:
    """One cell a layer; a failed one is red with a frame, one that is not quantised is left blank -> y below."""
    width = (INNER - _LEFT) / max(len(blocks), 12)
    for kind in sorted(kinds):
        page.text(MARGIN, y + _ROW / 2, kind, 18, anchor="lm", limit=_LEFT - 20)
        for index, block in enumerate(blocks):
            x = MARGIN + _LEFT + index * width
            check = kinds[kind].get(block)
            colour = GRID if check is None else _WRONG if check.verdict else colour_of(check.error)
            inset = (_ROW / 2 - 2) if check is None else 1
            page.box(x + 1, y + inset, x + width - 1, y + _ROW - inset, colour)
        y += _ROW
    every = max(1, round(34 / width))
    for index, block in enumerate(blocks):
        if index % every == 0:
            page.text(MARGIN + _LEFT + (index + 0.5) * width, y + 6, str(block), 16, FAINT, anchor="mt")
    return y


def _legend(page: Canvas, y: float) -> None:
    low, high, steps = _SCALE[0][0], _SCALE[-1][0], 120
    left, width = MARGIN + _LEFT, 520
    for step in range(steps):
        x = left + width * step / steps
        page.box(x, y, x + width / steps + 1, y + 18, colour_of(low + (high - low) * step / steps))
    for error, _ in _SCALE:
        page.text(left + width * (error - low) / (high - low), y + 24, f"{error:g}", 16, FAINT, anchor="mt")
    page.text(MARGIN, y + 9, "relative error", 18, FAINT, anchor="lm")
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
