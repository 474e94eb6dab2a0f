# SPDX-License-Identifier: Apache-2.0
"""A byte budget, spent where the outputs gain most: which layers stay as they are, or go to FP8 instead of NVFP4.

With a calibration file each layer's error is known in each format, as the squared error of its outputs over their
squares, of some of its rows: with the scale search in NVFP4, with one scale in FP8, none in the source's own format.
From a file with all of them in NVFP4 on, the step that saves most error for a byte is taken next, NVFP4 to FP8, FP8 to
the source's format, or both at once, until the budget is spent. Layers that were not calibrated stay in NVFP4.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...kernels import dispatch, gptq, reference
from ...measure.text import size_text
from ..file.container import PlannedTensor, build_header
from ..file.header import CheckpointError
from ..file.shards import Source
from .card import PROVENANCE, provenance
from .lora import Deltas
from .pack import trial_rows
from .plan import QuantizePlan, plan_quantization
from .units import Spent, fp8_tensors, nvfp4_tensors, quantize_fp8
from .weights import FloatRows

SMALLEST, BALANCED, CARD_24 = "smallest", "balanced", "24gb-card"
PRESETS = (SMALLEST, BALANCED, CARD_24)
_BALANCED = 1.10  # of the smallest file: about what published ones spend on the blocks at either end
_CARD_24_MODEL = 20e9  # bytes of the model, so that a card of 24 GB has some left to compute
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|MB|GiB|MiB)\s*", re.IGNORECASE)
_UNITS = {"gb": 1e9, "mb": 1e6, "gib": 2**30, "mib": 2**20}
_POINTS = 9  # of the curve that people are shown

FP8, WHOLE = "FP8", "source"


@dataclass(frozen=True)
class Step:
    """One layer to a wider format: bytes more, error less."""

    layer: str
    to: str
    nbytes: int
    saved: float

    @property
    def worth(self) -> float:
        """Error saved by a byte."""
        return self.saved / self.nbytes


@dataclass(frozen=True)
class Trade:
    """``steps`` by worth. ``nbytes``: of the file with all layers in NVFP4; ``error``: summed over ``layers``."""

    nbytes: int
    error: float
    layers: int
    steps: tuple[Step, ...]

    def taken(self, budget: float) -> list[Step]:
        """The steps that a budget pays, dearest first; a step that is too large is passed over for smaller ones."""
        left, passed, found = budget - self.nbytes, set(), []
        for step in self.steps:
            if step.nbytes <= left and step.layer not in passed:
                found.append(step)
                left -= step.nbytes
            else:
                passed.add(step.layer)
        return found

    def after(self, steps: Sequence[Step]) -> dict[str, float]:
        """Some steps -> size of the file, mean squared error of outputs, layers in FP8 and in the source's format."""
        last = {step.layer: step.to for step in steps}
        return {
            "nbytes": self.nbytes + sum(step.nbytes for step in steps),
            "error": max(self.error - sum(step.saved for step in steps), 0.0) / max(self.layers, 1),
            "fp8": sum(to == FP8 for to in last.values()),
            "whole": sum(to == WHOLE for to in last.values()),
        }

    def curve(self) -> list[dict[str, float]]:
        """What files from the smallest to that with all steps would be, evenly by size."""
        most = sum(step.nbytes for step in self.steps)
        return [self.after(self.taken(self.nbytes + most * at / (_POINTS - 1))) for at in range(_POINTS)]

    def spent(self, steps: Sequence[Step]) -> Spent:
        """Some steps -> which layers are to be what, by name without prefix."""
        last = {step.layer: step.to for step in steps}
        fp8, whole = (frozenset(layer for layer, to in last.items() if to == kind) for kind in (FP8, WHOLE))
        return Spent(fp8, whole)


def spend(
    plan: QuantizePlan,
    source: str | os.PathLike[str],
    non_finite: frozenset[str],
    device: torch.device,
    on_layer: Callable[[], None],
) -> QuantizePlan:
    """Plan without the budget of its settings, its source, what else was kept -> the plan with it, told in its record.

    CheckpointError as ``bytes_of`` and ``trade_off``, and where the budget leaves nothing to quantise.
    """
    asked = plan.settings.budget
    check_budget(asked)
    metadata = dict(plan.metadata) | {PROVENANCE: provenance(plan.record)}
    header, total = build_header(Path(plan.checkpoint.header.path.name), plan.tensors, metadata)
    trade = trade_off(plan, len(header) + total, device, on_layer)
    steps = trade.taken(bytes_of(asked, trade, plan))
    spent = trade.spent(steps)
    if len(spent.whole) == len(plan.jobs):
        found = f"a budget of {asked} has room for all {len(spent.whole):,} layers as they are"
        remedy = "use the source itself, or allow less"
        raise CheckpointError(found, where=plan.checkpoint.header.path.name, remedy=remedy)
    again = plan_quantization(source, plan.settings, non_finite, spent)
    told = {"asked": asked, "layers": trade.layers, "curve": trade.curve()} | trade.after(steps)
    return replace(again, record=dict(again.record) | {"budget": told})


