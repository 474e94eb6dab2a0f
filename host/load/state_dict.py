# SPDX-License-Identifier: Apache-2.0
"""The state dict of an NVFP4 file -> the host's layout, and the checks before and after the host loads it.

Each packed weight becomes a tensor in the host's layout that shows its logical shape, and every quantised layer gets
the marker the host looks for. Native tensors are not copied: they stay slices of the mapped file.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...checkpoint.file.header import MARKER, CheckpointError
from ...checkpoint.file.shards import Checkpoint, Source
from ...checkpoint.identify.dialects import AUTO, DialectPlan, detect, host_layer, input_scale
from ...checkpoint.identify.formats import LOW_RANK, OLD_FP8, SMOOTHING
from ...checkpoint.identify.layers import Layer, refuse
from ...checkpoint.identify.values import Get, check_layer, expand, read_scale
from ...kernels.format import packed_shape
from ...measure.escape import line
from ..compute.linear import supports, wrap

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
    FP8 scaled in blocks, which the host does not have, becomes BF16. Raises CheckpointError for scales that are NaN.
    """
    for name, layer in plan.layers.items():
        if f"{name}.{layer.weight}" not in state_dict:
            continue  # of another part of the file
        get = functools.partial(_tensor_of, state_dict, name)
        check_layer(plan.header.path.name, layer, get)
        new = _converted(plan, layer, get)
        if layer.marker is not None:
            new[MARKER] = torch.tensor(list(json.dumps(dict(layer.marker)).encode()), dtype=torch.uint8)
        for suffix in (*layer.read, *layer.ignored):
            if suffix not in _KEPT_KEYS or suffix in new:
                state_dict.pop(f"{name}.{suffix}", None)
        state_dict.update({f"{name}.{suffix}": tensor for suffix, tensor in new.items()})
    for key in [key for key in state_dict if key.rpartition(".")[2] == OLD_FP8]:
        del state_dict[key]
    return state_dict


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
    if layer.kind == "fp8_blocks":
        return {"weight": (get("weight").float() * scale).to(torch.bfloat16)}
    new = {"weight": get("weight"), "weight_scale": scale}
    old = next((get(suffix) for suffix in ("input_scale", "scale_input") if suffix in layer.read), None)
    # The host, too, takes an input scale of one in its older files for none.
    if old is not None and not (layer.scale == "scale_weight" and old.item() == 1):
        new["input_scale"] = old.float().reshape(())
    return new


# Tensors of a layer that the host, or the pack's Linear, takes as they are.
_KEPT_KEYS = (SMOOTHING, *LOW_RANK)


def check_model(model: torch.nn.Module, linear: type, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a model that the host has built with something the file does not have, or has in another shape.

    ``tensors``: what the host was given, named as the model names it. Where the file has nothing of a whole component,
    this host may build one that the model does not use: a warning, if a Linear without weight would stop its use.
    """
    refusal = functools.partial(_refusal, name)
    layers, present = {}, {key.rpartition(".")[0] for key in tensors}
    for layer, module in model.named_modules():
        if not isinstance(module, linear):
            continue
        layers[layer] = module
        shape, stored = (module.out_features, module.in_features), stored_shape(module)
        if stored is None and layer in present:
            raise refusal(layer, "it has no `weight`", shape)
        if stored is not None and stored != shape:
            raise refusal(layer, f"its `weight` has shape {stored}", shape)
        if layer in present and module.bias is not None and f"{layer}.bias" not in tensors:
            raise refusal(layer, "it has no `bias`", shape[:1])
    empty = [layer for layer, module in layers.items() if module.weight is None]
    parameters = {key: value for key, value in model.named_parameters() if key.rpartition(".")[0] not in empty}
    lost = [key for key in parameters if key not in tensors]
    components = {key.partition(".")[0] for key in tensors}
    unusable = {layer.partition(".")[0] for layer in empty} - components
    for key in [*empty, *lost]:
        if key.partition(".")[0] not in unusable:
            layer, _, suffix = (key, "", "weight") if key in empty else key.rpartition(".")
            shape = (layers[key].out_features, layers[key].in_features) if key in empty else parameters[key].shape
            raise refusal(layer, f"it has no `{suffix}`", tuple(shape))
    for key, value in parameters.items():
        if key in tensors and value.is_floating_point() and not tensors[key].is_floating_point():
            layer, _, suffix = key.rpartition(".")
            if layer not in layers or suffix != "weight":
                raise refusal(layer, f"its `{suffix}` is {tensors[key].dtype}", tuple(value.shape))
    if empty or lost:
        logger.warning("%s has nothing of %s, which this ComfyUI builds", name, line(", ".join(sorted(unusable))))


def _refusal(name: str, layer: str, found: str, shape: tuple[int, ...]) -> CheckpointError:
    where = f"{name}, layer {layer}" if layer else name
    remedy = "the file is damaged, or of another version of the model than its `config` says: download it again"
    return CheckpointError(found, where=where, expected=f"floating point of shape {shape}", remedy=remedy)


def as_named(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict's names and dtypes, without data, as the host renames them while it loads them."""
    dtypes = {key: torch.bfloat16 if isinstance(t, QuantizedTensor) else t.dtype for key, t in state_dict.items()}
    tensors = {key: torch.empty(t.shape, dtype=dtypes[key], device="meta") for key, t in state_dict.items()}
    rename = getattr(model.model_config, "process_unet_state_dict", dict)
    return rename(tensors)


def stored_shape(module: torch.nn.Module) -> tuple[int, ...] | None:
    """Shape of a Linear's weight; of coded ones that of the codes, since the host's tensor shows the model's.

    NVFP4 that has the model's size once it is unpacked has the model's.
    """
    weight = module.weight
    if weight is None:
        return None
    codes, form = getattr(weight, "_qdata", None), module.__dict__.get("quant_format")
    if codes is None:
        return tuple(weight.shape)
    if form == "nvfp4":
        fits = tuple(codes.shape) == packed_shape(tuple(weight.shape))
        return tuple(weight.shape) if fits else (*codes.shape[:-1], codes.shape[-1] * 2)
    return tuple((codes if form in _ONE_BY_ONE else weight).shape)


_ONE_BY_ONE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # formats with a code for each number


def _tensor_of(state_dict: dict, layer: str, suffix: str) -> torch.Tensor:
    return state_dict[f"{layer}.{suffix}"]
