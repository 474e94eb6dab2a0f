# SPDX-License-Identifier: Apache-2.0
"""The state dict of an NVFP4 file -> the host's layout, and the checks before the host loads it (after: built.py).

Each packed weight becomes a tensor in the host's layout that shows its logical shape, and every quantised layer gets
the marker the host looks for. Native tensors are not copied: they stay slices of the mapped file.
"""

from __future__ import annotations

import functools
import json
import logging

import torch
from comfy.quant_ops import QUANT_ALGOS

from ...checkpoint.file.header import MARKER, CheckpointError
from ...checkpoint.file.shards import Checkpoint, Source
from ...checkpoint.identify.dialects import AUTO, DialectPlan, detect
from ...checkpoint.identify.formats import LOW_RANK, OLD_FP8, SMOOTHING
from ...checkpoint.identify.host_layer import host_layer, input_scale
from ...checkpoint.identify.layers import Layer, refuse
from ...checkpoint.identify.values import Get, check_bare, check_layer, expand, read_scale
from ...measure.escape import line
from ..compute.linear import supports
from ..compute.matmul import wrap

logger = logging.getLogger(__name__)


def plan_file(checkpoint: Checkpoint, dialect: str = AUTO, prefix: str = "") -> DialectPlan:
    """Checkpoint -> DialectPlan of what can be loaded. CheckpointError, which names the layer, for what cannot."""
    header = checkpoint.header
    with Source(checkpoint) as reader:
        plan = detect(header, dialect, prefix, reader.tensor)
    refuse(header.path.name, plan.layers)
    for layer, fault in plan.faults().items():
        if not plan.stated:
            raise CheckpointError(
                f"its `{MARKER}` marker {fault}",
                where=f"{header.path.name}, layer {layer}",
                expected='{"format": "nvfp4"} or another format that fits its tensors and this ComfyUI',
                remedy="download the file again, or state its `dialect` (comfy, if a tool for ComfyUI wrote it): "
                "the markers are then made from the tensors",
            )
    for name, content in plan.formats.items():
        if content["format"] not in QUANT_ALGOS:
            where, found = f"{header.path.name}, layer {name}", f"its format is {content['format']!r}"
            known = f"one that this ComfyUI knows: {', '.join(QUANT_ALGOS)}"
            raise CheckpointError(found, where=where, expected=known, remedy="update ComfyUI")
    if plan.absent:
        text = "%s declares %d layers that it does not have, such as %s"
        logger.warning(text, header.path.name, len(plan.absent), line(plan.absent[0]))
    return plan


def rewrite(plan: DialectPlan, state_dict: dict) -> dict:
    """State dict as stored -> in the host's layout with markers, layer by layer and in place.

    NVFP4 weights become the host's QuantizedTensor; a converted layer's original is dropped before the next is read.
    FP8 that the host would not decode becomes BF16. Raises CheckpointError for scales that are NaN, and for other
    tensors that hold FP8 codes without a scale.
    """
    for name, layer in plan.layers.items():
        if f"{name}.{layer.weight}" not in state_dict:
            continue  # of another part of the file
        get = functools.partial(_tensor_of, state_dict, name)
        check_layer(plan.header.path.name, layer, get)
        new = _converted(plan, layer, get)
        if layer.marker is not None and not _restores(layer):
            new[MARKER] = torch.tensor(list(json.dumps(dict(layer.marker)).encode()), dtype=torch.uint8)
        for suffix in (*layer.read, *layer.ignored):
            if suffix not in _KEPT_KEYS or suffix in new:
                state_dict.pop(f"{name}.{suffix}", None)
        state_dict.update({f"{name}.{suffix}": tensor for suffix, tensor in new.items()})
    for key in [key for key in state_dict if key.rpartition(".")[2] == OLD_FP8]:
        del state_dict[key]
    read = {f"{name}.{suffix}" for name, layer in plan.layers.items() for suffix in layer.read}
    for key in [key for key in state_dict if key not in read]:
        check_bare(plan.header.path.name, key, state_dict[key])
    return state_dict


def _restores(layer: Layer) -> bool:
    """Whether it becomes BF16, since the host would not decode it."""
    return layer.kind == "fp8_blocks" or layer.loses_scale


def _converted(plan: DialectPlan, layer: Layer, get: Get) -> dict[str, torch.Tensor]:
    """The tensors of one layer that the host wants otherwise, by key suffix; all others of it stay."""
    where = f"{plan.header.path.name}, layer {layer.name}"
    if layer.name in plan.nvfp4:
        new = {"weight": wrap(host_layer(plan, layer.name, get))}
        activation = input_scale(plan, layer.name, get)
        if activation is not None:
            new["input_scale"] = activation
        if SMOOTHING in layer.read and not supports(SMOOTHING):
            found = f"it has AWQ smoothing (`{SMOOTHING}`), which this ComfyUI would ignore"
            expected = "a ComfyUI of August 2026 or later"
            raise CheckpointError(found, where=where, expected=expected, remedy="update ComfyUI")
        return new
    if layer.kind == "int8":  # one scale, or a column of them: the host would multiply columns by a row of numbers
        scale = expand(read_scale(plan.header.path.name, layer, get), layer)
        return {suffix: get(suffix) for suffix in layer.read if suffix != MARKER} | {"weight_scale": scale}
    if layer.scale is None or not layer.kind.startswith("fp8"):
        # What the host reads by itself stays under its own names.
        return {suffix: get(suffix) for suffix in layer.read if suffix != MARKER}
    scale = expand(read_scale(plan.header.path.name, layer, get), layer)
    if _restores(layer):
        return {"weight": (get("weight").float() * scale).to(torch.bfloat16)}
    new = {"weight": get("weight"), "weight_scale": scale}
    old = next((get(suffix) for suffix in ("input_scale", "scale_input") if suffix in layer.read), None)
    # The host, too, takes an input scale of one in its older files for none.
    if old is not None and not (layer.scale == "scale_weight" and old.item() == 1):
        new["input_scale"] = old.float().reshape(())
    return new


# Tensors of a layer that the host, or the pack's Linear, takes as they are.
_KEPT_KEYS = (SMOOTHING, *LOW_RANK)


def _tensor_of(state_dict: dict, layer: str, suffix: str) -> torch.Tensor:
    return state_dict[f"{layer}.{suffix}"]
