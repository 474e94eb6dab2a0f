# SPDX-License-Identifier: Apache-2.0
"""The sums of an INT8 product times the scales of its rows and columns, plus a bias, in Triton: one pass over them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launcher, bf16_as_bits
from .tiles import to_output

_TILE_ROWS, _TILE_COLS = 4, 1024


# A clip's length must not compile the kernel anew.
@triton.jit(do_not_specialize=["tokens"])
def _scale_sums_kernel(
    sums_ptr,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    padded_rows,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Each program writes ROWS tokens x COLS rows of the weight; an int16 output receives bf16 bits."""
    column_programs = tl.cdiv(rows, COLS)
    token = tl.program_id(0) // column_programs * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_programs * COLS + tl.arange(0, COLS)
    inside = (token < tokens)[:, None] & (column < rows)[None, :]
    sums = tl.load(sums_ptr + token.to(tl.int64)[:, None] * padded_rows + column[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + token, mask=token < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + column, mask=column < rows, other=0.0)
    values = sums.to(tl.float32) * scale[:, None] * weight_scale[None, :]
    if BIAS:
        values += tl.load(bias_ptr + column, mask=column < rows, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + token.to(tl.int64)[:, None] * rows + column[None, :]
    tl.store(target, to_output(values, out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def prepare(rows: int, dtype: torch.dtype, device: torch.device) -> Callable[..., None]:
    """N, dtype and device of the result -> function (sums (M, P) int32, (M, 1) and (P,) fp32, bias (N,) or None, out).

    ``out`` (M, N) is written; P is N or more.
    """
    bits, cols = bf16_as_bits(dtype, device), min(_TILE_COLS, triton.next_power_of_2(max(rows, 1)))
    launchers: dict[tuple[int, int, bool], Launcher] = {}

    def run(sums, scale, weight_scale, bias, out) -> None:
        tokens, padded_rows = sums.shape
        if not (tokens and rows):
            return
        key = tokens, padded_rows, bias is not None
        launch = launchers.get(key)
        if launch is None:
            grid = (triton.cdiv(tokens, _TILE_ROWS) * triton.cdiv(rows, cols),)
            arguments = (tokens, rows, padded_rows, _TILE_ROWS, cols, bias is not None)
            launch = launchers[key] = Launcher(_scale_sums_kernel, grid, arguments, device, num_warps=4)
        launch(sums, scale, weight_scale, scale if bias is None else bias, out.view(torch.int16) if bits else out)

    return run


def scale_sums(
    sums: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(M, P) int32 x (M, 1) fp32 x (P,) fp32 + (N,) -> (M, N) ``dtype``, of the first N columns."""
    out = torch.empty((len(sums), rows), dtype=dtype, device=sums.device)
    prepare(rows, dtype, sums.device)(sums, scale, weight_scale, bias, out)
    return out
