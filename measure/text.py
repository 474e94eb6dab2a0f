# SPDX-License-Identifier: Apache-2.0
"""How numbers are written: the one formatter of bytes and the one table of all that is printed or drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def size_text(nbytes: float, decimals: int | None = None) -> str:
    """Bytes in decimal units, as file managers give them: three digits, or so many ``decimals``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            digits = f".{decimals}f" if decimals is not None else ".3g" if nbytes < 999.5 * scale else ".0f"
            return f"{nbytes / scale:{digits}} {unit}"
    return f"{nbytes:.0f} B"


def gib(nbytes: float) -> str:
    """Memory, and what lies in it, in GiB, as cards are sold: "32 GB" on the box are 32 GiB."""
    return f"{nbytes / 2**30:.1f} GiB"


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows -> lines with columns as wide as their widest cell; those that ``right`` names are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    how = [">" if index in right else "<" for index in range(len(widths))]
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, how, widths, strict=True)] for row in rows)
    return ["  ".join(line).rstrip() for line in lines]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Heading and rows -> lines of Markdown; all columns but the first are set to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
