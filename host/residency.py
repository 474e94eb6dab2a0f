# SPDX-License-Identifier: Apache-2.0
"""The names that ComfyUI keeps to itself and this pack reads: who patches a layer, where its weight lies at a call.

All else of the pack asks here. Each name, and what the pack does without it:

* ``weight_function``, ``bias_function`` (lists), ``weight_lowvram_function``, ``bias_lowvram_function`` (a patch or
  None): what the host computes into a parameter when it brings it. Without one of them every layer goes through the
  host's own forward, LoRAs are the host's, and nothing is captured: slower, and right.
* ``_v`` (DynamicVRAM owns the layer), ``_prefetch`` (a dict, ``resident`` in it: the block prefetch found it in GPU
  memory and holds it there until the block has run), ``_v_weight``, ``_v_bias`` (the tensors then): without one of them
  the host is asked for each weight of a dynamic model, and none of its blocks is captured.
* ``backup`` of a dynamic model's patcher (a dict, ``weight`` of each entry: a tensor that the host copied to the GPU,
  and puts back later). Without it, graphs are captured anew where such copies lie elsewhere than before.
* ``pause_malloc_graph`` of ``comfy.model_prefetch``: the host's recording of allocations. Without it nothing is
  recorded, so there is nothing to pause.
* ``prefetch_dynamic_vbars``: the option by which the host's options are told from any other dict.
* ``_v_block`` (a block has an allocation of its own on the GPU), ``_comfy_graph`` (the host has captured the block),
  ``graph_dynamic_vbar_blocks`` (a model's own wish to be captured) and ``malloc_graph_enabled`` of
  ``comfy.model_prefetch``: without them the host captures no token loop, and runs it block by block.

``check`` looks for the names in the host's compiled code, so a renamed one is noticed before anything has run.
tests/stub_comfy/contract.json records what a dynamic model's layers hold on real hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor

PREFETCH_FLAG = "prefetch_dynamic_vbars"
_EVERY_MODULE = torch.nn.modules.module
_paused = threading.local()

_OPS, _PATCHER = "comfy.ops", "comfy.model_patcher"
# Word in the host's code -> modules that must use it. Names ending alike are put together there from two parts.
_PATCH_WORDS = {"weight_function": (_OPS,), "bias_function": (_OPS,)}
_DYNAMIC_PATCH_WORDS = {"_lowvram_function": (_OPS, _PATCHER)}
_PLACE_WORDS = {
    "_v": (_OPS, _PATCHER), "_prefetch": (_OPS,), "resident": (_OPS,), "_v_weight": (_OPS,), "_v_bias": (_OPS,)
}  # fmt: skip


@dataclass(frozen=True)
class Books:
    """What of the host's book-keeping is as this pack knows it; ``missing`` are the names it did not find."""

    patches: bool
    places: bool
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What the pack does without the missing names, or an empty string."""
        if not self.missing:
            return ""
        names = f"this ComfyUI has no {', '.join(self.missing)} where this pack looks for it"
        if not self.patches:
            return f"{names}: layers are computed ComfyUI's own way, LoRAs packed into the weights"
        return f"{names}: weights under DynamicVRAM are asked for one by one, blocks are not replayed as CUDA graphs"


def check() -> Books:
    """Whether the running host still uses the names above."""
    patches, places = dict(_PATCH_WORDS), {}
    if "ModelPatcherDynamic" in _words(_PATCHER):
        patches, places = patches | _DYNAMIC_PATCH_WORDS, _PLACE_WORDS
    unknown_patches, unknown_places = _missing(patches), _missing(places)
    return Books(not unknown_patches, not (unknown_patches or unknown_places), (*unknown_patches, *unknown_places))


def _missing(wanted: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(word for word, modules in wanted.items() if not all(word in _words(module) for module in modules))


@functools.cache
def _words(module: str) -> frozenset[str]:
    """Names and strings in a module's code, functions and classes included; none if there is no such code."""
    try:
        code = importlib.util.find_spec(module).loader.get_code(module)
    except (ImportError, AttributeError, ValueError):
        return frozenset()
    found: set[str] = set()
    waiting = [code]
    while waiting:
        one = waiting.pop()
        found.update(one.co_names, one.co_varnames, one.co_cellvars, (one.co_name,))
        for constant in one.co_consts:
            if isinstance(constant, str):
                found.add(constant)
            elif isinstance(constant, tuple):
                found.update(item for item in constant if isinstance(item, str))
            elif hasattr(constant, "co_code"):
                waiting.append(constant)
    return frozenset(found)


