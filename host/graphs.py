"""Replaying the blocks of LTX's joint audio and video transformer as CUDA graphs, where a step waits for the CPU.

A block queues some 250 kernels, most of which take the CPU longer to launch than the GPU to run as long as the clip is
small. A captured block is queued by one call. The host's own loop over the blocks stays in charge: it finds the graphs
as block replacements in its options, and what it does between two blocks, DynamicVRAM's prefetch above all, it still
does. A graph reads the weights where they lay when it was captured; it is replayed only while all weights of its block
are on the GPU and lie there. Everything else goes through the block itself.

Graphs are made in a sampling's first steps, if the GPU has been seen waiting for the CPU, and dropped at its end.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import weakref
from typing import Any

import comfy.model_management
import torch
from comfy import patcher_extension
from comfy.quant_ops import QuantizedTensor

from .residency import PREFETCH_FLAG as _FLAG

logger = logging.getLogger(__name__)

KEY = "nvfp4_video.graphs"
# What may stand in the options: these have no say in what a block computes ...
_WITHOUT_EFFECT = {
    "callbacks", "cond_or_uncond", "patches_replace", "sample_sigmas", "sigmas", "uuids", "wrappers", _FLAG,
}  # fmt: skip
_EFFECTIVE = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn", "stg_skip_self_attn")  # ... and these do.
_FEWEST_STEPS = 4  # with fewer, capturing takes longer than replaying saves
_MOST_PLANS = 2
_SPARE_BYTES = 2 << 30  # GPU memory that stays free, besides what the next graph may take
_EMPTY: dict = {}
_models: weakref.WeakKeyDictionary[torch.nn.Module, _Graphs] = weakref.WeakKeyDictionary()


def use_graphs(patcher: Any) -> str:
    """Let this model's blocks be captured where that is possible and pays -> what to expect, for the load report."""
    reason = _obstacle(patcher.model.diffusion_model, patcher.load_device)
    if reason:
        return f"none, {reason}"
    wrappers, callbacks = patcher_extension.WrappersMP.DIFFUSION_MODEL, patcher_extension.CallbacksMP.ON_CLEANUP
    patcher.add_wrapper_with_key(wrappers, KEY, with_graphs)
    patcher.add_callback_with_key(callbacks, KEY, drop_graphs)
    return "one a block, where a step waits for the CPU"


def _obstacle(model: torch.nn.Module, device: torch.device) -> str:
    if type(model) is not _host_class("LTXAVModel"):
        return "they are made for LTX's audio and video transformer"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they need an NVIDIA GPU, the model is on {device.type}"
    arguments = importlib.import_module("comfy.cli_args").args
    if getattr(arguments, "disable_cuda_graphs", True):  # without that switch nobody could turn them off
        return "ComfyUI runs with --disable-cuda-graphs, or is too old to have that switch"
    return ""


def _host_class(name: str) -> type | None:
    try:
        return getattr(importlib.import_module("comfy.ldm.lightricks.av_model"), name, None)
    except ImportError:
        return None


