# SPDX-License-Identifier: Apache-2.0
"""The operations on packed weights, each by the backend that runs: what the rest of the pack calls.

Each function takes a PackedWeight or gives one. Outside torch.compile it goes straight to the chosen implementation,
since torch's dispatcher costs microseconds a call; inside it goes through ``torch.ops.nvfp4_video``, so that a compiled
graph sees one opaque operator and does not break. ``prepare`` is for callers that use a shape again and again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from . import cpu_quantize, fp8, int8, int8_reference, reference
from .backends import BF16_CAPABILITY, pick_backend, triton_module
from .format import FP8, TENSOR_CORE_DTYPES, PackedWeight, block_scale_shape, packed_shape

logger = logging.getLogger(__name__)
_TOLERANCE = 5e-3  # of the trial of gemv; rounding to BF16 alone is 1.7e-3
_ops = torch.ops.nvfp4_video


@functools.cache
def prepare(
    operation: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> Callable[..., torch.Tensor] | None:
    """Operation, (N, K), dtype of x, factors or result, device -> function of tensors, to be called again and again.

    * ``dequantize``      (packed, block_scale, global_scale) -> (N, K)
    * ``dequantize_sum``  (packed, block_scale, global_scale, up (N, R), down (R, K)) -> (N, K)
    * ``gemv``            (x (M, K), packed, block_scale, global_scale, bias) -> (M, N); None where nothing is faster
      than to dequantise: another backend than Triton, FP32, an older GPU
    * ``linear_fp8``      (x (..., K), packed, block_scale, global_scale, bias, activation, shared) -> (..., N); x may
      be FP8Rows; ``activation`` (one of ``reference.ACTIVATIONS``) of x is taken first, ``shared`` is None or
      (fp8.SharedRows, place)
    * ``linear_fp8_sum``  (x, packed, block_scale, global_scale, up, down, peak (R,), bias, activation, shared): the
      same with the weight of ``reference.to_fp8_sum``; None for FP32
    * ``linear_int8``, ``linear_int8_sum``  the same two in INT8, for no FP8Rows; the latter for any dtype, without use
      for ``peak``; Triton's for 17 rows of x and more
    * ``unpack_factors``  (down, down_scale, up, up_scale) -> (down, up) in ``dtype``

    Raises ValueError for a backend or dtype that cannot be; a function, for tensors of another shape.
    """
    return _PREPARERS[operation](shape, dtype, device, pick_backend(device, backend)[0] == "triton")


def _dequantize(shape, dtype, device, in_triton: bool):
    if in_triton:
        return triton_module("dequantize").prepare(shape, dtype, device)
    return lambda *parts: reference.dequantize(PackedWeight(*parts, shape), dtype)


def _dequantize_sum(shape, dtype, device, in_triton: bool):
    """In two passes for FP32, and where the tensor cores do not take the dtype: one more rounding before the sum."""
    if in_triton and _multiplies(dtype, device):
        return triton_module("dequantize_sum").prepare(shape, dtype, device)
    dequantized = _dequantize(shape, dtype, device, in_triton)
    return lambda packed, block_scale, global_scale, up, down: dequantized(packed, block_scale, global_scale).addmm_(
        up, down
    )


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype != torch.bfloat16 or torch.version.cuda is None:
        return dtype in TENSOR_CORE_DTYPES
    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def _gemv(shape, dtype, device, in_triton: bool):
    if not in_triton or dtype not in TENSOR_CORE_DTYPES or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        return None
    fused = triton_module("gemv").prepare
    return fused(shape, dtype, device) if _sound(fused, dtype, device) else None


@functools.cache
def _sound(fused: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the fused kernel computes on this GPU what the reference does: tried once, with both ways to divide K.

    Its inner loop is inline assembly, which no test without this GPU proves.
    """
    generator = torch.Generator(device).manual_seed(0)
    for shape, rows in (((256, 4096), 1), ((144, 1040), 5)):
        x = torch.randn(rows, shape[1], generator=generator, device=device).to(dtype)
        weight = reference.quantize(torch.randn(shape, generator=generator, device=device).to(torch.bfloat16))
        exact = x.double() @ reference.dequantize(weight, torch.float32).double().t()
        error = (fused(shape, dtype, device)(x, *weight.parts, None).double() - exact).norm() / exact.norm()
        if not error < _TOLERANCE:
            logger.warning(
                "The fused kernel for few rows is off by %.2g on %s, %s: layers are dequantized instead. Please report "
                "it with the version of Triton.", error, torch.cuda.get_device_name(device), dtype,
            )  # fmt: skip
            return False
    return True