def patched(module: torch.nn.Module) -> bool:
    """Whether the host computes something into the weight or the bias of this layer when it brings them."""
    # Looked up in the instance where that will do: a missing attribute of an nn.Module costs microseconds.
    own = module.__dict__
    return bool(
        own.get("weight_lowvram_function") is not None
        or own.get("bias_lowvram_function") is not None
        or module.weight_function
        or module.bias_function
    )


def resident(own: dict, device: torch.device) -> tuple[QuantizedTensor, torch.Tensor | None] | None:
    """A quantised layer's ``__dict__`` -> weight and bias as they lie on ``device`` for this call, None: ask the host.

    Under DynamicVRAM that is what ``cast_bias_weight`` would return, at a tenth of its cost; the prefetch queue lets go
    of it after the block.
    """
    parameters = own["_parameters"]
    if "_v" not in own:
        weight = parameters["weight"]
        return (weight, parameters["bias"]) if weight._qdata.device == device else None
    if not _held(own):
        return None
    weight, bias = own.get("_v_weight"), own.get("_v_bias")
    if not isinstance(weight, QuantizedTensor) or weight._qdata.device != device:
        return None
    return None if bias is None and parameters["bias"] is not None else (weight, bias)


def plain_weight(module: torch.nn.Module, device: torch.device) -> torch.Tensor | None:
    """A layer's own weight as it lies on ``device`` for this call; None: it is quantised, patched, elsewhere, or none.

    ``resident`` for layers that ``cast_bias_weight`` would give their weight as it is, such as norms.
    """
    own = module.__dict__
    weight = own["_parameters"].get("weight")
    if weight is None or (hasattr(module, "weight_function") and patched(module)):
        return None
    if "_v" in own:
        weight = own.get("_v_weight") if _held(own) else None
    return weight if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device == device else None


def _held(own: dict) -> bool:
    """Whether the block prefetch has found the layer in GPU memory and holds it there."""
    prefetch = own.get("_prefetch")
    return type(prefetch) is dict and prefetch.get("resident") is True


def has_place(own: dict, name: str) -> bool:
    """Whether DynamicVRAM has an address for this parameter of a layer, given by its ``__dict__``, for good."""
    return "_v" in own and name in ("weight", "bias")


def has_originals_in_ram(patcher: Any) -> bool:
    """Whether what DynamicVRAM's host puts back when a loaded model leaves the GPU lies in RAM, all of it.

    Then the tensors on the GPU are copies, and may be written to.
    """
    backup = getattr(patcher, "backup", None)
    dynamic = getattr(patcher, "is_dynamic", bool)()
    return dynamic and type(backup) is dict and all(one.weight.device.type == "cpu" for one in backup.values())


def addresses(own: dict, device: torch.device, into: list) -> bool:
    """A layer's ``__dict__`` -> whether all its tensors lie on ``device`` for this call; ``into`` receives where.

    Of a quantised weight that is its packed data and every scale. A scale of one number in host memory counts by value.
    A layer into whose parameters something is computed at each call has no such place.
    """
    parameters = own["_parameters"]
    if not parameters and not own["_buffers"]:
        return True
    if own.get("weight_function") or own.get("bias_function"):
        return False
    values = [*parameters.values(), *own["_buffers"].values()]
    if "_v" in own:
        if not _held(own):
            return False
        for place, name in enumerate(parameters):
            if name in ("weight", "bias") and values[place] is not None:
                values[place] = own.get(f"_v_{name}")
                if values[place] is None:
                    return False
    for value in values:
        if isinstance(value, QuantizedTensor):
            if not _quantized(value, device, into):
                return False
        elif value is not None:
            if value.device != device:
                return False
            into += (value.data_ptr(), value.dtype)
    return True


def _quantized(weight: QuantizedTensor, device: torch.device, into: list) -> bool:
    """``addresses`` of a quantised weight."""
    packed, params = weight._qdata, weight._params
    if packed.device != device:
        return False
    into += (packed.data_ptr(), params.orig_dtype)
    for name in _fields(type(params)):
        part = getattr(params, name)
        if isinstance(part, torch.Tensor):
            if part.device == device:
                into.append(part.data_ptr())
            elif part.device.type == "cpu" and part.numel() == 1:
                into.append(part.item())
            else:
                return False
    return True


