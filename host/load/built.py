# SPDX-License-Identifier: Apache-2.0
"""A model that the host has built and loaded is held against the file: nothing computes from uninitialised memory.

The host builds its layers over memory it does not write, and only logs the names of those that a file does not fill.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils.deterministic
from comfy.quant_ops import QuantizedTensor

from ...checkpoint.file.header import MARKER, CheckpointError
from ...kernels.format import packed_shape
from ...measure.escape import line

logger = logging.getLogger(__name__)

_AGAIN = "the file is damaged, or of another version of the model than its `config` says: download it again"
_BLOCK = re.compile(r"(.*?\.)\d+\.")  # the first numbered part of a name, and the stack that it is of


def check_model(
    model: torch.nn.Module,
    linear: type,
    tensors: Mapping[str, torch.Tensor],
    name: str,
    build: Callable[[], torch.nn.Module],
    whole: bool = False,
) -> str:
    """Refuse a model built with something the file lacks or has otherwise -> what it may lack, a text for the report.

    ``tensors``: what the host was given, named as the model names it; ``build``: the model once more, before any file,
    its unwritten memory filled with NaN. Two things may be lacking, with a warning: parameters to which the model gives
    values by itself, and whole components, which some hosts build and do not use: using one is made an error. Weights
    that the host has no place for are told, too, and refused where they are a block of its own stacks, or, ``whole``,
    anything in one.
    """
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, linear)}
    _check_layers(layers, tensors, name)
    empty = [layer for layer, module in layers.items() if module.weight is None]
    parameters = {key: value for key, value in model.named_parameters() if key.rpartition(".")[0] not in empty}
    lost = [key for key in parameters if key not in tensors]
    own = _own_values({key: parameters[key] for key in lost}, build) if lost else []
    stopped = _stop_use(model, empty, [key for key in lost if key not in own], tensors, name)
    for key, value in parameters.items():
        layer, _, suffix = key.rpartition(".")
        if key not in tensors or not value.is_floating_point() or (layer in layers and suffix == "weight"):
            continue
        if not tensors[key].is_floating_point():
            raise _refusal(name, layer, f"its `{suffix}` is {tensors[key].dtype}", tuple(value.shape))
        user = model.get_submodule(layer)
        if suffix == "weight" and f"{layer}.{MARKER}" in tensors and getattr(user, "quant_format", None) is None:
            found = f"its `weight` is quantized, which this ComfyUI does not read in a {type(user).__name__}"
            raise _refusal(name, layer, found, tuple(value.shape))
    notes = _no_place(model, tensors, name, whole)
    if stopped:
        notes.append(f"nothing of {', '.join(stopped)}, which this ComfyUI builds: it is an error to use it")
    if own:
        notes.append(f"no {', '.join(own)}, to which this ComfyUI gives a value by itself")
    if notes:
        logger.warning("%s has %s", name, line("; ".join(notes)))
    return "; ".join(notes)


def _no_place(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str, whole: bool) -> list[str]:
    """What to tell of weights that the host leaves out. CheckpointError for a block of a stack whose others it uses.

    ``whole``: also for a part of such a block.
    """
    own = {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    left = [key for key in tensors if key.endswith((".weight", ".bias")) and key not in own]
    used = [found for key in own if (found := _BLOCK.match(key))]
    blocks, stacks = {block[0] for block in used}, {block[1] for block in used}
    for key in left:
        block = _BLOCK.match(key)
        if block and block[1] in stacks and (whole or block[0] not in blocks):
            found = f"it has `{key}`, which the model that ComfyUI builds of its `config` would leave out"
            remedy = f"{_AGAIN}, or update ComfyUI"
            raise CheckpointError(found, where=name, expected="a model with all of its blocks", remedy=remedy)
    return [f"{len(left):,} weights that this ComfyUI has no place for, such as {left[0]}"] if left else []


def _check_layers(layers: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a Linear of which the file has a part only, or another shape."""
    present = {key.rpartition(".")[0] for key in tensors}
    for layer, module in layers.items():
        shape, stored = (module.out_features, module.in_features), stored_shape(module)
        if stored is None and layer in present:
            raise _refusal(name, layer, "it has no `weight`", shape)
        if stored is not None and stored != shape:
            raise _refusal(name, layer, f"its `weight` has shape {stored}", shape)
        if layer in present and module.bias is not None and f"{layer}.bias" not in tensors:
            raise _refusal(name, layer, "it has no `bias`", shape[:1])


def _stop_use(
    model: torch.nn.Module, empty: list[str], lost: list[str], tensors: Mapping[str, torch.Tensor], name: str
) -> list[str]:
    """Make it an error to use what the file lacks -> names of these components. Refuses where none lacks as a whole.

    ``empty``: Linears without weight; ``lost``: parameters that nothing was written to.
    """
    components = {key.partition(".")[0] for key in tensors}
    for key in [*empty, *lost]:
        layer, _, suffix = (key, "", "weight") if key in empty else key.rpartition(".")
        user = model.get_submodule(layer)
        called = type(user).forward is not torch.nn.Module.forward  # a list of parameters is used without a call
        if user is model or key.partition(".")[0] in components or not called:
            shape = (user.out_features, user.in_features) if key in empty else user.get_parameter(suffix).shape
            raise _refusal(name, layer, f"it has no `{suffix}`", tuple(shape))
        if key in lost and user.get_parameter(suffix).is_floating_point():
            user.get_parameter(suffix).data.fill_(math.nan)  # for those who read it without calling its module
        user.register_forward_pre_hook(functools.partial(stop, name=name, layer=layer))
    return sorted({key.partition(".")[0] for key in [*empty, *lost]})


def build_again(base: Any) -> torch.nn.Module:
    """The host's model -> its diffusion model as it was before any file, unwritten memory filled with NaN."""
    config, filling = base.model_config, torch.utils.deterministic.fill_uninitialized_memory
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        operations = config.custom_operations
        return type(base.diffusion_model)(**config.unet_config, device=torch.device("cpu"), operations=operations)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _own_values(parameters: Mapping[str, torch.Tensor], build: Callable[[], torch.nn.Module]) -> list[str]:
    """Names of those that get the same values each time the model is built: neither left unwritten nor drawn."""
    try:
        again = dict(build().named_parameters())
    except TypeError:  # a class that takes more than its config: nothing is known of its values
        return []
    return [key for key, value in parameters.items() if key in again and torch.equal(value.cpu(), again[key].cpu())]


def stop(module: torch.nn.Module, inputs: tuple, *, name: str, layer: str) -> None:
    """A hook before a module's forward: the error that this file does not have it."""
    remedy = "the file is incomplete: download it again, or use one with all parts of the model"
    found = "the model needs it, and the file does not have it"
    raise CheckpointError(found, where=f"{name}, layer {layer}", remedy=remedy)


def _refusal(name: str, layer: str, found: str, shape: tuple[int, ...]) -> CheckpointError:
    where = f"{name}, layer {layer}" if layer else name
    return CheckpointError(found, where=where, expected=f"floating point of shape {shape}", remedy=_AGAIN)


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
