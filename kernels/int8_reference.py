# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights and activations as INT8 rows in plain torch: the definition of right for kernels/int8.py.

A row's step is uniform, its largest magnitude becomes 127. For normally distributed numbers that is finer than E4M3;
a row with an outlier loses what is small beside it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .format import BLOCK, FP8, PackedWeight, unswizzle
from .reference import SMALLEST_AMAX, activate, dequantize, dequantize_sum

INT8_MAX = 127.0


def to_int8(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 (N, K) -> (R16(N), R16(K)) int8, (R16(N),) fp32 row scales.

    A row is multiplied so that 6 times its largest block scale becomes 127; the inverse goes into its scale, with the
    global one. Squared, that rounding is 0.8 % of NVFP4's own error where block scales are block maxima, and 1.8 %
    where they were searched, whose largest block often ends at the code 4 (normally distributed weights, K = 4096).
    Padding becomes zero, with row scale 1; a row with a scale that is NaN becomes zeros with the scale NaN.
    """
    packed, (rows, cols) = weight.packed, weight.shape
    scale = unswizzle(weight.block_scale.view(FP8), packed.shape[0], packed.shape[1] * 2 // BLOCK)
    bits = scale.view(torch.uint8) & 0x7F
    bits = bits.amax(1, keepdim=True).clamp(min=1) if bits.numel() else bits.new_ones(packed.shape[0], 1)
    largest = 6 * bits.view(FP8).float()
    values = dequantize(replace(weight, global_scale=_most(largest) / largest), torch.float32)
    out = torch.zeros(packed.shape[0], packed.shape[1] * 2, dtype=torch.int8, device=packed.device)
    out[:rows, :cols] = _rounded(values)
    row_scale = torch.ones(packed.shape[0], device=packed.device)
    row_scale[:rows] = (weight.global_scale.float() * largest / _most(largest)).flatten()[:rows]
    return out, row_scale


def quantize_rows_int8(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) float -> (M, R16(K)) int8 and its (M, 1) fp32 scales, each row's largest magnitude becoming 127.

    The added columns are zero. INT8 has no NaN: a row with one, or with infinity, has it in its scale. ``activation``,
    one of ``reference.ACTIVATIONS``, comes first, in fp32.
    """
    values = activate(x.float(), activation)
    amax = values.abs().amax(1, keepdim=True) if x.shape[1] else values.new_zeros(len(x), 1)
    scale = torch.where(amax < SMALLEST_AMAX, 1.0, amax / _most(amax))
    return torch.nn.functional.pad(_rounded(values * scale.reciprocal()), (0, -x.shape[1] % BLOCK)), scale


def _most(like: torch.Tensor) -> torch.Tensor:
    # A number would be multiplied by a reciprocal: in a division by it on a GPU, of it on any device.
    return torch.full((), INT8_MAX, device=like.device)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.round().nan_to_num(0.0).to(torch.int8)


def scale_sums(
    sums: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(M, P) int32 x (M, 1) fp32 x (P,) fp32 + (N,) -> (M, N) ``dtype``, of the first N columns."""
    out = (sums.float() * scale * weight_scale)[:, :rows]
    return (out if bias is None else out + bias.float()).to(dtype)


def linear_int8(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype, both operands in INT8, sums in INT32.

    ``activation`` of x comes first, as in ``quantize_rows_int8``.
    """
    return _product(x, *to_int8(weight), weight.shape[0], bias, activation)


def linear_int8_sum(
    x: torch.Tensor, weight: PackedWeight, up, down, peak, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """As ``linear_int8`` with rows made of the sum NVFP4 + up (N, R) x down (R, K), after it is rounded to x's dtype.

    A bound of the sum, for which ``peak`` is, would cost bits: INT8's step grows with it.
    """
    rounded, scale = quantize_rows_int8(dequantize_sum(weight, up, down))
    return _product(x, rounded, scale.flatten(), weight.shape[0], bias, activation)


def _product(x, rounded, weight_scale, rows, bias, activation) -> torch.Tensor:
    quantized, scale = quantize_rows_int8(x.reshape(-1, x.shape[-1]), activation)
    sums = (quantized.double() @ rounded.double().t()).int()  # exact below 2**31
    return scale_sums(sums, scale, weight_scale, bias, rows, x.dtype).reshape(*x.shape[:-1], rows)
