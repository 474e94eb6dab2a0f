# SPDX-License-Identifier: Apache-2.0
"""A packed weight plus a low-rank change to FP8 in Triton: what a layer in FP8 mode with a LoRA multiplies by.

Two kernels: the row scales, from the block scales and a bound of the change, then the sum as dequantize_sum.py makes
it, stored as one byte an element. kernels/reference.py documents the bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FP8, PackedWeight, block_scale_shape, packed_shape
from .dequantize_sum import check_factors, sum_tile, tile_of
from .launch import Launcher, part_reader, store_modifier
from .tiles import four_scales, to_e4m3

_SCALE_ROWS = 8  # of a program


# As a constant, a rank of 1 makes Triton 3.6 pack undefined bytes beside it.
@triton.jit(do_not_specialize=["rank"])
def _row_scale_kernel(
    scale_ptr,
    global_ptr,
    up_ptr,
    peak_ptr,
    row_scale_ptr,
    rows,
    padded_rows,
    blocks_per_row,
    scale_cols,
    rank,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Each program bounds ROWS rows of W + up down. GROUPS of four scales, RANK: rounded up to a power of two."""
    if ALIGNED:
        rank = rank // 16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    group = tl.arange(0, GROUPS)
    inside = row_inside[:, None] & (group < scale_cols // 4)[None, :]
    four = tl.load(four_scales(scale_ptr, row, scale_cols)[:, None] + group[None, :] * 128, mask=inside, other=0)
    bits = tl.minimum(tl.maximum(blocks_per_row - group * 4, 0), 4) * 8  # what lies behind them is padding
    four &= tl.where(bits == 32, 0x7F7F7F7F, 0x7F7F7F7F & ((1 << (bits & 31)) - 1))[None, :]
    largest = tl.maximum(tl.maximum(four & 0xFF, four >> 8 & 0xFF), tl.maximum(four >> 16 & 0xFF, four >> 24))
    largest = tl.maximum(tl.max(largest, axis=1) >> 3, 1)
    weight = tl.load(global_ptr) * 360.0 * ((largest - 12 + 127) << 23).to(tl.float32, bitcast=True)
    part = tl.arange(0, RANK)
    inside = row_inside[:, None] & (part < rank)[None, :]
    up = tl.load(up_ptr + row.to(tl.int64)[:, None] * rank + part[None, :], mask=inside, other=0.0)
    peak = tl.load(peak_ptr + part, mask=part < rank, other=0.0)
    bound = weight + tl.sum(tl.abs(up.to(tl.float32)) * peak[None, :], axis=1)
    bits = tl.div_rn(bound, 448.0).to(tl.int32, bitcast=True)
    # The next power of two, from 2**-100 on: a row of zeros has a scale too.
    scale = tl.maximum((bits + 0x7FFFFF) & 0x7F800000, 27 << 23).to(tl.float32, bitcast=True)
    tl.store(row_scale_ptr + row, tl.where(row_inside, scale, 1.0), mask=row < padded_rows)


@triton.jit
def _to_fp8_sum_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    up_ptr,
    down_ptr,
    row_scale_ptr,
    out_ptr,
    rows,
    cols,
    padded_rows,
    words_per_row,
    scale_cols,
    rank,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    FULL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STORE: tl.constexpr,
):
    """Each program writes ROWS rows x WORDS * 8 columns, padding as zeros. See ``sum_tile``."""
    column_programs = tl.cdiv(words_per_row, WORDS)
    row = tl.program_id(0) // column_programs * ROWS + tl.arange(0, ROWS)
    first_word = tl.program_id(0) % column_programs * WORDS
    row_scale = tl.load(row_scale_ptr + row, mask=None if FULL else row < padded_rows, other=None if FULL else 1.0)
    values = sum_tile(
        packed_ptr, scale_ptr, global_ptr, up_ptr, down_ptr, row, first_word, rows, cols, padded_rows, words_per_row,
        scale_cols, rank, WORDS, RANK, FULL, PRODUCTS,
    )  # fmt: skip
    # The reciprocal of a power of two is exact, by its exponent.
    values *= ((254 << 23) - row_scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)[:, None]
    column = first_word * 8 + tl.arange(0, WORDS * 8)
    inside = None
    if not FULL:
        values = tl.where((row < rows)[:, None] & (column < cols)[None, :], values, 0.0)
        inside = (row < padded_rows)[:, None] & (column < words_per_row * 8)[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * (words_per_row * 8) + column[None, :]
    tl.store(target, to_e4m3(values, out_ptr.dtype.element_ty), mask=inside, cache_modifier=STORE)


@functools.cache
def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., tuple]:
    """(N, K), dtype of the factors, device -> function (packed, block_scale, global_scale, up, down, peak).

    The function gives (R16(N), R16(K)) e4m3 and (R16(N),) fp32; it raises ValueError for tensors of another shape or
    dtype.
    """
    rows, cols = shape
    padded_rows, bytes_per_row = packed_shape(shape)
    blocks, words, scale_cols = bytes_per_row // 8, bytes_per_row // 4, block_scale_shape(shape)[1]
    on_gpu = device.type == "cuda"
    products = on_gpu or dtype != torch.bfloat16
    read, store = part_reader(shape, device), store_modifier(shape, FP8, device)
    launchers: dict[int, tuple[Launcher, Launcher]] = {}

    def make(rank: int) -> tuple[Launcher, Launcher]:
        powers = (triton.next_power_of_2(max(scale_cols // 4, 1)), triton.next_power_of_2(rank))
        arguments = (rows, padded_rows, blocks, scale_cols, rank, _SCALE_ROWS, *powers, rank % 16 == 0)
        grid = (triton.cdiv(padded_rows, _SCALE_ROWS),)
        scales = Launcher(_row_scale_kernel, grid, arguments, device, (0,), num_warps=4)
        (tile_rows, tile_words, step), options = tile_of(rank)
        whole = rows % tile_rows == 0 and cols % (tile_words * 8) == 0 and rank % step == 0
        tile = (tile_rows, tile_words, step, whole, products, store)
        grid = (triton.cdiv(padded_rows, tile_rows) * triton.cdiv(words, tile_words),)
        as_bytes = (1,) if on_gpu else (1, 6)
        arguments = (rows, cols, padded_rows, words, scale_cols, rank, *tile)
        return scales, Launcher(_to_fp8_sum_kernel, grid, arguments, device, as_bytes, **options)

    def run(
        packed: torch.Tensor,
        block_scale: torch.Tensor,
        global_scale: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        peak: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        check_factors(up, down, shape, dtype)
        rank = up.shape[1]
        if peak.shape != (rank,) or peak.dtype != torch.float32:
            raise ValueError(f"found peak {tuple(peak.shape)} {peak.dtype}; expected ({rank},) of torch.float32")
        out = torch.empty((padded_rows, words * 8), dtype=FP8, device=device)
        row_scale = torch.empty(padded_rows, dtype=torch.float32, device=device)
        if out.numel():
            found = launchers.get(rank)
            if found is None:
                found = launchers[rank] = make(rank)
            up = up.contiguous()
            found[0](block_scale, global_scale, up, peak, row_scale)
            found[1](packed, block_scale, global_scale, up, down.contiguous(), row_scale, out)
        return out, row_scale

    return run


def to_fp8_sum(
    weight: PackedWeight, up: torch.Tensor, down: torch.Tensor, peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (R16(N), R16(K)) e4m3, (R16(N),) fp32 row scales, powers of two."""
    return prepare(tuple(weight.shape), up.dtype, weight.packed.device)(*weight.parts, up, down, peak)
