# SPDX-License-Identifier: Apache-2.0
"""Quantised weights of a VAE brought back to BF16: NVFP4 in any dialect, FP8 with or without scales, INT8 with scales.

No ComfyUI code dequantises a VAE, so a converter that packs or casts ``vae.*`` makes a file that cannot be used. NVFP4
is made for matrices: what a converter packs is the convolution flattened to (out, in * taps), so the kernel's size,
which the packed shape no longer shows, is taken from the layer's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ...kernels.dispatch import dequantize
from ...kernels.format import BLOCK, PackedWeight, round_up, swizzle, unswizzle
from ..file.header import CheckpointError, Header
from ..identify import dialects, host_layer
from ..identify.formats import OLD_FP8
from ..identify.layers import Layer
from ..identify.values import check_cast, expand, read_scale

Get = Callable[[str], torch.Tensor]  # name in the checkpoint -> tensor

_SLAB, _TILE = 2**19, 4096  # elements converted at once; columns dequantised at once


@dataclass(frozen=True)
class Restored:
    """A weight that ``produce(get)`` makes in BF16, shape ``shape``, where ``get`` puts its tensors."""

    shape: tuple[int, ...]
    stored_as: str
    produce: Callable[[Get], torch.Tensor]


@dataclass(frozen=True)
class Restoration:
    """``weights``: name of a `.weight` -> how to make it; ``leftover``: names that have no place beside them."""

    weights: Mapping[str, Restored]
    leftover: frozenset[str]


def plan_restoration(header: Header, names: Mapping[str, str], dialect: str = dialects.AUTO) -> Restoration:
    """Which of ``names`` (component.names) are quantised, and how each is restored; reads the header only.

    Raises CheckpointError for a quantised weight whose layout or shape cannot be told.
    """
    plan = _detect(header.of(names), header, dialect)
    weights: dict[str, Restored] = {}
    leftover: set[str] = {name for name in names if name.rpartition(".")[2] == OLD_FP8}
    for layer, stored in plan.layers.items():
        if stored.kind == "float":
            leftover |= {f"{layer}.{suffix}" for suffix in stored.read if suffix == dialects.MARKER}
            continue
        if layer in plan.nvfp4:
            restored = _packed(plan, layer, names[f"{layer}.{stored.weight}"])
        elif stored.kind.startswith("fp8") or stored.kind == "int8" and not _rotated(stored):
            restored = _scaled(header, stored)
        else:
            found = f"its weight is {stored.title}"
            expected = "NVFP4, FP8 or INT8 with a scale, or floating point"
            remedy = "take another version of the model for its VAE"
            raise CheckpointError(found, where=f"{header.path.name}, layer {layer}", expected=expected, remedy=remedy)
        weights[f"{layer}.weight"] = restored
        leftover |= {f"{layer}.{suffix}" for suffix in (*stored.read, *stored.ignored) if suffix != "weight"}
    return Restoration(weights, frozenset(leftover))


def _detect(own: Header, whole: Header, dialect: str) -> dialects.DialectPlan:
    """Dialect of the VAE's layers; where they do not declare it, that of the whole file, which one writer made."""
    try:
        return dialects.detect(own, dialect)
    except CheckpointError:
        if dialect != dialects.AUTO:
            raise
        try:
            of_all = dialects.detect(whole).dialect
        except CheckpointError:
            of_all = None
        if of_all is None:
            raise
    return dialects.detect(own, of_all)


def _rotated(stored: Layer) -> bool:
    """Whether the marker of an INT8 layer says that its columns were rotated."""
    marker = dict(stored.marker or {})
    params = marker.get("params")
    return bool(marker.get("convrot") or (isinstance(params, dict) and params.get("convrot")))


def _scaled(header: Header, stored: Layer) -> Restored:
    """FP8 or INT8, one scale per tensor, row or block; FP8 of a file without scales is a plain cast."""
    where, shape = header.path.name, stored.shape

    def produce(get: Get) -> torch.Tensor:
        of = lambda suffix: get(f"{stored.name}.{suffix}")  # noqa: E731
        value = of(stored.weight).reshape(shape or (1,))
        if stored.scale is None:
            check_cast(where, stored, value)
        factor = torch.ones(()) if stored.scale is None else expand(read_scale(where, stored, of), stored)
        factor = factor.to(value.device, torch.float32)
        restored = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device)
        if not factor.shape:
            _look_up(value.contiguous(), factor.reshape(1), restored)
            return restored.reshape(shape)
        for rows in _slabs(value):
            restored[rows] = (value[rows].float() * factor[rows]).to(torch.bfloat16)
        return restored.reshape(shape)

    return Restored(shape, stored.title, produce)


