# SPDX-License-Identifier: Apache-2.0
"""One layer or tensor of a quantised file against its source: how far off, how much is allowed, and what is wrong.

What is allowed is told in verify.py; the numbers are those of weight_error.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from ...kernels.format import BLOCK, PackedWeight, round_up
from ..file.header import CheckpointError
from ..file.shards import Source
from ..identify import dialects, host_layer
from ..identify.formats import LOW_RANK, SMOOTHING
from ..identify.layers import Layer, refuse
from ..write.calibration import Calibration
from ..write.card import provenance_of
from ..write.lora import Deltas, merged
from ..write.plan import GPTQ
from ..write.weights import FloatRows, FloatWeight
from .account import Side
from .found import LayerCheck
from .weight_error import (
    CALIBRATED_MARGIN,
    FLOOR,
    JUDGED_MARGIN,
    MARGIN,
    LayerError,
    decode,
    energy,
    layer_error,
    ratio,
)

FP8_ALLOWED = 0.04  # E4M3 with one scale has 0.027 on Gaussian weights, E5M2 twice that
SAME = 1e-6  # of two dialects, one of which divides by its global scale
FLOAT_ALLOWED = 0.004  # what rounding to BF16 costs at most, 2^-8
MERGED_ALLOWED = 2e-4  # of a kept tensor with a LoRA: one element in a thousand rounded to the other side
LORA_ALLOWED = 0.2  # of what LoRAs add to a layer
_SUSPICIOUS = 0.2
_BLOCK_NUMBER = re.compile(r"(?:^|\.)(\w*(?:blocks|layers)\w*)\.(\d+)\.")


class Layers:
    """Reads layers of both files and compares them."""

    def __init__(
        self,
        ours: Side,
        theirs: Side,
        reader: Source,
        original: Source,
        device: torch.device,
        deltas: Deltas,
        calibration: Calibration | None = None,
    ) -> None:
        self.ours, self.theirs, self.reader, self.original, self.device = ours, theirs, reader, original, device
        self._deltas, self._calibration = deltas, calibration
        self.evidence, self._stated = "", ""
        # GPTQ spends weight error to save output error.
        self.margin = CALIBRATED_MARGIN if provenance_of(ours.header).get("search") == GPTQ else MARGIN
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

    @property
    def dialect(self) -> str:
        """The dialect in which the file is read."""
        return self._plan.dialect

    def record(self, layer: str) -> tuple:
        """A layer of the file in the host's layout, what its input is multiplied by, its low-rank part, if any."""
        return self._record(self._plan, layer)

    def original_rows(self, weight: FloatWeight, count: int) -> torch.Tensor:
        """The first rows of a weight of the source, FP32 on the CPU."""
        return FloatRows(self.original, weight, self.device).rows(0, count).cpu()

    def same(self, name: str, other: str) -> bool:
        """Whether a tensor of the file is that of the source, with what LoRAs add to it.

        Then the sum may be rounded to the other side here and there, since devices add in different orders.
        """
        delta = self._deltas.of(other, self.device)
        if delta is None:
            return _equal(self.reader.view(name), self.original.view(other))
        wanted = merged(self.original.tensor(other), delta, self.device, other).double()
        return ratio(energy(self.reader.tensor(name).double() - wanted), energy(wanted)) <= MERGED_ALLOWED

    def _rows(self, weight: FloatWeight) -> FloatRows:
        """A weight of the source, with what LoRAs add to it."""
        delta = self._deltas.of(weight.name, self.device)
        return FloatRows(self.original, weight, self.device, delta=delta)

    def _gram(self, layer: str, columns: int) -> torch.Tensor | None:
        """(G, B, B) of the held-out inputs of a layer of the file, or None. CheckpointError for another width."""
        if self._calibration is None:
            return None
        own = self.ours.layer(layer)
        name = next((key for key in (own, self.theirs.prefix + own) if key in self._calibration.layers), None)
        if name is None:
            return None
        if (found := self._calibration.columns(name)) != columns:
            text, where = f"layer {own} has inputs of {found} columns", self._calibration.header.path.name
            raise CheckpointError(text, where=where, expected=str(columns), remedy="collect it again with this model")
        return self._calibration.moments(name, self.device).held_out

    def compare(self, mine: Layer, other: Layer) -> LayerCheck | str:
        """A layer that the two files store in different ways -> LayerCheck, or why it cannot be compared."""
        own = self.ours.layer(mine.name)
        if mine.kind == other.kind == "nvfp4" and len(mine.shape) == 2:
            return self._rewritten(mine, other)
        weight, decoded = self.theirs.weight(own), self.ours.weight(own)
        if weight is None:
            return f"{own}: the source has it as {other.title}, which is not read here; name the original as source"
        if len(mine.shape) < 2 or mine.kind == "nvfp4" and len(mine.shape) != 2:
            return f"{own}: {mine.title} of shape {mine.shape} is not read here, and was not compared"
        if mine.kind == "nvfp4":
            return self._nvfp4(mine.name, weight)
        if decoded is None:
            return f"{own}: it is stored as {mine.title}, which is not read here, and was not compared"
        if decoded.info.shape != weight.info.shape:
            return f"{own}: it is of shape {decoded.info.shape}, in the source {weight.info.shape}"
        return self._decoded(mine, decoded, weight)

    def _nvfp4(self, layer: str, weight: FloatWeight) -> LayerCheck:
        """One NVFP4 layer against its original."""
        rows = self._rows(weight)
        record, *beside = self.record(layer)
        (n, k), (stored_n, stored_k) = rows.shape, record.shape
        if not _fits(record, rows):
            verdict = f"it is {stored_n} x {stored_k}, its original {n} x {k}"
            return self._made(layer, "NVFP4", (n, k), LayerError(math.inf, 0.1, 0.0, 0.0, 0), verdict)
        gram = self._gram(layer, k)
        margin = self.margin if gram is None else JUDGED_MARGIN
        numbers = layer_error(rows, record, *beside, margin, gram)
        return self._made(layer, "NVFP4", (n, k), numbers, self._verdict(layer, weight, numbers))

    def _rewritten(self, mine: Layer, other: Layer) -> LayerCheck:
        """A layer that is NVFP4 in both, in two dialects: the numbers are the same, but for the last bit of a scale."""
        ours, *beside = self.record(mine.name)
        theirs, *others = self._record(self.theirs.plan, other.name, self.original)
        n, k = (min(sides) for sides in zip(ours.shape, theirs.shape, strict=True))  # one may be padded
        found, wanted = decode(replace(ours, shape=(n, k))), decode(replace(theirs, shape=(n, k)))
        error, shape = ratio(energy(found - wanted), energy(wanted)), (n, k)
        same = [round_up(a, 16) == round_up(b, 16) for a, b in zip(ours.shape, theirs.shape, strict=True)]
        if not all(same) or [b is None for b in beside] != [b is None for b in others]:
            error = math.inf
        verdict = "" if error <= SAME else f"its error is {error:.3g}, though the source has it in NVFP4 too"
        numbers = LayerError(error, SAME, 0.0, 0.0, int(not math.isfinite(error)))
        return self._made(mine.name, "NVFP4", shape, numbers, verdict)

    def _decoded(self, layer: Layer, mine: FloatWeight, weight: FloatWeight) -> LayerCheck:
        """One FP8 or floating-point layer that the source has in another format."""
        wanted, found = self._rows(weight), FloatRows(self.reader, mine, self.device)
        off = size = torch.zeros((), dtype=torch.float64, device=self.device)
        for start, rows in wanted:
            decoded = found.rows(start, start + rows.shape[0])
            off, size = off + energy(decoded - rows), size + energy(rows)
        error, title = ratio(off, size), "FP8" if mine.fp8 else mine.info.dtype
        allowed = {"F8_E4M3": FP8_ALLOWED, "F8_E5M2": 2 * FP8_ALLOWED}.get(mine.info.dtype, FLOAT_ALLOWED)
        verdict = "" if error <= allowed else f"its error is {error:.3f}, {title} should have {allowed:g} at most"
        numbers = LayerError(error, allowed, 0.0, 0.0, int(not math.isfinite(error)))
        return self._made(layer.name, title, weight.info.shape, numbers, verdict)

    def _made(self, layer: str, kind_of: str, shape, numbers: LayerError, verdict: str) -> LayerCheck:
        own = self.ours.layer(layer)
        found = _BLOCK_NUMBER.search(own)
        kind = own[found.end() :] if found else own
        if found and found[1] not in ("transformer_blocks", "blocks", "layers"):
            kind = f"{found[1]}: {kind}"
        block = int(found[2]) if found else None
        return LayerCheck(own, block, kind, kind_of, tuple(shape), *numbers[:5], verdict, *numbers[5:8])

    def _verdict(self, layer: str, weight, numbers: LayerError) -> str:
        error, allowed, _, lost, bad = numbers[:5]
        if bad:
            return f"{bad:,} of its decoded values are NaN or infinite"
        if error <= allowed:
            return _outputs_verdict(numbers) or _lora_verdict(numbers)
        text = f"its error is {error:.3f}, the format allows {allowed:.3f}"
        if error < _SUSPICIOUS:
            return text
        for name in dialects.DIALECTS:
            other = self._other(name)
            if name != self._plan.dialect and other is not None and layer in other.nvfp4:
                rows, found = self._rows(weight), self._record(other, layer)
                if _fits(found[0], rows) and layer_error(rows, *found, self.margin).error <= allowed:
                    return f"{text}; it is in the dialect {name}, not {self._plan.dialect}: state that and repair it"
        if lost > 0.5:
            return f"{text}; {100 * lost:.0f} % of its blocks decode to zero, in the source they are not"
        if 0.25 < error < 0.6:
            return f"{text}; 0.36 is the mark of block scales in the wrong order"
        return f"{text}; 1.41 is the mark of exchanged nibbles, or of a source that is another model"

    def _trial(self, name: str) -> float | None:
        """Error of the first layer that both files have, read in a dialect; None if it cannot be."""
        plan = self._other(name)
        for layer in plan.nvfp4 if plan else ():
            weight = self.theirs.weight(self.ours.layer(layer))
            if weight is not None:
                rows, found = self._rows(weight), self._record(plan, layer)
                return layer_error(rows, *found, self.margin).error if _fits(found[0], rows) else None
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
        self.ours.take(plan)
        # A byte budget may have left no layer in NVFP4 and many in FP8.
        if plan.dialect is None and not any(layer.coded for layer in plan.layers.values()):
            where, remedy = header.path.name, "choose the quantized file, and as source the one it was made from"
            raise CheckpointError("it has no NVFP4 layer", where=where, remedy=remedy)
        return plan

    def _record(self, plan: dialects.DialectPlan, layer: str, reader: Source | None = None) -> tuple:
        """A layer in the host's layout, what its input is multiplied by, and its low-rank part, if any."""
        reader = reader or self.reader
        get = lambda suffix: reader.tensor(f"{layer}.{suffix}")  # noqa: E731
        record, read = host_layer.host_layer(plan, layer, get, checked=False), plan.layers[layer].read
        smooth = get(SMOOTHING).float().reshape(-1).to(self.device) if SMOOTHING in read else None
        low_rank = None
        if plan.layers[layer].low_rank:
            low_rank = tuple(get(suffix).float().to(self.device) for suffix in LOW_RANK)
        return record, smooth, low_rank


def _fits(record: PackedWeight, rows: FloatRows) -> bool:
    """Whether a layer is of its original's shape, padded or not."""
    stored, own = ((round_up(n, 16), round_up(k, BLOCK)) for n, k in (record.shape, rows.shape))
    return stored == own


def _outputs_verdict(numbers: LayerError) -> str:
    if numbers.output is None or numbers.output <= max(MARGIN * numbers.output_plain, FLOOR):
        return ""
    return f"its outputs are off by {numbers.output:.3f}, those of block maxima by {numbers.output_plain:.3f}"


def _lora_verdict(numbers: LayerError) -> str:
    slack, plain = LORA_ALLOWED + 5 * numbers.noise, numbers.lora_plain
    if numbers.lora is None or min(1.0, plain) - slack <= numbers.lora <= max(1.0, plain) + slack:
        return ""
    return f"{numbers.lora:.2f} of what the LoRAs add is in it, expected {plain:.2f}: other strengths, or other LoRAs"


def _equal(a: memoryview, b: memoryview) -> bool:
    """Whether two buffers hold the same bytes, compared in pieces."""
    step = 2**24
    return len(a) == len(b) and all(bytes(a[i : i + step]) == bytes(b[i : i + step]) for i in range(0, len(a), step))
