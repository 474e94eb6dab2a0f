# SPDX-License-Identifier: Apache-2.0
"""Replaying the blocks of LTX's joint audio and video transformer as CUDA graphs, where a step waits for the CPU.

A block queues some 250 kernels, most of which take the CPU longer to launch than the GPU to run as long as the clip is
small. A captured block is queued by one call. The host's own loop over the blocks stays in charge: it finds ``run`` as
block replacements in its options, and what it does between two blocks, DynamicVRAM's prefetch above all, it still
does.

``Blocks.run`` decides anew for each call of a block, from what it is called with: it is replayed if a graph of exactly
such a call exists (graph_key.py); else it runs itself; and it is captured if it has run itself in such a call before,
so that every kernel is loaded, and the GPU has been seen waiting for the CPU. Whatever is not as known makes the block
run itself, with the reason in the log.

At a sampling's end the memory that graphs computed in goes back to the card; the graphs stay for the next one if what
they read and write is small beside the card. They go when the model leaves the GPU, or when a function that they may
have been made of was exchanged.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy import patcher_extension

from ...kernels.errors import first_line
from .. import residency
from . import graph_key, graph_plan, small_tensors

logger = logging.getLogger(__name__)

KEY = "nvfp4_video.graphs"
_FEWEST_STEPS = 4  # with fewer, capturing takes longer than replaying saves
_MOST_PLANS = 2
_WAITS = 2  # steps one after the other in which the GPU waited: a single one may be a hiccup of the CPU
_MOST_BRANCHES = 4  # LoRAs and hooks for which one block is captured; as many stay on the GPU (lora_patcher.py)
_MOST_RECAPTURES = 2  # of one block in a sampling: weights that keep moving are not worth it
_KNOWN_CALLS = 2 * _MOST_PLANS * _MOST_BRANCHES
_SPARE_BYTES = 2 << 30  # GPU memory that stays free, besides what the next graph may take
_KEPT_SHARE = 1 / 64  # of the card's memory: the most that graphs hold between samplings
_models: weakref.WeakKeyDictionary[torch.nn.Module, Blocks] = weakref.WeakKeyDictionary()


def use_graphs(patcher: Any) -> str:
    """Let this model's blocks be captured where that is possible and pays -> what to expect, for the load report.

    Nothing is said of models and devices of which nobody would expect it.
    """
    if _is_out_of_question(patcher.model.diffusion_model, patcher.load_device):
        return ""
    if reason := obstacle(patcher.model.diffusion_model, patcher.load_device):
        return f"none, {reason}"
    callbacks = patcher_extension.CallbacksMP
    patcher.add_wrapper_with_key(patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, with_graphs)
    patcher.add_callback_with_key(callbacks.ON_CLEANUP, KEY, end_of_sampling)
    patcher.add_callback_with_key(callbacks.ON_LOAD, KEY, put_back)
    patcher.add_callback_with_key(callbacks.ON_DETACH, KEY, drop_graphs)
    return "one a block, where a step waits for the CPU"


def _is_out_of_question(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether it is no audio and video transformer of LTX, or not on an NVIDIA GPU."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return not nvidia or not graph_key.is_host_s(model, "LTXAVModel")


def obstacle(model: torch.nn.Module, device: torch.device) -> str:
    """Why no block of this model can be captured on this device, or an empty string."""
    if _is_out_of_question(model, device):
        return "they are made for LTX's audio and video transformer on an NVIDIA GPU"
    if not residency.has_block_prefetch():
        return "this ComfyUI does not say in its options which model it samples"
    if residency.option("disable_comfy_compiler"):
        return "ComfyUI runs with --disable-comfy-compiler, which switches CUDA graphs off too"
    if residency.option("assert_graph_breaks"):
        return "ComfyUI runs with --assert-graph-breaks, and a block that is replayed allocates otherwise than before"
    if residency.option("disable_cuda_graphs") is not False:  # without that switch nobody could turn them off
        return "ComfyUI runs with --disable-cuda-graphs, or is too old to have that switch"
    if graph_plan.has_leaked():  # once is enough
        return "a capture failed before in a way that keeps its memory until ComfyUI ends"
    return str(residency.check())


def with_graphs(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A DIFFUSION_MODEL wrapper that puts ``Blocks.run`` in the place of the blocks, in the options of this call."""
    if torch.compiler.is_compiling():
        return executor(*args, **kwargs)
    model, flag = executor.class_obj, residency.PREFETCH_FLAG
    options = next((one for one in (*args, *kwargs.values()) if isinstance(one, dict) and flag in one), None)
    if options is None or obstacle(model, _device_of(args)):
        return executor(*args, **kwargs)
    blocks = blocks_of(model)
    if not blocks.may_pay(options):
        return executor(*args, **kwargs)
    blocks.begin(options["sample_sigmas"])
    replaced = options.get("patches_replace")
    options["patches_replace"] = {**(replaced or {}), "dit": dict(blocks.replacements)}
    try:
        return executor(*args, **kwargs)
    finally:
        blocks.end_of_step()
        options["patches_replace"] = replaced  # a wrapper before this one may call again with the same options
        if replaced is None:
            del options["patches_replace"]


