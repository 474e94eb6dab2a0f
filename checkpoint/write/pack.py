# SPDX-License-Identifier: Apache-2.0
"""One weight of a checkpoint to NVFP4: by block maxima, by the scale search, or by GPTQ where that is shown to help.

With a calibration file, GPTQ (kernels/gptq.py) is made of the inputs' Gram matrices and judged by others, those of the
tokens that were held out: with each damping some rows are packed, the whole weight with the best of them, and it is
kept if the outputs of the held-out tokens are off by less than with the plain search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels import dispatch, gptq, reference
from ...kernels.format import PackedWeight, block_scale_shape, packed_shape
from ...measure.moments import Moments
from .calibration import Statistics
from .weights import TILE, FloatRows

logger = logging.getLogger(__name__)

DAMPINGS = (0.005, 0.02, 0.08, 0.3)
_TRIAL_PIECES = 3  # of 128 rows, evenly spread
_TRIAL_EVERY = 3  # of those rows, one in so many is tried
_TRIAL_ELEMENTS = 2**26  # of the Gram matrices that are factored at once
Pack = Callable[[torch.Tensor], PackedWeight]
Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Packer:
    """Packs the weights of one checkpoint, and keeps count of what GPTQ brought.

    ``search``: "amax", "mse", or "gptq", which needs ``statistics`` with Gram matrices; with "mse" they weight the
    columns by their mean squares.
    """

    def __init__(self, statistics: Statistics | None, search: str, device: torch.device) -> None:
        self.device = device
        self._statistics, self._search = statistics, search
        self._ratios: list[float] = []
        self._worse = self._unseen = self._unfit = 0

    def pack(self, rows: FloatRows) -> Made | None:
        """FP32 rows -> packed, block_scale, global_scale in the host's layout, on the CPU; None if one is not finite.

        CheckpointError for statistics that are not finite.
        """
        amax = rows.amax()
        if not torch.isfinite(amax):
            return None
        search = "mse" if self._search == "gptq" else self._search
        global_scale = reference.default_global_scale(amax, search)
        if global_scale == 0:  # of zeros, or of numbers too small for FP32's scales: readers would divide by it
            global_scale = torch.ones_like(amax)
        if self._search == "gptq":
            return self._calibrated(rows, global_scale)
        weights = self._statistics and self._statistics.mean_square(rows.weight.name, self.device)
        return _packed(rows, lambda values: dispatch.quantize(values, global_scale, search, weights), global_scale)

    def report(self) -> dict[str, Any]:
        """{"gptq": ...} with the layers of this run: how many took it, kept the plain search and why; {} without it.

        ``error``: mean over the layers that took it, error of their held-out outputs over that of the plain search.
        """
        if self._search != "gptq":
            return {}
        taken = len(self._ratios)
        error = sum(self._ratios) / taken if taken else None
        return {
            "gptq": {"taken": taken, "worse": self._worse, "unseen": self._unseen, "unfit": self._unfit, "error": error}
        }

    def _calibrated(self, rows: FloatRows, global_scale: torch.Tensor) -> Made:
        """GPTQ's weight, or the plain search's where it is not better on held-out tokens."""

        def plain(values: torch.Tensor) -> PackedWeight:
            return dispatch.quantize(values, global_scale, "mse")

        moments = self._statistics.moments(rows.weight.name, self.device) if self._statistics else None
        if moments is None:
            self._unseen += 1
            return _packed(rows, plain, global_scale)
        try:
            told = _best_damping(rows, global_scale, moments)
            again = gptq.second_pass(moments.gram, told) if told.order.shape[1] <= gptq.EXACT_WIDTH else None
        except ValueError as problem:
            logger.warning("%s keeps the plain search: %s.", rows.weight.layer, problem)
            self._unfit += 1
            return _packed(rows, plain, global_scale)
        errors = torch.zeros(2, dtype=torch.float64, device=rows.device)
        for _, values in rows:
            errors[0] += _error(plain(values), values, moments)
        made = _packed(
            rows, lambda values: gptq.quantize(values, told, global_scale, again), global_scale, moments, errors[1]
        )
        plain_error, error = errors.tolist()
        if not error < plain_error:
            self._worse += 1
            return _packed(rows, plain, global_scale)
        self._ratios.append(error / plain_error)
        return made


def _packed(
    rows: FloatRows,
    pack: Pack,
    global_scale: torch.Tensor,
    moments: Moments | None = None,
    error: torch.Tensor | None = None,
) -> Made:
    """The weight, packed piece by piece; with moments, the squared error of its outputs on held-out tokens is added
    to ``error`` () fp64."""
    packed = torch.empty(packed_shape(rows.shape), dtype=torch.uint8)
    scale = torch.empty(block_scale_shape(rows.shape), dtype=torch.float8_e4m3fn)
    for start, values in rows:
        record = pack(values)
        packed[start : start + record.packed.shape[0]].copy_(record.packed)
        scale[start : start + record.block_scale.shape[0]].copy_(record.block_scale)
        if moments is not None:
            error += _error(record, values, moments)
    return packed, scale, global_scale.cpu()


def _error(record: PackedWeight, values: torch.Tensor, moments: Moments) -> torch.Tensor:
    return gptq.output_error(dispatch.dequantize(record, torch.float32) - values, moments.held_out)


def _best_damping(rows: FloatRows, global_scale: torch.Tensor, moments: Moments) -> gptq.Feedback:
    """Of the dampings, the one whose rounding of some rows is least off on held-out tokens. ValueError."""
    sample = torch.cat(list(trial_rows(rows)))[::_TRIAL_EVERY]
    many = max(min(_TRIAL_ELEMENTS // moments.gram.numel(), len(DAMPINGS)), 1)
    best, least = None, float("inf")
    for start in range(0, len(DAMPINGS), many):
        told = gptq.feedback(moments.gram, *DAMPINGS[start : start + many])
        errors = gptq.trial(sample, told, global_scale, moments.held_out).tolist()
        for number, error in enumerate(errors):
            if error < least:
                best, least = told.of(number), error
    if best is None:
        raise ValueError("no damping gives finite errors")
    return best


def trial_rows(rows: FloatRows) -> Iterator[torch.Tensor]:
    """Some rows of a weight, in pieces."""
    tiles = -(-rows.shape[0] // TILE)
    for number in range(min(tiles, _TRIAL_PIECES)):
        start = number * tiles // min(tiles, _TRIAL_PIECES) * TILE
        yield rows.rows(start, min(start + TILE, rows.shape[0]))
