"""A quantised file against its source, layer by layer: how far off is it, and is that what its format costs.

The measure is the relative Frobenius error, ||decoded - original|| / ||original||, and its logarithm, the SQNR. What is
allowed is not a constant: each original layer is also quantised with plain block maxima, and a file may be a quarter
worse than that. Reading the wrong way is far outside: 0.36 where row-major block scales are taken for tiled ones, 1.41
where the nibbles of a byte are exchanged (also what an unrelated model gives). Such a layer is read in the other
dialects too, and the one that fits is named; a file that leaves its dialect open is read in the one that fits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from ...kernels.format import BLOCK, round_up
from ..file.header import CheckpointError
from ..file.shards import Checkpoint, Source, open_checkpoint
from ..identify import dialects
from ..identify.components import DIFFUSION_MODEL, find_components
from ..identify.formats import FP8_FORMATS, LOW_RANK, SMOOTHING
from ..identify.layers import Layer, refuse
from ..write.weights import FloatRows, FloatWeight, float_weight
from .weight_error import energy, layer_error

FP8_ALLOWED = 0.04  # E4M3 with one scale has 0.027 on Gaussian weights
_SUSPICIOUS = 0.2
_BLOCK_NUMBER = re.compile(r"(?:^|\.)(\w*(?:blocks|layers)\w*)\.(\d+)\.")


@dataclass(frozen=True)
class LayerCheck:
    """``error``: relative; ``allowed``: what its format costs; shares of blocks; ``verdict``: "" if nothing is wrong.

    ``block``: number of its block, None outside; ``kind``: its name in the block. ``saturated``: blocks whose largest
    value the scale 448 cannot reach; ``lost``: blocks decoded as zero that are not.
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

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in decibels; 200 stands for none."""
        return -20 * math.log10(self.error) if self.error > 1e-10 else 200.0


@dataclass(frozen=True)
class Verification:
    """``changed``: tensors that should be copies and are not; ``alone``: quantised layers the source does not have."""

    file: str
    source: str
    dialect: str | None
    evidence: str
    layers: tuple[LayerCheck, ...]
    identical: int
    changed: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer is as good as its format allows and the rest is untouched."""
        return not (self.changed or self.alone) and not any(check.verdict for check in self.layers)

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


