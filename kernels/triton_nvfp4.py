"""NVFP4 in Triton: the same names and results as kernels/reference.py, on compute capability 7.5 and up.

No FP4 or FP8 instruction is needed, and no BF16 one below compute capability 8.0: E2M1 codes and E4M3 scales are
decoded by shifting their bits into an FP16 number's. ``decode_words`` is the one decode tile; every kernel that reads
packed weights goes through it.

One 32-bit word of ``packed`` holds eight neighbouring columns, half a block, hence one scale: byte k has column 2k in
its high nibble and 2k + 1 in its low one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .format import OUTPUT_DTYPES, PackedWeight, block_scale_shape, check_request, packed_shape
from .reference import checked_global_scale

# Tile found by measurement on an H200 (benchmarks/results); the kernel is bound by its stores, hardly by the tile.
_TILE_WORDS, _STEPS, _WARPS = 256, 2, 8
_L2_BYTES = 48 << 20
_QUANTIZE_BLOCKS = 64
Dequantizer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Compiled kernels take all arguments, constants included, since Triton 3.4; its interpreter compiles nothing.
_DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4) and not triton.knobs.runtime.interpret


@triton.jit
def _e4m3_to_f32(byte):
    """E4M3 bits -> fp32 of the value times 2**-8, subnormals and NaN included."""
    bits = byte.to(tl.int32)
    half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32))


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


@triton.jit
def _to_e4m3_bits(value):
    """fp32 in [0, 448] -> int32 E4M3 bits, nearest with ties to even, subnormals included."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the step is 2**-9; adding 2**23 leaves exactly that many integer bits, rounded to even by the adder.
    subnormal = (value * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def _to_e2m1_code(value):
    """fp32 in [-6, 6] -> int32 code 0..15, nearest with ties to even, the sign of zero kept."""
    size = tl.abs(value)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((value.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _scale_offset(row, block, scale_cols):
    """Offset of the scale of (row, block) in the tiled layout; see kernels/format.py."""
    tile = (row // 128).to(tl.int64) * (scale_cols // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4


@triton.jit
def _quantize_kernel(
    weight_ptr,
    global_ptr,
    packed_ptr,
    scale_ptr,
    rows,
    cols,
    blocks_per_row,
    scale_cols,
    BLOCKS: tl.constexpr,
):
    """Each program quantises BLOCKS neighbouring blocks of 16 columns of one row, padding with zeros."""
    programs_per_row = tl.cdiv(blocks_per_row, BLOCKS)
    row = tl.program_id(0) // programs_per_row
    block = tl.program_id(0) % programs_per_row * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    source = weight_ptr + row.to(tl.int64) * cols + column
    values = tl.load(source, mask=(row < rows) & (column < cols), other=0.0).to(tl.float32)
    global_scale = tl.load(global_ptr)
    amax = tl.max(tl.abs(values), axis=1)
    scale = tl.minimum(tl.div_rn(tl.div_rn(amax, 6.0), global_scale), 448.0)
    scale = tl.where(global_scale == 0.0, 0.0, scale)
    scale_bits = _to_e4m3_bits(scale)
    decode_scale = (global_scale * (_e4m3_to_f32(scale_bits) * 256.0))[:, None]
    scaled = tl.div_rn(values, tl.where(decode_scale == 0.0, 1.0, decode_scale))
    scaled = tl.where(decode_scale == 0.0, 0.0, tl.minimum(tl.maximum(scaled, -6.0), 6.0))
    even, odd = tl.split(tl.reshape(_to_e2m1_code(scaled), (BLOCKS, 8, 2)))
    byte = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = block < blocks_per_row
    target = packed_ptr + row.to(tl.int64) * (blocks_per_row * 8) + byte
    tl.store(target, ((even << 4) | odd).to(tl.uint8), mask=inside[:, None])
    tl.store(scale_ptr + _scale_offset(row, block, scale_cols), scale_bits.to(tl.uint8), mask=inside)


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
    store = ".cs" if rows * cols * dtype.itemsize > _L2_BYTES else ""
    arguments = (rows, cols, words_per_row, scale_shape[1], tile_rows, words, _STEPS, full and cols % 16 == 0, store)
    # Triton converts to bf16 from compute capability 8.0 on; its interpreter truncates instead of rounding.
    converts = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    bf16_as_bits = dtype == torch.bfloat16 and not converts
    only_device = device.type != "cuda" or torch.cuda.device_count() == 1
    direct = None

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        nonlocal direct
        if packed.shape != bytes_shape or block_scale.shape != scale_shape:
            check_request(packed, block_scale, shape, dtype)  # raises
        if not (packed.is_contiguous() and block_scale.is_contiguous()):
            packed, block_scale = packed.contiguous(), block_scale.contiguous()
        if global_scale.dtype != torch.float32 or global_scale.device != device:
            global_scale = global_scale.to(device, torch.float32)
        if packed.data_ptr() % 4:  # bytes are read as 32-bit words
            packed = packed.clone()
        out = torch.empty(shape, dtype=dtype, device=device)
        pointers = (packed.data_ptr(), block_scale.data_ptr(), global_scale.data_ptr(), out.data_ptr())
        aligned = (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15 == 0
        if direct is not None and aligned:
            direct(*pointers, *arguments)
            return out
        if out.numel() == 0:
            return out
        target = out.view(torch.int16) if bf16_as_bits else out
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            compiled = _dequantize_kernel[grid](
                packed, block_scale.view(torch.uint8), global_scale, target, *arguments, num_warps=_WARPS
            )
        if aligned and only_device and _DIRECT_LAUNCH:
            # The same kernel without the JIT's argument analysis, which costs the CPU more than all the rest.
            direct = compiled[grid]
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


def quantize(weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> PackedWeight:
    """(N, K) float -> PackedWeight, plain amax scaling, the bytes of reference.quantize; ValueError if not finite."""
    if weight.ndim != 2:
        raise ValueError(f"NVFP4 quantises matrices; found shape {tuple(weight.shape)}")
    global_scale = checked_global_scale(weight, global_scale)
    shape = (weight.shape[0], weight.shape[1])
    packed = torch.empty(packed_shape(shape), dtype=torch.uint8, device=weight.device)
    block_scale = torch.zeros(block_scale_shape(shape), dtype=torch.uint8, device=weight.device)
    blocks_per_row = packed.shape[1] // 8
    global_scale = global_scale.to(weight.device, torch.float32)
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        _quantize_kernel[(packed.shape[0] * triton.cdiv(blocks_per_row, _QUANTIZE_BLOCKS),)](
            weight.contiguous(),
            global_scale,
            packed,
            block_scale,
            *shape,
            blocks_per_row,
            block_scale.shape[1],
            _QUANTIZE_BLOCKS,
        )
    return PackedWeight(packed, block_scale.view(torch.float8_e4m3fn), global_scale, shape)


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