def with_graphs(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A DIFFUSION_MODEL wrapper that replaces the blocks in the options of this call by their graphs."""
    if torch.compiler.is_compiling():
        return executor(*args, **kwargs)
    model = executor.class_obj
    options = next((o for o in (*args, *kwargs.values()) if isinstance(o, dict) and _FLAG in o), None)
    if options is None or _obstacle(model, _device_of(args)):
        return executor(*args, **kwargs)
    graphs = _models.setdefault(model, _Graphs(model))
    if not graphs.usable(options):
        return executor(*args, **kwargs)
    replaced = options.get("patches_replace", _EMPTY)
    blocks = {("double_block", i): functools.partial(graphs.run, i) for i in range(len(graphs.blocks))}
    options["patches_replace"] = {**replaced, "dit": blocks}
    try:
        return executor(*args, **kwargs)
    finally:
        graphs.end_of_step()


def _device_of(args: tuple) -> torch.device:
    """Where the latents, the first argument, are."""
    latents = args[0] if args else None
    latents = latents[0] if isinstance(latents, list | tuple) and latents else latents
    return latents.device if isinstance(latents, torch.Tensor) else torch.device("cpu")


def drop_graphs(patcher: Any) -> None:
    """The host's ON_CLEANUP: sampling is over, and its memory is wanted for the decode."""
    graphs = _models.get(patcher.model.diffusion_model)
    if graphs is not None:
        graphs.drop()


class _Plan:
    """Captured blocks for inputs of one kind, and the tensors at fixed addresses that they read and write.

    ``inputs`` has every argument that all blocks of a step share, ``arguments`` the dict a block gets. ``stream`` (two
    tensors, video and audio) is what the blocks hand on; they change it in place.
    """

    def __init__(self, arguments: dict, tensors: list[torch.Tensor]):
        self.inputs = [_like(tensor) for tensor in tensors]
        self.stream = tuple(torch.empty_like(tensor) for tensor in arguments["img"])
        given = iter(self.inputs)
        self.arguments = {
            name: value if name in ("img", "transformer_options") else _rebuild(value, given)
            for name, value in arguments.items()
        }
        self.arguments["img"] = self.stream
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple]] = {}
        self.full = False
        self.pool = torch.cuda.graph_pool_handle()
        self.forget()

    def forget(self) -> None:
        """The tensors of a finished step need not be kept."""
        self._seen: list[torch.Tensor | None] = [None] * len(self.inputs)

    def fill(self, arguments: dict, tensors: list[torch.Tensor]) -> None:
        """Bring a block's inputs to their places, each once a step."""
        for place, (own, tensor) in enumerate(zip(self.inputs, tensors, strict=True)):
            if self._seen[place] is not tensor:
                own.copy_(tensor)
                self._seen[place] = tensor
        for own, tensor in zip(self.stream, arguments["img"], strict=True):
            if own is not tensor:
                own.copy_(tensor)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor with its strides, by which kernels are chosen; but one that is written to has no overlaps."""
    if 0 in tensor.stride():
        return torch.empty_like(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Graphs:
    """The graphs of one model, and what is known of the inputs it has seen."""

    def __init__(self, model: torch.nn.Module):
        self.blocks = model.transformer_blocks
        self.plans: dict[tuple, _Plan] = {}
        self.waits_for_cpu: set[tuple] = set()
        self.passes: dict[tuple, int] = {}
        self.refused: set[str] = set()
        self.capture_stream: torch.cuda.Stream | None = None
        self.most_bytes = 0  # GPU memory that one graph took
        self._last_block: tuple[tuple, torch.cuda.Event] | None = None

    def usable(self, options: dict) -> bool:
        """Whether nothing in the options can change what a block computes without our seeing it."""
        sigmas = options.get("sample_sigmas")
        if sigmas is None or len(sigmas) <= _FEWEST_STEPS:
            return False
        unknown = [name for name, value in options.items() if name not in (*_WITHOUT_EFFECT, *_EFFECTIVE) and value]
        if options.get("patches_replace", _EMPTY).get("dit"):
            unknown.append("patches_replace")
        return not unknown or self._refuse(f"something else in the workflow changes blocks: {', '.join(unknown)}")

    def _refuse(self, reason: str) -> bool:
        if reason not in self.refused:
            self.refused.add(reason)
            logger.info("CUDA graphs of the blocks are not used: %s", reason)
        return False

    def run(self, number: int, arguments: dict, extra: dict) -> dict:
        """The replacement of block ``number``: the host's arguments and original -> what the original would return."""
        original = extra["original_block"]
        comfy.model_management.throw_exception_if_processing_interrupted()
        tensors: list[torch.Tensor] = []
        key = _describe(arguments, tensors)
        if key is None:
            return original(arguments)
        if number == 0:
            self.passes[key] = self.passes.get(key, 0) + 1
        if key not in self.waits_for_cpu:
            if number == len(self.blocks) - 1 and self.passes.get(key, 0) > 1:
                event = torch.cuda.Event()
                event.record()
                self._last_block = key, event
            return original(arguments)
        weights = _weights(self.blocks[number], arguments["img"][0].device)
        plan = self._plan(key, arguments, tensors) if weights is not None else None
        if plan is None:
            return original(arguments)
        graph, captured = plan.graphs.get(number, (None, None))
        free = 0
        if captured != weights:
            free = self._free_bytes(plan)
            graph = self._capture(plan, number, original, weights) if free else None
            if graph is None:
                return original(arguments)
        plan.fill(arguments, tensors)
        graph.replay()
        if free:
            self.most_bytes = max(self.most_bytes, free - torch.cuda.mem_get_info(plan.stream[0].device)[0])
        return {"img": plan.stream}

    def _free_bytes(self, plan: _Plan) -> int:
        """GPU memory before another capture, 0 if too little would be left. Graphs of one stream share theirs, as a
        rule; the drivers promise it not."""
        if plan.full:
            return 0
        free = torch.cuda.mem_get_info(plan.stream[0].device)[0]
        if free >= _SPARE_BYTES + 2 * self.most_bytes:
            return free
        plan.full = True
        self._refuse(f"after {len(plan.graphs)} blocks only {free / 1e9:.1f} GB of GPU memory are free")
        return 0

    def end_of_step(self) -> None:
        """The CPU has queued the whole step: has the GPU come to the last block already?"""
        if self._last_block is not None:
            key, event = self._last_block
            self._last_block = None
            if event.query():
                self.waits_for_cpu.add(key)
        for plan in self.plans.values():
            plan.forget()

    def drop(self) -> None:
        """Free the graphs and all their memory."""
        if self.plans:
            torch.cuda.synchronize()
        for plan in self.plans.values():
            for graph, _ in plan.graphs.values():
                graph.reset()
        self.plans.clear()

    def _plan(self, key: tuple, arguments: dict, tensors: list[torch.Tensor]) -> _Plan | None:
        if key not in self.plans and len(self.plans) < _MOST_PLANS:
            self.plans[key] = _Plan(arguments, tensors)
        return self.plans.get(key)

    def _capture(self, plan: _Plan, number: int, original: Any, weights: tuple) -> torch.cuda.CUDAGraph | None:
        device = plan.stream[0].device
        if self.capture_stream is None:
            self.capture_stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self.capture_stream):
                _allocate_workspaces(device)
        graph, stream = torch.cuda.CUDAGraph(), self.capture_stream
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=plan.pool, capture_error_mode="thread_local")
                try:
                    out = original(plan.arguments)["img"]
                    for own, tensor in zip(plan.stream, out, strict=True):
                        if own is not tensor:
                            own.copy_(tensor)
                    del out
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.waits_for_cpu.clear()
            self.blocks = []  # nothing is replaced from now on
            self._refuse(f"this GPU, driver or attention cannot be captured ({str(error).splitlines()[0]})")
            return None
        torch.cuda.current_stream(device).wait_stream(stream)
        plan.graphs[number] = graph, weights
        return graph


