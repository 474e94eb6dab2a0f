# SPDX-License-Identifier: Apache-2.0
"""Packing to NVFP4 on a CPU: the bytes of kernels/reference.py, in pieces of some rows that stay in a core's cache.

Each piece is one thread's: every operation on it runs in that thread alone, so that nothing waits for another core
between two operations of a few microseconds each. (torch's own threads meet after every operation, which is many times
slower when anything else runs on the machine, a hash of the file just written for one.)

The search looks up the squared errors of a magnitude under all 16 candidate scales at once, one row of
``reference.search_errors``; ``embedding_bag`` adds the 16 rows of a block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from .format import BLOCK, E2M1_MAX, PackedWeight, packed_shape, swizzle
from .reference import (
    COLUMN_STEPS,
    SEARCH_GRID,
    amax_scale,
    check_finite,
    check_quantize,
    checked_global_scale,
    chosen_scale,
    column_steps,
    search_errors,
    search_grid,
    search_penalty,
)

# fp32 elements of a piece: long enough for its operations to outweigh their dispatch, short enough for a cache.
_PIECE = 1 << 18
# Exponents of ``search_grid`` beyond which some candidate is no E4M3 value.
_LOWEST, _HIGHEST = -3, 9
# Column weights are looked up as two digits, 0 to 11, so that their sums too are exact in FP32.
_DIGIT = math.isqrt(COLUMN_STEPS) + 1


@torch.inference_mode(False)
def quantize(
    weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    search: str = "amax",
    column_weight: torch.Tensor | None = None,
) -> PackedWeight:
    """(N, K) float on the CPU -> PackedWeight, the bytes of reference.quantize; ValueError likewise."""
    check_quantize(weight, search, column_weight)
    weight = weight.detach()
    rows, cols = weight.shape
    height, width = packed_shape((rows, cols))
    step = max(1, min(rows, _PIECE // max(1, width * 2)))
    starts = range(0, rows, step)
    amax = torch.zeros(len(starts))

    def largest(start: int) -> None:
        low, high = torch.aminmax(weight[start : start + step])
        amax[start // step] = torch.maximum(-low, high)

    if global_scale is None:  # otherwise each piece's block maxima tell in time whether it is finite
        in_threads(largest, starts)
    global_scale = checked_global_scale(check_finite(amax.amax()), global_scale, search).float()
    steps = None if column_weight is None else column_steps(column_weight.detach())
    # The padding rows stay zero; all other bytes are written.
    packed, scale = torch.empty((height, width), dtype=torch.uint8), torch.empty((height, width * 2 // BLOCK))
    packed[rows:], scale[rows:] = 0, 0
    scale = scale.to(torch.float8_e4m3fn)
    in_threads(_Piece(weight, step, global_scale, search, steps, packed, scale), starts)
    return PackedWeight(packed, swizzle(scale), global_scale, (rows, cols))


def in_threads(work: Callable[[Any], None], pieces: Iterable) -> None:
    """``work(piece)`` for all pieces, in as many threads as torch uses, each running torch's operations by itself."""
    pieces = list(pieces)
    threads = torch.get_num_threads()
    if min(threads, len(pieces)) <= 1:
        for piece in pieces:
            work(piece)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)  # what a thread sets is also the default of threads to come


