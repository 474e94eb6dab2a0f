# SPDX-License-Identifier: Apache-2.0
"""Fused dequantise and multiply for at most 16 rows of activations, in Triton: the packed weight is read once.

A program multiplies ROWS rows of the weight by all of x, 128 columns a step, on the tensor cores. Both operands are
permuted along K, alike, so that what a thread loads is what its tensor core takes: no shared memory, one warp a
program. A thread loads 16 bytes of a weight's row, 32 columns, and the two block scales they need. The rows of a
program are 32 apart in fours, as the scales lie in their tiles (kernels/format.py), so that all bytes of a fetched
sector are used.

A scale is never negative in NVFP4; one that is, like NaN, makes its row NaN. A code times a block scale is exact in
BF16 and FP16; sums are FP32; the global scale and the bias come last, and the result is rounded once. Where the rows
are too few to fill the GPU, K is divided among programs; the last of them to finish adds all sums in a fixed order: two
calls give the same bits. It is found by a counter per group of rows, which it sets back to zero. The counters belong to
a shape: two streams must not multiply by weights of one shape at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..format import TENSOR_CORE_DTYPES, PackedWeight, block_scale_shape, packed_shape
from ..reference import MAX_TOKENS
from .launch import Launcher, bf16_as_bits, part_reader
from .tiles import decode_operand, decode_scale, round_to_bf16_bits

# What the sum is multiplied by besides the global scale: the operands carry 2**-8 (BF16) or 2**-7 (FP16) of their own.
_UNDO = {torch.bfloat16: 256.0, torch.float16: 128.0}
_ROWS = 16
_STEP_WORDS = 16
# Programs for each multiprocessor, for tiles of 8 and of 16 rows of x, whose sums are more bytes to add up.
_PROGRAMS = {8: 20, 16: 10}
_FEWEST_STEPS = 3  # of a program
_MOST_SLICES = 16


@triton.jit
def _multiply(acc, x, token_inside, column, cols, word, scale, FULL: tl.constexpr, PACKED: tl.constexpr):
    """acc (R, T) += word (R, 4) x x (T, 32), ``scale`` (R, 4) being the words', decoded; column: (32,) of x."""
    inside = token_inside if FULL else token_inside & (column < cols)[None, :]
    values = tl.load(x + column[None, :], mask=inside, other=0.0)
    weight = decode_operand(word, scale, PACKED, values.dtype)
    values = values.to(weight.dtype)
    # K's bits, from (thread, 4, 2, 1) to (2, thread, 1, 4): the two columns decoded together share a register.
    weight = tl.permute(tl.reshape(weight, (acc.shape[0], 4, 2, 2, 2)), (0, 3, 1, 4, 2))
    values = tl.permute(tl.reshape(values, (acc.shape[1], 4, 2, 2, 2)), (3, 1, 4, 2, 0))
    return tl.dot(tl.reshape(weight, (acc.shape[0], 32)), tl.reshape(values, (32, acc.shape[1])), acc)


