# SPDX-License-Identifier: Apache-2.0
"""A transformer's residual stream in Triton: gated addition, norm, modulation and FP8 rows in one pass over memory.

Each program takes ``ROWS`` rows that have the same modulation, which stays in registers; a row is read once. The host
takes a pass for each of those, and a tensor of full size for a gate that it repeats along the tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..format import FP8, FP8Rows
from ..fused import Add, Want
from .launch import Launcher, bf16_as_bits, warps
from .quantize_rows import row_scale
from .tiles import as_bf16, load_row, store_bf16, store_row, to_e4m3

# Rows a program and columns a warp, as measured on an H200 (benchmarks/fused.py): modulations in registers are worth
# the more rows the fewer there are of them; a plain addition has none but its gate.
_TILE, _TILE_OF_TWO, _TILE_OF_NONE = (8, 512), (4, 1024), (1, 512)
_FEWEST_PROGRAMS = 512  # rather fewer rows a program than a GPU with nothing to do


@triton.jit
def _modulation(table_ptr, steps_ptr, at, row, stride, column, mask, FULL: tl.constexpr, BITS: tl.constexpr):
    """Parameter of a table plus that of a step, rounded to bf16 as the host rounds the sum."""
    table = load_row(table_ptr + at + column, mask, FULL).to(tl.float32)
    steps = load_row(steps_ptr + row * stride + at + column, mask, FULL).to(tl.float32)
    return as_bf16(table + steps, BITS)


@triton.jit
def write_row(
    values, out_ptr, scale_ptr, row, cols, column, mask, QUANTIZE: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr
):
    """One row as bf16, or as E4M3 and its scale."""
    if QUANTIZE:
        sizes = tl.abs(values)
        if BITS:  # Triton's interpreter hands a NaN on where a GPU's maximum leaves it out
            sizes = tl.where(values == values, sizes, 0.0)
        scale = row_scale(tl.max(sizes))
        tl.store(scale_ptr + row, scale)
        quantized = to_e4m3(values * tl.div_rn(1.0, scale), out_ptr.dtype.element_ty)
        store_row(out_ptr + row * cols + column, quantized, mask, FULL)
    else:
        store_bf16(out_ptr + row * cols + column, values, mask, FULL, BITS)


@triton.jit(do_not_specialize=["gate_group", "group", "group2"])  # or each length of a clip compiles anew
def _norm_rows_kernel(
    x_ptr,
    x_out_ptr,
    y_ptr,
    gate_table_ptr,
    gate_steps_ptr,
    table_ptr,
    steps_ptr,
    out_ptr,
    scale_ptr,
    kept_ptr,
    table2_ptr,
    steps2_ptr,
    out2_ptr,
    scale2_ptr,
    kept2_ptr,
    cols,
    eps,
    gate_at,
    gate_stride,
    gate_group,
    scale_at,
    shift_at,
    stride,
    group,
    scale2_at,
    shift2_at,
    stride2,
    group2,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MODULATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KEEP: tl.constexpr,
    MODULATED2: tl.constexpr,
    QUANTIZE2: tl.constexpr,
    KEEP2: tl.constexpr,
    FULL: tl.constexpr,
    BITS: tl.constexpr,
):
    """``*_at``: offset of a parameter in a row of ``table`` and ``steps``; ``*group``: rows of x per row of steps."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, COLS)
    mask = column < cols
    if GATED:
        place = first // gate_group
        gate = _modulation(gate_table_ptr, gate_steps_ptr, gate_at, place, gate_stride, column, mask, FULL, BITS)
    if MODULATED:
        place1 = first // group
        scale = 1.0 + _modulation(table_ptr, steps_ptr, scale_at, place1, stride, column, mask, FULL, BITS)
        shift = _modulation(table_ptr, steps_ptr, shift_at, place1, stride, column, mask, FULL, BITS)
    if MODULATED2:
        place2 = first // group2
        scale2 = 1.0 + _modulation(table2_ptr, steps2_ptr, scale2_at, place2, stride2, column, mask, FULL, BITS)
        shift2 = _modulation(table2_ptr, steps2_ptr, shift2_at, place2, stride2, column, mask, FULL, BITS)
    next_x = load_row(x_ptr + first * cols + column, mask, FULL)
    if ADD:
        next_y = load_row(y_ptr + first * cols + column, mask, FULL)
    for i in range(ROWS):
        row = first + i
        values = next_x.to(tl.float32)
        if ADD:
            more = next_y.to(tl.float32)
        if ROWS > 1:  # on its way while this row is computed; after the last there is none, and it comes again
            ahead = first + tl.minimum(i + 1, ROWS - 1)
            next_x = load_row(x_ptr + ahead * cols + column, mask, FULL)
            if ADD:
                next_y = load_row(y_ptr + ahead * cols + column, mask, FULL)
        if ADD:
            if GATED:
                more = more * gate
            values = as_bf16(values + more, BITS)
            store_bf16(x_out_ptr + row * cols + column, values, mask, FULL, BITS)
        if NORM:
            values = values * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / cols + eps))
        if OUTPUTS > 0:
            first_out = values
            if MODULATED:
                first_out = values * scale + shift
            write_row(first_out, out_ptr, scale_ptr, row, cols, column, mask, QUANTIZE, FULL, BITS)
            if KEEP:
                store_bf16(kept_ptr + row * cols + column, first_out, mask, FULL, BITS)
        if OUTPUTS > 1:
            second_out = values
            if MODULATED2:
                second_out = values * scale2 + shift2
            write_row(second_out, out2_ptr, scale2_ptr, row, cols, column, mask, QUANTIZE2, FULL, BITS)
            if KEEP2:
                store_bf16(kept2_ptr + row * cols + column, second_out, mask, FULL, BITS)


