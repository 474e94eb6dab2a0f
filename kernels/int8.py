# SPDX-License-Identifier: Apache-2.0
"""W4A8 for GPUs without FP8: NVFP4 weights and activations as INT8 rows, multiplied by ``torch._int_mm``.

As kernels/fp8.py but for the numbers: the weight is converted on every call, the product gives INT32 sums, and one more
pass makes the result of them. kernels/int8_reference.py defines the rounding.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch

from .backends import TRITON_CAPABILITY, tensor_core_obstacle, triton_module
from .errors import first_line
from .format import round_up
from .fp8 import by_rows, converting, converting_sum

# Turing cards that have none of its tensor cores.
_WITHOUT_TENSOR_CORES = re.compile(r"GTX 16|\bMX[45]50\b|\bT(4|5|6|10|12|20)00\b|\bT550\b|CMP 30HX")
_MOST_BYTES = 1 << 28  # of INT32 sums at a time: at 14,080 tokens and 16,384 rows they would be 0.9 GB
_FEWEST_TOKENS = 17  # that torch multiplies


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why ``linear_int8`` has no tensor cores on ``device``, or an empty string."""
    found = tensor_core_obstacle(device, "INT8", TRITON_CAPABILITY, "_int_mm")
    if found:
        return found
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) == (7, 5) and _WITHOUT_TENSOR_CORES.search(name):
        return f"{name} has no tensor cores"
    return _failure_of_a_trial(device)


def _failure_of_a_trial(device: torch.device) -> str:
    x = torch.arange(_FEWEST_TOKENS * 32, device=device).remainder(255).sub(127).to(torch.int8).view(-1, 32)
    try:
        found = torch._int_mm(x, torch.eye(32, device=device).to(torch.int8).t())
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot multiply INT8 here: {first_line(error)}"
    return "" if torch.equal(found, x.int()) else f"torch {torch.__version__} multiplies INT8 wrongly here"


def prepare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """(N, K), dtype and device of x -> the function ``linear_int8`` that dispatch.prepare describes, on tensor cores.

    It takes 17 rows of x and more; torch refuses fewer.
    """
    return converting(triton_module("to_fp8").prepare(shape, device, torch.int8), _product(shape, dtype, device))


def prepare_sum(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, add: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The same for ``linear_int8_sum``; ``add`` is dispatch.prepare's ``dequantize_sum``."""
    quantize, added = triton_module("quantize_rows").prepare(shape[1], dtype, device, "", torch.int8), -shape[0] % 16

    def convert(packed, block_scale, global_scale, up, down, peak):
        weight, scale = quantize(add(packed, block_scale, global_scale, up, down))
        return torch.nn.functional.pad(weight, (0, 0, 0, added)) if added else weight, scale

    return converting_sum(convert, _product(shape, dtype, device))


def _product(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    rows = shape[0]
    scale_sums = triton_module("scale_sums").prepare(rows, dtype, device)
    most = max(_MOST_BYTES // (4 * round_up(max(rows, 1), 16)), 64)

    def multiply(quantized, scale, weight, weight_scale, bias):
        tokens = len(quantized)
        out = torch.empty((tokens, rows), dtype=dtype, device=device)
        parts = ((quantized, scale, out),)
        if tokens > most:  # in parts of like size: a rest of few tokens would be refused
            each = round_up(-(-tokens // -(-tokens // most)), 4)
            parts = zip(*(one.split(each) for one in parts[0]), strict=True)
        for one, one_scale, one_out in parts:
            scale_sums(torch._int_mm(one, weight.t()), one_scale, weight_scale, bias, one_out)
        return out

    return by_rows(shape, dtype, device, multiply, torch.int8)