def _allocate_workspaces(device: torch.device) -> None:
    """Make cuBLAS take its workspace for the current stream outside any graph."""
    one = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    torch.nn.functional.linear(one, one, one[0])
    torch.cuda.current_stream(device).synchronize()


def _describe(arguments: dict, tensors: list[torch.Tensor]) -> tuple | None:
    """A block's arguments -> what a graph of them depends on, or None; ``tensors`` receives those but ``img``."""
    options = arguments["transformer_options"]
    found: list[Any] = [tuple(options.get(name) for name in _EFFECTIVE)]
    found += [(tuple(tensor.shape), tensor.dtype) for tensor in arguments["img"]]
    for name, value in arguments.items():
        if name not in ("img", "transformer_options"):
            kind = _kind(value, tensors)
            if kind is None:
                return None
            found.append((name, kind))
    return tuple(found)


def _kind(value: Any, tensors: list[torch.Tensor]) -> Any:
    """One argument -> what a graph depends on in it, None if that cannot be said; ``tensors`` receives its tensors."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        kinds = tuple(_kind(item, tensors) for item in value)
        return None if None in kinds else (type(value), kinds)
    if type(value) is _host_class("CompressedTimestep"):
        tensors.append(value.data)
        rest = value.batch_size, value.num_frames, value.patches_per_frame, value.feature_dim
        return type(value), tuple(value.data.shape), value.data.dtype, rest
    return None


def _rebuild(value: Any, tensors: Any) -> Any:
    """An argument as ``_kind`` has read it, with the next of ``tensors`` in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        return type(value)(_rebuild(item, tensors) for item in value)
    if type(value) is _host_class("CompressedTimestep"):
        own = copy.copy(value)
        own.data = next(tensors)
        return own
    return value


def _weights(block: torch.nn.Module, device: torch.device) -> tuple | None:
    """The addresses of all of a block's weights, None if one is elsewhere or is computed anew in every call."""
    if type(block) is not _host_class("BasicAVTransformerBlock"):
        return None  # somebody's own, or compiled
    found: list[Any] = []
    for module in block.modules():
        own = module.__dict__
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        if own.get("weight_function") or own.get("bias_function"):
            return None
        if (branch := own.get("nvfp4_lora")) is not None:
            found += branch.down.data_ptr(), branch.up.data_ptr()
        if "_v" in own:
            prefetch = own.get("_prefetch")
            if type(prefetch) is not dict or prefetch.get("resident") is not True:
                return None
            parameters = own.get("_v_weight"), own.get("_v_bias")
        else:
            parameters = own["_parameters"].values()
        for parameter in parameters:
            if parameter is not None:
                data = parameter._qdata if isinstance(parameter, QuantizedTensor) else parameter
                if data.device != device:
                    return None
                found.append(data.data_ptr())
    return tuple(found)
