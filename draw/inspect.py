# SPDX-License-Identifier: Apache-2.0
"""Draws an Inspection: bytes by component, bytes by block and format, and what stock ComfyUI does with the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np

from ..checkpoint.identify.components import AUDIO_VAE, DIFFUSION_MODEL, REST, TEXT_PROJECTION, VIDEO_VAE
from ..checkpoint.identify.report import OUTSIDE, ComponentSize, Inspection
from ..measure.text import size_text
from .canvas import (
    FAINT,
    GREY,
    GRID,
    INNER,
    MARGIN,
    PAPER,
    PURPLE,
    SMOOTH,
    TEAL,
    WIDTH,
    Canvas,
    Colour,
    text_width,
    wrap,
)

COMPONENT_COLOURS: dict[str, Colour] = {
    DIFFUSION_MODEL: (52, 96, 160),
    VIDEO_VAE: (214, 118, 32),
    AUDIO_VAE: PURPLE,
    TEXT_PROJECTION: TEAL,
    REST: GREY,
}
FORMAT_COLOURS: dict[str, Colour] = {
    "NVFP4": (86, 158, 60),
    "scaled FP8": (222, 160, 40),
    "FP8": (236, 192, 110),
    "scaled INT8": (190, 90, 60),
    "BF16": (52, 96, 160),
    "F16": (90, 140, 196),
    "F32": (128, 84, 150),
}
OTHER_FORMAT = GREY
_CHART, _BAR, _LINE = 360, 54, 30
_MOST_COLUMNS = 1000  # thinner ones would not be seen


def inspection_picture(found: Inspection) -> np.ndarray:
    """Inspection -> (H, 1600, 3) uint8 RGB."""
    stock = [(part.title, found.stock[part.name]) for part in found.parts if part.name in found.stock]
    text_lines = sum(len(wrap(text, 21, INNER - 330)) for _, text in stock)
    chart = _CHART + 160 if found.blocks else 0
    height = 190 + (_BAR + 50 + 36 * len(found.parts)) + chart + (70 + _LINE * text_lines if stock else 0) + MARGIN
    page = Canvas(WIDTH, round(height), SMOOTH)
    page.text(MARGIN, 40, found.file, 34, bold=True, limit=INNER)
    page.text(MARGIN, 88, found.kind, 22, FAINT, limit=INNER)
    facts = [size_text(found.file_size), f"{sum(part.tensors for part in found.parts):,} tensors"]
    if found.dialect or "NVFP4" in found.formats:
        facts.append(f"dialect {found.dialect or 'open'}")
    page.text(MARGIN, 120, "  |  ".join(facts), 22, FAINT)
    y = _components(page, 176, found.parts)
    if found.blocks:
        y = _blocks(page, y + 40, found.blocks)
    if stock:
        _stock(page, y + 40, stock)
    return page.pixels()


def _components(page: Canvas, y: float, parts: tuple[ComponentSize, ...]) -> float:
    """One bar, each component in proportion, and a line of numbers for each -> y below."""
    total = sum(part.nbytes for part in parts) or 1
    x = float(MARGIN)
    for part in parts:
        wide = INNER * part.nbytes / total
        page.box(x, y, x + max(wide - 2, 1), y + _BAR, COMPONENT_COLOURS[part.name])
        label = f"{100 * part.nbytes / total:.0f} %"
        if wide > 70:
            page.text(x + wide / 2, y + _BAR / 2, label, 20, PAPER, anchor="mm")
        x += wide
    y += _BAR + 22
    for part in sorted(parts, key=lambda part: -part.nbytes):
        page.box(MARGIN, y + 4, MARGIN + 18, y + 22, COMPONENT_COLOURS[part.name])
        page.text(MARGIN + 32, y + 13, part.title, 21, anchor="lm")
        page.text(MARGIN + 520, y + 13, size_text(part.nbytes), 21, anchor="rm", bold=True)
        page.text(MARGIN + 560, y + 13, f"{part.parameters / 1e6:,.1f} M parameters", 21, FAINT, anchor="lm")
        page.text(MARGIN + 860, y + 13, f"{part.tensors:,} tensors", 21, FAINT, anchor="lm")
        if part.prefix:
            page.text(MARGIN + 1060, y + 13, f"under {part.prefix}*", 21, FAINT, anchor="lm", limit=420)
        y += 36
    return y


def _blocks(page: Canvas, y: float, blocks: Mapping[str, Mapping[str, tuple[int, int]]]) -> float:
    """One column per block, stacked by format -> y below. What lies outside the blocks is told in words."""
    page.text(MARGIN, y, "Diffusion model: bytes by block and format", 22, bold=True)
    names = list(dict.fromkeys(name for sizes in blocks.values() for name in sizes))
    names.sort(key=lambda name: -sum(sizes.get(name, (0, 0))[1] for sizes in blocks.values()))
    x = MARGIN + INNER
    for name in reversed(names):
        x -= text_width(name, 19) + 50
        page.box(x, y + 4, x + 18, y + 22, FORMAT_COLOURS.get(name, OTHER_FORMAT))
        page.text(x + 26, y + 13, name, 19, FAINT, anchor="lm")
    columns = {label: sizes for label, sizes in blocks.items() if label != OUTSIDE} or blocks
    columns = dict(islice(columns.items(), _MOST_COLUMNS))
    top = _round_up(max(sum(nbytes for _, nbytes in sizes.values()) for sizes in columns.values()))
    left, base = MARGIN + 92, y + 50 + _CHART
    for step in range(5):
        level = base - _CHART * step / 4
        page.line([(left, level), (MARGIN + INNER, level)], GRID, 1)
        page.text(left - 12, level, size_text(round(top * step / 4)) if step else "0", 16, FAINT, anchor="rm")
    pitch = (MARGIN + INNER - left) / max(len(columns), 12)
    every = max(1, round(30 / pitch))
    for index, (label, sizes) in enumerate(columns.items()):
        start, level = left + pitch * index, base
        for name in names:
            tall = _CHART * sizes.get(name, (0, 0))[1] / top
            colour = FORMAT_COLOURS.get(name, OTHER_FORMAT)
            page.box(start + 0.12 * pitch, level - tall, start + 0.88 * pitch, level, colour)
            level -= tall
        if index % every == 0:
            page.text(start + pitch / 2, base + 12, label, 16, FAINT, anchor="mt")
    if OUTSIDE in blocks and OUTSIDE not in columns:
        outside = [f"{size_text(nbytes)} {name}" for name, (_, nbytes) in blocks[OUTSIDE].items()]
        page.text(MARGIN, base + 48, f"Outside the blocks: {', '.join(outside)}", 19, FAINT, limit=INNER)
    return base + 70


def _round_up(nbytes: int) -> int:
    """The next number whose quarters are round too."""
    power = 10 ** (len(str(nbytes)) - 1)
    steps = (10, 12, 16, 20, 24, 32, 40, 60, 80, 100)
    return next(step * power // 10 or 4 for step in steps if step * power >= 10 * nbytes)


def _stock(page: Canvas, y: float, rows: list[tuple[str, str]]) -> None:
    page.text(MARGIN, y, "What stock ComfyUI does with it", 22, bold=True)
    y += 42
    for title, text in rows:
        page.text(MARGIN, y, title, 21, FAINT)
        for line in wrap(text, 21, INNER - 330):
            page.text(MARGIN + 330, y, line, 21)
            y += _LINE
