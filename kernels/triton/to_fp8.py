# SPDX-License-Identifier: Apache-2.0
"""A packed weight to FP8, on compute capability 8.9 and up, or to INT8, in Triton.

It reads 0.56 byte and writes 1 byte per element: a program holds one row group's block scales long enough to find each
row's largest, then decodes. The choice of the row's scale is documented in kernels/reference.py and int8_reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import FP8, PackedWeight, block_scale_shape, packed_shape
from .launch import Launcher, part_reader
from .tiles import decode_words, e4m3_to_f32, largest_exponent, largest_scale, scales_of_rows, to_8_bits

# A tile for an H200; benchmarks/fp8.py times others. A thread owns two words, a block of 16 columns: one 16-byte store.
WEIGHT_TILE = {"ROWS": 2, "BLOCKS": 128, "num_warps": 4}


# As a constant, 1 column makes Triton 3.6 pack undefined bytes beside it.
@triton.jit(do_not_specialize=["cols"])
def _to_fp8_kernel(
    packed_ptr,
    scale_ptr,
    global_ptr,
    out_ptr,
    row_scale_ptr,
    rows,
    cols,
    padded_rows,
    blocks_per_row,
    scale_cols,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALES: tl.constexpr,
    FULL: tl.constexpr,
    INT8: tl.constexpr,
):
    """Each program converts ROWS whole rows, BLOCKS blocks of 16 columns a step; padding becomes zero.

    ROWS divides 32, so a program stays inside one 32-row group. SCALES: blocks_per_row rounded up to a power of two.
    FULL: rows and blocks divide evenly and nothing is padding.
    """
    first_row = tl.program_id(0) * ROWS
    scales = scales_of_rows(scale_ptr, first_row, scale_cols)
    row = tl.arange(0, ROWS)
    row_inside = first_row + row < rows

    if INT8:
        largest = e4m3_to_f32(largest_scale(scales, row, row_inside, blocks_per_row, SCALES)) * 1536.0  # 6 * 2**8
        multiplier = tl.div_rn(127.0, largest)
        row_scale = tl.div_rn(tl.load(global_ptr) * largest, 127.0)
    else:
        # 2**shift, as FP32 bits, brings 6 times the row's largest block scale into [192, 360].
        shift = 12 - largest_exponent(scales, row, row_inside, blocks_per_row, SCALES)
        multiplier = ((shift + 127) << 23).to(tl.float32, bitcast=True)
        row_scale = tl.load(global_ptr) * ((127 - shift) << 23).to(tl.float32, bitcast=True)
    tl.store(row_scale_ptr + first_row + row, tl.where(row_inside, row_scale, 1.0), mask=first_row + row < padded_rows)

    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first_row.to(tl.int64) * (blocks_per_row * 2)
    out = out_ptr + first_row.to(tl.int64) * (blocks_per_row * 16)
    block = tl.arange(0, BLOCKS)
    scale_offset = block[None, :] // 4 * 512 + row[:, None] * 16 + block[None, :] % 4
    source = row[:, None, None] * (blocks_per_row * 2) + block[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    target = row[:, None, None] * (blocks_per_row * 16) + column[None, :, :]
    for first in range(0, blocks_per_row, BLOCKS):
        scale_inside, word_inside, out_inside = None, None, None
        if not FULL:
            block_inside = first + block < blocks_per_row
            scale_inside = row_inside[:, None] & block_inside[None, :]
            word_inside = scale_inside[:, :, None]
            out_inside = (first_row + row < padded_rows)[:, None, None] & block_inside[None, :, None]
        scale_byte = tl.load(scales + first * 128 + scale_offset, mask=scale_inside, other=None if FULL else 0)
        word = tl.load(words + first * 2 + source, mask=word_inside, other=None if FULL else 0)
        values = decode_words(word, scale_byte[:, :, None], multiplier[:, None, None])
        values = tl.reshape(values, (ROWS, BLOCKS, 16))
        if not FULL:
            wanted = row_inside[:, None, None] & (first * 16 + column < cols)[None, :, :]
            values = tl.where(wanted, values, 0.0)
        tl.store(out + first * 16 + target, to_8_bits(values, out_ptr.dtype.element_ty, INT8), mask=out_inside)


@functools.cache
def prepare(
    shape: tuple[int, int], device: torch.device, codes: torch.dtype = FP8
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(N, K), device -> function (packed, block_scale, global_scale) -> (R16(N), R16(K)) ``codes``, (R16(N),) fp32.

    The function raises ValueError for tensors of another shape.
    """
    padded_rows, bytes_per_row = packed_shape(shape)
    blocks, tile = bytes_per_row // 8, WEIGHT_TILE
    full = shape == (padded_rows, blocks * 16) and shape[0] % tile["ROWS"] == 0 and blocks % tile["BLOCKS"] == 0
    scales = triton.next_power_of_2(max(blocks, 1))
    sizes = (*shape, padded_rows, blocks, block_scale_shape(shape)[1])
    grid = (triton.cdiv(padded_rows, tile["ROWS"]),)
    arguments = (*sizes, tile["ROWS"], tile["BLOCKS"], scales, full, codes == torch.int8)
    as_bytes = (1,) if device.type == "cuda" else (1, 3)
    launch = Launcher(_to_fp8_kernel, grid, arguments, device, as_bytes, num_warps=tile["num_warps"])
    read = part_reader(shape, device)

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor):
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        out = torch.empty((padded_rows, blocks * 16), dtype=codes, device=device)
        row_scale = torch.empty(padded_rows, dtype=torch.float32, device=device)
        if out.numel():
            launch(packed, block_scale, global_scale, out, row_scale)
        return out, row_scale

    return run


def to_fp8(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) -> (R16(N), R16(K)) e4m3, (R16(N),) fp32 row scales."""
    return prepare(tuple(weight.shape), weight.packed.device)(*weight.parts)


def to_int8(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) -> (R16(N), R16(K)) int8, (R16(N),) fp32 row scales."""
    return prepare(tuple(weight.shape), weight.packed.device, torch.int8)(*weight.parts)