@dataclass(frozen=True)
class _Piece:
    """Quantises ``step`` rows from a given one into ``packed`` and ``scale``; each thread keeps its scratch memory."""

    weight: torch.Tensor
    step: int
    global_scale: torch.Tensor
    search: str
    column_steps: torch.Tensor | None
    packed: torch.Tensor
    scale: torch.Tensor
    local: threading.local = field(default_factory=threading.local)

    def __call__(self, start: int) -> None:
        rows = self.weight[start : start + self.step]
        width = self.packed.shape[1] * 2
        if not hasattr(self.local, "scratch"):
            values, size, power = (torch.zeros((self.step, width)) for _ in range(3))
            self.local.scratch = values, size, power, torch.empty((self.step, width), dtype=torch.uint8)
        values, size, power, codes = (buffer[: len(rows)] for buffer in self.local.scratch)
        values[:, : rows.shape[1]] = rows  # the columns beyond stay zero
        values, size, power, codes = (buffer.view(-1, BLOCK) for buffer in (values, size, power, codes))
        torch.abs(values, out=size)
        amax = size.amax(1)
        check_finite(amax.amax())
        if self.search == "mse":
            scale = _search_scale(size, amax, self.global_scale, self.column_steps)
        else:
            scale = amax_scale(amax, self.global_scale)
        self.scale[start : start + len(rows)] = scale.view(len(rows), -1)
        decode_scale = scale.float() * self.global_scale
        zero = decode_scale == 0
        values.div_(decode_scale.unsqueeze(1))
        if zero.any():
            values[zero] = 0.0
        _round_to_e2m1(values, size, power, codes)
        # Two codes read as one number: the even column is its low byte, and belongs in the high nibble.
        pairs = codes.view(torch.int16)
        self.packed[start : start + len(rows)] = ((pairs << 4) | (pairs >> 8)).view(len(rows), -1)


def _search_scale(
    size: torch.Tensor, amax: torch.Tensor, global_scale: torch.Tensor, steps: torch.Tensor | None
) -> torch.Tensor:
    """(B, 16) fp32 magnitudes, overwritten, + their maxima + () fp32 + (C, 16) column steps -> (B,) e4m3 scales."""
    exponent, factor = search_grid(amax, global_scale)
    size.mul_(factor.unsqueeze(1)).clamp_(max=2.0 * SEARCH_GRID)
    # 2**23 leaves no bits for a fraction, so the low bits of the sum are the rounded number.
    places = size.add_(8388608.0).view(torch.int32).sub_(0x4B000000)
    errors = _errors(places, steps)
    lowest, highest = torch.aminmax(exponent)
    if lowest < _LOWEST or highest > _HIGHEST:
        few = ((exponent < _LOWEST) | (exponent > _HIGHEST)).nonzero().view(-1)
        errors[few] += search_penalty(exponent[few])
    return chosen_scale(errors.min(1).indices, exponent, amax, global_scale)


def _errors(places: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    """(B, 16) int32 places on the search's grid + (C, 16) column steps -> (B, 16) error of each candidate scale."""
    table = search_errors(places.device)
    if steps is None:
        return torch.nn.functional.embedding_bag(places, table, mode="sum")
    high = (steps / _DIGIT).floor()
    sums = []
    for digit in (high, steps - high * _DIGIT):
        weights = digit.repeat(len(places) // len(steps), 1)
        sums.append(torch.nn.functional.embedding_bag(places, table, mode="sum", per_sample_weights=weights))
    return sums[0].double() * _DIGIT + sums[1]


def _round_to_e2m1(ratio: torch.Tensor, size: torch.Tensor, power: torch.Tensor, codes: torch.Tensor) -> None:
    """fp32 ``ratio``, overwritten -> uint8 ``codes`` of reference.round_to_e2m1; the others are scratch, all (B, 16).

    With p the power of two below a magnitude, at least 1, codes are p / 2 apart. Adding p * 1.5 * 2**22 rounds the
    magnitude to such a step, ties to the even one, and leaves the number of steps in the sum's low bits; the code is
    that number plus 2 * log2(p), which is what the exponent bits of p add up to modulo 8 (one more p makes it so).
    """
    torch.abs(ratio, out=size).clamp_(max=E2M1_MAX)
    bits = power.view(torch.int32)
    torch.bitwise_and(size.view(torch.int32), 0x7F800000, out=bits).clamp_(min=0x3F800000)
    size.add_(power, alpha=1.5 * 2**22 + 1.0)
    code = size.view(torch.int32)
    code.add_(bits.bitwise_right_shift_(22)).bitwise_and_(7)
    code.bitwise_or_(ratio.view(torch.int32).bitwise_right_shift_(28).bitwise_and_(8))
    codes.copy_(code)
