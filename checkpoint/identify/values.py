# SPDX-License-Identifier: Apache-2.0
"""The numbers beside a weight, read and checked: no NaN, nothing negative, no zero that would erase a weight.

Shapes and names are checked in layers.py; here are the few values that decide over a whole layer. ``read_scale`` is the
one reader of what multiplies FP8 and INT8 codes; ``check_packed`` looks at an NVFP4 layer's;
``check_layer`` at all that a layer has, for tools that copy it as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.geometry import E2M1_MAX, E4M3_MAX
from ..file.header import CheckpointError, quote
from ..file.torch_dtypes import DTYPES
from .formats import FP8_FORMATS, SMOOTHING
from .layers import Layer

Get = Callable[[str], torch.Tensor]  # key suffix of one layer -> tensor

_DAMAGED = "the file is damaged: download or convert it again"
_NAN = 0x7F  # E4M3: the largest byte without a sign; all above it are negative
_E8M0_NAN = 0xFF
_SAMPLE = 1 << 16
# Scaled FP8 codes fill their range, RMS about 90; plain casts are weights, and those are of the order of one.
_BARE_RMS = 8.0
_FP8 = tuple(DTYPES[name] for name in FP8_FORMATS)
_INPUTS = ("input_scale", "scale_input", "input_global_scale", "input_absmax")


def check_layer(where: str, layer: Layer, get: Get) -> None:
    """File, layer, its tensors -> None, or CheckpointError: what is there does not make finite, scaled numbers."""
    if layer.scale is not None and layer.kind != "mxfp8":
        read_scale(where, layer, get)
    elif layer.kind == "mxfp8" and (get("weight_scale").view(torch.uint8) == _E8M0_NAN).any():
        raise _error(where, layer, "its block scales hold NaN")
    elif layer.kind == "fp8_cast":
        check_cast(where, layer, get(layer.weight))
    elif layer.kind == "nvfp4" and len(layer.shape) == 3:
        _check_bank(where, layer, get)
    for suffix in _INPUTS:
        if suffix in layer.read:
            check_input_scale(where, layer.name, suffix, get(suffix))
    if SMOOTHING in layer.read:
        values = get(SMOOTHING).float()
        if not torch.isfinite(values).all() or (values == 0).any():
            raise _error(where, layer, f"its `{SMOOTHING}` holds NaN, infinity or zero")


def _check_bank(where: str, layer: Layer, get: Get) -> None:
    """As ``check_packed``, for each expert of a bank."""
    factors = get("weight_scale_2").float().reshape(-1).expand(layer.shape[0])
    if not torch.isfinite(factors).all() or (factors < 0).any():
        raise _error(where, layer, "its `weight_scale_2` holds NaN, infinity or a negative number")
    for index, factor in enumerate(factors):
        name = f"{layer.name}, expert {index}"
        check_packed(where, name, get("weight_scale")[index], factor, lambda index=index: get(layer.weight)[index])


def check_input_scale(where: str, layer: str, suffix: str, value: torch.Tensor) -> None:
    """CheckpointError for a scale of activations that is not above zero and finite."""
    value = value.float()
    if not torch.isfinite(value).all() or (value <= 0).any():
        found = f"its `{suffix}` is {value.flatten()[0].item()}"
        where = f"{where}, layer {layer}"
        raise CheckpointError(found, where=where, expected="finite numbers above zero", remedy=_DAMAGED)


def read_scale(where: str, layer: Layer, get: Get) -> torch.Tensor:
    """What multiplies FP8 or INT8 codes, FP32, in the file's own shape. CheckpointError for NaN, infinity, below zero.

    Zero may only multiply codes that are zero.
    """
    scale = get(layer.scale).float()
    if not torch.isfinite(scale).all() or (scale < 0).any():
        bad = scale[~torch.isfinite(scale) | (scale < 0)][0].item()
        raise _error(where, layer, f"its `{layer.scale}` holds {bad}")
    if (scale == 0).any():
        codes = get(layer.weight).view(torch.uint8)
        magnitude = codes if layer.kind == "int8" else codes & 0x7F
        if (magnitude.reshape(layer.shape)[(expand(scale, layer) == 0).expand(layer.shape)] != 0).any():
            raise _error(where, layer, f"its `{layer.scale}` holds zeros, and what they multiply is not zero")
    return scale


def expand(scale: torch.Tensor, layer: Layer) -> torch.Tensor:
    """A scale in the file's shape -> one that multiplies the layer's codes by broadcasting."""
    if layer.block is not None:
        rows, cols = layer.block
        return scale.repeat_interleave(rows, 0)[: layer.shape[0]].repeat_interleave(cols, 1)[:, : layer.shape[1]]
    return scale.reshape(-1, *[1] * (len(layer.shape) - 1)) if scale.numel() > 1 else scale.reshape(())


def check_cast(where: str, layer: Layer, codes: torch.Tensor) -> None:
    """CheckpointError for FP8 without scale whose numbers are as large as only scaled codes are; its start is read."""
    rms = _rms(codes)
    if not rms <= _BARE_RMS:
        found = f"its FP8 weight has no scale, and numbers as large as scaled codes (RMS {rms:.3g})"
        raise _error(where, layer, found, "`weight_scale`")


def check_bare(where: str, name: str, tensor: torch.Tensor) -> None:
    """As ``check_cast``, for what is no layer's weight: biases, tables, statistics. Other dtypes pass."""
    if tensor.dtype in _FP8 and not (rms := _rms(tensor)) <= _BARE_RMS:
        found = f"tensor {quote(name)} is FP8 without a scale, and its numbers as large as scaled codes (RMS {rms:.3g})"
        raise CheckpointError(found, where=where, expected="floating point", remedy=_DAMAGED)


def _rms(codes: torch.Tensor) -> float:
    sample = codes.reshape(-1)[:_SAMPLE].float()
    return sample.square().mean().sqrt().item() if sample.numel() else 0.0


def check_packed(
    where: str, layer: str, block_scale: torch.Tensor, global_scale: torch.Tensor, packed: Callable[[], torch.Tensor]
) -> None:
    """CheckpointError for NVFP4 scales that are NaN, negative, or make a weight zero or thousands.

    ``packed`` is asked for only where scales are zero, which is right for a weight of zeros.
    """

    def error(found: str, expected: str) -> CheckpointError:
        return CheckpointError(found, where=f"{where}, layer {layer}", expected=expected, remedy=_DAMAGED)

    top = block_scale.view(torch.uint8).max().item() if block_scale.numel() else 0
    if top >= _NAN:
        found = "NaN" if top & 0x7F == _NAN else "negative numbers"
        raise error(f"its block scales hold {found}", "finite numbers, not negative")
    factor = global_scale.item()
    if factor > 1:
        found = f"its global scale is {factor:.4g}, which allows weights as large as {factor * E2M1_MAX * E4M3_MAX:.3g}"
        raise error(found, "one below 1; perhaps it is stored as its reciprocal")
    if (top == 0 or factor == 0) and (packed() & 0x77).any():
        what = "global scale is" if factor == 0 else "block scales are"
        raise error(f"its {what} zero, its codes are not", "scales above zero")


def _error(where: str, layer: Layer, found: str, expected: str = "finite numbers, not negative") -> CheckpointError:
    return CheckpointError(found, where=f"{where}, layer {layer.name}", expected=expected, remedy=_DAMAGED)