@triton.jit
def _step(acc, bad, x, token_inside, column, cols, word, scale, FULL: tl.constexpr, PACKED: tl.constexpr):
    """acc (R, T) += word (R, 16) x x, 128 columns; ``scale`` (4, R) int16 holds the two scales of four words.

    ``bad`` (4, R) gets a bit where a byte of ``scale`` is above 126.
    """
    pair = scale.to(tl.int32)
    bad |= (pair | (pair + 0x0101)) & 0x8080
    pair = tl.trans(pair)
    low = decode_scale(pair & 0x7F, PACKED, x.dtype.element_ty)
    high = decode_scale((pair >> 8) & 0x7F, PACKED, x.dtype.element_ty)
    even, odd = tl.split(tl.reshape(word, (acc.shape[0], 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    acc = _multiply(acc, x, token_inside, column, cols, w0, low, FULL, PACKED)
    acc = _multiply(acc, x, token_inside, column + 8, cols, w1, low, FULL, PACKED)
    acc = _multiply(acc, x, token_inside, column + 16, cols, w2, high, FULL, PACKED)
    return _multiply(acc, x, token_inside, column + 24, cols, w3, high, FULL, PACKED), bad


@triton.jit(do_not_specialize=["tokens", "steps"])
def _gemv_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    global_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    counter_ptr,
    tokens,
    rows,
    cols,
    packed_rows,
    words_per_row,
    scale_cols,
    steps,
    UNDO: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    FULL: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (p, s): ROWS rows of the weight, ``steps`` steps of K from step s * steps on.

    ``sum_ptr``: (SPLIT, tokens, rows) fp32 for the slices' sums, ``counter_ptr``: int32 zeros, one a program p. An
    int16 output receives BF16 bits. FULL: rows and words divide evenly by what the programs take.
    """
    group = tl.program_id(0) * ROWS // 128
    first_row = tl.program_id(0) * ROWS % 128 // 4
    first_step = tl.program_id(1) * steps
    # Scalar 64-bit bases and 32-bit offsets inside the tile: no vector arithmetic on 64-bit addresses.
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + group.to(tl.int64) * (128 * words_per_row)
    scales = scale_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + group.to(tl.int64) * (scale_cols * 64)
    number = tl.arange(0, ROWS)
    row = number % 4 * 32 + first_row + number // 4
    four = tl.arange(0, 4)
    word_col = tl.arange(0, 16)
    word_offset = (row * words_per_row)[:, None] + word_col[None, :]
    # Loaded as (4, R), and with & so that the compiler sees no neighbours: the layout that it gives is the one needed.
    scale_offset = (four // 2 * 256 + (four & 1))[:, None] + (first_row * 8 + number // 4 * 8 + number % 4 * 2)[None, :]
    row_inside = group * 128 + row < packed_rows
    token = tl.arange(0, TOKENS)
    token_inside = (token < tokens)[:, None]
    x = x_ptr + (token * cols)[:, None]
    column = tl.arange(0, 32) // 8 * 32 + tl.arange(0, 32) % 8
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    bad = tl.zeros((4, ROWS), tl.int32)
    end = first_step + steps
    if FULL:
        # What is next is loaded before what is here is decoded: the memory does not wait for the arithmetic.
        word, scale = tl.load(words + first_step * 16 + word_offset), tl.load(scales + first_step * 512 + scale_offset)
        for step in range(first_step, end):
            ahead = tl.minimum(step + 1, end - 1)
            next_word = tl.load(words + ahead * 16 + word_offset)
            next_scale = tl.load(scales + ahead * 512 + scale_offset)
            acc, bad = _step(acc, bad, x, token_inside, column + step * 128, cols, word, scale, FULL, PACKED)
            word, scale = next_word, next_scale
    else:
        for step in range(first_step, end):
            inside = row_inside[:, None] & (step * 16 + word_col < words_per_row)[None, :]
            word = tl.load(words + step * 16 + word_offset, mask=inside, other=0)
            inside = (step * 16 + four * 4 < words_per_row)[:, None] & row_inside[None, :]
            scale = tl.load(scales + step * 512 + scale_offset, mask=inside, other=0)
            acc, bad = _step(acc, bad, x, token_inside, column + step * 128, cols, word, scale, FULL, PACKED)
    acc = tl.where((tl.max(bad, 0) != 0)[:, None], float("nan"), acc)
    number = group * 128 + row
    inside = (number < rows)[:, None] & (token < tokens)[None, :]
    target = token[None, :] * rows + number[:, None]
    if SPLIT == 1:
        _finish(acc, out_ptr + target, number, inside, rows, global_ptr, bias_ptr, UNDO, BIAS)
    else:
        size = tokens.to(tl.int64) * rows
        tl.store(sum_ptr + tl.program_id(1) * size + target, acc, mask=inside)
        tl.debug_barrier()  # all of the program's stores come before its first thread's counting
        finished = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel")
        if finished == SPLIT - 1:
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            for part in tl.static_range(SPLIT):
                acc += tl.load(sum_ptr + part * size + target, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(acc, out_ptr + target, number, inside, rows, global_ptr, bias_ptr, UNDO, BIAS)
            tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit
def _finish(acc, target, number, inside, rows, global_ptr, bias_ptr, UNDO: tl.constexpr, BIAS: tl.constexpr):
    """Sums (R, T) of weight rows ``number`` -> the result at the pointers ``target``."""
    acc = acc * (tl.load(global_ptr) * UNDO)
    if BIAS:
        acc += tl.load(bias_ptr + number, mask=number < rows, other=0.0).to(tl.float32)[:, None]
    if target.dtype.element_ty == tl.int16:
        acc = round_to_bf16_bits(acc)
    tl.store(target, acc.to(target.dtype.element_ty), mask=inside)


def plan(shape: tuple[int, int], programs: int) -> tuple[int, int]:
    """(N, K), programs that fill the GPU -> (ROWS, SPLIT)."""
    groups, steps = -(-shape[0] // 128) * (128 // _ROWS), -(-packed_shape(shape)[1] // (4 * _STEP_WORDS))
    splits = [n for n in range(1, _MOST_SLICES + 1) if steps % n == 0 and steps // n >= _FEWEST_STEPS] or [1]
    return _ROWS, next((n for n in splits if groups * n >= programs), splits[-1])


@functools.cache
def prepare(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    config: tuple[int, int] | None = None,
) -> Callable[..., torch.Tensor]:
    """(N, K), dtype and device of x -> function (x (M, K), packed, block_scale, global_scale, bias or None) -> (M, N).

    For M up to ``MAX_TOKENS``. ``config``: (ROWS, SPLIT) instead of ``plan``'s choice. Raises ValueError for a
    dtype that the tensor cores do not take, the function for tensors of another shape.
    """
    if dtype not in TENSOR_CORE_DTYPES:
        raise ValueError(f"the small-input kernel computes in {TENSOR_CORE_DTYPES}; found {dtype}")
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    divisions = {tile: config or plan(shape, processors * most) for tile, most in _PROGRAMS.items()}
    rows, cols = shape
    packed_rows, bytes_per_row = packed_shape(shape)
    words = bytes_per_row // 4
    counters = torch.zeros(-(-rows // 128) * 8, dtype=torch.int32, device=device)
    read, as_bits = part_reader(shape, device), bf16_as_bits(dtype, device)
    launchers: dict[tuple[int, bool], Launcher] = {}

    def launcher(tokens: int, bias: bool) -> Launcher:
        tile = 8 if tokens <= 8 else 16
        tile_rows, split = divisions[tile]
        steps = triton.cdiv(triton.cdiv(words, _STEP_WORDS), split)
        full = packed_rows % 128 == 0 and words == steps * split * _STEP_WORDS and cols % 16 == 0
        grid = (triton.cdiv(rows, 128) * (128 // tile_rows), split)
        sizes = (tokens, rows, cols, packed_rows, words, block_scale_shape(shape)[1], steps, _UNDO[dtype])
        return Launcher(
            _gemv_kernel, grid, (*sizes, tile, tile_rows, split, full, on_gpu, bias), device, (2,), num_warps=1,
            num_stages=1,
        )  # fmt: skip

    def run(
        x: torch.Tensor,
        packed: torch.Tensor,
        block_scale: torch.Tensor,
        global_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        if block_scale.data_ptr() % 2:  # scales are read in pairs
            block_scale = block_scale.clone()
        tokens = x.shape[0]
        if tokens > MAX_TOKENS or x.shape[1] != cols:
            raise ValueError(f"found x {tuple(x.shape)}; expected at most {MAX_TOKENS} rows of {cols}")
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty((tokens, rows), dtype=dtype, device=device)
        if out.numel() == 0:
            return out
        key = (tokens, bias is not None)
        launch = launchers.get(key)
        if launch is None:
            launch = launchers[key] = launcher(*key)
        bias = global_scale if bias is None else bias
        sums, split = counters, divisions[8 if tokens <= 8 else 16][1]
        if split > 1:
            sums = torch.empty((split, tokens, rows), dtype=torch.float32, device=device)
        launch(x, packed, block_scale, global_scale, bias, out.view(torch.int16) if as_bits else out, sums, counters)
        return out

    return run


def gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K) bf16 or fp16 x NVFP4 (N, K) -> (..., N) in x's dtype, for at most ``MAX_TOKENS`` rows of x."""
    run = prepare(tuple(weight.shape), x.dtype, x.device)
    return run(x.reshape(-1, x.shape[-1]), *weight.parts, bias).reshape(*x.shape[:-1], weight.shape[0])
