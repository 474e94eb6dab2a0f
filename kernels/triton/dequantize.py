"""NVFP4 in Triton: the same names and results as kernels/reference.py, on compute capability 7.5 and up.

No FP4 or FP8 instruction is needed, and no BF16 one below compute capability 8.0: E2M1 codes and E4M3 scales are
decoded by shifting their bits into an FP16 number's. ``decode_words`` is the one decode tile; every kernel that reads
packed weights goes through it. ``quantize`` is in kernels/triton/quantize.py.

One 32-bit word of ``packed`` holds eight neighbouring columns, half a block, hence one scale: byte k has column 2k in
its high nibble and 2k + 1 in its low one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import OUTPUT_DTYPES, block_scale_shape, check_request, packed_shape
from .launch import Launcher
from .quantize import _e4m3_to_f32, quantize  # noqa: F401  (one of the four functions this module offers)

# Tile found by measurement on an H200 (benchmarks/results); the kernel is bound by its stores, hardly by the tile.
_TILE_WORDS, _STEPS, _WARPS = 256, 2, 8
L2_BYTES = 48 << 20
Dequantizer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@triton.jit
def _halves_to_f32(pair):
    """int32 -> fp32 of its low and of its high 16 bits, each read as FP16."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def decode_words(word, scale_byte, global_scale):
    """int32 words [...] + their E4M3 scale bytes [...] + fp32 scalar -> fp32 values [..., 2, 2, 2], columns in order.

    The exponent and mantissa bits of a code, moved to bits 9-11 of an FP16 number, make its value times 2**-14 (0.5
    becomes a subnormal); two codes, 16 bits apart, are moved by the same shift. That 2**-14 and the scale's 2**-8 are
    made good in ``global_scale``: powers of two change no rounding.
    """
    scale = _e4m3_to_f32(scale_byte) * (global_scale * 4194304.0)
    c1, c5 = _halves_to_f32(((word << 9) & 0x0E000E00) | ((word << 12) & -0x7FFF8000))
    c0, c4 = _halves_to_f32(((word << 5) & 0x0E000E00) | ((word << 8) & -0x7FFF8000))
    c3, c7 = _halves_to_f32(((word << 1) & 0x0E000E00) | ((word << 4) & -0x7FFF8000))
    c2, c6 = _halves_to_f32(((word >> 3) & 0x0E000E00) | (word & -0x7FFF8000))
    even = tl.join(tl.join(c0 * scale, c4 * scale), tl.join(c2 * scale, c6 * scale))
    odd = tl.join(tl.join(c1 * scale, c5 * scale), tl.join(c3 * scale, c7 * scale))
    return tl.join(even, odd)


@triton.jit
def _round_to_bf16_bits(value):
    """fp32 -> int16 bits of the nearest bf16, ties to even, in integers: for hardware without BF16 conversions."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)  # the sum would carry a NaN's bits into the sign


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
    scales = scale_ptr + (first_row // 128).to(tl.int64) * (scale_cols * 128) + first_word * 64
    scales += first_row % 32 * 16 + first_row % 128 // 32 * 4
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
        if out_ptr.dtype.element_ty == tl.int16:
            values = _round_to_bf16_bits(values)
        out_inside = None if FULL else target_row_inside & ((first_word + step * WORDS) * 8 + column < cols)
        values = values.to(out_ptr.dtype.element_ty)
        tl.store(out + step * (WORDS * 8) + out_offset, values, mask=out_inside, cache_modifier=STORE)


def _tile(rows: int, words_per_row: int) -> tuple[int, int, bool]:
    """(rows, words a row) -> (ROWS, WORDS, FULL) with 256 words a step: the widest tile that divides the row."""
    for words in (128, 64, 32, 16, 8):
        if words_per_row % (words * _STEPS) == 0 and rows % (_TILE_WORDS // words) == 0:
            return _TILE_WORDS // words, words, True
    return _TILE_WORDS // 64, 64, False


@functools.cache
def dequantizer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Dequantizer:
    """(N, K), output dtype, device -> function (packed, block_scale, global_scale) -> (N, K), for tensors of
    ``device``.

    All that depends on nothing but these is computed here, once; the function costs the CPU a few microseconds. Raises
    ValueError for another dtype, the function for tensors of another shape.
    """
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"cannot dequantise NVFP4 to {dtype}; expected one of {OUTPUT_DTYPES}")
    rows, cols = shape
    bytes_shape, scale_shape = packed_shape(shape), block_scale_shape(shape)
    words_per_row = bytes_shape[1] // 4
    tile_rows, words, full = _tile(rows, words_per_row)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(words_per_row, words * _STEPS), 1, 1)
    # A weight that outgrows the L2 cache is written past it; a smaller one is left there for the matmul that follows.
    store = ".cs" if rows * cols * dtype.itemsize > L2_BYTES else ""
    arguments = (rows, cols, words_per_row, scale_shape[1], tile_rows, words, _STEPS, full and cols % 16 == 0, store)
    # Triton converts to bf16 from compute capability 8.0 on; its interpreter truncates instead of rounding.
    converts = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    bf16_as_bits = dtype == torch.bfloat16 and not converts
    launch = Launcher(_dequantize_kernel, grid, arguments, device, (1,), num_warps=_WARPS)

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        if packed.shape != bytes_shape or block_scale.shape != scale_shape:
            check_request(packed, block_scale, shape, dtype)  # raises
        if not (packed.is_contiguous() and block_scale.is_contiguous()):
            packed, block_scale = packed.contiguous(), block_scale.contiguous()
        if global_scale.dtype != torch.float32 or global_scale.device != device:
            global_scale = global_scale.to(device, torch.float32)
        if packed.data_ptr() % 4:  # bytes are read as 32-bit words
            packed = packed.clone()
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.numel():
            launch(packed, block_scale, global_scale, out.view(torch.int16) if bf16_as_bits else out)
        return out

    return run


def dequantize(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """(R16(N), R16(K)/2) uint8 + swizzled e4m3 scales + () fp32 -> (N, K) ``dtype``; ValueError on other shapes."""
    return dequantizer(tuple(shape), dtype, packed.device)(packed, block_scale, global_scale)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype: the weight is dequantised to it, then one matmul."""
    return torch.nn.functional.linear(x, dequantize(packed, block_scale, global_scale, shape, x.dtype), bias)
