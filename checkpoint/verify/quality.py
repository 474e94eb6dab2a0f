# SPDX-License-Identifier: Apache-2.0
"""The quality card: how far off the layers of a verified file are, by layer type and by block, as Markdown.

Where a calibration file was given, also their outputs: before, as plain block maxima would have them, and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ...measure.escape import LONGEST_LINE, markdown
from .found import LayerCheck, Verification, outputs_text

_WORST = 15
_OUTSIDE = "outside the blocks"


def quality_card(found: Verification, picture: str = "") -> str:
    """Verification, name of a picture beside it -> Markdown."""
    state = "as good as its format allows" if found.ok else "**not in order**, see `verify`"
    head = [
        f"# Quality of {markdown(found.file)}",
        "",
        f"Against {markdown(found.source)}{''.join(f', {markdown(lora)} folded in' for lora in found.loras)}: {state}.",
        "",
    ]
    if found.calibration:
        text = f"Outputs, on the held-out tokens of {found.calibration}: {outputs_text(found)}."
        head += [markdown(text, LONGEST_LINE), ""]
    head += [f"![Errors by block and layer type]({markdown(picture)})", ""] if picture else []
    kinds = _grouped((check.kind, check) for check in found.layers)
    blocks = _grouped((_OUTSIDE if check.block is None else check.block, check) for check in found.layers)
    order = sorted(blocks, key=lambda block: (block == _OUTSIDE, block if block != _OUTSIDE else 0))
    return "\n".join(
        [
            *head,
            "Errors are relative; those of a group are root mean squares, in which each layer counts alike. *Before*",
            "is what plain block maxima give, as other tools write them.",
            "",
            *_table("layer type", [(kind, kinds[kind]) for kind in sorted(kinds)]),
            *_table("block", [(str(block), blocks[block]) for block in order]),
            *_table("worst layers", [(check.layer, [check]) for check in _worst(found.layers)]),
        ]
    )


def _grouped(pairs: Iterable[tuple]) -> Mapping:
    found: dict = {}
    for key, check in pairs:
        found.setdefault(key, []).append(check)
    return found


def _worst(checks: Sequence[LayerCheck]) -> list[LayerCheck]:
    """By outputs where they are known, else by weights."""
    return sorted(checks, key=lambda check: -(check.error if check.output is None else check.output))[:_WORST]


def _table(title: str, rows: Sequence[tuple[str, Sequence[LayerCheck]]]) -> list[str]:
    lines = [f"| {title} | layers | weights | outputs before | outputs after |", "|---|---|---|---|---|"]
    for name, checks in rows:
        weights, before, after = (
            _mean([getattr(check, what) for check in checks]) for what in ("error", "output_plain", "output")
        )
        lines.append(f"| {markdown(name)} | {len(checks):,} | {weights} | {before} | {after} |")
    return [*lines, ""]


def _mean(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{math.sqrt(sum(error**2 for error in known) / len(known)):.4f}" if known else "-"
