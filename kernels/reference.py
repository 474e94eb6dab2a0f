"""NVFP4 in plain torch, FP32 arithmetic: the definition of right for every faster kernel. Runs on any device.

Layout, names and the order of the multiplications: kernels/format.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .format import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    PackedWeight,
    check_request,
    swizzle,
    unswizzle,
)

# Midpoints between neighbouring E2M1 magnitudes. A tie goes to the even code, so a midpoint counts as "reached" only
# where the code above it is even: 0.25 -> 0, 0.75 -> 1.0, 1.25 -> 1.0, 1.75 -> 2.0, 2.5 -> 2.0, 3.5 -> 4.0, 5.0 -> 4.0.
_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def dequantize(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """(R16(N), R16(K)/2) uint8 + swizzled e4m3 scales + () fp32 -> (N, K) ``dtype``."""
    check_request(packed, block_scale, shape, dtype)
    rows, cols = shape
    scale = unswizzle(block_scale.view(torch.float8_e4m3fn), packed.shape[0], packed.shape[1] * 2 // BLOCK)
    decode_scale = scale.float() * global_scale.float()
    codes = torch.stack((packed >> 4, packed & 0x0F), dim=-1).flatten(1).long()
    values = torch.tensor(E2M1_VALUES, device=packed.device)[codes]
    values = values.unflatten(1, (-1, BLOCK)) * decode_scale.unsqueeze(-1)
    return values.flatten(1)[:rows, :cols].to(dtype).contiguous()


def dequantizer(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """(N, K), output dtype -> function (packed, block_scale, global_scale) -> (N, K); nothing to prepare here."""
    return lambda packed, block_scale, global_scale: dequantize(packed, block_scale, global_scale, shape, dtype)


def amax_global_scale(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) float -> () fp32 ``amax / (448 * 6)``, the scale at which no block scale saturates."""
    return _divide(weight.abs().amax().float(), E4M3_MAX * E2M1_MAX)


def checked_global_scale(weight: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """``global_scale``, by default the amax one. Raises ValueError if the weight or the scale is not finite."""
    amax_scale = amax_global_scale(weight)
    if not torch.isfinite(amax_scale):
        raise ValueError("the weight holds NaN or infinity; NVFP4 cannot represent it")
    if global_scale is None:
        return amax_scale
    if not torch.isfinite(global_scale):
        raise ValueError(f"the global scale is {global_scale.item()}; expected a finite number")
    return global_scale


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


def quantize(weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> PackedWeight:
    """(N, K) float -> PackedWeight, plain amax scaling, byte for byte what comfy-kitchen's quantize_nvfp4 writes.

    ``global_scale``: () fp32, default ``amax_global_scale(weight)``. Raises ValueError if the weight is not a finite
    matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"NVFP4 quantises matrices; found shape {tuple(weight.shape)}")
    global_scale = checked_global_scale(weight, global_scale)
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % BLOCK, 0, -rows % 16))
    blocks = padded.float().unflatten(1, (-1, BLOCK))
    scale = (_divide(blocks.abs().amax(-1), E2M1_MAX) / global_scale).clamp(max=E4M3_MAX).nan_to_num(0.0)
    scale = scale.to(torch.float8_e4m3fn)
    decode_scale = (global_scale * scale.float()).unsqueeze(-1)
    scaled = torch.where(decode_scale == 0, 0.0, blocks / decode_scale)
    codes = round_to_e2m1(scaled.clamp(-E2M1_MAX, E2M1_MAX)).flatten(1)
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    return PackedWeight(packed, swizzle(scale), global_scale.float(), (rows, cols))


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(..., K) float x NVFP4 (N, K) -> (..., N) in x's dtype: the weight is dequantised to it, then one matmul."""
    return torch.nn.functional.linear(x, dequantize(packed, block_scale, global_scale, shape, x.dtype), bias)
