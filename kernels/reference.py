# SPDX-License-Identifier: Apache-2.0
"""NVFP4 in plain torch, FP32 arithmetic: the definition of right for every faster kernel. Runs on any device.

Layout, names and the order of the multiplications: kernels/format.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .format import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    FACTOR_BLOCK,
    FP8,
    FP8Rows,
    PackedWeight,
    check_output_dtype,
    check_parts,
    swizzle,
    unswizzle,
)

MAX_TOKENS = 16  # rows of x that ``gemv`` is meant for, and its kernel takes
SMALLEST_AMAX = 1e-30  # a row of activations below it counts as zero: the reciprocal of its scale would overflow
ACTIVATIONS = ("", "gelu_tanh")

SEARCHES = ("amax", "mse")
# Candidate block scales of a search in units of 2**(k - 6); see search_scale.
SEARCH_STEPS = (9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32)
SEARCH_GRID = 256
COLUMN_STEPS = 143
_EXPONENTS = range(-7, 12)
_SMALLEST_SEARCH_SCALE = 2.0**-100
_SMALLEST_ROW_SCALE = 2.0**-100

# Midpoints between neighbouring E2M1 magnitudes. A tie goes to the even code, so a midpoint counts as "reached" only
# where the code above it is even: 0.25 -> 0, 0.75 -> 1.0, 1.25 -> 1.0, 1.75 -> 2.0, 2.5 -> 2.0, 3.5 -> 4.0, 5.0 -> 4.0.
_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """NVFP4 (N, K) -> (N, K) ``dtype``. Raises ValueError for another dtype, or tensors of another shape."""
    check_output_dtype(dtype)
    check_parts(weight.packed, weight.block_scale, weight.shape)
    packed, (rows, cols) = weight.packed, weight.shape
    scale = unswizzle(weight.block_scale.view(FP8), packed.shape[0], packed.shape[1] * 2 // BLOCK)
    decode_scale = scale.float() * weight.global_scale.float()
    codes = torch.stack((packed >> 4, packed & 0x0F), dim=-1).flatten(1).long()
    values = torch.tensor(E2M1_VALUES, device=packed.device)[codes]
    values = values.unflatten(1, (-1, BLOCK)) * decode_scale.unsqueeze(-1)
    return values.flatten(1)[:rows, :cols].to(dtype).contiguous()


def _unscaled(weight: PackedWeight) -> torch.Tensor:
    """NVFP4 (N, K) -> (N, K) fp32, code times block scale, exact."""
    return dequantize(replace(weight, global_scale=torch.ones((), device=weight.packed.device)), torch.float32)


def finite_amax(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) float -> () fp32, the largest magnitude. Raises ValueError if the weight holds NaN or infinity."""
    return check_finite(weight.abs().amax().float())


def check_finite(amax: torch.Tensor) -> torch.Tensor:
    """() fp32 largest magnitude of a weight -> itself; ValueError if it is NaN or infinite."""
    if not torch.isfinite(amax):
        raise ValueError("the weight holds NaN or infinity; NVFP4 cannot represent it")
    return amax


