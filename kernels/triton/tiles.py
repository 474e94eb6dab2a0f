# SPDX-License-Identifier: Apache-2.0
"""What the kernels share, as tiles: decoding packed words and scales, encoding numbers, where a scale lies, rows.

No FP4 or FP8 instruction is needed, and no BF16 one below compute capability 8.0: E2M1 codes and E4M3 scales are
decoded by shifting their bits into an FP16 number's. One 32-bit word of ``packed`` holds eight neighbouring columns,
half a block, hence one scale: byte k has column 2k in its high nibble and 2k + 1 in its low one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiled_offset(row, block, scale_cols):
    """Offset of the scale of (row, block) in the tiled layout; see kernels/format.py."""
    tile = (row // 128).to(tl.int64) * (scale_cols // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4


@triton.jit
def scales_of_rows(scale_ptr, first_row, scale_cols):
    """Where the scales of row ``first_row`` begin; a row r of the same 32 behind it has its own 16 r further on."""
    scales = scale_ptr + (first_row // 128).to(tl.int64) * (scale_cols * 128)
    return scales + first_row % 32 * 16 + first_row % 128 // 32 * 4


@triton.jit
def largest_scale(scales, row, row_inside, blocks_per_row, SCALES: tl.constexpr):
    """``scales_of_rows`` and rows [R] from there -> int32 [R]: bits of a row's largest scale, 1 or more, without sign.

    NaN is the largest.
    """
    block = tl.arange(0, SCALES)
    offset = block[None, :] // 4 * 512 + row[:, None] * 16 + block[None, :] % 4
    inside = row_inside[:, None] & (block < blocks_per_row)[None, :]
    return tl.maximum(tl.max(tl.load(scales + offset, mask=inside, other=0).to(tl.int32) & 0x7F, axis=1), 1)


@triton.jit
def largest_exponent(scales, row, row_inside, blocks_per_row, SCALES: tl.constexpr):
    """As ``largest_scale`` -> int32 [R]: largest biased exponent of a row's scales, 1 or more."""
    return tl.maximum(largest_scale(scales, row, row_inside, blocks_per_row, SCALES) >> 3, 1)


@triton.jit
def e4m3_to_f32(byte):
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
    scale = e4m3_to_f32(scale_byte) * (global_scale * 4194304.0)
    c1, c5 = _halves_to_f32(((word << 9) & 0x0E000E00) | ((word << 12) & -0x7FFF8000))
    c0, c4 = _halves_to_f32(((word << 5) & 0x0E000E00) | ((word << 8) & -0x7FFF8000))
    c3, c7 = _halves_to_f32(((word << 1) & 0x0E000E00) | ((word << 4) & -0x7FFF8000))
    c2, c6 = _halves_to_f32(((word >> 3) & 0x0E000E00) | (word & -0x7FFF8000))
    even = tl.join(tl.join(c0 * scale, c4 * scale), tl.join(c2 * scale, c6 * scale))
    odd = tl.join(tl.join(c1 * scale, c5 * scale), tl.join(c3 * scale, c7 * scale))
    return tl.join(even, odd)


# One word -> eight numbers, two an instruction, in the order of decode_words: the bits of a code, moved to where BF16
# has its lowest two exponent bits and highest mantissa bit, are its value times 2**-126 (FP16: 2**-14, see
# decode_words); times the scale, 2**118 (2**7) too large. Subnormal operands count in full. For BF16 one product moves
# a code's sign and the rest of it, six bits further apart than they were, to their places: GPUs multiply beside what
# they shift and mask with, which is what this waits for. In FP16 the two would meet.
_BF16 = tl.constexpr("""
{
.reg .b32 a, w, z;
mov.b32 z, 0x80008000;
and.b32 a, $8, 0x000F000F;
mul.lo.u32 a, a, 0x1040;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 a, a, $9, z;
mov.b32 {$1, $5}, a;
and.b32 a, $8, 0x00F000F0;
mul.lo.u32 a, a, 0x104;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 a, a, $9, z;
mov.b32 {$0, $4}, a;
shr.u32 w, $8, 8;
and.b32 a, w, 0x000F000F;
mul.lo.u32 a, a, 0x1040;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 a, a, $9, z;
mov.b32 {$3, $7}, a;
and.b32 a, w, 0x00F000F0;
mul.lo.u32 a, a, 0x104;
and.b32 a, a, 0x81C081C0;
fma.rn.bf16x2 a, a, $9, z;
mov.b32 {$2, $6}, a;
}
""")
_FP16 = tl.constexpr("""
{
.reg .b32 a, b;
shl.b32 a, $8, 9;
and.b32 a, a, 0x0E000E00;
shl.b32 b, $8, 12;
lop3.b32 a, b, 0x80008000, a, 0xEA;
mul.f16x2 a, a, $9;
mov.b32 {$1, $5}, a;
shl.b32 a, $8, 5;
and.b32 a, a, 0x0E000E00;
shl.b32 b, $8, 8;
lop3.b32 a, b, 0x80008000, a, 0xEA;
mul.f16x2 a, a, $9;
mov.b32 {$0, $4}, a;
shl.b32 a, $8, 1;
and.b32 a, a, 0x0E000E00;
shl.b32 b, $8, 4;
lop3.b32 a, b, 0x80008000, a, 0xEA;
mul.f16x2 a, a, $9;
mov.b32 {$3, $7}, a;
shr.u32 a, $8, 3;
and.b32 a, a, 0x0E000E00;
lop3.b32 a, $8, 0x80008000, a, 0xEA;
mul.f16x2 a, a, $9;
mov.b32 {$2, $6}, a;
}
""")


