# SPDX-License-Identifier: Apache-2.0
"""What a captured block depends on, so that a graph is replayed only for calls that would do exactly what it did.

A graph repeats kernels with the addresses and numbers they were captured with. What chooses kernels, addresses or
numbers is in one of three parts of a key: ``of_call``, the same for all blocks of a step (shapes, strides and types of
the arguments, their plain values, the options that have a say); and of each block its LoRA branches and where all of
its weights and scales lie. Whatever cannot be described has no key, and its block runs itself.

Between two samplings more can change: other nodes run, which may exchange functions of the host or set torch's
switches. ``surroundings`` has those.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .. import residency
from .attention import OVERRIDE, Attention

# What may stand in the options: these have no say in what a block computes ...
_WITHOUT_EFFECT = frozenset((
    "callbacks", "cond_or_uncond", "patches_replace", "sample_sigmas", "sigmas", "uuids", "wrappers",
    residency.PREFETCH_FLAG,
))  # fmt: skip
_EFFECTIVE = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn", "stg_skip_self_attn")  # ... and these do.
SCHEDULED = "nvfp4_video.compute"  # the mode in which this step's layers compute, if it is not their own (schedule.py)
_EMPTY: dict = {}
# Modules whose functions a block calls, or other packs are known to exchange.
_SURROUNDINGS = (
    "comfy.ldm.common_dit", "comfy.ldm.lightricks.av_model", "comfy.ldm.lightricks.model",
    "comfy.ldm.modules.attention", "comfy.ops", "comfy_kitchen", "torch.nn.functional",
)  # fmt: skip


def host_class(name: str) -> type | None:
    """A class of the host's module with LTX's audio and video transformer, None where it has none."""
    try:
        return getattr(importlib.import_module("comfy.ldm.lightricks.av_model"), name, None)
    except ImportError:
        return None


def is_host_s(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is of that class of the host's, or of one that the pack derived from it."""
    kind = type(module)
    return kind.__dict__.get("host_class", kind) is host_class(name)


def strange(options: Mapping) -> list[str]:
    """Names of the options that might change what a block computes in a way this module does not see."""
    known = (*_WITHOUT_EFFECT, *_EFFECTIVE, SCHEDULED)
    found = [
        name
        for name, value in options.items()
        if name not in known and not _is_nothing(value) and not (name == OVERRIDE and isinstance(value, Attention))
    ]
    found += [name for name in _EFFECTIVE if not isinstance(options.get(name), bool | int | None)]
    replaced = options.get("patches_replace", _EMPTY)
    return found + [f"patches_replace of {kind}" for kind, value in replaced.items() if kind != "dit" and value]


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or isinstance(value, dict | list | tuple | set) and not value


def of_call(arguments: Mapping, tensors: list[torch.Tensor]) -> tuple | None:
    """A block's arguments -> what a graph of them depends on, or None; ``tensors`` receives those but ``img``."""
    options = arguments["transformer_options"]
    found: list[Any] = [tuple(options.get(name) for name in (*_EFFECTIVE, SCHEDULED)), *_attention(options)]
    found += [_kind(tensor, []) for tensor in arguments["img"]]
    for name, value in arguments.items():
        if name not in ("img", "transformer_options"):
            found.append(name)
            found.append(_kind(value, tensors))
    return None if None in found[1:] else tuple(found)


def _attention(options: Mapping) -> tuple:
    """This pack's choice of attention, and the host's functions, which other packs exchange at run time."""
    own = options.get(OVERRIDE)
    module = sys.modules.get("comfy.ldm.modules.attention")
    names = ("optimized_attention", "optimized_attention_masked")
    functions = tuple(getattr(module, name, name) for name in names)
    return (*functions, own.key() if isinstance(own, Attention) else ())


def _kind(value: Any, tensors: list[torch.Tensor]) -> Any:
    """One argument -> what a graph depends on in it, None if that cannot be said; ``tensors`` receives its tensors."""
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        tensors.append(value)
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if type(value) in (list, tuple):
        kinds = tuple(_kind(item, tensors) for item in value)
        return None if None in kinds else (type(value), kinds)
    if type(value) is host_class("CompressedTimestep"):
        data = _kind(value.data, tensors)
        rest = value.batch_size, value.num_frames, value.patches_per_frame, value.feature_dim
        return data and (type(value), data, rest)
    return None


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """An argument as ``of_call`` has read it, with the next of ``tensors`` in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        return type(value)(rebuild(item, tensors) for item in value)
    if type(value) is host_class("CompressedTimestep"):
        own = copy.copy(value)
        own.data = next(tensors)
        return own
    return value


def of_block(block: torch.nn.Module, device: torch.device) -> tuple[tuple, tuple] | None:
    """A block -> (its LoRA branches, all that its weights and layers are), None if it has to run itself.

    That is if somebody's function stands in it, if it is compiled, or if a weight is not on the GPU or is computed
    anew in every call. Branches are told by where they lie and by their ranks: LoRA of the model, of a hook, or none.
    """
    if not is_host_s(block, "BasicAVTransformerBlock"):
        return None
    branches: list[Any] = []
    found: list[Any] = []
    waiting = [block]
    while waiting:  # as block.modules(), at a tenth of its cost
        module = waiting.pop()
        own = module.__dict__
        if residency.taken_over(own):
            return None
        found += (type(module), own.get("nvfp4_mode"))
        if not residency.addresses(own, device, found):
            return None
        branch = own.get("nvfp4_lora")
        if branch is not None:
            if branch.down.device != device:
                return None
            # Not its strengths, which are in one of the tensors: a graph reads what they are when it is replayed.
            branches.append(len(found))
            for part in branch.tensors:
                branches += (part.data_ptr(), tuple(part.shape), part.dtype)
        waiting += [child for child in own["_modules"].values() if child is not None]
    return tuple(branches), tuple(found)


def surroundings(block: torch.nn.Module) -> tuple[tuple, tuple]:
    """What stays as it is through a sampling, and may not have between two -> (functions and classes, numbers)."""
    code = [vars(sys.modules[name]) for name in _SURROUNDINGS if name in sys.modules]
    kinds = dict.fromkeys(type(module) for module in block.modules())
    code += map(vars, dict.fromkeys(base for kind in kinds for base in kind.__mro__))
    found = tuple(value for names in code for value in list(names.values()) if callable(value))
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    numbers = (
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        cuda.matmul.allow_bf16_reduced_precision_reduction, cuda.matmul.allow_fp16_reduced_precision_reduction,
        getattr(cuda.matmul, "allow_fp16_accumulation", None), cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cudnn.allow_tf32, cudnn.benchmark,
        cudnn.deterministic, cudnn.enabled,
    )  # fmt: skip
    return found, numbers


def are_same(one: tuple[tuple, tuple], other: tuple[tuple, tuple]) -> bool:
    """Whether two ``surroundings`` are of the same objects and equal numbers."""
    same = len(one[0]) == len(other[0]) and all(a is b for a, b in zip(one[0], other[0], strict=True))
    return same and one[1] == other[1]
