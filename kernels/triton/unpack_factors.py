# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors as they are kept, in 8 bits or without their strengths, to the dtype that is multiplied, in Triton.

Both in one launch: they are small, and a second one would take as long as the bytes do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FACTOR_BLOCK, check_output_dtype
from .launch import Launcher, bf16_as_bits
from .tiles import to_output

_ELEMENTS, _MOST_COLS = 2048, 1024  # of a program, of its rows; packed ones are those of one scale


@triton.jit
def _scale_tile(
    values_ptr,
    scale_ptr,
    out_ptr,
    program,
    rows,
    cols,
    scale_cols,
    COLS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of ELEMENTS / COLS rows x COLS columns, times a scale a row: the tile's or, BLOCKS 0, the row's."""
    ROWS: tl.constexpr = ELEMENTS // COLS
    if ALIGNED:
        cols = cols // 16 * 16  # a hint on an argument of a function called here would be lost
    column_programs = tl.cdiv(cols, COLS)
    row = (program // column_programs * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = program % column_programs
    column = (first * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (column < cols)
    scale = tl.load(scale_ptr + row * scale_cols + first * BLOCKS, mask=row < rows, other=0.0)
    values = tl.load(values_ptr + row * cols + column, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out_ptr + row * cols + column, to_output(values, out_ptr.dtype.element_ty), mask=inside)


# As a constant, 1 column makes Triton 3.6 pack undefined bytes beside it.
@triton.jit(do_not_specialize=["cols", "rank"])
def _unpack_factors_kernel(
    down_ptr,
    down_scale_ptr,
    down_out_ptr,
    up_ptr,
    up_scale_ptr,
    up_out_ptr,
    rows,
    cols,
    rank,
    down_scale_cols,
    up_scale_cols,
    DOWN_COLS: tl.constexpr,
    UP_COLS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The first programs do ``down`` (rank, cols), the others, if there are any, ``up`` (rows, rank)."""
    program = tl.program_id(0)
    down_programs = tl.cdiv(rank, ELEMENTS // DOWN_COLS) * tl.cdiv(cols, DOWN_COLS)
    if program < down_programs:
        _scale_tile(
            down_ptr, down_scale_ptr, down_out_ptr, program, rank, cols, down_scale_cols, DOWN_COLS, ELEMENTS, BLOCKS,
            ALIGNED,
        )  # fmt: skip
    else:
        program -= down_programs
        _scale_tile(
            up_ptr, up_scale_ptr, up_out_ptr, program, rows, rank, up_scale_cols, UP_COLS, ELEMENTS, BLOCKS, ALIGNED
        )


def _tile_cols(cols: int) -> int:
    return min(max(triton.next_power_of_2(max(cols, 1)), 16), _MOST_COLS)


@functools.cache
def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., tuple]:
    """(N, K), dtype of the results, device -> function (down (R, K), down_scale, up (N, R), up_scale) -> (down, up).

    An ``up`` without scales comes back as it is, in ``dtype``. The function raises ValueError for tensors of another
    shape.
    """
    check_output_dtype(dtype)
    rows, cols = shape
    as_bits = bf16_as_bits(dtype, device)
    launchers: dict[tuple, Launcher] = {}

    def make(rank: int, counts: tuple[int, int], packed: bool) -> Launcher:
        tiles = (FACTOR_BLOCK, FACTOR_BLOCK) if packed else (_tile_cols(cols), FACTOR_BLOCK)
        aligned = cols % 16 == 0 and rank % 16 == 0
        grid = triton.cdiv(rank, _ELEMENTS // tiles[0]) * triton.cdiv(cols, tiles[0])
        if packed:
            grid += triton.cdiv(rows, _ELEMENTS // tiles[1]) * triton.cdiv(rank, tiles[1])
        arguments = (rows, cols, rank, *counts, *tiles, _ELEMENTS, int(packed), aligned)
        return Launcher(_unpack_factors_kernel, (grid,), arguments, device, num_warps=4)

    def run(down: torch.Tensor, down_scale: torch.Tensor, up: torch.Tensor, up_scale: torch.Tensor | None):
        rank, packed = len(down), up_scale is not None
        counts = (triton.cdiv(cols, FACTOR_BLOCK), triton.cdiv(rank, FACTOR_BLOCK)) if packed else (1, 1)
        right = down.shape == (rank, cols) and up.shape == (rows, rank) and down_scale.shape == (rank, counts[0])
        if not right or packed and up_scale.shape != (rows, counts[1]):
            found = [tuple(part.shape) for part in (down, down_scale, up, up_scale) if part is not None]
            raise ValueError(f"found factors and scales of {found}; expected those of a weight of {shape}")
        down_out = torch.empty((rank, cols), dtype=dtype, device=device)
        up_out = torch.empty((rows, rank), dtype=dtype, device=device) if packed else up.to(dtype)
        if down_out.numel() or packed and up_out.numel():
            key = rank, packed, down.dtype
            launch = launchers.get(key)
            if launch is None:
                launch = launchers[key] = make(rank, counts, packed)
            first = down.contiguous(), down_scale.contiguous(), down_out.view(torch.int16) if as_bits else down_out
            second = (
                (up.contiguous(), up_scale.contiguous(), up_out.view(torch.int16) if as_bits else up_out)
                if packed
                else first
            )
            launch(*first, *second)
        return down_out, up_out

    return run


def unpack_factors(
    down: torch.Tensor,
    down_scale: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """down (R, K) and up (N, R) int8, or float and up_scale None, + scales -> both in ``dtype``, times their scales."""
    return prepare((up.shape[0], down.shape[1]), dtype, down.device)(down, down_scale, up, up_scale)
