"""Linear layers with few rows of input: the packed weight is read once and multiplied on the way, where Triton can.

At one row a matmul with a dequantised weight writes and reads 4 bytes an element that the fused kernel never touches.
kernels/reference.py defines the result.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch

from . import backends, reference

logger = logging.getLogger(__name__)

MAX_TOKENS = 16
_TOLERANCE = 5e-3  # rounding to BF16 alone is 1.7e-3
_MIN_CAPABILITY = (8, 0)  # tensor cores that take BF16
_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def gemv_function(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> Callable[..., torch.Tensor] | None:
    """(N, K), dtype and device of x -> function (x (M, K), packed, block_scale, global_scale, bias) -> (M, N), or None.

    None where nothing is faster than to dequantise: another backend than Triton, FP32, an older GPU.
    """
    name, _ = backends.pick_backend(device, backend)
    if name != "triton" or dtype not in _DTYPES or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return None
    fused = importlib.import_module(".triton.gemv", __package__).gemv_function
    return fused(shape, dtype, device) if _sound(fused, dtype, device) else None


@functools.cache
def _sound(fused: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the fused kernel computes on this GPU what the reference does: tried once, with both ways to divide K.

    Its inner loop is inline assembly, which no test without this GPU proves.
    """
    generator = torch.Generator(device).manual_seed(0)
    for shape, rows in (((256, 4096), 1), ((144, 1040), 5)):
        x = torch.randn(rows, shape[1], generator=generator, device=device).to(dtype)
        weight = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
        record = reference.quantize(weight)
        parts = (record.packed, record.block_scale, record.global_scale)
        exact = x.double() @ reference.dequantize(*parts, shape, torch.float32).double().t()
        error = (fused(shape, dtype, device)(x, *parts, None).double() - exact).norm() / exact.norm()
        if not error < _TOLERANCE:
            logger.warning(
                "The fused kernel for few rows is off by %.2g on %s, %s: layers are dequantised instead. Please report "
                "it with the version of Triton.", error, torch.cuda.get_device_name(device), dtype,
            )  # fmt: skip
            return False
    return True


def gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) + (N,) -> (..., N) in x's dtype, for at most 16 rows of x.

    Where the fused kernel cannot run, it is ``backends.linear``.
    """
    if torch.compiler.is_compiling():
        return torch.ops.nvfp4_video.gemv(x, packed, block_scale, global_scale, shape[0], shape[1], bias, backend)
    run = gemv_function(tuple(shape), x.dtype, x.device, backend)
    if run is None:
        return backends.linear(x, packed, block_scale, global_scale, shape, bias, backend)
    out = run(x.reshape(-1, x.shape[-1]), packed, block_scale, global_scale, bias)
    return out.reshape(*x.shape[:-1], shape[0])


backends.define_linear("gemv", gemv)