# One byte -> its value twice, as the factor that _MOVE multiplies by: the byte's bits, moved to where BF16 has its
# lowest four exponent bits and highest mantissa bits, are its value times 2**-120 (FP16: 2**-8). No BF16 holds the
# power of two that is left to make good, so it comes as two.
_SCALE_BF16 = tl.constexpr("""
{
.reg .b32 s, t, u, z;
mov.b32 t, 0x7F007F00;
mov.b32 u, 0x77007700;
mov.b32 z, 0x80008000;
mul.lo.u32 s, $1, 0x00100010;
fma.rn.bf16x2 s, s, t, z;
fma.rn.bf16x2 $0, s, u, z;
}
""")
_SCALE_FP16 = tl.constexpr("""
{
.reg .b32 s, t;
mov.b32 t, 0x78007800;
mul.lo.u32 s, $1, 0x00800080;
mul.f16x2 $0, s, t;
}
""")


@triton.jit
def decode_scale(byte, PACKED: tl.constexpr, dtype: tl.constexpr):
    """E4M3 bytes 0 to 126 as int32 -> what ``decode_operand`` multiplies by: both halves of an int32, or the byte."""
    if PACKED:
        asm: tl.constexpr = _SCALE_BF16 if dtype == tl.bfloat16 else _SCALE_FP16
        return tl.inline_asm_elementwise(asm, "=r,r", [byte], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return byte


@triton.jit
def decode_operand(word, scale, PACKED: tl.constexpr, dtype: tl.constexpr):
    """int32 words [...] + ``decode_scale`` of theirs -> [..., 2, 2, 2] of ``dtype``, times 2**-8 (BF16), 2**-7 (FP16).

    PACKED: two numbers an instruction. Triton's interpreter has neither assembly nor BF16 products and gets the same
    values in FP32: nothing is rounded in either.
    """
    if PACKED:
        asm: tl.constexpr = _BF16 if dtype == tl.bfloat16 else _FP16
        word, scale = tl.broadcast(word, scale)
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            asm,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [word, scale],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
        return tl.join(even, odd).to(dtype, bitcast=True)
    else:
        factor: tl.constexpr = 0.00390625 if dtype == tl.bfloat16 else 0.0078125
        return decode_words(word, scale, factor)


@triton.jit
def to_e4m3_bits(value):
    """fp32 in [0, 448] -> int32 E4M3 bits, nearest with ties to even, subnormals included."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the step is 2**-9; adding 2**23 leaves exactly that many integer bits, rounded to even by the adder.
    subnormal = (value * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def to_e2m1_code(value):
    """fp32 in [-6, 6] -> int32 code 0..15, nearest with ties to even, the sign of zero kept."""
    size = tl.abs(value)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((value.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def to_e4m3(values, dtype: tl.constexpr):
    """fp32 in [-448, 448] or NaN -> E4M3, or its bits where ``dtype`` is uint8: Triton's interpreter misrounds ties."""
    if dtype == tl.uint8:
        sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(values != values, 0x7F, to_e4m3_bits(tl.abs(values)) | sign).to(tl.uint8)
    else:
        return values.to(tl.float8e4nv)


@triton.jit
def to_int8(values, dtype: tl.constexpr):
    """fp32 in [-127, 127] or NaN -> INT8, nearest with ties to even, NaN as 0; its bits where ``dtype`` is uint8.

    In one instruction that cannot be contracted with the multiplication before it; Triton's interpreter has no assembly
    and leaves the rounding to an addition, which contracts nothing.
    """
    if dtype == tl.uint8:
        whole = (values + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
        return tl.where(values == values, whole, 0).to(tl.uint8)
    else:
        asm: tl.constexpr = "cvt.rni.s32.f32 $0, $1;"
        whole = tl.inline_asm_elementwise(asm, "=r,f", [values], dtype=tl.int32, is_pure=True, pack=1)
        return whole.to(tl.int8)


@triton.jit
def to_8_bits(values, dtype: tl.constexpr, INT8: tl.constexpr):
    """fp32 -> E4M3 or INT8, see ``to_e4m3`` and ``to_int8``."""
    if INT8:
        return to_int8(values, dtype)
    else:
        return to_e4m3(values, dtype)


@triton.jit
def round_to_bf16_bits(value):
    """fp32 -> int16 bits of the nearest bf16, ties to even, in integers: for hardware without BF16 conversions."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)  # the sum would carry a NaN's bits into the sign


@triton.jit
def to_output(value, dtype: tl.constexpr):
    """fp32 -> ``dtype`` of an output, int16 being the bits of bf16: see ``launch.bf16_as_bits``."""
    if dtype == tl.int16:
        return round_to_bf16_bits(value)
    else:
        return value.to(dtype)


@triton.jit
def as_bf16(value, BITS: tl.constexpr):
    """fp32 -> fp32 of the nearest bf16. BITS: in integers, see ``launch.bf16_as_bits``."""
    if BITS:
        return (round_to_bf16_bits(value).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.bfloat16).to(tl.float32)


@triton.jit
def load_row(pointer, mask, FULL: tl.constexpr):
    """FULL: the tile has no columns too many, so that nothing has to be put in their place."""
    if FULL:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def store_row(pointer, value, mask, FULL: tl.constexpr):
    """As ``load_row``."""
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def store_bf16(pointer, value, mask, FULL: tl.constexpr, BITS: tl.constexpr):
    """Store fp32 as bf16, or as its bits."""
    if BITS:
        store_row(pointer, round_to_bf16_bits(value), mask, FULL)
    else:
        store_row(pointer, value.to(tl.bfloat16), mask, FULL)
