# SPDX-License-Identifier: Apache-2.0
"""Layers of a file whose dialect is known, in the host's own layout.

``host_layer`` reads one layer into the layout of kernels/format.py; tensors of the native dialect pass through
untouched, so they stay memory-mapped.
"""

from __future__ import annotations

import torch

from ...kernels.format import PackedWeight, round_up, swap_nibbles, swizzle
from ..file.header import CheckpointError
from .dialects import DIALECTS, INPUT_SCALES, DialectPlan, Get
from .values import check_input_scale, check_packed


def host_layer(plan: DialectPlan, layer: str, get: Get, checked: bool = True) -> PackedWeight:
    """One NVFP4 layer of ``plan`` in the host's layout, on the device where ``get`` puts its tensors.

    ``get(suffix)`` returns the layer's tensor of that key suffix. The shape of the record is the stored one. Native
    bytes are returned as they are. Raises CheckpointError for scales that are not finite or negative; ``checked``
    False: only for such a global scale, for a caller that measures what the block scales make of the layer.
    """
    kind, factor = DIALECTS[plan.dialect], global_scale(plan, layer, get)
    rows, cols = plan.nvfp4[layer]
    packed, scale = get(kind.weight), get("weight_scale").view(torch.float8_e4m3fn)
    if kind.low_nibble_first:
        packed = swap_nibbles(packed)
    if rows % 16:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, round_up(rows, 16) - rows))
    record = PackedWeight(packed, scale if kind.tiled_scales else swizzle(scale), factor, (rows, cols))
    if checked:
        check_packed(plan.header.path.name, layer, record.block_scale, factor, lambda: record.packed)
    return record


def global_scale(plan: DialectPlan, layer: str, get: Get) -> torch.Tensor:
    """The multiplying scale of an NVFP4 layer, () fp32. Raises CheckpointError if it is not finite, or below zero."""
    found = DIALECTS[plan.dialect].global_scale(plan.groups[layer])(get).reshape(())
    if not torch.isfinite(found) or found < 0:
        raise CheckpointError(
            f"its global scale is {found.item()}",
            where=f"{plan.header.path.name}, layer {layer}",
            expected="a finite number, not negative",
            remedy="the file is damaged: download or quantize it again",
        )
    return found


def input_scale(plan: DialectPlan, layer: str, get: Get) -> torch.Tensor | None:
    """Static activation scale of a layer, () fp32, multiplying, whatever key and convention it has; None if dynamic."""
    for suffix, convert in INPUT_SCALES:
        if suffix in plan.layers[layer].read:
            value = get(suffix).float().reshape(())
            check_input_scale(plan.header.path.name, layer, suffix, value)
            return convert(value)
    return None