def amax_global_scale(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) float -> () fp32 ``amax / (448 * 6)``, the scale at which no block scale saturates."""
    return default_global_scale(weight.abs().amax().float(), "amax")


def default_global_scale(amax: torch.Tensor, search: str) -> torch.Tensor:
    """() fp32 largest magnitude, one of ``SEARCHES`` -> () fp32 global scale.

    "amax": amax / (448 * 6), at which no block scale saturates. Searches: the smallest power of two that is not below
    amax / (448 * 4), at which even the block of the largest weight may choose the scale that maps its largest value to
    4. A power of two makes every decoded value exact in BF16, whichever way a host multiplies code and scales.
    """
    if search == "amax":
        return _divide(amax, E4M3_MAX * E2M1_MAX)
    power = _next_power_of_two(_divide(amax, E4M3_MAX * 4.0))
    return torch.where(amax == 0, 0.0, power.clamp(min=_SMALLEST_SEARCH_SCALE))


def _next_power_of_two(values: torch.Tensor) -> torch.Tensor:
    """fp32 from 0 -> the smallest power of two that is not below it."""
    return ((values.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def checked_global_scale(amax: torch.Tensor, global_scale: torch.Tensor | None, search: str) -> torch.Tensor:
    """() fp32 finite largest magnitude + ``global_scale`` -> () fp32 on amax's device, by default the search's own.

    Raises ValueError if the scale is not finite, or too small (below 2**-100, but not 0) or negative for a search.
    """
    if global_scale is None:
        return default_global_scale(amax, search)
    if not torch.isfinite(global_scale):
        raise ValueError(f"the global scale is {global_scale.item()}; expected a finite number")
    if search == "mse" and global_scale != 0 and global_scale < _SMALLEST_SEARCH_SCALE:
        raise ValueError(
            f"the global scale is {global_scale.item()}; a search needs 0 or at least {_SMALLEST_SEARCH_SCALE}"
        )
    return global_scale.to(amax.device)


def check_quantize(weight: torch.Tensor, search: str, column_weight: torch.Tensor | None) -> None:
    """Raise ValueError unless ``weight`` is a matrix, ``search`` is known and ``column_weight`` fits both."""
    if weight.ndim != 2:
        raise ValueError(f"NVFP4 quantizes matrices; found shape {tuple(weight.shape)}")
    if search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}; expected {' or '.join(SEARCHES)}")
    if column_weight is None:
        return
    if search == "amax":
        raise ValueError("column weights have no effect on amax scales; expected search mse, or no column weights")
    if column_weight.shape != weight.shape[1:]:
        raise ValueError(f"column weights of shape {tuple(column_weight.shape)}; expected {tuple(weight.shape[1:])}")
    if not (torch.isfinite(column_weight) & (column_weight >= 0)).all():
        raise ValueError("the column weights hold NaN, infinity or a negative number; expected finite numbers from 0")


def _divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """IEEE division on every device: by a Python number, CUDA's division multiplies by the reciprocal."""
    return values / torch.full((), divisor, device=values.device)


def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """fp32 values -> uint8 codes 0..15, nearest, ties to the even code, saturating at 6; the sign of zero is kept."""
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint, inclusive in _MIDPOINTS:
        codes += (magnitude >= midpoint if inclusive else magnitude > midpoint).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def quantize(
    weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    search: str = "amax",
    column_weight: torch.Tensor | None = None,
) -> PackedWeight:
    """(N, K) float -> PackedWeight; ValueError if the weight is not a finite matrix, or an argument does not fit it.

    ``search``: how block scales are chosen. "amax" gives byte for byte what comfy-kitchen's quantize_nvfp4 writes;
    "mse" those of ``search_scale``, about a quarter less squared error. ``global_scale``: () fp32, default that of
    ``default_global_scale``. ``column_weight``: (K,), for "mse": the weight of each column's squared error, such as the
    mean square of that input.
    """
    check_quantize(weight, search, column_weight)
    global_scale = checked_global_scale(finite_amax(weight), global_scale, search).float()
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % BLOCK, 0, -rows % 16))
    blocks = padded.float().unflatten(1, (-1, BLOCK))
    if search == "mse":
        scale = search_scale(blocks, global_scale, column_weight)
    else:
        scale = amax_scale(blocks.abs().amax(-1), global_scale)
    decode_scale = (global_scale * scale.float()).unsqueeze(-1)
    scaled = torch.where(decode_scale == 0, 0.0, blocks / decode_scale)
    codes = round_to_e2m1(scaled.clamp(-E2M1_MAX, E2M1_MAX)).flatten(1)
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    return PackedWeight(packed, swizzle(scale), global_scale, (rows, cols))


