# SPDX-License-Identifier: Apache-2.0
"""Bias, residual, norm over the channels, modulation and SiLU in one pass, on compute capability 8.0 and up."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from .launch import bf16_as_bits
from .tiles import to_output

_WARP_NUMBERS = 1024  # that a warp holds, 32 a thread; programs of one warp came nearest to a copy's time


@triton.jit(do_not_specialize=["positions"])
def _norm_silu_kernel(
    x_ptr,
    sum_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    shift_ptr,
    scale_ptr,
    positions,
    eps,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MODULATED: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Each program takes ROWS positions with all their channels; sum and out of int16 receive bf16 bits."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    offset = row * CHANNELS + column
    inside = (first + row < positions) & (column < CHANNELS)
    total = tl.load(x_ptr + first * CHANNELS + offset, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual_ptr + first * CHANNELS + offset, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        kept = to_output(total, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + first * CHANNELS + offset, kept, mask=inside)
    if NORM:
        mean = tl.sum(total * total, axis=1, keep_dims=True) / CHANNELS
        total = total * tl.rsqrt(mean + eps)
        if MODULATED:
            scale = tl.load(scale_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
            total = total * (1.0 + scale) + shift
        total = total * tl.sigmoid(total)
    tl.store(out_ptr + first * CHANNELS + offset, to_output(total, out_ptr.dtype.element_ty), mask=inside)


def norm_silu(
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float | None = None,
    keep: bool = False,
) -> None:
    """As in kernels/video_reference.py. Raises ValueError for tensors of another shape or layout."""
    for tensor in (x, out, residual):
        if tensor is not None and (tensor.shape != x.shape or not tensor.is_contiguous()):
            raise ValueError(f"found {tuple(tensor.shape)}, strides {tensor.stride()}; expected {tuple(x.shape)}")
    channels, positions = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if not positions:
        return
    shift, scale = (x, x) if modulation is None else (part.contiguous() for part in modulation)
    cols = triton.next_power_of_2(channels)
    rows = max(_WARP_NUMBERS // cols, 1)
    bits = bf16_as_bits(x.dtype, x.device)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        _norm_silu_kernel[(triton.cdiv(positions, rows),)](
            x, x.view(torch.int16) if bits else x, out.view(torch.int16) if bits else out,
            x if bias is None else bias, x if residual is None else residual, shift, scale, positions, eps or 0.0,
            channels, rows, cols, bias is not None, residual is not None, modulation is not None, eps is not None, keep,
            num_warps=max(cols // _WARP_NUMBERS, 1),
        )  # fmt: skip
