# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of column blocks of a Linear's inputs in Triton, added to sums in one launch; compute capability 8.0.

Tensor cores multiply BF16 or FP16 numbers, whose products FP32 holds exactly, and add them up in FP32. Each program has
one tile of one block and goes through all tokens, so that nothing depends on the order in which programs run: first
those that count for the one sum, then those that are held out. A matrix is symmetric: tiles below its diagonal are
copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launcher

_TILE, _LARGE_TILE, _LARGE_WIDTH = 64, 128, 512
_TOKENS = 64


@triton.jit
def _sum(x_ptr, left, right, first, last, cols, total, TOKENS: tl.constexpr):
    """Tokens ``first`` to ``last`` of the columns ``left`` and ``right`` [T] -> total [T, T] and their products."""
    token = tl.arange(0, TOKENS)[:, None]
    for start in range(first, last, TOKENS):
        row = (start + token).to(tl.int64) * cols
        inside = start + token < last
        one = tl.load(x_ptr + row + left[None, :], mask=inside & (left < cols)[None, :], other=0.0)
        other = tl.load(x_ptr + row + right[None, :], mask=inside & (right < cols)[None, :], other=0.0)
        total = tl.dot(tl.trans(one), other, total)
    return total


@triton.jit
def _add(sum_ptr, i, j, inside, mirrored, total, width):
    """Add [T, T] at columns ``i`` and ``j`` to sums (G, width, width), and its transpose where ``mirrored``."""
    offset = (i // width).to(tl.int64) * width * width
    place = sum_ptr + offset + i % width * width + j % width
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
    place = sum_ptr + offset + j % width * width + i % width
    inside = inside & mirrored
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _moments_kernel(
    x_ptr,
    gram_ptr,
    held_ptr,
    turn_ptr,
    rows,
    cols,
    width,
    span,
    tiles,
    columns,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Each program has one tile of a span of columns: a block, or several blocks that are narrower than a tile.

    x (rows, cols) bf16 or fp16; gram, held (columns / width, width, width) fp32; turn int32: which quarter of the
    tokens is held out. ``tiles``: on a side of a span.
    """
    turn = tl.load(turn_ptr)
    start, stop = rows * turn // 4, rows * (turn + 1) // 4
    program = tl.program_id(0)
    first, second = program // tiles % tiles, program % tiles
    base = program // (tiles * tiles) * span
    if first <= second:
        left, right = first * TILE + tl.arange(0, TILE), second * TILE + tl.arange(0, TILE)
        known = (left < span)[:, None] & (right < span)[None, :]
        left, right = base + left, base + right
        i, j = left[:, None], right[None, :]
        inside = known & (i // width == j // width) & (i < columns) & (j < columns)
        total = tl.zeros((TILE, TILE), tl.float32)
        total = _sum(x_ptr, left, right, 0, start, cols, total, TOKENS)
        total = _sum(x_ptr, left, right, stop, rows, cols, total, TOKENS)
        _add(gram_ptr, i, j, inside, first < second, total, width)
        total = _sum(x_ptr, left, right, start, stop, cols, tl.zeros((TILE, TILE), tl.float32), TOKENS)
        _add(held_ptr, i, j, inside, first < second, total, width)


@functools.lru_cache(maxsize=1024)
def prepare(
    rows: int, cols: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]:
    """T, K, (G, B, B) of the sums, dtype of x -> function of x (T, K), gram and held_out, added to, and a turn, 0 to 3.

    Tokens from T * turn // 4 to T * (turn + 1) // 4 are held out. x is contiguous, BF16 or FP16; the sums FP32.
    """
    count, width, _ = shape
    tile = _LARGE_TILE if width >= _LARGE_WIDTH else _TILE
    span = width if width >= tile else tile // width * width
    tiles = triton.cdiv(span, tile)
    columns = count * width
    grid = (triton.cdiv(columns, span) * tiles * tiles,)
    warps, stages = (8, 2) if tile == _LARGE_TILE else (4, 4)
    arguments = (rows, cols, width, span, tiles, columns, tile, _TOKENS)
    launch = Launcher(_moments_kernel, grid, arguments, device, changes=(1, 2), num_warps=warps, num_stages=stages)
    turns = _turns(device)

    def run(x: torch.Tensor, gram: torch.Tensor, held: torch.Tensor, turn: int) -> None:
        launch(x, gram, held, turns[turn])

    return run


@functools.cache
def _turns(device: torch.device) -> list[torch.Tensor]:
    """0 to 3 on the device, each at an address that a kernel may be launched with directly."""
    return list(torch.arange(4, dtype=torch.int32, device=device).unsqueeze(1).repeat(1, 4))