def amax_scale(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """(...) fp32 largest magnitude of each block + () fp32 -> (...) e4m3 ``amax / 6 / global_scale``."""
    scale = (_divide(amax, E2M1_MAX) / global_scale).clamp(max=E4M3_MAX).nan_to_num(0.0)
    return scale.to(FP8)


def search_scale(
    blocks: torch.Tensor, global_scale: torch.Tensor, column_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, C, 16) fp32 blocks + () fp32 -> (N, C) e4m3, of ``SEARCH_STEPS`` the scale of least squared error.

    With r = amax / global_scale and 2**k <= r < 2**(k + 1), the candidates are ``step * 2**(k - 6)``: the 16 E4M3
    values from r / 14 to r / 2, among which any E4M3 value that could win lies. Errors are measured on magnitudes
    rounded to the grid ``2**k / 256``, where every candidate times every code lies too: their squares are integers
    whose sums are exact in FP32, so neither the order of summation nor the hardware can change a choice. Rounding to
    that grid costs 0.02 % of the error. Equal errors choose the smaller scale.

    Candidates that E4M3 does not hold (above 448, between its subnormals) do not take part; from r = 4096 on the
    scale is 448, and a block of zeros has the scale 0.
    """
    amax = blocks.abs().amax(-1)
    exponent, factor = search_grid(amax, global_scale)
    index = (blocks.abs() * factor.unsqueeze(-1)).clamp(max=2 * SEARCH_GRID).round().int()
    table = search_errors(blocks.device)
    weights = 1.0 if column_weight is None else column_steps(column_weight).double()
    best = torch.full_like(amax, torch.inf, dtype=torch.float64)
    choice = torch.zeros_like(amax, dtype=torch.int64)
    for number in range(len(SEARCH_STEPS)):
        error = (table[:, number][index].double() * weights).sum(-1) + search_penalty(exponent)[..., number]
        choice = torch.where(error < best, number, choice)
        best = torch.minimum(error, best)
    return chosen_scale(choice, exponent, amax, global_scale)


def search_grid(amax: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(...) fp32 largest magnitude of each block + () fp32 -> (...) int32 exponent k, -7 to 11, and (...) fp32 factor.

    A magnitude times the factor is its place on the search's grid.
    """
    global_scale = torch.where(global_scale == 0, 1.0, global_scale)  # its blocks are zeros whatever is chosen
    ratio = amax / global_scale
    exponent = ((ratio.view(torch.int32) >> 23) - 127).clamp(_EXPONENTS[0], _EXPONENTS[-1])
    return exponent, (((127 + 8) - exponent) << 23).view(torch.float32) / global_scale


@functools.cache
def _search_steps(device: torch.device) -> torch.Tensor:
    return torch.tensor(SEARCH_STEPS, dtype=torch.float32, device=device)


@functools.cache
def search_errors(device: torch.device) -> torch.Tensor:
    """(513, 16) fp32: squared error of a magnitude, in steps of the search's grid, under each candidate scale."""
    codes = torch.tensor(E2M1_VALUES[:8], device=device)
    places = torch.arange(2.0 * SEARCH_GRID + 1, device=device)
    return (places[:, None, None] - 4 * _search_steps(device)[:, None] * codes).square().amin(-1)


def search_penalty(exponent: torch.Tensor) -> torch.Tensor:
    """(...) int32 -> (..., 16) fp32: 0 for candidates that are E4M3 values, infinity for the others."""
    return _penalties(exponent.device)[exponent.long() - _EXPONENTS[0]]


@functools.cache
def _penalties(device: torch.device) -> torch.Tensor:
    units = torch.tensor([2.0 ** (k - 6) for k in _EXPONENTS], device=device)
    candidates = units[:, None] * _search_steps(device)
    return torch.where(candidates.to(FP8).float() == candidates, 0.0, torch.inf)


def chosen_scale(
    choice: torch.Tensor, exponent: torch.Tensor, amax: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    """(...) int64 places in ``SEARCH_STEPS``, (...) exponents and largest magnitudes + () fp32 -> (...) e4m3 scales."""
    unit = ((127 - 6 + exponent) << 23).view(torch.float32)
    scale = _search_steps(choice.device)[choice] * unit
    scale = torch.where(amax / global_scale >= 4096.0, E4M3_MAX, scale)
    return torch.where((amax == 0) | (global_scale == 0), 0.0, scale).to(FP8)


def column_steps(column_weight: torch.Tensor) -> torch.Tensor:
    """(K,) weights -> (R16(K) / 16, 16) fp32 whole numbers: each weight in 143ths of its block's largest.

    A weight above 0 counts at least 1; in a block of zeros every column counts 1.
    """
    blocks = torch.nn.functional.pad(column_weight.float(), (0, -len(column_weight) % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(1, keepdim=True)
    steps = torch.where(blocks > 0, (blocks / largest * COLUMN_STEPS).round().clamp(min=1.0), 0.0)
    return torch.where(largest == 0, 1.0, steps)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype: the weight is dequantised to it, then one matmul."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def to_fp8(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) -> (R16(N), R16(K)) e4m3, (R16(N),) fp32 row scales.

    A row is multiplied by the power of two that brings 6 times its largest block scale into [192, 360], so nothing
    saturates; the inverse goes into its scale, with the global one. What is rounded is inherent: a code times a block
    scale has up to six significand bits, E4M3 four, so codes 1.5, 3 and 6 round (by at most 1/16 of the value) and
    0.5, 1, 2 and 4 do not. Blocks whose scale is 2**10 below the row's largest end in E4M3's subnormals, an error
    under 2**-17 of the row's largest value. Padding becomes zero, with row scale 1.
    """
    unscaled, packed, (rows, cols) = _unscaled(weight), weight.packed, weight.shape
    scale = unswizzle(weight.block_scale.view(FP8), packed.shape[0], packed.shape[1] * 2 // BLOCK)[:rows]
    exponent = (scale.view(torch.uint8) >> 3 & 15).int()
    largest = exponent.amax(1) if exponent.numel() else exponent.new_ones(rows)
    shift = 12 - largest.clamp(min=1)
    out = torch.zeros(packed.shape[0], packed.shape[1] * 2, dtype=FP8, device=packed.device)
    out[:rows, :cols] = (unscaled * _power_of_two(shift).unsqueeze(1)).to(FP8)
    row_scale = torch.ones(packed.shape[0], device=packed.device)
    row_scale[:rows] = weight.global_scale.float() * _power_of_two(-shift)
    return out, row_scale


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """int32 in -126..127 -> fp32, exact on every device, which pow is not."""
    return ((exponent + 127) << 23).view(torch.float32)


def dequantize_sum(weight: PackedWeight, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (N, K) in the factors' dtype, rounded once."""
    return torch.addmm(dequantize(weight, torch.float32), up.float(), down.float()).to(up.dtype)


def unpack_factors(
    down: torch.Tensor,
    down_scale: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """down (R, K) and up (N, R) int8, or float and up_scale None, + scales -> both in ``dtype``, times their scales.

    A scale (R, C) and (N, C) fp32 is that of FACTOR_BLOCK columns; a ``down`` that is not int8 has one a row.
    """
    if up_scale is None:
        return (down.float() * down_scale).to(dtype), up.to(dtype)
    scales = (scale.repeat_interleave(FACTOR_BLOCK, 1) for scale in (down_scale, up_scale))
    return tuple((part * scale[:, : part.shape[1]]).to(dtype) for part, scale in zip((down, up), scales, strict=True))


def pack_factor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) fp32 -> (N, K) int8, (N, C) fp32 scales, of FACTOR_BLOCK columns each, whose largest becomes 127."""
    rows, cols = values.shape
    blocks = torch.nn.functional.pad(values, (0, -cols % FACTOR_BLOCK)).view(rows, -1, FACTOR_BLOCK)
    amax = blocks.abs().amax(2, keepdim=True)
    scale = torch.where(amax == 0, 1.0, _divide(amax, 127.0))
    return (blocks / scale).round().to(torch.int8).flatten(1)[:, :cols].contiguous(), scale.squeeze(2)


def to_fp8_sum(
    weight: PackedWeight, up: torch.Tensor, down: torch.Tensor, peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (R16(N), R16(K)) e4m3, (R16(N),) fp32 row scales, powers of two.

    ``peak`` (R,) fp32 bounds the magnitudes in each row of ``down``. A row's scale follows from a bound, |up| peak plus
    that of ``to_fp8``, 360 of its scales: nothing saturates and no pass over the sum is needed. Were it 2**6 too large,
    E4M3 would still have 9 octaves above its subnormals; rounding is relative, so the error is the same.
    """
    out, scale = to_fp8(weight)
    rows, cols = weight.shape
    bound = 360 * scale[:rows] + up.float().abs() @ peak
    scale[:rows] = _next_power_of_two(_divide(bound, E4M3_MAX)).clamp(min=_SMALLEST_ROW_SCALE)
    total = torch.addmm(dequantize(weight, torch.float32), up.float(), down.float())
    out[:rows, :cols] = (total / scale[:rows].unsqueeze(1)).to(FP8)
    return out, scale


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """One of ``ACTIVATIONS`` of x, in x's dtype; the empty one is x itself. Raises ValueError for another."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {ACTIVATIONS}")
    return torch.nn.functional.gelu(x, approximate="tanh") if activation else x


def quantize_rows(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) float -> (M, R16(K)) e4m3 and its (M, 1) fp32 scales, each row's largest magnitude becoming 448.

    The added columns are zero. NaN stays NaN where it is. ``activation``, one of ``ACTIVATIONS``, comes first, in fp32.
    """
    values = activate(x.float(), activation)
    amax = values.abs().nan_to_num(0.0, torch.inf).amax(1, keepdim=True) if x.shape[1] else values.new_zeros(len(x), 1)
    scale = torch.where(amax < SMALLEST_AMAX, 1.0, _divide(amax, E4M3_MAX))
    quantized = (values * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    padded = torch.nn.functional.pad(quantized.view(torch.uint8), (0, -x.shape[1] % BLOCK))
    return padded.view(FP8), scale


def linear_fp8(
    x: torch.Tensor | FP8Rows, weight: PackedWeight, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype, both operands in E4M3 (W4A8), FP32 accumulation.

    ``activation`` of x comes first, as in ``quantize_rows``; x may be quantised already.
    """
    return _fp8_product(x, *to_fp8(weight), weight.shape[0], bias, activation)


def linear_fp8_sum(
    x: torch.Tensor, weight: PackedWeight, up, down, peak, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """As ``linear_fp8`` with the weight of ``to_fp8_sum``."""
    return _fp8_product(x, *to_fp8_sum(weight, up, down, peak), weight.shape[0], bias, activation)


def _fp8_product(x, rounded, weight_scale, rows, bias, activation) -> torch.Tensor:
    if isinstance(x, FP8Rows):
        quantized, scale = x.quantized, x.scale
    else:
        quantized, scale = quantize_rows(x.reshape(-1, x.shape[-1]), activation)
    out = (quantized.float() @ rounded.float().t() * weight_scale * scale)[:, :rows]
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], rows)


def gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype, for few rows: weight-only, rounded once, at the end.

    ``linear`` rounds each weight to x's dtype; here code times block scale is exact, the sum is FP32, and the global
    scale multiplies the sum. The result is nearer to the exact product, and differs from ``linear`` by its rounding.
    """
    out = torch.nn.functional.linear(x.float(), _unscaled(weight)) * weight.global_scale.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)
