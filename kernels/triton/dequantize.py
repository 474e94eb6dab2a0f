# SPDX-License-Identifier: Apache-2.0
"""Decoding a packed weight in Triton, on compute capability 7.5 and up."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import PackedWeight, block_scale_shape, check_output_dtype, packed_shape
from .launch import Launcher, bf16_as_bits, part_reader, store_modifier
from .tiles import decode_words, scales_of_rows, to_output

# Tile found by measurement on an H200 (benchmarks/results); the kernel is bound by its stores, hardly by the tile.
_TILE_WORDS, _STEPS, _WARPS = 256, 2, 8


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    out_ptr,
    rows,
    cols,
    words_per_row,
    scale_cols,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    FULL: tl.constexpr,
    STORE: tl.constexpr,
):
    """Each program decodes ROWS rows x (STEPS * WORDS * 8) columns; an int16 output receives bf16 bits.

    ROWS divides 32 and WORDS is a multiple of 8, so a program stays inside one 32-row group and on whole scale tiles.
    FULL: no program crosses an edge. STORE: cache modifier of the output.
    """
    column_programs = tl.cdiv(words_per_row, WORDS * STEPS)
    first_row = tl.program_id(0) // column_programs * ROWS
    first_word = tl.program_id(0) % column_programs * (WORDS * STEPS)
    # Scalar 64-bit bases and 32-bit offsets inside the tile: no vector arithmetic on 64-bit addresses.
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first_row.to(tl.int64) * words_per_row + first_word
    scales = scales_of_rows(scale_ptr, first_row, scale_cols) + first_word * 64
    out = out_ptr + first_row.to(tl.int64) * cols + first_word * 8
    global_scale = tl.load(global_ptr)
    # Flat tiles: with one word a thread, the joins leave eight neighbouring outputs in it, which is one 16-byte store.
    source = tl.arange(0, ROWS * WORDS)
    row, word_col = source // WORDS, source % WORDS
    word_offset = row * words_per_row + word_col
    scale_offset = word_col // 8 * 512 + row * 16 + word_col // 2 % 4
    target = tl.arange(0, ROWS * WORDS * 8)
    target_row, column = target // (WORDS * 8), target % (WORDS * 8)
    out_offset = target_row * cols + column
    row_inside = first_row + row < rows
    target_row_inside = first_row + target_row < rows
    inside = None if FULL else row_inside & (first_word + word_col < words_per_row)
    word = tl.load(words + word_offset, mask=inside)
    scale_byte = tl.load(scales + scale_offset, mask=inside)
    for step in tl.static_range(STEPS):
        values = tl.reshape(decode_words(word, scale_byte, global_scale), (ROWS * WORDS * 8,))
        if step + 1 < STEPS:  # the next loads are issued before this step's store
            shift = (step + 1) * WORDS
            inside = None if FULL else row_inside & (first_word + shift + word_col < words_per_row)
            word = tl.load(words + shift + word_offset, mask=inside)
            scale_byte = tl.load(scales + shift * 64 + scale_offset, mask=inside)
        out_inside = None if FULL else target_row_inside & ((first_word + step * WORDS) * 8 + column < cols)
        values = to_output(values, out_ptr.dtype.element_ty)
        tl.store(out + step * (WORDS * 8) + out_offset, values, mask=out_inside, cache_modifier=STORE)


def _tile(rows: int, words_per_row: int) -> tuple[int, int, bool]:
    """(rows, words a row) -> (ROWS, WORDS, FULL) with 256 words a step: the widest tile that divides the row."""
    for words in (128, 64, 32, 16, 8):
        if words_per_row % (words * _STEPS) == 0 and rows % (_TILE_WORDS // words) == 0:
            return _TILE_WORDS // words, words, True
    return _TILE_WORDS // 64, 64, False


@functools.cache
def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """(N, K), output dtype, device -> function (packed, block_scale, global_scale) -> (N, K), for parts on ``device``.

    All that depends on nothing but these is computed here, once; the function costs the CPU a few microseconds. Raises
    ValueError for another dtype, the function for tensors of another shape.
    """
    check_output_dtype(dtype)
    rows, cols = shape
    words_per_row = packed_shape(shape)[1] // 4
    tile_rows, words, full = _tile(rows, words_per_row)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(words_per_row, words * _STEPS),)
    sizes = (rows, cols, words_per_row, block_scale_shape(shape)[1])
    tile = (tile_rows, words, _STEPS, full and cols % 16 == 0, store_modifier(shape, dtype, device))
    launch = Launcher(_dequantize_kernel, grid, sizes + tile, device, (1,), num_warps=_WARPS)
    read, as_bits = part_reader(shape, device), bf16_as_bits(dtype, device)

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.numel():
            launch(packed, block_scale, global_scale, out.view(torch.int16) if as_bits else out)
        return out

    return run


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """NVFP4 (N, K) -> (N, K) ``dtype``. Raises ValueError for another dtype, or tensors of another shape."""
    return prepare(tuple(weight.shape), dtype, weight.packed.device)(*weight.parts)
