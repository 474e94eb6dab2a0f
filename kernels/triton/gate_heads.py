# SPDX-License-Identifier: Apache-2.0
"""Attention's output times the gates of its heads, and its rows in FP8, in Triton: one pass instead of three."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..format import FP8, FP8Rows
from .launch import Launcher, bf16_as_bits, warps
from .norm_rows import write_row
from .tiles import load_row

_WARP_COLS = 512


@triton.jit
def _gate_heads_kernel(
    x_ptr,
    logits_ptr,
    out_ptr,
    scale_ptr,
    heads,
    width,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FULL: tl.constexpr,
    BITS: tl.constexpr,
):
    """Each program takes one row, as a matrix of heads."""
    row, cols = tl.program_id(0).to(tl.int64), heads * width
    head, place = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    column = head[:, None] * width + place[None, :]
    mask = (head[:, None] < heads) & (place[None, :] < width)
    gates = 2.0 * tl.sigmoid(load_row(logits_ptr + row * heads + head, head < heads, FULL).to(tl.float32))
    values = load_row(x_ptr + row * cols + column, mask, FULL).to(tl.float32) * gates[:, None]
    write_row(values, out_ptr, scale_ptr, row, cols, column, mask, QUANTIZE, FULL, BITS)


@functools.lru_cache(maxsize=256)
def _launcher(device: torch.device, rows: int, heads: int, width: int, quantize: bool, bits: bool) -> Launcher:
    tile = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    arguments = (heads, width, *tile, quantize, tile == (heads, width), bits)
    as_bytes = (2,) if quantize and device.type != "cuda" else ()
    many = warps(tile[0] * tile[1], _WARP_COLS)
    return Launcher(_gate_heads_kernel, (rows,), arguments, device, as_bytes, num_warps=many)


def gate_heads(x: torch.Tensor, logits: torch.Tensor, quantize: bool) -> torch.Tensor | FP8Rows:
    """``fused.gate_heads``, in one kernel."""
    cols, device, bits = x.shape[-1], x.device, bf16_as_bits(torch.bfloat16, x.device)
    rows, x, logits = x.numel() // cols, x.contiguous(), logits.contiguous()
    heads = logits.shape[-1]
    launch = _launcher(device, rows, heads, cols // heads, quantize, bits)
    if quantize:
        out = torch.empty((rows, cols), dtype=FP8, device=device)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=device)
        launch(x, logits, out, scale)
        return FP8Rows(out, scale, x.shape)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    launch(x, logits, out.view(torch.int16) if bits else out, x)
    return out