@functools.lru_cache(maxsize=1024)
def _launcher(device: torch.device, rows: int, cols: int, numbers: tuple, constants: tuple) -> Launcher:
    """The kernel for one shape and set of modulations; models have few."""
    step = triton.next_power_of_2(cols)
    most, a_warp = (_TILE_OF_NONE, _TILE, _TILE_OF_TWO)[constants[3]]
    per = math.gcd(rows, most, *(numbers[place] for place in (3, 7, 11)))
    while per > 1 and rows // per < _FEWEST_PROGRAMS:
        per //= 2
    arguments = (cols, *numbers, step, per, *constants)
    quantized = ((7, constants[5]), (12, constants[8]))
    as_bytes = () if device.type == "cuda" else tuple(place for place, is_fp8 in quantized if is_fp8)
    changes, many = (0, 1) if constants[0] else (), warps(step, a_warp)
    return Launcher(_norm_rows_kernel, (rows // per,), arguments, device, as_bytes, changes, num_warps=many)


def norm_rows(
    x: torch.Tensor, add: Add | None, wants: Sequence[Want], norm: bool = True, eps: float = 1e-6
) -> list[torch.Tensor | FP8Rows]:
    """``fused.norm_rows``, in one kernel."""
    cols, device = x.shape[-1], x.device
    rows, bits = x.numel() // cols, bf16_as_bits(torch.bfloat16, device)
    tensors, numbers = [x, x.view(torch.int16) if bits else x, x, x, x], [eps, 0, 0, 0]
    gate = None
    if add is not None:
        tensors[2], gate = add.y.contiguous(), add.gate
        if gate is not None:
            tensors[3:5] = gate.table, gate.steps
            numbers[1:] = add.at * cols, gate.steps.stride(0), gate.group
    found, kinds = [], []
    for ada, scale_at, shift_at, quantize, keep in wants:
        out = torch.empty(x.shape, dtype=torch.bfloat16, device=device) if keep or not quantize else None
        kept = x if out is None else out.view(torch.int16) if bits else out
        if quantize:
            target = torch.empty((rows, cols), dtype=FP8, device=device)
            scale = torch.empty((rows, 1), dtype=torch.float32, device=device)
            found.append(FP8Rows(target, scale, x.shape, kept=out))
        else:
            target, scale = kept, x
            found.append(out)
        modulated = ada is not None
        tensors += [*((ada.table, ada.steps) if modulated else (x, x)), target, scale, kept]
        numbers += [scale_at * cols, shift_at * cols, *((ada.steps.stride(0), ada.group) if modulated else (0, 0))]
        kinds += [modulated, quantize, quantize and keep]
    for _ in range(2 - len(wants)):
        tensors += [x] * 5
        numbers += [0] * 4
        kinds += [False] * 3
    full = cols == triton.next_power_of_2(cols)
    constants = (add is not None, gate is not None, norm, len(wants), *kinds, full, bits)
    if rows and cols:
        _launcher(device, rows, cols, tuple(numbers), constants)(*tensors)
    return found
