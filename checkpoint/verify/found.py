# SPDX-License-Identifier: Apache-2.0
"""What verifying a file has found, layer by layer and tensor by tensor, and how it is told to people and programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ...measure.escape import report as text_report
from ...measure.text import table


@dataclass(frozen=True)
class LayerCheck:
    """``error``: relative; ``allowed``: what its format costs; shares of blocks; ``verdict``: "" if nothing is wrong.

    ``block``: number of its block, None outside; ``kind``: its name in the block. ``saturated``: blocks whose largest
    value the scale 448 cannot reach; ``lost``: blocks decoded as zero that are not. ``output``, ``output_plain``:
    relative error of the outputs on calibrated inputs, that of plain block maxima. ``lora``: share of the LoRAs in it.
    """

    layer: str
    block: int | None
    kind: str
    format: str
    shape: tuple[int, int]
    error: float
    allowed: float
    saturated: float
    lost: float
    non_finite: int
    verdict: str
    output: float | None = None
    output_plain: float | None = None
    lora: float | None = None

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in decibels; 200 stands for none."""
        return -20 * math.log10(self.error) if self.error > 1e-10 else 200.0


@dataclass(frozen=True)
class Verification:
    """``changed``: tensors that should be copies and are not; ``alone``: quantised layers the source does not have.

    ``missing``: tensors of the source that the file lacks; ``extra``: the reverse; ``faults``: what else is wrong, name
    first. ``left_out``: components of the source that a file of the diffusion model alone rightly lacks. ``sampled``:
    layers whose numbers were read a second time, without the pack's own readers. ``loras``: what the source was taken
    together with. ``calibration``: the file by which layers were judged by their outputs, or "".
    """

    file: str
    source: str
    dialect: str | None
    evidence: str
    layers: tuple[LayerCheck, ...]
    identical: int
    changed: tuple[str, ...]
    alone: tuple[str, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sampled: int = 0
    loras: tuple[str, ...] = ()
    calibration: str = ""

    @property
    def ok(self) -> bool:
        """Whether every layer is as good as its format allows, and the rest is there and untouched."""
        wrong = self.changed or self.alone or self.missing or self.extra or self.faults
        return not wrong and not any(check.verdict for check in self.layers)

    def worst(self, count: int = 10) -> list[LayerCheck]:
        """The layers furthest above what is allowed."""
        return sorted(self.layers, key=lambda check: -check.error / check.allowed)[:count]

    def as_dict(self) -> dict:
        """For JSON."""
        layers = [asdict(check) | {"sqnr_db": check.sqnr} for check in self.layers]
        return asdict(self) | {"layers": layers, "ok": self.ok, "mean_error": self.mean_error}

    @property
    def mean_error(self) -> float | None:
        """Root mean square of the layers' errors, each layer counting by its size."""
        sizes = [math.prod(check.shape) for check in self.layers]
        if not sizes:
            return None
        return math.sqrt(sum(c.error**2 * n for c, n in zip(self.layers, sizes, strict=True)) / sum(sizes))


def blocks_and_kinds(checks: tuple[LayerCheck, ...]) -> tuple[list[int], Mapping[str, dict[int, LayerCheck]]]:
    """Checks -> numbers of blocks, and kind of layer -> {block: check}, as the picture shows them."""
    kinds: dict[str, dict[int, LayerCheck]] = {}
    for check in checks:
        if check.block is not None:
            kinds.setdefault(check.kind, {})[check.block] = check
    return sorted({number for row in kinds.values() for number in row}), kinds


def summary(found: Verification) -> str:
    """Verification -> lines for people."""
    mean = f"{found.mean_error:.4f}" if found.layers else "-"
    wrong = [check for check in found.layers if check.verdict]
    lines = [
        f"{found.file} against {found.source}: {'as good as its format allows' if found.ok else 'NOT in order'}",
        f"dialect: {found.dialect or 'none'} ({found.evidence})",
        f"{len(found.layers):,} quantized layers, mean error {mean}, {len(wrong):,} worse than allowed; "
        f"{found.identical:,} other tensors identical, {len(found.changed):,} changed, {len(found.missing):,} missing, "
        f"{len(found.extra):,} extra; {found.sampled:,} layers read a second time, without the pack's readers",
    ]
    if found.loras:
        shares = [check.lora for check in found.layers if check.lora is not None]
        seen = f", {min(shares):.2f} to {max(shares):.2f} of it in {len(shares):,} quantised layers" if shares else ""
        lines.append(f"compared with the source and {', '.join(found.loras)}{seen}")
    if found.calibration:
        lines.append(f"outputs, by {found.calibration}: {outputs_text(found)}")
    if found.left_out:
        lines.append(f"a file of the diffusion model alone: without the source's {', '.join(found.left_out)}")
    lines += _some([f"{check.layer}: {check.verdict}" for check in wrong])
    lines += _some([f"{name}: it should be a copy and is not" for name in found.changed])
    lines += _some([f"{name}: the source has no such layer" for name in found.alone])
    lines += _some([f"{name}: the source has it, the file does not" for name in found.missing])
    lines += _some([f"{name}: the file has it, the source does not" for name in found.extra])
    lines += _some(found.faults)
    return text_report(lines)


def outputs_text(found: Verification) -> str:
    """Verification with a calibration file -> how the outputs are, in words."""
    judged = [check for check in found.layers if check.output is not None]
    if not judged:
        return "it has none of the quantised layers"
    ours, plain = (sum(getattr(c, n) ** 2 for c in judged) / len(judged) for n in ("output", "output_plain"))
    better = sum(check.output < check.output_plain for check in judged)
    of = f"{len(judged):,} layers, {better:,} better than block maxima"
    return f"mean squared error {ours:.5f} where those would have {plain:.5f}, of {of}"


def worst_layers(found: Verification, count: int) -> list[tuple[str, ...]]:
    """Verification -> rows of a table, its heading first; empty without quantised layers."""
    rows = [
        (check.layer, check.format, f"{check.error:.4f}", f"{check.allowed:.4f}", f"{check.sqnr:.1f}",
         f"{100 * check.saturated:.2f} %", f"{100 * check.lost:.2f} %")
        for check in found.worst(count)
    ]  # fmt: skip
    head = ("worst layers", "format", "error", "allowed", "SQNR dB", "saturated", "lost")
    return [head, *rows] if rows else []


def report(found: Verification, count: int = 10) -> str:
    """Verification -> ``summary``, and the layers furthest above what is allowed, their numbers first.

    So a reader with little room, as on a node, need not scroll past the names.
    """
    rows = [(error, allowed, layer) for layer, _, error, allowed, *_ in worst_layers(found, count)]
    return "\n".join([summary(found), *(["", text_report(table(rows, right=(0, 1)))] if rows else [])])


def _some(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first of the lines, indented, and how many more there are."""
    return [f"  {line}" for line in lines[:most]] + ([f"  ... {len(lines) - most:,} more"] * (len(lines) > most))
