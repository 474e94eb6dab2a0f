# SPDX-License-Identifier: Apache-2.0
"""GPTQ's rounding of a group of 16 columns in Triton, all blocks of columns and all rows at once: kernels/gptq.py.

A pass takes two launches a group: the product that says how far the settled columns move the targets, and the kernel,
which tries the scales, rounds with the best, and writes codes, tiled scale and errors. Nothing waits for the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..format import BLOCK, FP8, PackedWeight, block_scale_shape, packed_shape
from ..gptq import LARGEST_LEVEL, SCALES
from .tiles import e4m3_to_f32, tiled_offset, to_e2m1_code, to_e4m3_bits

_ROWS = 64  # of a program of four warps: eight numbers a thread
_LARGEST_LEVEL, _SCALES = tl.constexpr(LARGEST_LEVEL), tl.constexpr(SCALES)


@triton.jit
def _column(values, column, place):
    """fp32 [R, 16], its columns' numbers [1, 16], one of them -> that column [R]."""
    return tl.sum(tl.where(column == place, values, 0.0), axis=1)


@triton.jit
def _cost(target, scale, within_ptr, cost_ptr, column):
    """fp32 targets [R, 16] + decoded scales [R] -> what rounding to them costs [R], the levels [R, 16]."""
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
    total, levels = tl.zeros_like(scale), tl.zeros_like(target)
    for place in range(16):
        here = _column(target, column, place)
        level = tl.minimum(tl.maximum(here * inverse, -6.0), 6.0)
        power = tl.maximum(level.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
        power *= 6291456.0  # 1.5 * 2**22
        level = (level + power) - power
        residual = here - level * scale
        total += tl.load(cost_ptr + place) * residual * residual
        target += residual[:, None] * tl.load(within_ptr + place * 16 + column)
        levels = tl.where(column == place, level[:, None], levels)
    return total, levels


@triton.jit
def _present_cost(residuals, within_ptr, cost_ptr, column):
    """fp32 distances of the targets from what is there already [R, 16] -> what it costs [R]."""
    total = tl.sum(residuals, axis=1) * 0.0
    for place in range(16):
        here = _column(residuals, column, place)
        total += tl.load(cost_ptr + place) * here * here
        residuals += here[:, None] * tl.load(within_ptr + place * 16 + column)
    return total


@triton.jit(do_not_specialize=["group"])
def _group_kernel(
    weight_ptr,
    pushed_ptr,
    errors_ptr,
    order_ptr,
    within_ptr,
    cost_ptr,
    global_ptr,
    packed_ptr,
    scale_ptr,
    group,
    count,
    width,
    rows,
    cols,
    blocks_per_row,
    scale_cols,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program rounds a group of one block of columns, in ROWS rows; what is better already is left, if AGAIN.

    weight (rows, cols) fp32, pushed (count, rows, 16), errors (count, rows, width) in the order of the groups; order
    (count, width / 16) int64: which group of the block is taken when.
    """
    block = tl.program_id(0) % count
    row = tl.program_id(0) // count * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 16)[None, :]
    groups = width // 16
    place = block * groups + tl.load(order_ptr + block * groups + group).to(tl.int32)
    inside = (row < rows)[:, None]
    source = weight_ptr + row.to(tl.int64)[:, None] * cols + place * 16 + column
    weight = tl.load(source, mask=inside & (place * 16 + column < cols), other=0.0)
    line = block.to(tl.int64) * rows + row
    pushed = tl.load(pushed_ptr + line[:, None] * 16 + column, mask=inside, other=0.0)
    target = weight + pushed
    within_ptr += (block * groups + group) * 256
    cost_ptr += (block * groups + group) * 16
    global_scale = tl.load(global_ptr)

    amax = tl.max(tl.abs(target), axis=1)
    most = tl.minimum(tl.div_rn(tl.div_rn(amax, _LARGEST_LEVEL), global_scale), 448.0)
    first = to_e4m3_bits(tl.where(global_scale == 0.0, 0.0, most))
    least, bits = tl.full(amax.shape, float("inf"), tl.float32), first
    scale, levels = tl.zeros_like(amax), tl.zeros_like(target)
    for number in range(_SCALES + 1):  # the last time with the best
        candidate = tl.where(number == _SCALES, bits, tl.minimum(first + number, 126))
        scale = global_scale * (e4m3_to_f32(candidate) * 256.0)
        total, levels = _cost(target, scale, within_ptr, cost_ptr, column)
        better = total < least
        least, bits = tl.where(better, total, least), tl.where(better, candidate, bits)
    known = errors_ptr + line[:, None] * width + group * 16 + column
    if AGAIN:
        present = tl.load(known, mask=inside, other=0.0) + pushed
        taken = least < _present_cost(present, within_ptr, cost_ptr, column)
    else:
        taken = amax >= 0.0
    inside = inside & taken[:, None]
    tl.store(known, weight - levels * scale[:, None], mask=inside)
    even, odd = tl.split(tl.reshape(to_e2m1_code(levels), (ROWS, 8, 2)))
    target_ptr = packed_ptr + row.to(tl.int64)[:, None] * (blocks_per_row * 8) + place * 8 + tl.arange(0, 8)[None, :]
    inside = inside & (place < blocks_per_row)
    tl.store(target_ptr, ((even << 4) | odd).to(tl.uint8), mask=inside)
    taken = taken & (row < rows) & (place < blocks_per_row)
    tl.store(scale_ptr + tiled_offset(row, place, scale_cols), bits.to(tl.uint8), mask=taken)


def quantize(weight: torch.Tensor, passes: Sequence[Any], global_scale: torch.Tensor) -> PackedWeight:
    """(N, K) float, Feedback of each pass, () fp32 -> PackedWeight; the arguments have been checked."""
    (rows, cols), (count, width), device = weight.shape, passes[0].order.shape, weight.device
    weight, global_scale = weight.float().contiguous(), global_scale.to(device, torch.float32)
    packed = torch.zeros(packed_shape((rows, cols)), dtype=torch.uint8, device=device)
    scale = torch.zeros(block_scale_shape((rows, cols)), dtype=torch.uint8, device=device)
    errors = torch.empty((count, rows, width), device=device)
    order = (passes[0].order[:, ::BLOCK] // BLOCK).contiguous()
    grid = (count * triton.cdiv(rows, _ROWS),)
    sizes = (count, width, rows, cols, packed.shape[1] // 8, scale.shape[1])
    with torch.cuda.device(device) if weight.is_cuda else contextlib.nullcontext():
        for again, told in enumerate(passes):
            for group in range(width // BLOCK):
                start = group * BLOCK
                settled = width if again else start
                pushed = torch.bmm(errors[:, :, :settled], told.carry[:, :settled, start : start + BLOCK])
                parts = (weight, pushed, errors, order, told.within, told.cost, global_scale, packed, scale)
                _group_kernel[grid](*parts, group, *sizes, bool(again), _ROWS, num_warps=4)
    return PackedWeight(packed, scale.view(FP8), global_scale, (rows, cols))
