# SPDX-License-Identifier: Apache-2.0
"""A decoded NVFP4 weight plus a low-rank change, W + up down, in Triton: what a layer with a LoRA multiplies by.

The sum is made while the weight is decoded, in fp32, and rounded once. Beside the bytes of ``dequantize`` only the two
factors are read. kernels/reference.py has the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import PackedWeight, block_scale_shape, packed_shape
from .launch import Launcher, bf16_as_bits, part_reader, store_modifier
from .tiles import decode_in_place, four_scales, to_output

# Tiles: rows, words of 8 columns, warps, stages of the loop; the fastest on an H200 at rank 64 and at rank 384: larger
# ones read the factors less often.
TILES = {"small": (64, 16, 4, 2), "large": (128, 16, 4, 3)}
_MOST_RANK = 64  # of a step


def tile_of(rank: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """R -> rows and words of a program's tile and how much of the rank a step takes; options of the launch.

    No multiplication is fused with the addition behind it: a decoded number is rounded first, as in the definition.
    """
    rows, words, warps, stages = TILES["small" if rank <= 2 * _MOST_RANK else "large"]
    step = min(max(triton.next_power_of_2(rank), 16), _MOST_RANK)
    return (rows, words, step), {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


@triton.jit
def sum_tile(
    packed_ptr,
    scale_ptr,
    global_ptr,
    up_ptr,
    down_ptr,
    row,
    first_word,
    rows,
    cols,
    packed_rows,
    words_per_row,
    scale_cols,
    rank,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
    FULL: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """fp32 of the rows ``row`` [ROWS] and WORDS * 8 columns of W + up (rows, rank) x down (rank, cols).

    FULL: no tile crosses an edge, and RANK divides ``rank``. PRODUCTS: whether the factors' own dtype can be
    multiplied, as in Triton's interpreter bf16 cannot.
    """
    column, part = first_word * 8 + tl.arange(0, WORDS * 8), tl.arange(0, RANK)
    # Asked for first, to come while the factors are multiplied.
    word_col, group = first_word + tl.arange(0, WORDS), first_word // 8 + tl.arange(0, WORDS // 8)
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row.to(tl.int64)[:, None] * words_per_row
    scales = four_scales(scale_ptr, row, scale_cols)[:, None]
    word_inside = None if FULL else (row < packed_rows)[:, None] & (word_col < words_per_row)[None, :]
    group_inside = None if FULL else (row < packed_rows)[:, None] & (group < scale_cols // 4)[None, :]
    word = tl.load(words + word_col[None, :], mask=word_inside)
    scale = tl.load(scales + group[None, :] * 128, mask=group_inside)
    row_inside, column_inside = (row < rows)[:, None], (column < cols)[None, :]
    up = up_ptr + row.to(tl.int64)[:, None] * rank + part[None, :]
    down = down_ptr + part.to(tl.int64)[:, None] * cols + column[None, :]
    acc = tl.zeros((row.shape[0], WORDS * 8), tl.float32)
    for first in range(0, rank, RANK):
        if FULL:
            left, right = tl.load(up + first), tl.load(down + first * cols)
        else:
            part_inside = first + part < rank
            left = tl.load(up + first, mask=row_inside & part_inside[None, :], other=0.0)
            right = tl.load(down + first * cols, mask=part_inside[:, None] & column_inside, other=0.0)
        if PRODUCTS:
            acc = tl.dot(left, right, acc)
        else:
            acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    return decode_in_place(word, scale, tl.load(global_ptr)) + acc


@triton.jit
def _dequantize_sum_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    up_ptr,
    down_ptr,
    out_ptr,
    rows,
    cols,
    packed_rows,
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
    """Each program writes ROWS rows x WORDS * 8 columns; an int16 output receives bf16 bits. See ``sum_tile``."""
    column_programs = tl.cdiv(words_per_row, WORDS)
    row = tl.program_id(0) // column_programs * ROWS + tl.arange(0, ROWS)
    first_word = tl.program_id(0) % column_programs * WORDS
    values = sum_tile(
        packed_ptr, scale_ptr, global_ptr, up_ptr, down_ptr, row, first_word, rows, cols, packed_rows, words_per_row,
        scale_cols, rank, WORDS, RANK, FULL, PRODUCTS,
    )  # fmt: skip
    column = first_word * 8 + tl.arange(0, WORDS * 8)
    target = out_ptr + row.to(tl.int64)[:, None] * cols + column[None, :]
    inside = None if FULL else (row < rows)[:, None] & (column < cols)[None, :]
    tl.store(target, to_output(values, out_ptr.dtype.element_ty), mask=inside, cache_modifier=STORE)


def check_factors(up: torch.Tensor, down: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ValueError unless these are factors of a change of ``shape`` in ``dtype``."""
    rows, cols, rank = *shape, up.shape[1]
    if up.shape != (rows, rank) or down.shape != (rank, cols) or up.dtype != dtype or down.dtype != dtype:
        found = f"up {tuple(up.shape)} {up.dtype}, down {tuple(down.shape)} {down.dtype}"
        raise ValueError(f"found {found}; expected ({rows}, {rank}) and ({rank}, {cols}) of {dtype}")


@functools.cache
def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """(N, K), dtype of the factors, device -> function (packed, block_scale, global_scale, up, down) -> (N, K).

    up (N, R), down (R, K). The function raises ValueError for parts or factors of another shape or dtype.
    """
    rows, cols = shape
    bytes_shape = packed_shape(shape)
    words = bytes_shape[1] // 4
    products = device.type == "cuda" or dtype != torch.bfloat16
    store = store_modifier(shape, dtype, device)
    read, as_bits = part_reader(shape, device), bf16_as_bits(dtype, device)
    launchers: dict[int, Launcher] = {}

    def launcher(rank: int) -> Launcher:
        (tile_rows, tile_words, step), options = tile_of(rank)
        whole = rows % tile_rows == 0 and cols % (tile_words * 8) == 0 and rank % step == 0
        grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(words, tile_words),)
        sizes = (rows, cols, bytes_shape[0], words, block_scale_shape(shape)[1], rank)
        tile = (tile_rows, tile_words, step, whole, products, store)
        return Launcher(_dequantize_sum_kernel, grid, sizes + tile, device, (1,), **options)

    def run(
        packed: torch.Tensor,
        block_scale: torch.Tensor,
        global_scale: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        check_factors(up, down, shape, dtype)
        rank = up.shape[1]
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.numel():
            launch = launchers.get(rank)
            if launch is None:
                launch = launchers[rank] = launcher(rank)
            target = out.view(torch.int16) if as_bits else out
            launch(packed, block_scale, global_scale, up.contiguous(), down.contiguous(), target)
        return out

    return run


def dequantize_sum(weight: PackedWeight, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (N, K) in the factors' dtype, rounded once."""
    return prepare(tuple(weight.shape), up.dtype, weight.packed.device)(*weight.parts, up, down)
