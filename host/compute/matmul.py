# SPDX-License-Identifier: Apache-2.0
"""A packed weight on the device and an input -> their product; which kernel computes it follows from the rows.

Few rows go to the fused kernel, many of a layer in FP8 or INT8 mode to the tensor cores for it, the rest is multiplied
by the weight dequantised on the device. Called a thousand times a step: what depends on the layer alone is prepared
once.
"""

from __future__ import annotations

import functools
import math

import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class

from ...kernels import dispatch, reference
from ...kernels.format import FP8Rows, PackedWeight
from .. import residency
from . import lora
from .card import gpu_of, min_tokens
from .modes import EIGHT_BITS
from .rows import shared_rows, takes_rows

LAYOUT = "TensorCoreNVFP4Layout"
# A LoRA beside the product costs as much as one in the weight where T (N + K) is this many times N K: 1.5 to 2 on an
# H200 (benchmarks/results/low_rank.json).
_BESIDE = 1.5


def wrap(record: PackedWeight) -> QuantizedTensor:
    """PackedWeight -> the host's tensor; it shows the logical shape, from which the host detects architectures.

    Its dtype is provisional: the layer that loads it computes in its own.
    """
    params = get_layout_class(LAYOUT).Params(
        scale=record.global_scale, orig_dtype=torch.bfloat16, orig_shape=record.shape, block_scale=record.block_scale
    )
    return QuantizedTensor(record.packed, LAYOUT, params)


def multiply(
    own: dict,
    input: torch.Tensor | FP8Rows,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    device: torch.device,
    backend: str,
    activation: str,
) -> torch.Tensor:
    """(..., K) BF16, FP16 or FP32 times a packed (N, K) weight, both on ``device`` -> (..., N) in the input's dtype.

    The input of a layer in FP8 mode may be rows. ``own`` is the layer's ``__dict__``, where what it calls is kept;
    ``activation`` is computed of the input first.
    """
    params, packed, dtype = weight._params, weight._qdata, input.dtype
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if torch.compiler.is_compiling():
        return _compiled_matmul(own, reference.activate(input, activation), packed, params, bias, backend)
    functions, mode = own.get("_nvfp4_functions"), own.get("nvfp4_mode")
    if (
        functions is None
        or functions[0] is not dtype
        or functions[1] != device
        or functions[2] != backend
        or functions[3] != mode  # a schedule changes it from step to step
    ):
        with residency.outside_host_graph():  # some keep tensors of their own
            functions = own["_nvfp4_functions"] = _functions(own, params.orig_shape, dtype, device, backend)
    few, many, least, dequantize = functions[4:]
    if type(input) is FP8Rows:
        if many is not None and mode == "fp8":
            return many(input, packed, params.block_scale, params.scale, bias)
        input = input.plain()
    if few is not None or many is not None:
        shape = input.shape
        cols = shape[-1] if shape else 0
        rows = input.numel() // cols if cols else 0
        if many is not None and rows >= least:
            return many(input, packed, params.block_scale, params.scale, bias, activation, shared_rows(own))
        if activation:
            input = reference.activate(input, activation)
        if few is not None and 0 < rows <= reference.MAX_TOKENS:
            if len(shape) == 2:
                return few(input, packed, params.block_scale, params.scale, bias)
            out = few(input.reshape(rows, cols), packed, params.block_scale, params.scale, bias)
            return out.view(*shape[:-1], out.shape[1])
    return torch.nn.functional.linear(input, dequantize(packed, params.block_scale, params.scale), bias)