def verify(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dialect: str = dialects.AUTO,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Quantised file, its source (each a file, index, shard or wildcard) -> Verification; reads both once.

    ``on_step(done, total)`` counts bytes of the quantised file and may raise. Raises CheckpointError.
    """
    device, step = torch.device(device), on_step or (lambda done, total: None)
    ours, theirs = _Side(open_checkpoint(path)), _Side(open_checkpoint(source))
    theirs.stored = dialects.detect(theirs.header.of(theirs.own), prefix=theirs.prefix).layers
    with Source(ours.checkpoint) as reader, Source(theirs.checkpoint) as original:
        layers = _Layers(ours, theirs, reader, original, device)
        plan = layers.plan(dialect)
        checks, identical, changed, alone = [], 0, [], []
        done, total = 0, sum(info.nbytes for info in ours.header.tensors.values())
        quantized = {f"{layer}.{dialects.DIALECTS[plan.dialect].weight}": layer for layer in plan.nvfp4}
        for name in sorted(ours.header.tensors, key=reader.place):
            step(done, total)
            done += ours.header.tensors[name].nbytes
            own = ours.names[name]
            if name in quantized:
                weight = theirs.weight(ours.layer(quantized[name]))
                checks += [] if weight is None else [layers.check(quantized[name], weight)]
                alone += [ours.layer(quantized[name])] if weight is None else []
            elif own in theirs.full and not _describes(name, plan):
                info, other = ours.header.tensors[name], theirs.header.tensors[theirs.full[own]]
                if info.dtype == other.dtype and info.shape == other.shape:
                    same = _equal(reader.view(name), original.view(theirs.full[own]))
                    identical += same
                    changed += [] if same else [own]
                elif info.dtype in FP8_FORMATS and own.endswith(".weight"):
                    checks += layers.check_fp8(name, own.rpartition(".")[0])
        step(total, total)
    return Verification(
        ours.header.path.name, theirs.header.path.name, plan.dialect, layers.evidence or plan.evidence,
        tuple(checks), identical, tuple(changed), tuple(alone),
    )  # fmt: skip


class _Side:
    """One of the two checkpoints, its tensors by names without the model's prefix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.header = checkpoint, checkpoint.header
        component = find_components(self.header).get(DIFFUSION_MODEL)
        if component is None:
            remedy = "choose a diffusion model or a full checkpoint"
            raise CheckpointError("there is no diffusion model in it", where=self.header.path.name, remedy=remedy)
        self.names = {name: component.names.get(name, name) for name in self.header.tensors}
        self.full = {own: name for name, own in self.names.items()}
        self.own = component.names
        self.prefix = component.prefix
        self.stored: Mapping[str, Layer] = {}

    def layer(self, layer: str) -> str:
        """Layer as stored -> without prefix."""
        return layer.removeprefix(self.prefix)

    def weight(self, own: str) -> FloatWeight | None:
        """FloatWeight of a layer, or None."""
        layer = self.stored.get(self.prefix + own)
        found = None if layer is None else float_weight(self.header, layer)
        return None if isinstance(found, str) else found


class _Layers:
    """Reads layers of both files and compares them."""

    def __init__(self, ours: _Side, theirs: _Side, reader: Source, original: Source, device: torch.device) -> None:
        self.ours, self.theirs, self.reader, self.original, self.device = ours, theirs, reader, original, device
        self.evidence, self._stated = "", ""
        self._plans: dict[str, dialects.DialectPlan | None] = {}

    def plan(self, dialect: str) -> dialects.DialectPlan:
        """The dialect that is declared or stated, or, where it is open, the one that fits the source."""
        self._stated = dialect
        try:
            self._plan = self._detect(dialect)
            return self._plan
        except CheckpointError:
            if dialect != dialects.AUTO:
                raise
            errors = {name: error for name in dialects.DIALECTS if (error := self._trial(name)) is not None}
            best = min(errors, key=errors.get, default=None)
            if best is None or errors[best] > _SUSPICIOUS:
                raise
        self.evidence = f"undeclared; it fits the source (error {errors[best]:.3f})"
        self._plan = self._other(best)
        return self._plan

    def check(self, layer: str, weight) -> LayerCheck:
        """One NVFP4 layer against its original."""
        rows = FloatRows(self.original, weight, self.device)
        record, *beside = self._record(self._plan, layer)
        (n, k), (stored_n, stored_k) = rows.shape, record.shape
        if (round_up(n, 16), round_up(k, BLOCK)) != (round_up(stored_n, 16), round_up(stored_k, BLOCK)):
            verdict = f"it is {stored_n} x {stored_k}, its original {n} x {k}"
            return self._made(layer, "NVFP4", (n, k), (math.inf, 0.1, 0.0, 0.0, 0), verdict)
        numbers = layer_error(rows, record, *beside)
        return self._made(layer, "NVFP4", (n, k), numbers, self._verdict(layer, weight, numbers))

    def check_fp8(self, name: str, own: str) -> list[LayerCheck]:
        """One FP8 layer that the source has in another format."""
        weight, mine = self.theirs.weight(own), self.ours.weight(own)
        if weight is None or mine is None or len(mine.info.shape) != 2 or mine.info.shape != weight.info.shape:
            return []
        wanted, found = FloatRows(self.original, weight, self.device), FloatRows(self.reader, mine, self.device)
        off = size = torch.zeros((), dtype=torch.float64, device=self.device)
        for start, rows in wanted:
            decoded = found.rows(start, start + rows.shape[0])
            off, size = off + energy(decoded - rows), size + energy(rows)
        error = float((off / size).sqrt()) if size else float(off > 0)
        bad = int(not math.isfinite(error))
        verdict = f"its error is {error:.3f}, FP8 should have 0.03" if not error <= FP8_ALLOWED else ""
        numbers = (error if not bad else math.inf, FP8_ALLOWED, 0.0, 0.0, bad)
        return [self._made(f"{self.ours.prefix}{own}", "FP8", weight.info.shape, numbers, verdict)]

    def _made(self, layer: str, kind_of: str, shape, numbers, verdict: str) -> LayerCheck:
        own = self.ours.layer(layer)
        found = _BLOCK_NUMBER.search(own)
        kind = own[found.end() :] if found else own
        if found and found[1] not in ("transformer_blocks", "blocks", "layers"):
            kind = f"{found[1]}: {kind}"
        return LayerCheck(own, int(found[2]) if found else None, kind, kind_of, tuple(shape), *numbers, verdict)

    def _verdict(self, layer: str, weight, numbers) -> str:
        error, allowed, _, _, bad = numbers
        if bad:
            return f"{bad:,} of its decoded values are NaN or infinite"
        if error <= allowed:
            return ""
        text = f"its error is {error:.3f}, the format allows {allowed:.3f}"
        if error < _SUSPICIOUS:
            return text
        for name in dialects.DIALECTS:
            other = self._other(name)
            if name != self._plan.dialect and other is not None and layer in other.nvfp4:
                found = self._record(other, layer)
                if layer_error(FloatRows(self.original, weight, self.device), *found)[0] <= allowed:
                    return f"{text}; it is in the dialect {name}, not {self._plan.dialect} (`repair --dialect {name}`)"
        if 0.25 < error < 0.6:
            return f"{text}; 0.36 is the mark of block scales in the wrong order"
        return f"{text}; 1.41 is the mark of exchanged nibbles, or of a source that is another model"

    def _trial(self, name: str) -> float | None:
        """Error of the first layer that both files have, read in a dialect; None if it cannot be."""
        plan = self._other(name)
        for layer in plan.nvfp4 if plan else ():
            weight = self.theirs.weight(self.ours.layer(layer))
            if weight is not None:
                found = self._record(plan, layer)
                return layer_error(FloatRows(self.original, weight, self.device), *found)[0]
        return None

    def _other(self, name: str) -> dialects.DialectPlan | None:
        if name not in self._plans:
            try:
                self._plans[name] = self._detect(name)
            except CheckpointError:
                self._plans[name] = None
        return self._plans[name]

    def _detect(self, dialect: str) -> dialects.DialectPlan:
        header = self.ours.header
        read = self.reader.tensor if dialect in (dialects.AUTO, self._stated) else None  # a trial may be any dialect
        plan = dialects.detect(header.of(self.ours.own), dialect, self.ours.prefix, read)
        refuse(header.path.name, plan.layers)
        self.ours.stored = plan.layers
        if plan.dialect is None:
            where, remedy = header.path.name, "name the quantised file first, its source second"
            raise CheckpointError("it has no NVFP4 layer", where=where, remedy=remedy)
        return plan

    def _record(self, plan: dialects.DialectPlan, layer: str) -> tuple:
        """A layer in the host's layout, what its input is multiplied by, and its low-rank part, if any."""
        get = lambda suffix: self.reader.tensor(f"{layer}.{suffix}")  # noqa: E731
        record, read = dialects.host_layer(plan, layer, get, checked=False), plan.layers[layer].read
        smooth = get(SMOOTHING).float().reshape(-1).to(self.device) if SMOOTHING in read else None
        low_rank = None
        if plan.layers[layer].low_rank:
            low_rank = tuple(get(suffix).float().to(self.device) for suffix in LOW_RANK)
        return record, smooth, low_rank


def _describes(name: str, plan: dialects.DialectPlan) -> bool:
    """Whether a tensor is part of how an NVFP4 layer is stored."""
    layer, _, suffix = name.rpartition(".")
    return layer in plan.nvfp4 and suffix in (*dialects.STORAGE_KEYS, dialects.MARKER)


def _equal(a: memoryview, b: memoryview) -> bool:
    """Whether two buffers hold the same bytes, compared in pieces."""
    step = 2**24
    return len(a) == len(b) and all(bytes(a[i : i + step]) == bytes(b[i : i + step]) for i in range(0, len(a), step))


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
        f"dialect: {found.dialect} ({found.evidence})",
        f"{len(found.layers):,} quantised layers, mean error {mean}, {len(wrong):,} worse than allowed; "
        f"{found.identical:,} other tensors identical, {len(found.changed):,} changed",
    ]
    lines += [f"  {check.layer}: {check.verdict}" for check in wrong[:10]]
    lines += [f"  {name}: it should be a copy and is not" for name in found.changed[:10]]
    lines += [f"  {name}: the source has no such layer" for name in found.alone[:10]]
    return "\n".join(lines)


__all__ = ["LayerCheck", "Verification", "blocks_and_kinds", "summary", "verify"]
