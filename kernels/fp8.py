# SPDX-License-Identifier: Apache-2.0
"""W4A8: NVFP4 weights and row-wise quantised activations meet on FP8 tensor cores, through ``torch._scaled_mm``.

The weight is converted to E4M3 on every call, as the BF16 mode dequantises it: one byte written and read an element
instead of two, and a matmul of twice the rate. kernels/reference.py defines the rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .backends import FP8_CAPABILITY, tensor_core_obstacle, triton_module
from .errors import first_line
from .format import FP8, FP8Rows
from .reference import ACTIVATIONS

# On: sums stay in the tensor core's short accumulator instead of going to FP32 every 128 products. On an H200 that
# takes 8 to 15 % off the matmul, and its rounding (0.1 to 0.2 %) is small beside the 2.4 % of FP8 itself
# (benchmarks/results/fp8.json).
FAST_ACCUMULATION = True


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why ``linear_fp8`` has no tensor cores on ``device``, or an empty string.

    Behind the capability a tiny product is computed: which torch builds have row-wise scaling for which GPU differs.
    """
    return tensor_core_obstacle(device, "FP8", FP8_CAPABILITY, "_scaled_mm") or _failure_of_a_trial(device)


def _failure_of_a_trial(device: torch.device) -> str:
    try:
        weight = torch.eye(32, device=device).to(FP8)
        scale = torch.full((32,), 0.5, device=device)
        x = torch.arange(17 * 32, device=device).remainder(15).float().view(17, 32)
        x_scale = torch.arange(1, 18, device=device, dtype=torch.float32).unsqueeze(1)
        bias = torch.ones(32, device=device, dtype=torch.bfloat16)
        found = scaled_mm(x.to(FP8), x_scale, weight, scale, bias)
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot multiply FP8 row-wise here: {first_line(error)}"
    if not torch.equal(found, (x * x_scale * 0.5 + 1).bfloat16()):
        return f"torch {torch.__version__} multiplies FP8 row-wise wrongly here"
    return ""


def scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    fast: bool = FAST_ACCUMULATION,
) -> torch.Tensor:
    """(M, K) e4m3, (M, 1) fp32, (N, K) e4m3, (N,) fp32, (N,) bf16 -> (M, N) bf16; N and K are multiples of 16."""
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale.unsqueeze(0), bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


class SharedRows:
    """The quantised form of a tensor that several Linears take one after the other, such as to_q, to_k and to_v.

    ``place`` says where a Linear stands among them: the first begins a new pass and always quantises, the last forgets.
    Within a pass the tensor must not be written to. Its quantised form hangs on it, and is gone when it is.
    """

    FIRST, MIDDLE, LAST = range(3)
    __slots__ = ("_pass",)

    def __init__(self):
        self._pass = object()

    def get(self, place: int, x: torch.Tensor, quantize: Callable[[torch.Tensor], tuple]) -> tuple:
        """``quantize(x)``, or what it gave for this very tensor in this pass."""
        if place == self.FIRST:
            self._pass = object()
        known = getattr(x, "_nvfp4_rows", None)
        if known is not None and known[0] is self._pass:
            rows = known[1]
        else:
            rows = quantize(x)
            x._nvfp4_rows = self._pass, rows
        if place == self.LAST:
            del x._nvfp4_rows
        return rows


def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """(N, K), dtype and device of x -> the function ``linear_fp8`` that dispatch.prepare describes, on tensor cores."""
    return converting(triton_module("to_fp8").prepare(shape, device), _product(shape, dtype, device))


def prepare_sum(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """The same for ``linear_fp8_sum``, whose factors are of x's dtype."""
    return converting_sum(triton_module("to_fp8_sum").prepare(shape, dtype, device), _product(shape, dtype, device))


def converting(convert: Callable[..., tuple], product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A weight's conversion and a function of ``by_rows`` -> function of x, a packed weight's parts, bias and so on."""

    def run(x, packed, block_scale, global_scale, bias=None, activation="", shared=None):
        return product(x, *convert(packed, block_scale, global_scale), bias, activation, shared)

    return run


def converting_sum(convert: Callable[..., tuple], product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same of a weight and the factors of its change, up, down and peak, which come behind ``global_scale``."""

    def run(x, packed, block_scale, global_scale, up, down, peak, bias=None, activation="", shared=None):
        weight, scale = convert(packed, block_scale, global_scale, up, down, peak)
        return product(x, weight, scale, bias, activation, shared)

    return run


def _product(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    rows, added = shape[0], -shape[0] % 16

    def multiply(quantized, scale, weight, weight_scale, bias):
        if bias is not None:
            bias = bias if bias.dtype == torch.bfloat16 else bias.to(torch.bfloat16)
            bias = torch.nn.functional.pad(bias, (0, added)) if added else bias
        out = scaled_mm(quantized, scale, weight, weight_scale, bias)
        out = out[:, :rows] if added else out
        return out if dtype == torch.bfloat16 else out.to(dtype)

    return by_rows(shape, dtype, device, multiply)


def by_rows(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    multiply: Callable[..., torch.Tensor],
    codes: torch.dtype = FP8,
) -> Callable[..., torch.Tensor]:
    """(N, K), dtype and device of x -> function (x, weight, its row scales, bias, activation, shared) -> (..., N).

    ``multiply`` (rows in ``codes``, their scales, weight, its row scales, bias) -> (M, N) in ``dtype``.
    """
    rows, cols = shape
    rounding = triton_module("quantize_rows").prepare
    rounders = {kind: rounding(cols, dtype, device, kind, codes) for kind in ACTIVATIONS}
    flat = {kind: lambda x, run=run: run(x if x.ndim == 2 else x.reshape(-1, cols)) for kind, run in rounders.items()}

    def product(x, weight, weight_scale, bias, activation, shared):
        if type(x) is FP8Rows:
            quantized, scale = x.quantized, x.scale
        elif shared is None or activation:
            quantized, scale = flat[activation](x)
        else:
            quantized, scale = shared[0].get(shared[1], x, flat[activation])
        out = multiply(quantized, scale, weight, weight_scale, bias)
        return out if len(x.shape) == 2 else out.reshape(*x.shape[:-1], rows)

    return product