def _linear_fp8(shape, dtype, device, in_triton: bool):
    """The torch backend computes in FP32 what the tensor cores would."""
    return fp8.prepare(shape, dtype, device) if in_triton else _plain(reference.linear_fp8, shape)


def _linear_fp8_sum(shape, dtype, device, in_triton: bool):
    if dtype not in TENSOR_CORE_DTYPES:
        return None
    return fp8.prepare_sum(shape, dtype, device) if in_triton else _plain_sum(reference.linear_fp8_sum, shape)


def _linear_int8(shape, dtype, device, in_triton: bool):
    return int8.prepare(shape, dtype, device) if in_triton else _plain(int8_reference.linear_int8, shape)


def _linear_int8_sum(shape, dtype, device, in_triton: bool):
    if not in_triton:
        return _plain_sum(int8_reference.linear_int8_sum, shape)
    return int8.prepare_sum(shape, dtype, device, _dequantize_sum(shape, dtype, device, True))


def _plain(linear: Callable[..., torch.Tensor], shape: tuple[int, int]) -> Callable[..., torch.Tensor]:
    def run(x, packed, block_scale, global_scale, bias=None, activation="", shared=None):
        return linear(x, PackedWeight(packed, block_scale, global_scale, shape), bias, activation)

    return run


def _plain_sum(linear: Callable[..., torch.Tensor], shape: tuple[int, int]) -> Callable[..., torch.Tensor]:
    def run(x, packed, block_scale, global_scale, up, down, peak, bias=None, activation="", shared=None):
        weight = PackedWeight(packed, block_scale, global_scale, shape)
        return linear(x, weight, up, down, peak, bias, activation)

    return run


def _unpack_factors(shape, dtype, device, in_triton: bool):
    if in_triton:
        return triton_module("unpack_factors").prepare(shape, dtype, device)
    return lambda *factors: reference.unpack_factors(*factors, dtype)


_PREPARERS = {
    "dequantize": _dequantize,
    "dequantize_sum": _dequantize_sum,
    "gemv": _gemv,
    "linear_fp8": _linear_fp8,
    "linear_fp8_sum": _linear_fp8_sum,
    "linear_int8": _linear_int8,
    "linear_int8_sum": _linear_int8_sum,
    "unpack_factors": _unpack_factors,
}


def _prepared(operation: str, weight: PackedWeight, dtype: torch.dtype, backend: str):
    return prepare(operation, tuple(weight.shape), dtype, weight.packed.device, backend)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16, backend: str = "auto") -> torch.Tensor:
    """NVFP4 (N, K) -> (N, K) ``dtype``, by the chosen backend."""
    if torch.compiler.is_compiling():
        return _ops.dequantize(*weight.parts, *weight.shape, dtype, backend)
    return _prepared("dequantize", weight, dtype, backend)(*weight.parts)


