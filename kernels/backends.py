"""Which implementation computes: Triton where it runs, plain torch elsewhere; and both as torch.library operators.

``dequantize`` and ``linear`` are what the rest of the pack calls. Outside torch.compile they go straight to the
chosen implementation, since the dispatcher costs microseconds a call; inside they go through
``torch.ops.nvfp4_video``, so that a compiled graph sees one opaque operator and does not break.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from . import cpu_quantize, reference
from .format import PackedWeight, block_scale_shape, packed_shape

BACKENDS = ("triton", "torch")
_MIN_CAPABILITY = (7, 5)
_MODULES = {"torch": "reference", "triton": "triton.dequantize"}


@functools.cache
def pick_backend(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """Device, "auto" or a name of ``BACKENDS`` -> (backend, reason).

    "auto" falls back to torch and says why; a backend asked for by name that cannot run raises ValueError.
    """
    if requested not in (*BACKENDS, "auto"):
        raise ValueError(f"unknown backend {requested!r}; expected auto, {' or '.join(BACKENDS)}")
    if requested == "torch":
        return "torch", "asked for"
    obstacle = _triton_obstacle(device)
    if not obstacle:
        return "triton", "asked for" if requested == "triton" else f"Triton runs on {_describe(device)}"
    if requested == "triton":
        raise ValueError(f"the triton backend cannot run: {obstacle}; choose backend auto or torch")
    return "torch", obstacle


def _triton_obstacle(device: torch.device) -> str:
    """Why Triton cannot run on ``device``, or an empty string."""
    if device.type != "cuda":
        return f"Triton needs an NVIDIA or AMD GPU, the model is on {device.type}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"Triton needs compute capability 7.5, this is {_describe(device)}"
    try:
        importlib.import_module(".triton.dequantize", __package__)
    except ImportError as error:
        return f"Triton is not installed ({error}); install triton, on Windows triton-windows"
    return ""


def _describe(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@functools.cache
def implementation(device: torch.device, requested: str = "auto"):
    """The module (reference or triton.dequantize) that ``pick_backend`` chose."""
    return importlib.import_module(f".{_MODULES[pick_backend(device, requested)[0]]}", __package__)


def dequantize(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """(R16(N), R16(K)/2) uint8 + swizzled e4m3 scales + () fp32 -> (N, K) ``dtype``, by the chosen backend."""
    if torch.compiler.is_compiling():
        return torch.ops.nvfp4_video.dequantize(packed, block_scale, global_scale, shape[0], shape[1], dtype, backend)
    return implementation(packed.device, backend).dequantize(packed, block_scale, global_scale, shape, dtype)


@functools.cache
def dequantizer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str = "auto"):
    """(N, K), output dtype, device -> the chosen backend's function (packed, block_scale, global_scale) -> (N, K).

    For callers that dequantise the same shape again and again and cannot spare the CPU time of ``dequantize``.
    """
    return implementation(device, backend).dequantizer(shape, dtype, device)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype: weight-only, one dequantise and one matmul."""
    weight = dequantize(packed, block_scale, global_scale, shape, x.dtype, backend)
    return torch.nn.functional.linear(x, weight, bias)


def dequantize_sum(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    up: torch.Tensor,
    down: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """NVFP4 (N, K) + up (N, R) x down (R, K) -> (N, K) in the factors' dtype, by the chosen backend.

    Inside torch.compile, for FP32, and for BF16 where the GPU's matrix units do not take it, in two passes: the decoded
    weight is rounded before the product is added.
    """
    if not torch.compiler.is_compiling() and _sums_in_triton(up.dtype, packed.device, backend):
        module = importlib.import_module(".triton.dequantize_sum", __package__)
        return module.dequantize_sum(packed, block_scale, global_scale, shape, up, down)
    return dequantize(packed, block_scale, global_scale, shape, up.dtype, backend).addmm_(up, down)


@functools.cache
def _sums_in_triton(dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    if pick_backend(device, backend)[0] != "triton":
        return False
    if dtype == torch.bfloat16:
        return torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype == torch.float16


def quantize(
    weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    search: str = "amax",
    column_weight: torch.Tensor | None = None,
    backend: str = "auto",
) -> PackedWeight:
    """(N, K) float -> PackedWeight by the chosen backend; arguments and errors of ``reference.quantize``."""
    module = implementation(weight.device, backend)
    if module is reference and weight.device.type == "cpu":
        module = cpu_quantize
    return module.quantize(weight, global_scale, search, column_weight)


_library = torch.library.Library("nvfp4_video", "DEF")
_library.define(
    "dequantize(Tensor packed, Tensor block_scale, Tensor global_scale, SymInt rows, SymInt cols, ScalarType dtype, "
    "str backend) -> Tensor"
)
_library.define("quantize(Tensor weight, Tensor global_scale, str backend) -> (Tensor, Tensor)")


def _dequantize_op(packed, block_scale, global_scale, rows, cols, dtype, backend):
    return implementation(packed.device, backend).dequantize(packed, block_scale, global_scale, (rows, cols), dtype)


def _dequantize_fake(packed, block_scale, global_scale, rows, cols, dtype, backend):
    return packed.new_empty((rows, cols), dtype=dtype)


def _quantize_op(weight, global_scale, backend):
    record = quantize(weight, global_scale, backend=backend)
    return record.packed, record.block_scale


def _quantize_fake(weight, global_scale, backend):
    packed = weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8)
    return packed, weight.new_empty(block_scale_shape(weight.shape), dtype=torch.float8_e4m3fn)


_library.impl("dequantize", _dequantize_op, "CompositeExplicitAutograd")
_library.impl("quantize", _quantize_op, "CompositeExplicitAutograd")
torch.library.register_fake("nvfp4_video::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("nvfp4_video::quantize", _quantize_fake, lib=_library)


def define_linear(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Register ``nvfp4_video::<name>``, by which compiled graphs call a function with the arguments of ``linear``."""
    _library.define(
        f"{name}(Tensor x, Tensor packed, Tensor block_scale, Tensor global_scale, SymInt rows, SymInt cols, "
        "Tensor? bias, str backend) -> Tensor"
    )

    def run(x, packed, block_scale, global_scale, rows, cols, bias, backend):
        return function(x, packed, block_scale, global_scale, (rows, cols), bias, backend)

    def fake(x, packed, block_scale, global_scale, rows, cols, bias, backend):
        return x.new_empty((*x.shape[:-1], rows))

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_video::{name}", fake, lib=_library)


__all__ = [
    "BACKENDS", "define_linear", "dequantize", "dequantize_sum", "implementation", "linear", "pick_backend", "quantize",
    "reference",
]  # fmt: skip
