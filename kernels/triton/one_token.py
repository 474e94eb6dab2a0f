# SPDX-License-Identifier: Apache-2.0
"""Norms of one token's residual stream and of its heads in Triton, each with what comes before and after it."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import Launcher, after_the_one_before, bf16_as_bits, overlap, warps
from .tiles import as_bf16, load_row, store_bf16

_WARP_COLS = 512


@triton.jit
def _normed(values, weight, cols, eps, BITS: tl.constexpr):
    """fp32 [C] and the norm's weight w -> the RMS norm times 1 + w, both rounded to BF16."""
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / cols + eps))
    return as_bf16(values * factor * as_bf16(weight.to(tl.float32) + 1.0, BITS), BITS)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    y_ptr,
    y_weight_ptr,
    weight_ptr,
    x_out_ptr,
    out_ptr,
    cols,
    eps,
    COLS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    FULL: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program takes one row."""
    row = tl.program_id(0).to(tl.int64) * cols
    column = tl.arange(0, COLS)
    mask = column < cols
    if NORM:
        weight = load_row(weight_ptr + column, mask, FULL)
    if ADD:
        y_weight = load_row(y_weight_ptr + column, mask, FULL)
    after_the_one_before(OVERLAP)
    values = load_row(x_ptr + row + column, mask, FULL).to(tl.float32)
    if ADD:
        more = load_row(y_ptr + row + column, mask, FULL).to(tl.float32)
        more = _normed(more, y_weight, cols, eps, BITS)
        values = as_bf16(values + more, BITS)
        store_bf16(x_out_ptr + row + column, values, mask, FULL, BITS)
    if NORM:
        store_bf16(out_ptr + row + column, _normed(values, weight, cols, eps, BITS), mask, FULL, BITS)


@functools.lru_cache(maxsize=64)
def _adder(device: torch.device, rows: int, cols: int, eps: float, add: bool, norm: bool) -> Launcher:
    tile = triton.next_power_of_2(cols)
    options = overlap(device)
    arguments = (cols, eps, tile, add, norm, tile == cols, bf16_as_bits(torch.bfloat16, device), bool(options))
    options |= {"num_warps": warps(tile, _WARP_COLS)}
    return Launcher(_add_norm_kernel, (rows,), arguments, device, (), (0, 4) if add else (), **options)


def add_norm(
    x: torch.Tensor, add: tuple[torch.Tensor, torch.Tensor] | None, weight: torch.Tensor | None, eps: float
) -> torch.Tensor | None:
    """``one_token.add_norm``, in one kernel."""
    cols, bits = x.shape[-1], bf16_as_bits(torch.bfloat16, x.device)
    out = None if weight is None else torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    y, y_weight = (x, x) if add is None else add
    sums, result = (one.view(torch.int16) if bits else one for one in (x, x if out is None else out))
    launch = _adder(x.device, x.numel() // cols, cols, eps, add is not None, weight is not None)
    launch(x, y, y_weight, x if weight is None else weight, sums, result)
    return out


@triton.jit
def _place_token_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotation_ptr,
    position_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    heads,
    groups,
    eps,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    PAIRS: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program takes one head: of q, then of k, then of v. A rotation is a matrix: cosine, -sine, sine, cosine."""
    head = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    mask = pair < HALF
    after_the_one_before(OVERLAP)
    source = qkv_ptr + head * (2 * HALF) + pair
    first = load_row(source, mask, FULL).to(tl.float32)
    second = load_row(source + HALF, mask, FULL).to(tl.float32)
    place = tl.load(position_ptr) * (groups * 2 * HALF)
    if head >= heads + groups:
        target = value_ptr + place + (head - heads - groups) * (2 * HALF) + pair
    else:
        weight_ptr = q_weight_ptr
        target = query_ptr + head * (2 * HALF) + pair
        if head >= heads:
            weight_ptr = k_weight_ptr
            target = key_ptr + place + (head - heads) * (2 * HALF) + pair
        cosine = load_row(rotation_ptr + pair * 4, mask, FULL)
        sine = load_row(rotation_ptr + pair * 4 + 2, mask, FULL)
        squares = tl.sum(first * first + second * second, axis=0)
        factor = tl.div_rn(1.0, tl.sqrt_rn(squares / (2 * HALF) + eps))
        first *= factor * as_bf16(load_row(weight_ptr + pair, mask, FULL).to(tl.float32) + 1.0, BITS)
        second *= factor * as_bf16(load_row(weight_ptr + HALF + pair, mask, FULL).to(tl.float32) + 1.0, BITS)
        first, second = as_bf16(first, BITS), as_bf16(second, BITS)
        upper, lower = first * cosine - second * sine, second * cosine + first * sine
        first, second = upper, lower
    store_bf16(target, first, mask, FULL, BITS)
    store_bf16(target + HALF, second, mask, FULL, BITS)


@functools.lru_cache(maxsize=64)
def _placer(device: torch.device, heads: int, groups: int, width: int, eps: float) -> Launcher:
    half = width // 2
    pairs = triton.next_power_of_2(half)
    options, bits = overlap(device), bf16_as_bits(torch.bfloat16, device)
    arguments = (heads, groups, eps, half, pairs == half, pairs, bits, bool(options))
    return Launcher(_place_token_kernel, (heads + 2 * groups,), arguments, device, num_warps=1, **options)


def place_token(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    rotation: torch.Tensor,
    position: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """``one_token.place_token``, in one kernel."""
    device, (_, groups, width) = qkv.device, cache[0].shape
    heads = qkv.numel() // width - 2 * groups
    query = torch.empty((heads, width), dtype=torch.bfloat16, device=device)
    bits = bf16_as_bits(torch.bfloat16, device)
    written = (one.view(torch.int16) if bits else one for one in (query, *cache))
    launch = _placer(device, heads, groups, width, eps)
    launch(qkv, *weights, rotation, position, *written)
    return query
