# SPDX-License-Identifier: Apache-2.0
"""Channels to frames, rows and columns, with the bias of the convolution before it, in one pass."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

from .launch import bf16_as_bits
from .tiles import round_to_bf16_bits

_TILE = 4096


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _depth_to_space_kernel(
    x_ptr,
    out_ptr,
    bias_ptr,
    positions,
    height,
    width,
    CHANNELS: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Each program takes ROWS positions: reads CHANNELS x PARTS numbers of each in order, writes PARTS x CHANNELS."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column, part = tl.arange(0, COLS), tl.arange(0, PARTS)
    source = column[:, None] * PARTS + part[None, :]
    inside = (first + row < positions)[:, None, None] & (column < CHANNELS)[None, :, None]
    offset = row[:, None, None] * (CHANNELS * PARTS) + source[None, :, :]
    values = tl.load(x_ptr + first * (CHANNELS * PARTS) + offset, mask=inside)
    if BIAS:
        bias = tl.load(bias_ptr + source, mask=(column < CHANNELS)[:, None]).to(tl.float32)
        values = values.to(tl.float32) + bias[None, :, :]
    if out_ptr.dtype.element_ty == tl.int16:
        values = round_to_bf16_bits(values.to(tl.float32))
    values = tl.permute(values.to(out_ptr.dtype.element_ty), (0, 2, 1))
    place = first + row
    at_width, at_row = place % width, place // width
    at_height, frame = at_row % height, at_row // height
    i, j, k = part // (P2 * P3), part // P3 % P2, part % P3
    target = (frame[:, None] * P1 + i[None, :]) * (height * P2) + at_height[:, None] * P2 + j[None, :]
    target = target * (width * P3) + at_width[:, None] * P3 + k[None, :]
    inside = (first + row < positions)[:, None, None] & (column < CHANNELS)[None, None, :]
    tl.store(out_ptr + target[:, :, None] * CHANNELS + column[None, None, :], values, mask=inside)


def depth_to_space(
    x: torch.Tensor, stride: tuple[int, int, int], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As in kernels/video_reference.py; the factors must be powers of two. Raises ValueError otherwise."""
    parts, (frames, height, width, total) = math.prod(stride), x.shape
    if parts & (parts - 1) or total % parts or not x.is_contiguous():
        raise ValueError(f"found {tuple(x.shape)}, factors {stride}; expected powers of two that divide the channels")
    channels = total // parts
    shape = (frames * stride[0], height * stride[1], width * stride[2], channels)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    cols, positions = triton.next_power_of_2(channels), frames * height * width
    rows = max(_TILE // (cols * parts), 1)
    target = out.view(torch.int16) if bf16_as_bits(x.dtype, x.device) else out
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        _depth_to_space_kernel[(triton.cdiv(positions, rows),)](
            x, target, x if bias is None else bias, positions, height, width,
            channels, *stride, parts, rows, cols, bias is not None, num_warps=4,
        )  # fmt: skip
    return out
