"""NVFP4 to FP8 in Triton: the names and results of kernels/reference.py, on compute capability 8.9 and up.

``to_fp8`` reads 0.56 byte and writes 1 byte per element: a program holds one row group's block scales long enough to
find each row's largest, then decodes through ``decode_words``, the tile that every reader of packed weights shares.
The choice of the row's power of two is documented in kernels/reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import block_scale_shape, check_request, packed_shape, round_up
from ..reference import ACTIVATIONS, FP8, SMALLEST_AMAX
from .dequantize import decode_words
from .launch import Launcher
from .quantize import _to_e4m3_bits

# A tile for an H200; benchmarks/fp8.py times others. A thread owns two words, a block of 16 columns: one 16-byte store.
WEIGHT_TILE = {"ROWS": 2, "BLOCKS": 128, "num_warps": 4}
_ROW_COLS = 16384
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)
Converter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
RowQuantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@triton.jit
def _to_fp8(values, dtype: tl.constexpr):
    """fp32 in [-448, 448] or NaN -> E4M3, or its bits where ``dtype`` is uint8: Triton's interpreter misrounds ties."""
    if dtype == tl.uint8:
        sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(values != values, 0x7F, _to_e4m3_bits(tl.abs(values)) | sign).to(tl.uint8)
    else:
        return values.to(tl.float8e4nv)


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
):
    """Each program converts ROWS whole rows, BLOCKS blocks of 16 columns a step; padding becomes zero.

    ROWS divides 32, so a program stays inside one 32-row group. SCALES: blocks_per_row rounded up to a power of two.
    FULL: rows and blocks divide evenly and nothing is padding.
    """
    first_row = tl.program_id(0) * ROWS
    scales = scale_ptr + (first_row // 128).to(tl.int64) * (scale_cols * 128)
    scales += first_row % 32 * 16 + first_row % 128 // 32 * 4
    row = tl.arange(0, ROWS)
    row_inside = first_row + row < rows

    block = tl.arange(0, SCALES)
    offset = block[None, :] // 4 * 512 + row[:, None] * 16 + block[None, :] % 4
    inside = row_inside[:, None] & (block < blocks_per_row)[None, :]
    exponent = tl.load(scales + offset, mask=inside, other=0).to(tl.int32) >> 3 & 15
    # 2**shift, as FP32 bits, brings 6 times the row's largest block scale into [192, 360].
    shift = 12 - tl.maximum(tl.max(exponent, axis=1), 1)
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
        tl.store(out + first * 16 + target, _to_fp8(values, out_ptr.dtype.element_ty), mask=out_inside)


@triton.jit
def _activated(values, ACTIVATION: tl.constexpr, ASSEMBLY: tl.constexpr):
    """fp32 numbers -> fp32 of their activation.

    GELU's 0.5 (1 + tanh(u)) is the logistic function of 2 u. ASSEMBLY: with the GPU's own exponential and reciprocal,
    good to 2**-22, without their handling of subnormals, which would make this slower than the memory.
    """
    if ACTIVATION == "gelu_tanh":
        power = values * (-2.302208198144325 - 0.10294324004745842 * values * values)  # -2 u / ln 2
        if ASSEMBLY:
            gate = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
                "=f,f",
                [power],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            gate = 1.0 / (1.0 + tl.exp2(power))
        values = values * gate
    return values


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    cols,
    out_cols,
    COLS: tl.constexpr,
    SINGLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Each program quantises one row of x; columns from ``cols`` to ``out_cols`` become zero. SINGLE: one step does."""
    row = tl.program_id(0).to(tl.int64)
    source, target = x_ptr + row * cols, out_ptr + row * out_cols
    on_gpu: tl.constexpr = out_ptr.dtype.element_ty != tl.uint8
    column = tl.arange(0, COLS)
    values = tl.load(source + column, mask=column < cols, other=0.0).to(tl.float32)
    values = _activated(values, ACTIVATION, on_gpu)
    amax = tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=0)
    if not SINGLE:
        for first in range(COLS, cols, COLS):
            more = tl.load(source + first + column, mask=first + column < cols, other=0.0).to(tl.float32)
            more = _activated(more, ACTIVATION, on_gpu)
            amax = tl.maximum(amax, tl.max(tl.where(more == more, tl.abs(more), 0.0), axis=0))
    scale = tl.where(amax < _SMALLEST_AMAX, 1.0, tl.div_rn(amax, 448.0))
    factor = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, scale)
    tl.store(target + column, _to_fp8(values * factor, out_ptr.dtype.element_ty), mask=column < out_cols)
    if not SINGLE:
        for first in range(COLS, out_cols, COLS):
            more = tl.load(source + first + column, mask=first + column < cols, other=0.0).to(tl.float32)
            more = _to_fp8(_activated(more, ACTIVATION, on_gpu) * factor, out_ptr.dtype.element_ty)
            tl.store(target + first + column, more, mask=first + column < out_cols)


@functools.cache
def converter(shape: tuple[int, int], device: torch.device) -> Converter:
    """(N, K), device -> function (packed, block_scale, global_scale) -> (R16(N), R16(K)) e4m3, (R16(N),) fp32.

    As dequantize.dequantizer: what depends on the shape is computed here, once.
    """
    bytes_shape, scale_shape = packed_shape(shape), block_scale_shape(shape)
    padded_rows, blocks = bytes_shape[0], bytes_shape[1] // 8
    tile = WEIGHT_TILE
    full = shape == (padded_rows, blocks * 16) and shape[0] % tile["ROWS"] == 0 and blocks % tile["BLOCKS"] == 0
    scales = triton.next_power_of_2(max(blocks, 1))
    arguments = (*shape, padded_rows, blocks, scale_shape[1], tile["ROWS"], tile["BLOCKS"], scales, full)
    grid = (triton.cdiv(padded_rows, tile["ROWS"]),)
    as_bytes = (1,) if device.type == "cuda" else (1, 3)
    launch = Launcher(_to_fp8_kernel, grid, arguments, device, as_bytes, num_warps=tile["num_warps"])

    def run(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor):
        if packed.shape != bytes_shape or block_scale.shape != scale_shape:
            check_request(packed, block_scale, shape, torch.bfloat16)  # raises
        if not (packed.is_contiguous() and block_scale.is_contiguous()):
            packed, block_scale = packed.contiguous(), block_scale.contiguous()
        if global_scale.dtype != torch.float32 or global_scale.device != device:
            global_scale = global_scale.to(device, torch.float32)
        if packed.data_ptr() % 4:  # bytes are read as 32-bit words
            packed = packed.clone()
        out = torch.empty((padded_rows, blocks * 16), dtype=FP8, device=device)
        row_scale = torch.empty(padded_rows, dtype=torch.float32, device=device)
        if out.numel():
            launch(packed, block_scale, global_scale, out, row_scale)
        return out, row_scale

    return run


@functools.cache
def row_quantizer(cols: int, dtype: torch.dtype, device: torch.device, activation: str = "") -> RowQuantizer:
    """K, dtype and device of x, activation -> function (M, K) -> (M, R16(K)) e4m3, (M, 1) fp32."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {ACTIVATIONS}")
    out_cols = round_up(cols, 16)
    step = min(triton.next_power_of_2(max(out_cols, 16)), _ROW_COLS)
    warps = min(max(step // 1024, 1), 8)
    arguments = (cols, out_cols, step, step >= out_cols, activation)
    as_bytes = () if device.type == "cuda" else (1,)
    launchers: dict[int, Launcher] = {}

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[0]
        if x.shape[1] != cols:
            raise ValueError(f"found {x.shape[1]} columns, the weight has {cols}")
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty((rows, out_cols), dtype=FP8, device=device)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=device)
        if rows == 0 or cols == 0:
            return out, scale.fill_(1.0)
        launch = launchers.get(rows)
        if launch is None:
            launch = Launcher(_quantize_rows_kernel, (rows,), arguments, device, as_bytes, num_warps=warps)
            launchers[rows] = launch
        launch(x, out, scale)
        return out, scale

    return run


def to_fp8(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R16(N), R16(K)/2) uint8 + swizzled e4m3 scales + () fp32 -> (R16(N), R16(K)) e4m3, (R16(N),) fp32."""
    return converter(tuple(shape), packed.device)(packed, block_scale, global_scale)


def quantize_rows(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) float, activation -> (M, R16(K)) e4m3, (M, 1) fp32."""
    return row_quantizer(x.shape[1], x.dtype, x.device, activation)(x)