def check_budget(text: str) -> None:
    """CheckpointError for a text that is neither a preset nor a size."""
    if text not in PRESETS and not _SIZE.fullmatch(text):
        raise CheckpointError(f"budget {text!r}", expected=f"{', '.join(PRESETS)}, or a size such as 20GB")


def bytes_of(text: str, trade: Trade, plan: QuantizePlan) -> float:
    """A budget in words, what can be had, the plan of the smallest file -> bytes of the file.

    CheckpointError for less than the smallest.
    """
    check_budget(text)
    others = trade.nbytes - plan.model_bytes
    presets = {SMALLEST: trade.nbytes, BALANCED: _BALANCED * trade.nbytes, CARD_24: max(_CARD_24_MODEL + others, 0)}
    if text in presets:
        budget = presets[text]
    else:
        amount, unit = _SIZE.fullmatch(text).groups()
        budget = float(amount) * _UNITS[unit.lower()]
    if budget < trade.nbytes:
        found = f"a budget of {size_text(int(budget))}, the smallest file would have {size_text(trade.nbytes)}"
        remedy = "allow more, leave out the VAEs, or have the recipe keep less"
        raise CheckpointError(found, where=plan.checkpoint.header.path.name, remedy=remedy)
    return budget


def trade_off(plan: QuantizePlan, nbytes: int, device: torch.device, on_layer: Callable[[], None]) -> Trade:
    """Plan of a file of ``nbytes`` with all its layers in NVFP4 -> Trade. Reads every layer that was calibrated once.

    CheckpointError without a calibration file that has Gram matrices.
    """
    if plan.statistics is None or plan.statistics.calibration is None:
        remedy = "name one in `calibration`: it tells how much each layer matters"
        raise CheckpointError("a budget needs a calibration file", remedy=remedy)
    own = dict(zip(plan.jobs, plan.selection.quantized, strict=True))
    steps: list[Step] = []
    total, count = 0.0, 0
    with Source(plan.checkpoint) as reader, Deltas(plan.loras) as deltas:
        for name in sorted(plan.jobs, key=reader.place):
            on_layer()
            moments = plan.statistics.moments(name, device)
            if moments is None:
                continue
            job, delta = plan.jobs[name], deltas.of(name, device)
            errors = _errors(FloatRows(reader, job, device, delta=delta), moments.gram + moments.held_out)
            if errors is None:
                continue
            packed, eight = errors
            points = [(_bytes(nvfp4_tensors("", job.info.shape)), packed, "")]
            if not job.fp8:
                points.append((_bytes(fp8_tensors("", job.info.shape)), eight, FP8))
            whole = 2 * job.info.numel if job.fp8 and delta is not None else job.info.nbytes
            points.append((whole, 0.0, WHOLE))
            steps += _steps(own[name], points)
            total, count = total + packed, count + 1
    return Trade(nbytes, total, count, tuple(sorted(steps, key=lambda step: (-step.worth, step.layer))))


def _errors(rows: FloatRows, gram: torch.Tensor) -> tuple[float, float] | None:
    """Relative squared error of outputs in NVFP4 and in FP8, of some rows; None for weights that are not finite, or
    inputs or weights that are zero."""
    amax = rows.amax()
    if not torch.isfinite(amax):
        return None
    scale = reference.default_global_scale(amax, "mse")
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    for values in trial_rows(rows):
        packed = dispatch.dequantize(dispatch.quantize(values, scale, "mse"), torch.float32) if scale > 0 else values
        coded, factor = quantize_fp8(values, amax)
        parts = packed - values, coded.float() * factor - values, values
        sums += torch.stack([gptq.output_error(part, gram) for part in parts])
    packed, eight, size = sums.tolist()
    return (packed / size, eight / size) if size > 0 and math.isfinite(packed + eight + size) else None


def _steps(layer: str, points: Sequence[tuple[int, float, str]]) -> list[Step]:
    """(bytes, error, format) of a layer, smallest first -> steps along their lower convex hull, so that each is worth
    less than the one before."""
    hull: list[tuple[int, float, str]] = []
    for point in points:
        if hull and (point[0] <= hull[-1][0] or point[1] >= hull[-1][1]):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [Step(layer, b[2], b[0] - a[0], a[1] - b[1]) for a, b in zip(hull, hull[1:], strict=False)]


def _bytes(tensors: Sequence[PlannedTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _slope(a: tuple[int, float, str], b: tuple[int, float, str]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])
