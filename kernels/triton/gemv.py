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

Weights that take the same input can be one launch, their rows one after another in the grid; so can GELU of one product
times the other, which whoever finishes a group of rows of either last computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from ..format import TENSOR_CORE_DTYPES, PackedWeight, block_scale_shape, packed_shape
from ..reference import MAX_TOKENS
from .launch import Launcher, after_the_one_before, bf16_as_bits, overlap, part_reader
from .quantize_rows import activated
from .tiles import as_bf16, decode_operand, decode_scale, to_output

# What the sum is multiplied by besides the global scale: the operands carry 2**-8 (BF16) or 2**-7 (FP16) of their own.
_UNDO = {torch.bfloat16: 256.0, torch.float16: 128.0}
_ROWS = 16
_STEP_WORDS = 16
# Programs for each multiprocessor, for tiles of 8 and of 16 rows of x, whose sums are more bytes to add up.
_PROGRAMS = {8: 20, 16: 15}
_FEWEST_STEPS = 3  # of a program
_MOST_SLICES = 16
MOST_WEIGHTS = 3  # of a launch


@triton.jit
def _multiply(acc, x, token_inside, column, cols, word, scale, FULL: tl.constexpr, PACKED: tl.constexpr):
    """acc (R, T) += word (R, 4) x x (T, 32), ``scale`` (R, 4) being the words', decoded; column: (32,) of x."""
    if FULL:
        values = tl.load(x + column[None, :])
    else:
        values = tl.load(x + column[None, :], mask=token_inside & (column < cols)[None, :], other=0.0)
    weight = decode_operand(word, scale, PACKED, values.dtype)
    values = values.to(weight.dtype)
    # K's bits, from (thread, 4, 2, 1) to (2, thread, 1, 4): the two columns decoded together share a register.
    weight = tl.permute(tl.reshape(weight, (acc.shape[0], 4, 2, 2, 2)), (0, 3, 1, 4, 2))
    values = tl.permute(tl.reshape(values, (acc.shape[1], 4, 2, 2, 2)), (3, 1, 4, 2, 0))
    return tl.dot(tl.reshape(weight, (acc.shape[0], 32)), tl.reshape(values, (32, acc.shape[1])), acc)


