# SPDX-License-Identifier: Apache-2.0
"""Packing to NVFP4 in Triton, the bytes of kernels/reference.py, on compute capability 7.5 and up.

One kernel reads a weight once and writes codes and tiled block scales; SEARCH makes it compare the candidate scales of
``reference.search_scale`` on the way. Every operation that decides a byte is a division with IEEE rounding, or exact:
the search's arithmetic is on whole numbers below 2**24, so contraction into fused multiply-adds and the order of a
reduction change nothing.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..format import FP8, PackedWeight, block_scale_shape, packed_shape
from ..reference import check_quantize, checked_global_scale, column_steps, finite_amax
from .tiles import e4m3_to_f32, tiled_offset, to_e2m1_code, to_e4m3_bits

_BLOCKS = 64


@triton.jit
def _try_candidate(place, unit, NUMBER: tl.constexpr):
    """Places on the search's grid, fp32 (BLOCKS, 16) + fp32 units (BLOCKS,) -> squared errors, candidate scales.

    In units of half the scale the codes are 0, 1, 2, 3, 4, 6, 8, 12: adding and subtracting 2**22 times the power of
    two below a number rounds it to one. A number midway between two codes may go either way: its distances are equal.
    """
    step: tl.constexpr = 9.0 + NUMBER if NUMBER < 7 else 2.0 + 2.0 * NUMBER  # reference.SEARCH_STEPS
    code = place * (1.0 / (2.0 * step))
    power = (tl.maximum(code, 2.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 4194304.0
    distance = place - tl.minimum((code + power) - power, 12.0) * (2.0 * step)
    return distance * distance, unit * step


@triton.jit
def _search_scale(size, amax, global_scale, weights, WEIGHTED: tl.constexpr):
    """fp32 magnitudes (BLOCKS, 16), their maxima (BLOCKS,), int32 column weights -> fp32 scales (BLOCKS,)."""
    global_scale = tl.where(global_scale == 0.0, 1.0, global_scale)  # its blocks are zeros whatever is chosen
    ratio = tl.div_rn(amax, global_scale)
    exponent = tl.minimum(tl.maximum((ratio.to(tl.int32, bitcast=True) >> 23) - 127, -7), 11)
    factor = tl.div_rn(((135 - exponent) << 23).to(tl.float32, bitcast=True), global_scale)
    # The minimum also keeps the product and the rounding sum from being contracted into one operation.
    place = tl.minimum(size * factor[:, None], 512.0)
    place = (place + 8388608.0) - 8388608.0
    unit = ((121 + exponent) << 23).to(tl.float32, bitcast=True)
    if WEIGHTED:  # weighted sums stay below 2**31, the others below 2**24
        best = tl.full(amax.shape, 2147483647, tl.int32)
    else:
        best = tl.full(amax.shape, float("inf"), tl.float32)
    scale = tl.zeros_like(amax)
    for number in tl.static_range(16):
        errors, candidate = _try_candidate(place, unit, number)
        if WEIGHTED:
            error = tl.sum(errors.to(tl.int32) * weights, axis=1)
        else:
            error = tl.sum(errors, axis=1)
        in_subnormals = candidate * 512.0  # whole for every E4M3 value
        is_e4m3 = (candidate <= 448.0) & (in_subnormals.to(tl.int32).to(tl.float32) == in_subnormals)
        better = is_e4m3 & (error < best)
        best = tl.where(better, error, best)
        scale = tl.where(better, candidate, scale)
    scale = tl.where(ratio >= 4096.0, 448.0, scale)
    return tl.where(amax == 0.0, 0.0, scale)


@triton.jit
def _quantize_kernel(
    weight_ptr,
    global_ptr,
    column_ptr,
    packed_ptr,
    scale_ptr,
    rows,
    cols,
    blocks_per_row,
    scale_cols,
    BLOCKS: tl.constexpr,
    SEARCH: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Each program quantises BLOCKS neighbouring blocks of 16 columns of one row, padding with zeros.

    column_ptr: int32 column weights, 16 for each block of a row; read only if WEIGHTED.
    """
    programs_per_row = tl.cdiv(blocks_per_row, BLOCKS)
    row = tl.program_id(0) // programs_per_row
    block = tl.program_id(0) % programs_per_row * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    source = weight_ptr + row.to(tl.int64) * cols + column
    values = tl.load(source, mask=(row < rows) & (column < cols), other=0.0).to(tl.float32)
    global_scale = tl.load(global_ptr)
    inside = block < blocks_per_row
    amax = tl.max(tl.abs(values), axis=1)
    if SEARCH:
        weights = tl.load(column_ptr + column, mask=inside[:, None], other=0) if WEIGHTED else 0
        scale = _search_scale(tl.abs(values), amax, global_scale, weights, WEIGHTED)
    else:
        scale = tl.minimum(tl.div_rn(tl.div_rn(amax, 6.0), global_scale), 448.0)
    scale_bits = to_e4m3_bits(tl.where(global_scale == 0.0, 0.0, scale))
    decode_scale = (global_scale * (e4m3_to_f32(scale_bits) * 256.0))[:, None]
    scaled = tl.div_rn(values, tl.where(decode_scale == 0.0, 1.0, decode_scale))
    scaled = tl.where(decode_scale == 0.0, 0.0, tl.minimum(tl.maximum(scaled, -6.0), 6.0))
    even, odd = tl.split(tl.reshape(to_e2m1_code(scaled), (BLOCKS, 8, 2)))
    byte = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    target = packed_ptr + row.to(tl.int64) * (blocks_per_row * 8) + byte
    tl.store(target, ((even << 4) | odd).to(tl.uint8), mask=inside[:, None])
    tl.store(scale_ptr + tiled_offset(row, block, scale_cols), scale_bits.to(tl.uint8), mask=inside)


def quantize(
    weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    search: str = "amax",
    column_weight: torch.Tensor | None = None,
) -> PackedWeight:
    """(N, K) float -> PackedWeight, the bytes of reference.quantize with the same arguments; ValueError likewise."""
    check_quantize(weight, search, column_weight)
    global_scale = checked_global_scale(finite_amax(weight), global_scale, search)
    return pack(weight, global_scale.to(weight.device, torch.float32), search, column_weight)


def pack(
    weight: torch.Tensor, global_scale: torch.Tensor, search: str, column_weight: torch.Tensor | None = None
) -> PackedWeight:
    """``quantize`` of arguments known to be right, with nothing the CPU has to wait for."""
    shape = (weight.shape[0], weight.shape[1])
    packed = torch.empty(packed_shape(shape), dtype=torch.uint8, device=weight.device)
    block_scale = torch.zeros(block_scale_shape(shape), dtype=torch.uint8, device=weight.device)
    blocks_per_row = packed.shape[1] // 8
    weights = global_scale if column_weight is None else column_steps(column_weight.to(weight.device)).int()
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        _quantize_kernel[(packed.shape[0] * triton.cdiv(blocks_per_row, _BLOCKS),)](
            weight.contiguous(),
            global_scale,
            weights,
            packed,
            block_scale,
            *shape,
            blocks_per_row,
            block_scale.shape[1],
            _BLOCKS,
            search == "mse",
            column_weight is not None,
        )
    return PackedWeight(packed, block_scale.view(FP8), global_scale, shape)