def _device_of(args: tuple) -> torch.device:
    """Where the latents, the first argument, are."""
    latents = args[0] if args else None
    latents = latents[0] if isinstance(latents, list | tuple) and latents else latents
    return latents.device if isinstance(latents, torch.Tensor) else torch.device("cpu")


def end_of_sampling(patcher: Any) -> None:
    """The host's ON_CLEANUP: sampling is over, and its memory is wanted for the decode."""
    blocks = _models.get(patcher.model.diffusion_model)
    if blocks is not None:
        blocks.end()


def put_back(patcher: Any, *_: Any) -> None:
    """The host's ON_LOAD: it may have brought the model's small tensors anew."""
    blocks = _models.get(patcher.model.diffusion_model)
    if blocks is not None and not small_tensors.put_back(patcher, blocks.places):
        blocks.places = []


def drop_graphs(patcher: Any, unpatch_all: bool = True) -> None:
    """The host's ON_DETACH: the model leaves the GPU, which something else wants.

    Without ``unpatch_all`` another patcher of the same model takes over, with the weights where they are.
    """
    blocks = _models.get(patcher.model.diffusion_model)
    if blocks is not None and unpatch_all:
        blocks.drop()


def blocks_of(model: torch.nn.Module) -> Blocks:
    """What is known of a loaded model's blocks."""
    if model not in _models:
        _models[model] = blocks = Blocks(model)
        weakref.finalize(model, blocks.drop).atexit = False
    return _models[model]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a block as graph_key.py describes it; ``tensors`` are its arguments' but the streams."""

    key: tuple
    branches: tuple
    weights: tuple
    tensors: list[torch.Tensor]
    device: torch.device

    def __hash__(self) -> int:
        return hash((self.key, self.branches, self.weights))