@triton.jit
def _step(acc, bad, x, token_inside, column, cols, word, scale, lower, FULL: tl.constexpr, PACKED: tl.constexpr):
    """acc (R, T) += word (R, 16) x x, 128 columns; ``scale`` (R / 2, 4) int16 holds the two scales of four words.

    ``lower`` are those of the lower half of the rows. ``bad`` (R, 4) gets a bit where a byte of either is above 126.
    """
    pair = tl.reshape(tl.permute(tl.join(scale, lower), (2, 0, 1)), (acc.shape[0], 4)).to(tl.int32)
    bad |= (pair | (pair + 0x0101)) & 0x8080
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
    packed1_ptr,
    scale1_ptr,
    global1_ptr,
    packed2_ptr,
    scale2_ptr,
    global2_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    counter_ptr,
    tokens,
    rows,
    rows1,
    rows2,
    cols,
    words_per_row,
    scale_cols,
    steps,
    UNDO: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    FULL: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (p, s): ROWS rows of a weight, ``steps`` steps of K from step s * steps on; one weight after another.

    ``sum_ptr``: (SPLIT, tokens, all rows) fp32 for the slices' sums, twice that many slices if GATED; ``counter_ptr``:
    int32 zeros, one a program p. An int16 output receives BF16 bits. FULL: rows and words divide evenly by what the
    programs take. GATED: of two weights alike, the output is GELU of the first product times the second.
    """
    program, gate_ptr = tl.program_id(0), global_ptr
    before, part, own_rows = 0, 0, rows  # rows of the weights before this one, its number, its rows
    if WEIGHTS > 1:
        first = tl.cdiv(rows, 128) * (128 // ROWS)
        if program >= first:
            program -= first
            packed_ptr, scale_ptr, global_ptr, own_rows = packed1_ptr, scale1_ptr, global1_ptr, rows1
            before += rows
            part += 1
    if WEIGHTS > 2:
        second = tl.cdiv(rows1, 128) * (128 // ROWS)
        if part == 1 and program >= second:
            program -= second
            packed_ptr, scale_ptr, global_ptr, own_rows = packed2_ptr, scale2_ptr, global2_ptr, rows2
            before += rows1
            part += 1
    group = program * ROWS // 128
    first_row = program * ROWS % 128 // 4
    first_step = tl.program_id(1) * steps
    # Scalar 64-bit bases and 32-bit offsets inside the tile: no vector arithmetic on 64-bit addresses.
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + group.to(tl.int64) * (128 * words_per_row)
    scales = scale_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + group.to(tl.int64) * (scale_cols * 64)
    number = tl.arange(0, ROWS)
    row = number % 4 * 32 + first_row + number // 4
    four = tl.arange(0, 4)
    word_col = tl.arange(0, 16)
    word_offset = (row * words_per_row)[:, None] + word_col[None, :]
    # Loaded in halves of 8 rows, one number a thread: so a warp's threads have the scales of their own words in every
    # version of the compiler. Of 16 rows at once some give a thread two neighbours, others take the rows first.
    half = tl.arange(0, ROWS // 2)
    scale_offset = (first_row * 8 + half // 4 * 8 + half % 4 * 2)[:, None] + (four // 2 * 256 + four % 2)[None, :]
    token = tl.arange(0, TOKENS)
    token_inside = (token < tokens)[:, None]
    # Rows that x has not are the last one again where that spares a mask: what comes of them is not stored.
    x = x_ptr + ((tl.minimum(token, tokens - 1) if FULL else token) * cols)[:, None]
    column = tl.arange(0, 32) // 8 * 32 + tl.arange(0, 32) % 8
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    bad = tl.zeros((ROWS, 4), tl.int32)
    end = first_step + steps
    if FULL:
        # What is next is loaded before what is here is decoded: the memory does not wait for the arithmetic.
        word = tl.load(words + first_step * 16 + word_offset)
        scale = tl.load(scales + first_step * 512 + scale_offset)
        lower = tl.load(scales + first_step * 512 + ROWS + scale_offset)
        after_the_one_before(OVERLAP, SMALL=False)
        for step in range(first_step, end):
            ahead = tl.minimum(step + 1, end - 1)
            next_word = tl.load(words + ahead * 16 + word_offset)
            next_scale = tl.load(scales + ahead * 512 + scale_offset)
            next_lower = tl.load(scales + ahead * 512 + ROWS + scale_offset)
            place = column + step * 128
            acc, bad = _step(acc, bad, x, token_inside, place, cols, word, scale, lower, FULL, PACKED)
            word, scale, lower = next_word, next_scale, next_lower
    else:
        after_the_one_before(OVERLAP, SMALL=False)
        packed_rows = (own_rows + 15) // 16 * 16 - group * 128
        half_row = half % 4 * 32 + first_row + half // 4
        for step in range(first_step, end):
            inside = (row < packed_rows)[:, None] & (step * 16 + word_col < words_per_row)[None, :]
            word = tl.load(words + step * 16 + word_offset, mask=inside, other=0)
            inside = (half_row < packed_rows)[:, None] & (step * 16 + four * 4 < words_per_row)[None, :]
            scale = tl.load(scales + step * 512 + scale_offset, mask=inside, other=0)
            inside = (half_row + ROWS // 8 < packed_rows)[:, None] & (step * 16 + four * 4 < words_per_row)[None, :]
            lower = tl.load(scales + step * 512 + ROWS + scale_offset, mask=inside, other=0)
            place = column + step * 128
            acc, bad = _step(acc, bad, x, token_inside, place, cols, word, scale, lower, FULL, PACKED)
    acc = tl.where((tl.max(bad, 1) != 0)[:, None], float("nan"), acc)
    number = group * 128 + row
    inside = (number < own_rows)[:, None] & (token < tokens)[None, :]
    if GATED:
        all_rows, counter = rows, program
    else:
        all_rows, counter = rows + rows1 + rows2, tl.program_id(0)
        part = 0
        number += before
    target = token[None, :] * all_rows + number[:, None]
    if SPLIT == 1 and not GATED:
        acc = _scaled(acc, number, all_rows, global_ptr, bias_ptr, UNDO, BIAS)
        tl.store(out_ptr + target, to_output(acc, out_ptr.dtype.element_ty), mask=inside)
    else:
        size = tokens.to(tl.int64) * all_rows
        tl.store(sum_ptr + (part * SPLIT + tl.program_id(1)) * size + target, acc, mask=inside)
        tl.debug_barrier()  # all of the program's stores come before its first thread's counting
        finished = tl.atomic_add(counter_ptr + counter, 1, sem="acq_rel")
        if finished == SPLIT * (1 + GATED) - 1:
            acc = _summed(sum_ptr + target, size, inside, SPLIT, ROWS, TOKENS)
            if GATED:
                other = _summed(sum_ptr + SPLIT * size + target, size, inside, SPLIT, ROWS, TOKENS)
                gate = _rounded(_scaled(acc, number, rows, gate_ptr, bias_ptr, UNDO, False), out_ptr.dtype.element_ty)
                gate = _rounded(activated(gate, "gelu_tanh", False), out_ptr.dtype.element_ty)
                up = _scaled(other, number, rows, global1_ptr, bias_ptr, UNDO, False)
                acc = gate * _rounded(up, out_ptr.dtype.element_ty)
            else:
                acc = _scaled(acc, number, all_rows, global_ptr, bias_ptr, UNDO, BIAS)
            tl.store(out_ptr + target, to_output(acc, out_ptr.dtype.element_ty), mask=inside)
            tl.store(counter_ptr + counter, 0)


@triton.jit
def _summed(pointers, size, inside, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The sums of all slices, in their order."""
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(pointers + part * size, mask=inside, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def _scaled(acc, number, rows, global_ptr, bias_ptr, UNDO: tl.constexpr, BIAS: tl.constexpr):
    """Sums (R, T) of weight rows ``number`` -> the products, FP32."""
    acc = acc * (tl.load(global_ptr) * UNDO)
    if BIAS:
        acc += tl.load(bias_ptr + number, mask=number < rows, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """fp32 -> fp32 of the nearest number of the output's dtype; int16: of BF16, in integers."""
    if dtype == tl.int16:
        return as_bf16(value, True)
    else:
        return value.to(dtype).to(tl.float32)


def plan(shape: tuple[int, int], programs: int) -> tuple[int, int]:
    """(N, K), programs that fill the GPU -> (ROWS, SPLIT)."""
    groups, steps = -(-shape[0] // 128) * (128 // _ROWS), -(-packed_shape(shape)[1] // (4 * _STEP_WORDS))
    splits = [n for n in range(1, _MOST_SLICES + 1) if steps % n == 0 and steps // n >= _FEWEST_STEPS] or [1]
    return _ROWS, next((n for n in splits if groups * n >= programs), splits[-1])


class _Product:
    """The kernel for one to three weights of the same K: ``launch`` computes all their products with x.

    ``gated``: GELU (its tanh form) of the first product times the second, instead of both. ``overlapping``: weights are
    read while the kernel before ends, so they must not be what it writes.
    """

    def __init__(
        self, shapes: tuple[tuple[int, int], ...], dtype, device, config: tuple[int, int] | None,
        gated: bool = False, overlapping: bool = False,
    ):  # fmt: skip
        if dtype not in TENSOR_CORE_DTYPES:
            raise ValueError(f"the small-input kernel computes in {TENSOR_CORE_DTYPES}; found {dtype}")
        if len({cols for _, cols in shapes}) != 1 or not 0 < len(shapes) <= MOST_WEIGHTS:
            raise ValueError(f"found weights {shapes}; expected 1 to {MOST_WEIGHTS} with as many columns each")
        if gated and (len(shapes) != 2 or shapes[0] != shapes[1]):
            raise ValueError(f"found weights {shapes}; a gated product takes two of the same shape")
        self.shapes, self.dtype, self.device, self.gated = shapes, dtype, device, gated
        self.rows, self.cols = [rows for rows, _ in shapes], shapes[0][1]
        self.width = self.rows[0] if gated else sum(self.rows)
        self.groups = sum(-(-rows // 128) for rows in self.rows)
        on_gpu = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        whole = self.groups * 128, self.cols
        self.divisions = {tile: config or plan(whole, processors * most) for tile, most in _PROGRAMS.items()}
        self.counters = torch.zeros(self.groups * 8, dtype=torch.int32, device=device)
        self.as_bits, self.options = bf16_as_bits(dtype, device), overlap(device) if overlapping else {}
        self.launchers: dict[tuple[int, bool], tuple[Launcher, int]] = {}

    def _launcher(self, tokens: int, bias: bool) -> tuple[Launcher, int]:
        """-> the kernel, and how many sums it keeps of each element of the output."""
        tile = next(tile for tile in _PROGRAMS if tokens <= tile)
        tile_rows, split = self.divisions[tile]
        words = packed_shape(self.shapes[0])[1] // 4
        steps = triton.cdiv(triton.cdiv(words, _STEP_WORDS), split)
        full = words == steps * split * _STEP_WORDS and self.cols % 16 == 0 and all(r % 128 == 0 for r in self.rows)
        sizes = (*self.rows, 0, 0)[:MOST_WEIGHTS]
        numbers = (tokens, *sizes, self.cols, words, block_scale_shape(self.shapes[0])[1], steps, _UNDO[self.dtype])
        flags = tile, tile_rows, split, len(self.rows), self.gated, full, self.device.type == "cuda", bias
        grid = (self.groups * (128 // tile_rows), split)
        as_bytes = tuple(2 + 3 * weight for weight in range(MOST_WEIGHTS))
        options = self.options | {"num_warps": 1, "num_stages": 1}
        launch = Launcher(_gemv_kernel, grid, (*numbers, *flags, bool(self.options)), self.device, as_bytes, **options)
        return launch, 0 if split == 1 and not self.gated else split * len(self.rows) if self.gated else split

    def launch(self, x: torch.Tensor, parts: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """x (M, K), packed, block_scale and global_scale of each weight in turn -> (M, all N)."""
        tokens = x.shape[0]
        if tokens > MAX_TOKENS or x.shape[1] != self.cols:
            raise ValueError(f"found x {tuple(x.shape)}; expected at most {MAX_TOKENS} rows of {self.cols}")
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty((tokens, self.width), dtype=self.dtype, device=self.device)
        if out.numel() == 0:
            return out
        key = (tokens, bias is not None)
        found = self.launchers.get(key)
        if found is None:
            found = self.launchers[key] = self._launcher(*key)
        launch, kept = found
        sums = self.counters
        if kept:
            sums = torch.empty((kept, tokens, self.width), dtype=torch.float32, device=self.device)
        bias = parts[2] if bias is None else bias
        result = out.view(torch.int16) if self.as_bits else out
        launch(x, *parts, *parts[:3] * (MOST_WEIGHTS - len(self.rows)), bias, result, sums, self.counters)
        return out


def _reader(shape: tuple[int, int], device: torch.device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``part_reader``, for scales that are read in pairs."""
    read = part_reader(shape, device)

    def even(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, block_scale, global_scale = read(packed, block_scale, global_scale)
        return packed, block_scale.clone() if block_scale.data_ptr() % 2 else block_scale, global_scale

    return even


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
    product, read = _Product((shape,), dtype, device, config), _reader(shape, device)

    def run(
        x: torch.Tensor,
        packed: torch.Tensor,
        block_scale: torch.Tensor,
        global_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return product.launch(x, read(packed, block_scale, global_scale), bias)

    return run


@functools.cache
def prepare_group(
    shapes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    gated: bool = False,
    config: tuple[int, int] | None = None,
) -> Callable[..., torch.Tensor]:
    """Shapes (N, K) of one to three weights with the same K -> function (x (M, K), their parts in turn) -> (M, sum N).

    One launch for all, on the weights where they lie, which must have been there before the kernel before it began:
    where the GPU can, they are read while that ends. ``gated``, for two weights of one shape: (M, N), GELU of the
    first product times the second, each rounded as a tensor of ``dtype`` would be. Errors are those of ``prepare``.
    """
    product = _Product(shapes, dtype, device, config, gated, True)
    readers = [_reader(shape, device) for shape in shapes]

    def run(x: torch.Tensor, *parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        found = [tensor for read, part in zip(readers, parts, strict=True) for tensor in read(*part)]
        return product.launch(x, found, None)

    return run


def gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K) bf16 or fp16 x NVFP4 (N, K) -> (..., N) in x's dtype, for at most ``MAX_TOKENS`` rows of x."""
    run = prepare(tuple(weight.shape), x.dtype, x.device)
    return run(x.reshape(-1, x.shape[-1]), *weight.parts, bias).reshape(*x.shape[:-1], weight.shape[0])


def gemv_group(x: torch.Tensor, weights: Sequence[PackedWeight], gated: bool = False) -> torch.Tensor:
    """``one_token.gemv_group``, in one launch, for at most ``MAX_TOKENS`` rows of x."""
    run = prepare_group(tuple(tuple(weight.shape) for weight in weights), x.dtype, x.device, gated)
    out = run(x.reshape(-1, x.shape[-1]), *(weight.parts for weight in weights))
    return out.reshape(*x.shape[:-1], out.shape[1])
