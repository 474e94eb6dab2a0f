# SPDX-License-Identifier: Apache-2.0
"""A low-rank factor as it is kept, in 8 bits or without its strengths, to the dtype that is multiplied, in Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FACTOR_BLOCK, check_output_dtype
from .launch import Launcher, bf16_as_bits
from .tiles import round_to_bf16_bits

_ELEMENTS, _MOST_COLS = 2048, 1024


@triton.jit
def _unpack_factor_kernel(
    values_ptr,
    scale_ptr,
    out_ptr,
    rows,
    cols,
    scale_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program multiplies ROWS rows x COLS columns by their scales, one for BLOCK columns or, BLOCK 0, a row."""
    column_programs = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // column_programs * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % column_programs * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (column < cols)
    scale = scale_ptr + row * scale_cols
    if BLOCK:
        scale = tl.load(scale + column // BLOCK, mask=inside, other=0.0)
    else:
        scale = tl.load(scale, mask=row < rows, other=0.0)
    values = tl.load(values_ptr + row * cols + column, mask=inside, other=0).to(tl.float32) * scale
    if out_ptr.dtype.element_ty == tl.int16:
        values = round_to_bf16_bits(values)
    tl.store(out_ptr + row * cols + column, values.to(out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """(N, K), dtype of the result, device -> function (values (N, K), scale (N, C)) -> (N, K).

    The function raises ValueError for tensors of another shape.
    """
    check_output_dtype(dtype)
    rows, cols = shape
    tile_cols = min(max(triton.next_power_of_2(max(cols, 1)), 16), _MOST_COLS)
    tile_rows = _ELEMENTS // tile_cols
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(cols, tile_cols),)
    as_bits = bf16_as_bits(dtype, device)
    launchers: dict[tuple[torch.dtype, int], Launcher] = {}

    def run(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        count = scale.shape[1]
        if values.shape != shape or scale.shape[0] != rows or count not in (1, triton.cdiv(cols, FACTOR_BLOCK)):
            found = f"values {tuple(values.shape)}, scales {tuple(scale.shape)}"
            expected = f"{shape} and {rows} scales, or as many for each {FACTOR_BLOCK} columns"
            raise ValueError(f"found {found}; expected {expected}")
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.numel():
            launch = launchers.get((values.dtype, count))
            if launch is None:
                arguments = (rows, cols, count, tile_rows, tile_cols, 0 if count == 1 else FACTOR_BLOCK)
                launch = launchers[values.dtype, count] = Launcher(
                    _unpack_factor_kernel, grid, arguments, device, num_warps=4
                )
            launch(values.contiguous(), scale.contiguous(), out.view(torch.int16) if as_bits else out)
        return out

    return run


def unpack_factor(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(N, K) int8 or float, (N, C) fp32 -> (N, K) ``dtype``: each value times its scale."""
    return prepare(tuple(values.shape), dtype, values.device)(values, scale)