def dequantize_sum(weight: PackedWeight, up: torch.Tensor, down: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (N, K) in the factors' dtype, by the chosen backend.

    Inside torch.compile in two passes: the decoded weight is rounded before the product is added.
    """
    if torch.compiler.is_compiling():
        return dequantize(weight, up.dtype, backend).addmm_(up, down)
    return _prepared("dequantize_sum", weight, up.dtype, backend)(*weight.parts, up, down)


def unpack_factors(
    down: torch.Tensor,
    down_scale: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.unpack_factors`` by the chosen backend; inside torch.compile in torch."""
    if torch.compiler.is_compiling():
        return reference.unpack_factors(down, down_scale, up, up_scale, dtype)
    run = prepare("unpack_factors", (up.shape[0], down.shape[1]), dtype, down.device, backend)
    return run(down, down_scale, up, up_scale)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype: weight-only, one dequantise and one matmul."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype, backend), bias)


def gemv(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype, for at most ``reference.MAX_TOKENS`` rows of x.

    The packed weight is read once and multiplied on the way: at one row a matmul with a dequantised weight writes and
    reads 4 bytes an element more. Where the fused kernel cannot run, it is ``linear``.
    """
    if torch.compiler.is_compiling():
        return _ops.gemv(x, *weight.parts, *weight.shape, bias, backend)
    run = _prepared("gemv", weight, x.dtype, backend)
    if run is None:
        return linear(x, weight, bias, backend)
    return run(x.reshape(-1, x.shape[-1]), *weight.parts, bias).reshape(*x.shape[:-1], weight.shape[0])


def linear_fp8(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype, both operands rounded to E4M3.

    The matmul's result is BF16 whatever x is, before it is cast to x's dtype.
    """
    if torch.compiler.is_compiling():
        return _ops.linear_fp8(x, *weight.parts, *weight.shape, bias, backend)
    return _prepared("linear_fp8", weight, x.dtype, backend)(x, *weight.parts, bias)


def linear_int8(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype, both operands as rows in INT8.

    Triton's takes 17 rows of x and more.
    """
    if torch.compiler.is_compiling():
        return _ops.linear_int8(x, *weight.parts, *weight.shape, bias, backend)
    return _prepared("linear_int8", weight, x.dtype, backend)(x, *weight.parts, bias)


def quantize(
    weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    search: str = "amax",
    column_weight: torch.Tensor | None = None,
    backend: str = "auto",
) -> PackedWeight:
    """(N, K) float -> PackedWeight by the chosen backend; arguments and errors of ``reference.quantize``."""
    if pick_backend(weight.device, backend)[0] == "triton":
        module = triton_module("quantize")
    else:
        module = cpu_quantize if weight.device.type == "cpu" else reference
    return module.quantize(weight, global_scale, search, column_weight)


_library = torch.library.Library("nvfp4_video", "DEF")


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Register ``torch.ops.nvfp4_video.<name>``; operators take the parts of a weight and its shape as numbers."""
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_video::{name}", fake, lib=_library)


def _define_linear(name: str, function: Callable[..., torch.Tensor]) -> None:
    def run(x, packed, block_scale, global_scale, rows, cols, bias, backend):
        return function(x, PackedWeight(packed, block_scale, global_scale, (rows, cols)), bias, backend)

    def fake(x, packed, block_scale, global_scale, rows, cols, bias, backend):
        return x.new_empty((*x.shape[:-1], rows))

    weight = "Tensor packed, Tensor block_scale, Tensor global_scale, SymInt rows, SymInt cols"
    _define(name, f"(Tensor x, {weight}, Tensor? bias, str backend) -> Tensor", run, fake)


def _dequantize_op(packed, block_scale, global_scale, rows, cols, dtype, backend):
    weight = PackedWeight(packed, block_scale, global_scale, (rows, cols))
    return _prepared("dequantize", weight, dtype, backend)(*weight.parts)


def _dequantize_fake(packed, block_scale, global_scale, rows, cols, dtype, backend):
    return packed.new_empty((rows, cols), dtype=dtype)


def _quantize_op(weight, global_scale, backend):
    return quantize(weight, global_scale, backend=backend).parts[:2]


def _quantize_fake(weight, global_scale, backend):
    packed = weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8)
    return packed, weight.new_empty(block_scale_shape(weight.shape), dtype=FP8)


_define(
    "dequantize",
    "(Tensor packed, Tensor block_scale, Tensor global_scale, SymInt rows, SymInt cols, ScalarType dtype, str backend) "
    "-> Tensor",
    _dequantize_op,
    _dequantize_fake,
)
_define(
    "quantize", "(Tensor weight, Tensor global_scale, str backend) -> (Tensor, Tensor)", _quantize_op, _quantize_fake
)
_define_linear("gemv", gemv)
_define_linear("linear_fp8", linear_fp8)
_define_linear("linear_int8", linear_int8)
