# SPDX-License-Identifier: Apache-2.0
"""The white page that every picture is drawn on: text, lines, dots, boxes, pasted pixels.

ComfyUI's own Pillow draws, with its built-in scalable font, so that no plotting library has to be installed beside
ComfyUI. Pictures are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK, FAINT, GRID, PAPER = (32, 36, 44), (105, 112, 124), (226, 229, 234), (255, 255, 255)
BLUE, ORANGE, RED = (31, 103, 178), (214, 98, 12), (190, 30, 45)
PURPLE, TEAL, GREY = (120, 86, 168), (52, 140, 120), (150, 156, 166)
SMOOTH = 2  # times larger while it is drawn: edges and letters come out smooth
WIDTH, MARGIN = 1600, 48  # of a page
INNER = WIDTH - 2 * MARGIN
_LONGEST = 4000  # characters; what comes from a file may have millions


class Canvas:
    """A white picture with text, lines and pasted pixels; drawn ``oversample`` times larger and reduced.

    It has ``density`` pixels a unit of length, for what is shown at ``width`` or larger.
    """

    def __init__(self, width: int, height: int, oversample: int = 1, density: int = 1) -> None:
        self.size = (width * density, height * density)
        self.scale = oversample * density
        self.image = Image.new("RGB", (width * self.scale, height * self.scale), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int, colour: Colour = INK, anchor: str = "la",
        bold: bool = False, halo: bool = False, limit: float | None = None,
    ) -> float:  # fmt: skip
        """Draw ``text``, cut to ``limit`` and the picture's width, and return its width."""
        font = ImageFont.load_default(size * self.scale)
        text = _cut(_drawable(text), font, min(limit * self.scale if limit else self.image.width, self.image.width))
        at = (x * self.scale, y * self.scale)
        if halo:
            self.draw.text(at, text, PAPER, font, anchor, stroke_width=3 * self.scale, stroke_fill=PAPER)
        self.draw.text(at, text, colour, font, anchor)
        if bold:  # the built-in font has one weight
            self.draw.text((at[0] + 0.5 * self.scale, at[1]), text, colour, font, anchor)
        return font.getlength(text) / self.scale

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, colour, max(round(width * self.scale), 1), joint="curve")

    def dot(self, point: tuple[float, float], radius: float, colour: Colour) -> None:
        x, y = (c * self.scale for c in point)
        radius *= self.scale
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill from ``left`` and ``top`` up to, not with, ``right`` and ``bottom``; neighbours share no pixel."""
        if right > left and bottom > top:
            x1, y1, x2, y2 = (round(value * self.scale) for value in (left, top, right, bottom))
            self.draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), colour)

    def paste(self, x: float, y: float, pixels: np.ndarray) -> None:
        """Put pixels as they are; of an oversampled canvas they would be reduced with it."""
        self.image.paste(Image.fromarray(pixels), (round(x * self.scale), round(y * self.scale)))

    def pixels(self) -> np.ndarray:
        same = self.image.size == self.size
        return np.asarray(self.image if same else self.image.resize(self.size, Image.Resampling.LANCZOS))


def text_width(text: str, size: int) -> float:
    """Pixels that one line takes."""
    return ImageFont.load_default(size).getlength(_drawable(text))


def _drawable(text: str) -> str:
    """As the built-in font can draw it, and no more than has room: '?' for all that it lacks, line breaks included."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:_LONGEST])


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """``text``, or the longest beginning of it that fits with three dots; found by halving."""
    if font.getlength(text) <= width:
        return text
    keep = bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(keep - 1, 1)] + "..."


def wrap(text: str, size: int, width: float) -> list[str]:
    """Text -> lines of at most ``width`` pixels, a longer word on one of its own."""
    font, lines = ImageFont.load_default(size), [""]
    for word in _drawable(" ".join(text[:_LONGEST].split())).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
