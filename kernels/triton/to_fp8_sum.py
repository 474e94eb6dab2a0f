# SPDX-License-Identifier: Apache-2.0
"""A packed weight plus a change of it to FP8 in Triton: what a layer in FP8 mode with a LoRA multiplies by.

A program decodes a row, adds the change's, finds the largest magnitude and stores one byte an element; up to 16,384
columns it keeps the sums in registers meanwhile. The change itself is a product for torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FP8, PackedWeight, block_scale_shape, packed_shape
from .launch import Launcher, part_reader
from .tiles import decode_words, to_e4m3

_MOST_BLOCKS, _STEP_BLOCKS = 1024, 256  # of a row in registers; of a step where a row has more


@triton.jit
def _sums(words, scales, change, global_scale, first, cols, blocks_per_row, inside_rows, BLOCKS: tl.constexpr):
    """fp32 [BLOCKS, 16] of one row from block ``first`` on: decoded weight plus change, zero outside."""
    block = first + tl.arange(0, BLOCKS)
    inside = inside_rows & (block < blocks_per_row)
    scale_byte = tl.load(scales + block // 4 * 512 + block % 4, mask=inside, other=0)
    source = block[:, None] * 2 + tl.arange(0, 2)[None, :]
    word = tl.load(words + source, mask=inside[:, None], other=0)
    values = tl.reshape(decode_words(word, scale_byte[:, None], global_scale), (BLOCKS, 16))
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    wanted = inside_rows & (column < cols)
    added = tl.load(change + column, mask=wanted, other=0.0).to(tl.float32)
    return tl.where(wanted, values + added, 0.0)


# As a constant, 1 column makes Triton 3.6 pack undefined bytes beside it.
@triton.jit(do_not_specialize=["cols"])
def _to_fp8_sum_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    change_ptr,
    out_ptr,
    row_scale_ptr,
    rows,
    cols,
    blocks_per_row,
    scale_cols,
    BLOCKS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Each program converts one row, padding becomes zero with the scale 1. SINGLE: BLOCKS blocks are the whole row."""
    row = tl.program_id(0)
    real = row < rows
    scales = scale_ptr + (row // 128).to(tl.int64) * (scale_cols * 128) + row % 32 * 16 + row % 128 // 32 * 4
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row.to(tl.int64) * (blocks_per_row * 2)
    change = change_ptr + row.to(tl.int64) * cols
    out = out_ptr + row.to(tl.int64) * (blocks_per_row * 16)
    global_scale = tl.load(global_ptr)
    values = _sums(words, scales, change, global_scale, 0, cols, blocks_per_row, real, BLOCKS)
    size = tl.max(tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=1), axis=0)
    if not SINGLE:
        for first in range(BLOCKS, blocks_per_row, BLOCKS):
            more = _sums(words, scales, change, global_scale, first, cols, blocks_per_row, real, BLOCKS)
            size = tl.maximum(size, tl.max(tl.max(tl.where(more == more, tl.abs(more), 0.0), axis=1), axis=0))
    bits = tl.div_rn(size, 448.0).to(tl.int32, bitcast=True)
    # The next power of two, from 2**-100 on, and its reciprocal, both by the exponent.
    bits = tl.maximum((bits + 0x7FFFFF) & 0x7F800000, 27 << 23)
    tl.store(row_scale_ptr + row, tl.where(real, bits.to(tl.float32, bitcast=True), 1.0))
    factor = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(
        out + column, to_e4m3(values * factor, out_ptr.dtype.element_ty), mask=(block < blocks_per_row)[:, None]
    )
    if not SINGLE:
        for first in range(BLOCKS, blocks_per_row, BLOCKS):
            more = _sums(words, scales, change, global_scale, first, cols, blocks_per_row, real, BLOCKS)
            inside = (first + block < blocks_per_row)[:, None]
            tl.store(out + first * 16 + column, to_e4m3(more * factor, out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def prepare(shape: tuple[int, int], device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(N, K), device -> function (packed, block_scale, global_scale, change (N, K)) -> what ``to_fp8_sum`` gives.

    The function raises ValueError for tensors of another shape.
    """
    padded_rows, bytes_per_row = packed_shape(shape)
    blocks = bytes_per_row // 8
    step = triton.next_power_of_2(max(blocks, 1)) if blocks <= _MOST_BLOCKS else _STEP_BLOCKS
    arguments = (*shape, blocks, block_scale_shape(shape)[1], step, step >= blocks)
    # 32 numbers a thread up to 4,096 columns, 64 above.
    warps = min(max(step // 64, 1), 8)
    as_bytes = (1,) if device.type == "cuda" else (1, 4)
    read = part_reader(shape, device)
    launchers: dict[torch.dtype, Launcher] = {}

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, change: torch.Tensor):
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        if change.shape != shape:
            raise ValueError(f"found a change of {tuple(change.shape)}; the weight has {shape}")
        out = torch.empty((padded_rows, blocks * 16), dtype=FP8, device=device)
        row_scale = torch.empty(padded_rows, dtype=torch.float32, device=device)
        if out.numel():
            launch = launchers.get(change.dtype)
            if launch is None:
                launch = Launcher(_to_fp8_sum_kernel, (padded_rows,), arguments, device, as_bytes, num_warps=warps)
                launchers[change.dtype] = launch
            launch(packed, block_scale, global_scale, change.contiguous(), out, row_scale)
        return out, row_scale

    return run


def to_fp8_sum(weight: PackedWeight, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) + (N, K) float -> (R16(N), R16(K)) e4m3, (R16(N),) fp32 row scales, powers of two."""
    return prepare(tuple(weight.shape), weight.packed.device)(*weight.parts, change)
