# SPDX-License-Identifier: Apache-2.0
"""RMS norm and rotation of q and k in Triton: each is read and written once, the rotation of a token read once.

Without a rotation a row counts as one head, whose halves stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import Launcher, bf16_as_bits, warps
from .tiles import load_row, store_bf16

_WARP_PAIRS = 256


@triton.jit
def _low(word):
    """int32 -> fp32 of the bf16 in its low half."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    """int32 -> fp32 of the bf16 in its high half."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rotate(
    x_ptr, weight_ptr, out_ptr, row, place, mask, upper, lower, cols, eps,
    HALF: tl.constexpr, TURN: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One row: ``place`` has the columns of the heads' first halves, ``upper`` and ``lower`` the matrices' rows."""
    first = load_row(x_ptr + row * cols + place, mask, FULL).to(tl.float32)
    second = load_row(x_ptr + row * cols + place + HALF, mask, FULL).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(squares / cols + eps))
    first = first * factor * load_row(weight_ptr + place, mask, FULL).to(tl.float32)
    second = second * factor * load_row(weight_ptr + place + HALF, mask, FULL).to(tl.float32)
    if TURN:
        old_first = first
        first = _low(upper) * first + _high(upper) * second
        second = _low(lower) * old_first + _high(lower) * second
    store_bf16(out_ptr + row * cols + place, first, mask, FULL, BITS)
    store_bf16(out_ptr + row * cols + place + HALF, second, mask, FULL, BITS)


@triton.jit
def _norm_rope_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x2_ptr,
    weight2_ptr,
    out2_ptr,
    rotation_ptr,
    cols,
    tokens,
    eps,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BOTH: tl.constexpr,
    TURN: tl.constexpr,
    FULL: tl.constexpr,
    BITS: tl.constexpr,
):
    """Each program takes one token; rotation_ptr: int64, a matrix each. tokens: after as many rows it begins anew."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    mask = pair < cols // 2
    upper, lower = pair, pair
    if TURN:
        matrix = load_row(rotation_ptr + (row % tokens) * (cols // 2) + pair, mask, FULL)
        upper, lower = matrix.to(tl.int32), (matrix >> 32).to(tl.int32)
    place = pair + pair // HALF * HALF
    _rotate(x_ptr, weight_ptr, out_ptr, row, place, mask, upper, lower, cols, eps, HALF, TURN, FULL, BITS)
    if BOTH:
        _rotate(x2_ptr, weight2_ptr, out2_ptr, row, place, mask, upper, lower, cols, eps, HALF, TURN, FULL, BITS)


@functools.lru_cache(maxsize=256)
def _launcher(
    device: torch.device, rows: int, cols: int, tokens: int, eps: float, half: int, both: bool, turn: bool
) -> Launcher:
    pairs = triton.next_power_of_2(cols // 2)
    arguments = (cols, tokens, eps, half, pairs, both, turn, 2 * pairs == cols, bf16_as_bits(torch.bfloat16, device))
    return Launcher(_norm_rope_kernel, (rows,), arguments, device, num_warps=warps(pairs, _WARP_PAIRS))


def norm_rope(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]], rotation: torch.Tensor | None, eps: float
) -> list[torch.Tensor]:
    """``fused.norm_rope``, in one kernel."""
    device = tensors[0][0].device
    found, arguments = [], []
    for x, weight in tensors:
        found.append(torch.empty(x.shape, dtype=torch.bfloat16, device=device))
        out = found[-1].view(torch.int16) if bf16_as_bits(torch.bfloat16, device) else found[-1]
        arguments += [x.contiguous(), weight, out]
    cols = found[0].shape[-1]
    rows, turn = found[0].numel() // cols, rotation is not None
    matrices = rotation.reshape(-1).view(torch.int64) if turn else arguments[0]
    tokens, half = (rotation.shape[0] * rotation.shape[1], rotation.shape[3]) if turn else (1, cols // 2)
    launch = _launcher(device, rows, cols, tokens, eps, half, len(tensors) == 2, turn)
    launch(*(arguments if len(tensors) == 2 else arguments * 2), matrices)
    return found