class Blocks:
    """The graphs of one model, and what is known of the calls it has seen.

    ``counts``: calls of blocks that were "replayed" or ran themselves ("eager"), blocks "captured", and "recaptured".
    """

    def __init__(self, model: torch.nn.Module):
        self._model = weakref.ref(model)  # ``drop`` waits for its end, which a hook on a block kept here could put off
        self.module = type(model).__dict__.get("host_class", type(model)).__module__
        self.plans: dict[tuple, graph_plan.Plan] = {}
        self.waits_for_cpu: set[tuple] = set()
        self.places: list[small_tensors.Place] = []
        self.counts: Counter[str] = Counter()
        self.replacements = {("double_block", i): functools.partial(self.run, i) for i in range(len(self.blocks))}
        self._passes: Counter[tuple] = Counter()
        self._waits: Counter[tuple] = Counter()
        self._ran: list[dict[int, None]] = [{} for _ in self.replacements]  # calls of each block, the latest last
        self._said: set[str] = set()
        self._most_bytes = 0  # GPU memory that one graph took
        self._last_block: tuple[tuple, torch.cuda.Event] | None = None
        self._surroundings: tuple = ((), ())
        self._sigmas: Any = None  # of the sampling that goes on; the host hands on one tensor through all its steps
        self._forget_sampling()

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The model's, as they are now."""
        return self._model().transformer_blocks

    def _forget_sampling(self) -> None:
        """What holds for one sampling only."""
        self._stopped = ""
        self._closed: set[tuple] = set()  # kinds of calls of which no more blocks are captured
        self._used: set[tuple] = set()  # kinds of calls of which blocks were captured or replayed
        self._recaptures: Counter[int] = Counter()
        self._streams: list[tuple[torch.Tensor, ...]] = []  # of freed plans: the host's loop may still hand them on

    def begin(self, sigmas: Any) -> None:
        """A step begins, and with its first a sampling: graphs of the one before must be of what would run now."""
        if self._sigmas is not sigmas:
            found = graph_key.surroundings(self.blocks[0])
            if not graph_key.are_same(found, self._surroundings):
                self.drop()
                self._ran = [{} for _ in self._ran]  # what runs now may load kernels of its own
            self._sigmas, self._surroundings = sigmas, found

    def may_pay(self, options: Mapping) -> bool:
        """Whether the sampling is long enough, and nobody else replaces blocks."""
        sigmas = options.get("sample_sigmas")
        if sigmas is None or len(sigmas) <= _FEWEST_STEPS:
            return False
        return not options.get("patches_replace", {}).get("dit") or self._say(
            "something else in the workflow changes blocks: patches_replace"
        )

    def run(self, number: int, arguments: dict, extra: Mapping) -> dict:
        """The replacement of block ``number``: the host's arguments and original -> what the original would return."""
        original = extra["original_block"]
        comfy.model_management.throw_exception_if_processing_interrupted()
        call = self._describe(number, arguments, original)
        if call is None:
            self.counts["eager"] += 1
            return original(arguments)
        plan, free = self._plan(call), 0
        captured = plan and plan.graphs.get(number, {}).get(call.branches)
        if captured is None or captured.weights != call.weights:
            moved = captured is not None
            free = self._room(number, call, moved)
            captured = self._capture(number, call, arguments, original, moved) if free else None
            if captured is None:
                return self._run_itself(number, call, arguments, original)
            plan = self.plans[call.key]
        self.counts["replayed"] += 1
        plan.replay(captured, arguments, call.tensors)
        if free:  # the driver takes a graph's memory when it is launched first
            self._most_bytes = max(self._most_bytes, free - torch.cuda.mem_get_info(call.device)[0])
        return {"img": plan.stream}

    def _describe(self, number: int, arguments: Mapping, original: Any) -> _Call | None:
        """A call that a graph could stand for, None if the block has to run itself whatever is captured."""
        device = arguments["img"][0].device
        if self._stopped or torch.is_grad_enabled():
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # inside somebody's own graph
        if getattr(original, "__module__", None) != self.module:
            return self._say("something else in the workflow stands between ComfyUI and its blocks") or None
        if names := graph_key.strange(arguments["transformer_options"]):
            return self._say(f"something else in the workflow changes blocks: {', '.join(names)}") or None
        tensors: list[torch.Tensor] = []
        key = graph_key.of_call(arguments, tensors)
        block = None if key is None else graph_key.of_block(self.blocks[number], device)
        return block and _Call(key, *block, tensors, device)

    def _plan(self, call: _Call) -> graph_plan.Plan | None:
        """The plan for such calls; one of an earlier sampling goes if its graphs have no room to compute in."""
        plan = self.plans.get(call.key)
        if plan is not None and call.key not in self._used:
            if self._has_room(torch.cuda.mem_get_info(call.device)[0], call, len(plan.graphs)):
                self._used.add(call.key)
            else:
                self._free({call.key}, call.device)
                plan = None
        return plan

    def _has_room(self, free: int, call: _Call, blocks: int) -> bool:
        """Whether a graph may run where ``free`` bytes are left; else this kind of call has none in this sampling."""
        if free >= _SPARE_BYTES + 2 * self._most_bytes:
            return True
        self._closed.add(call.key)
        return self._say(f"after {blocks} blocks only {free / 1e9:.1f} GB of GPU memory are free")

    def _run_itself(self, number: int, call: _Call, arguments: dict, original: Any) -> dict:
        """Run the block, note that it ran in such a call, and find out whether the GPU waits for the CPU."""
        self.counts["eager"] += 1
        if number == 0:
            self._passes[call.key] += 1
        # The first pass loads and compiles kernels and says nothing.
        if number == len(self.blocks) - 1 and call.key not in self.waits_for_cpu and self._passes[call.key] > 1:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(call.device))
            self._last_block = call.key, event
        out = original(arguments)
        ran = self._ran[number]
        ran.pop(hash(call), None)
        ran[hash(call)] = None
        if len(ran) > _KNOWN_CALLS:
            del ran[next(iter(ran))]
        return out

    def end_of_step(self) -> None:
        """The CPU has queued the whole step: has the GPU come to the last block already?"""
        if self._last_block is not None:
            key, event = self._last_block
            self._last_block = None
            self._waits[key] = self._waits[key] + 1 if event.query() else 0
            if self._waits[key] >= _WAITS:
                self.waits_for_cpu.add(key)
        for plan in self.plans.values():
            plan.forget()

    def _room(self, number: int, call: _Call, moved: bool) -> int:
        """Bytes that are free on the GPU if the block may be captured now, else 0; ``moved``: its weights were."""
        if call.key not in self.waits_for_cpu or hash(call) not in self._ran[number] or call.key in self._closed:
            return 0
        if moved and self._recaptures[number] >= _MOST_RECAPTURES:
            self._stopped = f"the weights of block {number} keep moving in GPU memory"
            self._say(f"{self._stopped}; the rest of the sampling runs without graphs")
            return 0
        plan = self.plans.get(call.key)
        blocks = plan.graphs if plan else {}
        if plan is None and len(self.plans) >= _MOST_PLANS and self.plans.keys() <= self._used:
            return 0
        if not moved and len(blocks.get(number, ())) >= _MOST_BRANCHES:
            return 0
        free = torch.cuda.mem_get_info(call.device)[0]
        return free if self._has_room(free, call, len(blocks)) else 0

    def _capture(self, number: int, call: _Call, arguments: dict, original: Any, moved: bool) -> Any:
        """Capture a block -> what can be replayed, or None; then there are no graphs of its kind in this sampling."""
        try:
            with graph_plan.apart(call.device):
                if call.key not in self.plans:
                    if len(self.plans) >= _MOST_PLANS:
                        self._free({next(key for key in self.plans if key not in self._used)}, call.device)
                    self.plans[call.key] = graph_plan.Plan(arguments, call.tensors)
                self._used.add(call.key)
                options = arguments["transformer_options"]
                captured = self.plans[call.key].capture(number, call.branches, call.weights, options, original)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # whatever a block cannot do while it is captured, it can do by itself
            self._closed.add(call.key)
            self._say(f"block {number} could not be captured: {first_line(error)}. The sampling goes on without graphs")
            self._free({call.key} & self.plans.keys(), call.device)
            return None
        self._recaptures[number] += moved
        self.counts.update(captured=1, recaptured=int(moved))
        return captured

    def end(self) -> None:
        """The sampling is over: its memory goes back to the card, and graphs whose own tensors are small stay."""
        if self._sigmas is None:
            return
        self._sigmas = None
        for device in {plan.device for plan in self.plans.values()}:
            held, gone = 0, set()
            most = _KEPT_SHARE * torch.cuda.mem_get_info(device)[1] if graph_plan.gives_memory_back() else 0
            for key in sorted(self.plans, key=lambda key: key not in self._used):  # those of this sampling first
                plan = self.plans[key]
                if plan.device == device:
                    held += plan.nbytes
                    gone |= {key} if held > most else set()
            self._free(gone, device, self._used)
            self.places = small_tensors.places_of(self.blocks, device)
        self._forget_sampling()

    def drop(self) -> None:
        """Free the graphs and all their memory."""
        self.places = []
        for device in {plan.device for plan in self.plans.values()}:
            self._free({key for key, plan in self.plans.items() if plan.device == device}, device)
        self._forget_sampling()

    def _free(self, keys: set[tuple], device: torch.device, used: Set[tuple] = frozenset()) -> None:
        """Free these kinds of calls' graphs, and of those in ``used`` the graphs of LoRAs that were not.

        What all others compute in goes back to the card until they run again.
        """
        plans = [self.plans.pop(key) for key in keys]
        self._streams += [plan.stream for plan in plans]
        with graph_plan.apart(device):
            for plan in plans:
                plan.free()
            for key in used & self.plans.keys():
                self.plans[key].free_unused()
            graph_plan.give_back(device)

    def _say(self, reason: str) -> bool:
        """Log once why graphs are not used -> False."""
        if reason not in self._said:
            self._said.add(reason)
            logger.info("CUDA graphs of the blocks are not used: %s", reason)
        return False