@functools.cache
def _fields(params: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(params))


def taken_over(own: dict) -> bool:
    """A module's ``__dict__`` -> whether somebody put a function in the place of its ``forward``, or hooked it.

    Its own ``forward``, put back where it was replaced before, does not count; hooks of torch on every module do.
    """
    return bool(
        "forward" in own and not _is_its_own(own["forward"], own)
        or own["_forward_hooks"] or own["_forward_pre_hooks"]
        or _EVERY_MODULE._global_forward_hooks or _EVERY_MODULE._global_forward_pre_hooks
    )  # fmt: skip


def _is_its_own(forward: Any, own: dict) -> bool:
    module = getattr(forward, "__self__", None)
    return getattr(module, "__dict__", None) is own and forward.__func__ is type(module).forward


def in_every_step(layer: torch.nn.Module) -> bool:
    """Whether functions are computed into this layer's weight whenever it is used."""
    return bool(layer.__dict__.get("weight_function"))


def while_brought(layer: torch.nn.Module) -> bool:
    """Whether the host patches this layer's weight when it brings it to the GPU, and packs the sum again."""
    return layer.__dict__.get("weight_lowvram_function") is not None


def take_patch(layer: torch.nn.Module, key: str) -> str:
    """Remove the host's own patch of the weight ``key`` from a layer -> where one is left all the same, or "".

    Left is one under a name that this pack does not know: whoever adds the patch too would add it twice.
    """
    if while_brought(layer):
        layer.weight_lowvram_function = None
    functions = getattr(layer, "weight_function", ())
    if any(_patches(function, key) for function in functions):
        layer.weight_function = [function for function in functions if not _patches(function, key)]
    for name, value in layer.__dict__.items():
        if any(_patches(one, key) for one in (value if isinstance(value, list | tuple) else (value,))):
            return name
    return ""


def _patches(function: Any, key: str) -> bool:
    """Whether it is the host's own patch for the weight of that name (its LowVramPatch)."""
    return getattr(function, "key", None) == key and hasattr(function, "patches")


@contextlib.contextmanager
def outside_host_graph(synchronize: bool = False) -> Iterator[None]:
    """What is allocated in here is not recorded by the host's compiler, and may outlive a block.

    Nothing that was allocated outside may be freed in here. The host's own pause ends with the innermost one, so only
    the outermost one of this thread is asked for.
    """
    pause = getattr(_prefetch_module(), "pause_malloc_graph", None)
    if pause is None or getattr(_paused, "here", False):
        yield
        return
    _paused.here = True
    try:
        with pause(sync=True) if synchronize else pause():
            yield
    finally:
        _paused.here = False


def ask_for_graphs(model: Any) -> None:
    """Let the host capture the blocks of this decoder as CUDA graphs."""
    model.graph_dynamic_vbar_blocks = True


def ask_for_prefetch(model: Any) -> None:
    """Let the host bring the weights of this decoder's blocks before they run."""
    setattr(model, PREFETCH_FLAG, True)


def has_allocation(block: torch.nn.Module) -> bool:
    """Whether the host gave this block an allocation of its own on the GPU; it captures no other."""
    return getattr(block, "_v_block", None) is not None


def is_captured(block: torch.nn.Module) -> bool:
    """Whether the host keeps a graph of this block."""
    return hasattr(block, "_comfy_graph")


def compiler_is_on(device: torch.device) -> bool:
    """Whether the host's compiler works on ``device``; on hosts without one nothing is switched off."""
    enabled = getattr(_prefetch_module(), "malloc_graph_enabled", None)
    return enabled is None or enabled(device)


def has_block_prefetch() -> bool:
    """Whether this host brings the weights of the next block while one runs (``comfy.model_prefetch``)."""
    return _prefetch_module() is not None


def _prefetch_module() -> Any:
    try:
        return importlib.import_module("comfy.model_prefetch")
    except ImportError:
        return None


def option(name: str) -> bool | None:
    """A switch of the host's command line, None on a host that does not have it."""
    return getattr(importlib.import_module("comfy.cli_args").args, name, None)