def _packed(plan: dialects.DialectPlan, layer: str, own_name: str) -> Restored:
    """NVFP4 of a matrix, or of a flattened convolution."""
    rows, cols = plan.nvfp4[layer]
    where = f"{plan.header.path.name}, layer {layer}"
    bias = plan.header.tensors.get(f"{layer}.bias")
    if bias is not None and len(bias.shape) == 1 and round_up(bias.numel, 16) == round_up(rows, 16):
        rows = bias.numel
    taps = _kernel(own_name)
    inner = None if taps is None else cols // math.prod(taps)
    if inner is None or not inner or round_up(inner * math.prod(taps), 16) != cols:
        found = f"it is packed as {rows} x {cols}, from which the shape of its kernel cannot be told"
        remedy = "take another version of the model for its VAE"
        raise CheckpointError(found, where=where, expected="a layer of an LTX video or audio VAE", remedy=remedy)
    shape = (rows, inner, *taps)
    smooth = f"{layer}.pre_quant_scale"
    if smooth in plan.header.tensors and (taps or plan.header.tensors[smooth].numel != inner):
        found = f"its `pre_quant_scale` has shape {plan.header.tensors[smooth].shape}"
        remedy = "take another version of the model for its VAE"
        raise CheckpointError(found, where=where, expected="one number per column of a matrix", remedy=remedy)

    def produce(get: Get) -> torch.Tensor:
        record = host_layer.host_layer(plan, layer, lambda suffix: get(f"{layer}.{suffix}"))
        weight = _dequantize(record)[:rows, : inner * math.prod(taps)]
        if smooth in plan.header.tensors:
            weight = (weight.float() * get(smooth).to(weight.device, torch.float32).reshape(-1)).to(torch.bfloat16)
        return weight.reshape(shape)

    return Restored(shape, f"NVFP4, {plan.dialect}", produce)


def _look_up(value: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` = ``value`` (8-bit codes) * ``factor`` (one number), by a table: a third of the time of converting."""
    codes = torch.arange(256, dtype=torch.uint8, device=value.device).view(value.dtype)
    table = (codes.float() * factor).to(torch.bfloat16)
    codes, flat = value.view(torch.uint8).view(-1), out.view(-1)
    for start in range(0, flat.numel(), _SLAB):
        part = slice(start, start + _SLAB)
        torch.index_select(table, 0, codes[part].int(), out=flat[part])


def _slabs(value: torch.Tensor) -> list[slice]:
    """Rows of a tensor in groups whose FP32 copy stays small."""
    step = max(1, _SLAB * len(value) // max(1, value.numel()))
    return [slice(start, start + step) for start in range(0, len(value), step)]


def _dequantize(record: PackedWeight) -> torch.Tensor:
    """The whole stored matrix in BF16; on the CPU tile by tile, because plain torch needs 30 bytes for an element."""
    rows, cols = record.packed.shape[0], 2 * record.packed.shape[1]
    if record.packed.device.type != "cpu":
        return dequantize(replace(record, shape=(rows, cols)))
    weight = torch.empty(rows, cols, dtype=torch.bfloat16)
    for top in range(0, rows, 128):  # the block scales of 128 rows are contiguous
        height = min(128, rows - top)
        scale = unswizzle(record.block_scale[top : top + 128], height, cols // BLOCK)
        for left in range(0, cols, _TILE):
            right = min(left + _TILE, cols)
            packed = record.packed[top : top + height, left // 2 : right // 2]
            part = swizzle(scale[:, left // BLOCK : right // BLOCK])
            tile = PackedWeight(packed, part, record.global_scale, (height, right - left))
            weight[top : top + height, left:right] = dequantize(tile)
    return weight


def _kernel(name: str) -> tuple[int, ...] | None:
    """Name in a file of the component's own -> size of the kernel in LTX's VAEs; () for a matrix, None if unknown."""
    parts = name.split(".")
    one = any("shortcut" in part for part in parts)
    if parts[0] == "vocoder":
        return None  # one-dimensional, of many sizes
    if parts[0] == "audio_vae":
        return (1, 1) if one else (3, 3) if "conv" in parts else None
    if one:
        return (1, 1, 1)
    if "conv" in parts:
        return 3, 3, 3
    return None if any(part.startswith("conv") for part in parts) else ()
