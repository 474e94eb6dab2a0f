# SPDX-License-Identifier: Apache-2.0
"""A packed weight on the device and an input -> their product; which kernel computes it follows from the rows.

Few rows go to the fused kernel, many of a layer in FP8 mode to the FP8 tensor cores, the rest is multiplied by the
weight dequantised on the device. Called a thousand times a step: what depends on the layer alone is prepared once.
"""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class

from ...kernels import dispatch, reference
from ...kernels.format import FP8Rows, PackedWeight
from .. import residency
from . import lora
from .rows import shared_rows

LAYOUT = "TensorCoreNVFP4Layout"
# Below it FP8 saves no GPU time worth its additional kernel launches: see benchmarks/fp8.py.
FP8_MIN_TOKENS = 256


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
    functions = own.get("_nvfp4_functions")
    if functions is None or functions[0] is not dtype or functions[1] != device or functions[2] != backend:
        with residency.outside_host_graph():  # some keep tensors of their own
            functions = own["_nvfp4_functions"] = _functions(own, params.orig_shape, dtype, device, backend)
    _, _, _, few, many, dequantize = functions
    if type(input) is FP8Rows:
        if many is not None:
            return many(input, packed, params.block_scale, params.scale, bias)
        input = input.plain()
    if few is not None or many is not None:
        shape = input.shape
        cols = shape[-1] if shape else 0
        rows = input.numel() // cols if cols else 0
        if many is not None and rows >= FP8_MIN_TOKENS:
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
    input: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    device: torch.device,
    backend: str,
    activation: str = "",
) -> torch.Tensor:
    """As ``multiply`` with the layer's branch; where the weight is decoded, it is decoded with the LoRA added.

    The branch takes the input too, so an activation has been computed before.
    """
    branch, cols = own["nvfp4_lora"], input.shape[-1] if input.ndim else 0
    rows = input.numel() // cols if cols else 0
    if own.get("nvfp4_mode") != "bf16" or rows <= reference.MAX_TOKENS:
        return lora.add(multiply(own, input, weight, bias, device, backend, activation), input, branch)
    params = weight._params
    down, up = lora.tensors(branch, input)
    record = PackedWeight(weight._qdata, params.block_scale, params.scale, params.orig_shape)
    merged = dispatch.dequantize_sum(record, up, down, backend)
    return torch.nn.functional.linear(input, merged, bias if bias is None else bias.to(input.dtype))


def _functions(own: dict, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str) -> tuple:
    """What this layer calls for inputs of ``dtype`` on ``device``, which led the tuple: few rows, many, any number."""
    few = dispatch.prepare("gemv", shape, dtype, device, backend)
    many = dispatch.prepare("linear_fp8", shape, dtype, device, backend) if own.get("nvfp4_mode") == "fp8" else None
    return dtype, device, backend, few, many, dispatch.prepare("dequantize", shape, dtype, device, backend)


def _compiled_matmul(own: dict, input, packed, params, bias, backend: str) -> torch.Tensor:
    """As ``multiply`` with operators that torch.compile takes whole; the number of rows is a guard of the graph."""
    weight = packed, params.block_scale, params.scale, *params.orig_shape
    cols = input.shape[-1] if input.ndim else 0
    rows = input.numel() // cols if cols else 0
    if own.get("nvfp4_mode") == "fp8" and rows >= FP8_MIN_TOKENS:
        return torch.ops.nvfp4_video.linear_fp8(input, *weight, bias, backend)
    if 0 < rows <= reference.MAX_TOKENS:
        return torch.ops.nvfp4_video.gemv(input, *weight, bias, backend)
    decoded = torch.ops.nvfp4_video.dequantize(*weight, input.dtype, backend)
    return torch.nn.functional.linear(input, decoded, bias)