def multiply_with_lora(
    own: dict,
    input: torch.Tensor | FP8Rows,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    device: torch.device,
    backend: str,
    activation: str = "",
) -> torch.Tensor:
    """As ``multiply`` with the layer's branch: few rows get it beside their product, many are multiplied by the sum.

    The sum is made while the weight is decoded, or converted to 8 bits, whose rounding the change then shares: 2 N K R
    FLOPs whatever the rows, where a branch costs 2 T (N + K) R in BF16 and a pass over the output.
    """
    branch, cols, is_rows = own["nvfp4_lora"], input.shape[-1] if len(input.shape) else 0, type(input) is FP8Rows
    rows = math.prod(input.shape[:-1]) if cols else 0
    params, shape = weight._params, tuple(weight._params.orig_shape)
    in_weight = _in_weight(shape, rows)
    down, up = lora.factors(branch, input, backend)
    many, mode = None, own.get("nvfp4_mode")
    if in_weight and mode in EIGHT_BITS and not torch.compiler.is_compiling():
        if rows >= least_rows(shape, device, mode):
            many = dispatch.prepare(f"linear_{mode}_sum", shape, input.dtype, device, backend)
    if many is not None:
        parts = weight._qdata, params.block_scale, params.scale, up, down, branch.peak
        return many(input, *parts, bias, activation, None if is_rows else shared_rows(own))
    input = reference.activate(input.plain() if is_rows else input, activation)
    if not in_weight:
        return lora.add(multiply(own, input, weight, bias, device, backend, ""), input, down, up)
    record = PackedWeight(weight._qdata, params.block_scale, params.scale, shape)
    merged = dispatch.dequantize_sum(record, up, down, backend)
    return torch.nn.functional.linear(input, merged, bias if bias is None else bias.to(input.dtype))


def _in_weight(shape: tuple[int, int], rows: int) -> bool:
    """Whether a LoRA is cheaper in a weight of (N, K) than beside its product with so many rows."""
    return rows > reference.MAX_TOKENS and rows * sum(shape) >= _BESIDE * shape[0] * shape[1]


def rows_for(layer: torch.nn.Module, rows: int, device: torch.device) -> bool:
    """Whether a Linear, its LoRA included, is computed from FP8 rows alone where it gets so many of them."""
    if not takes_rows(layer):
        return False
    shape = layer.out_features, layer.in_features
    beside = layer.__dict__.get("nvfp4_lora") is not None and not _in_weight(shape, rows)
    return rows >= least_rows(shape, device) and not beside


def _functions(own: dict, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str) -> tuple:
    """What this layer calls for inputs of ``dtype`` on ``device``, in its mode; these and the backend lead the tuple.

    For few rows, for many and from how many on, and for any number.
    """
    mode = own.get("nvfp4_mode")
    few = dispatch.prepare("gemv", shape, dtype, device, backend)
    many = dispatch.prepare(f"linear_{mode}", shape, dtype, device, backend) if mode in EIGHT_BITS else None
    least = 0 if many is None else least_rows(tuple(shape), device, mode)
    any_number = dispatch.prepare("dequantize", shape, dtype, device, backend)
    return dtype, device, backend, mode, few, many, least, any_number


@torch.compiler.assume_constant_result
@functools.cache
def least_rows(shape: tuple[int, int], device: torch.device, mode: str = "fp8") -> int:
    """From how many rows on a layer in FP8 or INT8 mode computes so; a compiled graph has the number."""
    return min_tokens(shape, gpu_of(device), mode)


def _compiled_matmul(own: dict, input, packed, params, bias, backend: str) -> torch.Tensor:
    """As ``multiply`` with operators that torch.compile takes whole; the number of rows is a guard of the graph."""
    weight = packed, params.block_scale, params.scale, *params.orig_shape
    cols = input.shape[-1] if input.ndim else 0
    rows = input.numel() // cols if cols else 0
    mode = own.get("nvfp4_mode")
    if mode in EIGHT_BITS and rows >= least_rows(tuple(params.orig_shape), input.device, mode):
        multiply = torch.ops.nvfp4_video.linear_fp8 if mode == "fp8" else torch.ops.nvfp4_video.linear_int8
        return multiply(input, *weight, bias, backend)
    if 0 < rows <= reference.MAX_TOKENS:
        return torch.ops.nvfp4_video.gemv(input, *weight, bias, backend)
    decoded = torch.ops.nvfp4_video.dequantize(*weight, input.dtype, backend)
    return torch.nn.functional.linear(input, decoded, bias)
