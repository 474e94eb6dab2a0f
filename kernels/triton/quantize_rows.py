# SPDX-License-Identifier: Apache-2.0
"""Activations to FP8, on compute capability 8.9 and up, or to INT8, each row with a scale of its own, in Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FP8, round_up
from ..reference import ACTIVATIONS, SMALLEST_AMAX
from .launch import Launcher
from .tiles import to_8_bits

_ROW_COLS = 16384
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def activated(values, ACTIVATION: tl.constexpr, ASSEMBLY: tl.constexpr):
    """fp32 numbers -> fp32 of their activation.

    GELU's 0.5 (1 + tanh(u)) is the logistic function of 2 u. ASSEMBLY: with the GPU's own exponential and reciprocal,
    good to 2**-22, without their handling of subnormals, which would make this slower than the memory.
    """
    if ACTIVATION == "gelu_tanh":
        power = values * (-2.302208198144325 - 0.10294324004745842 * values * values)  # -2 u / ln 2
        if ASSEMBLY:
            gate = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
                "=f,f",
                [power],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            gate = 1.0 / (1.0 + tl.exp2(power))
        values = values * gate
    return values


@triton.jit
def row_scale(amax, MOST: tl.constexpr = 448.0):
    """Largest magnitude of a row -> the scale with which it becomes MOST."""
    return tl.where(amax < _SMALLEST_AMAX, 1.0, tl.div_rn(amax, MOST))


@triton.jit
def _largest_bits(values, INT8: tl.constexpr):
    """fp32 row -> bits of its largest magnitude; NaN is that of an INT8 row, whose scale holds what INT8 cannot."""
    sizes = tl.abs(values)
    if not INT8:
        sizes = tl.where(values == values, sizes, 0.0)
    return tl.max(sizes.to(tl.int32, bitcast=True), axis=0)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    cols,
    out_cols,
    COLS: tl.constexpr,
    SINGLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
):
    """Each program quantises one row of x; columns from ``cols`` to ``out_cols`` become zero. SINGLE: one step does."""
    row = tl.program_id(0).to(tl.int64)
    source, target = x_ptr + row * cols, out_ptr + row * out_cols
    on_gpu: tl.constexpr = out_ptr.dtype.element_ty != tl.uint8
    column = tl.arange(0, COLS)
    values = tl.load(source + column, mask=column < cols, other=0.0).to(tl.float32)
    values = activated(values, ACTIVATION, on_gpu)
    bits = _largest_bits(values, INT8)
    if not SINGLE:
        for first in range(COLS, cols, COLS):
            more = tl.load(source + first + column, mask=first + column < cols, other=0.0).to(tl.float32)
            more = activated(more, ACTIVATION, on_gpu)
            bits = tl.maximum(bits, _largest_bits(more, INT8))
    scale = row_scale(bits.to(tl.float32, bitcast=True), 127.0 if INT8 else 448.0)
    factor = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, scale)
    tl.store(target + column, to_8_bits(values * factor, out_ptr.dtype.element_ty, INT8), mask=column < out_cols)
    if not SINGLE:
        for first in range(COLS, out_cols, COLS):
            more = tl.load(source + first + column, mask=first + column < cols, other=0.0).to(tl.float32)
            more = to_8_bits(activated(more, ACTIVATION, on_gpu) * factor, out_ptr.dtype.element_ty, INT8)
            tl.store(target + first + column, more, mask=first + column < out_cols)


@functools.cache
def prepare(
    cols: int, dtype: torch.dtype, device: torch.device, activation: str = "", codes: torch.dtype = FP8
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """K, dtype and device of x, activation -> function (M, K) -> (M, R16(K)) ``codes``, (M, 1) fp32."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {ACTIVATIONS}")
    out_cols = round_up(cols, 16)
    step = min(triton.next_power_of_2(max(out_cols, 16)), _ROW_COLS)
    warps = min(max(step // 1024, 1), 8)
    arguments = (cols, out_cols, step, step >= out_cols, activation, codes == torch.int8)
    as_bytes = () if device.type == "cuda" else (1,)
    launchers: dict[int, Launcher] = {}

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[0]
        if x.shape[1] != cols:
            raise ValueError(f"found {x.shape[1]} columns, the weight has {cols}")
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty((rows, out_cols), dtype=codes, device=device)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=device)
        if rows == 0 or cols == 0:
            return out, scale.fill_(1.0)
        launch = launchers.get(rows)
        if launch is None:
            launch = Launcher(_quantize_rows_kernel, (rows,), arguments, device, as_bytes, num_warps=warps)
            launchers[rows] = launch
        launch(x, out, scale)
        return out, scale

    return run


def quantize_rows(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) float, activation -> (M, R16(K)) e4m3, (M, 1) fp32."""
    return prepare(x.shape[1], x.dtype, x.device, activation)(x)


def quantize_rows_int8(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) float, activation -> (M, R16(K)) int8, (M, 1) fp32."""
    return prepare(x.shape[1], x.dtype, x.device, activation, torch.int8)(x)
