# SPDX-License-Identifier: Apache-2.0
"""The tensors that a layer is written as, in NVFP4 and in FP8, in ComfyUI's own layout with its marker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from ...kernels.format import E4M3_MAX, block_scale_shape, packed_shape
from ..file.container import PlannedTensor
from ..identify.dialects import MARKER

_NVFP4_MARKER = b'{"format": "nvfp4"}'
_FP8_MARKER = b'{"format": "float8_e4m3fn"}'


@dataclass(frozen=True)
class Spent:
    """Layers without prefix that a byte budget has become FP8, or has left as they are in the source."""

    fp8: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def nvfp4_marker() -> bytes:
    """Content of a layer's `comfy_quant` tensor."""
    return _NVFP4_MARKER


def fp8_marker() -> bytes:
    """The same of an FP8 layer."""
    return _FP8_MARKER


def nvfp4_tensors(layer: str, shape: tuple[int, ...]) -> tuple[PlannedTensor, ...]:
    """The four tensors of an NVFP4 layer, in the order in which they are made."""
    return (
        planned_tensor(f"{layer}.weight", "U8", packed_shape(shape)),
        planned_tensor(f"{layer}.weight_scale", "F8_E4M3", block_scale_shape(shape)),
        planned_tensor(f"{layer}.weight_scale_2", "F32", ()),
        planned_tensor(f"{layer}.{MARKER}", "U8", (len(_NVFP4_MARKER),)),
    )


def fp8_tensors(layer: str, shape: tuple[int, ...]) -> tuple[PlannedTensor, ...]:
    """The three tensors of an FP8 layer, in the order in which they are made."""
    return (
        planned_tensor(f"{layer}.weight", "F8_E4M3", shape),
        planned_tensor(f"{layer}.weight_scale", "F32", ()),
        planned_tensor(f"{layer}.{MARKER}", "U8", (len(_FP8_MARKER),)),
    )


def quantize_fp8(values: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) fp32, () fp32 largest magnitude of the whole weight -> (N, K) e4m3 and what multiplies it, () fp32."""
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax)).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def planned_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    """A tensor whose bytes the quantiser makes together with those of its layer."""
    return PlannedTensor(name, dtype, shape, _unplanned)


def _unplanned() -> NoReturn:
    raise AssertionError("the quantiser makes tensors by unit, not one by one")
