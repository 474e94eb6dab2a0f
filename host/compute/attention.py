# SPDX-License-Identifier: Apache-2.0
"""Which function computes attention: the host's, one by name, or the one that a trial on this GPU finds fastest.

ComfyUI asks torch for FlashAttention before anything else. What is fastest differs by GPU and by shape: on an H200
cuDNN takes half the time at LTX's sizes, on an L40S the same. ``Attention`` stands in the model's options as
``optimized_attention_override``, where the host looks for such a choice and any node after the loader may put its own.

A trial runs each candidate on the tensors of the first call of a shape, drops those whose result differs from torch's
own by more than rounding to BF16 explains or that cannot run, times the others in turn, and keeps the fastest for this
shape and GPU as long as the process lives. All of it happens outside the host's recording of allocations.

What counts is the GPU's time, and a little the CPU's: it is felt only in steps that wait for the CPU, and not once
their blocks are replayed as graphs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy import patcher_extension
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.errors import PackError, first_line
from .. import residency

logger = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"
KEY = "nvfp4_video.attention"
BY_COMPUTE, HOST, AUTO = "by compute mode", "host", "auto"
_TORCH = {"sdpa": "", "sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_flash": "FLASH_ATTENTION",
          "sdpa_efficient": "EFFICIENT_ATTENTION"}  # fmt: skip
_OTHERS = ("sage", "sage3", "flash", "xformers", "comfy_kitchen_int8")  # as the host registers them, if installed
# Two results that are rounded to BF16 on their way differ by about 2**-8 of their norm; measured 3e-3 on an H200.
_MOST_DIFFERENCE = 2.0**-7
_WORTH = 0.97  # of the host's time: a smaller gain is noise
_HOPELESS = 1.3  # times the fastest in the first round: not timed again
_ROUNDS = 3
_SHORT_MS = 1.0  # calls shorter than this are timed ten at a time
_CPU_SHARE = 0.1  # of the CPU's time for a call that is added to the GPU's
_CYCLES = 3e9  # of a second, more than any GPU has
_LONGEST_WAIT = 0.1  # seconds
_MOST_SHAPES = 256
_MOST_BATCH = 2**15  # the host splits larger ones, for a fault in torch's kernels


@dataclass
class Trial:
    """What was found for one shape: the function that is used, milliseconds of all that ran, reasons of the others."""

    shape: str
    winner: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.milliseconds.items(), key=lambda i: i[1]))
        left = "".join(f"; not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.shape}: {self.winner} ({times}{left})"


_trials: dict[tuple, Trial] = {}


def trials() -> list[Trial]:
    """All trials of this process, in the order in which they were made."""
    return list(_trials.values())


def choices() -> list[str]:
    """What may be asked for: modes, torch's kernels, and what else this ComfyUI has registered."""
    registered = getattr(host_attention, "REGISTERED_ATTENTION_FUNCTIONS", {})
    return [BY_COMPUTE, HOST, AUTO, *_TORCH, *(name for name in _OTHERS if name in registered)]


class Attention:
    """An ``optimized_attention_override`` of the host's: called in place of its attention function, which it is given.

    ``choice``: AUTO, or a name from ``choices``. A call that the chosen function cannot do goes to the host's.
    """

    def __init__(self, choice: str):
        self.choice = choice
        self.replaced = False  # by a node further on, which was said
        self._failed: dict[tuple, str] = {}

    def key(self) -> tuple:
        """What a captured graph of a block depends on."""
        return self, len(self._failed)

    def __call__(self, function: Callable, q, k, v, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The host's function and its arguments: q, k, v of (batch, tokens, heads * width) or of four dimensions."""
        mask = args[0] if args else kwargs.get("mask")
        # Compiled code fixes its choice itself; positional arguments after the mask have no fixed meaning.
        if not _is_gpu(q.device) or torch.compiler.is_compiling() or len(args) > 1 or q.shape[0] >= _MOST_BATCH:
            return function(q, k, v, heads, *args, **kwargs)
        shape = _shape(q, k, v, heads, mask, kwargs)
        name = self.choice if self.choice != AUTO else self._winner(shape, function, (q, k, v, heads, *args), kwargs)
        if name == HOST or shape in self._failed:
            return function(q, k, v, heads, *args, **kwargs)
        try:
            return _function(name, kwargs)(q, k, v, heads, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if torch.cuda.is_current_stream_capturing():
                raise
            self._failed[shape] = reason = first_line(error)
            logger.info("attention %s: ComfyUI's own instead of %s: %s", _in_words(q, k, heads, mask), name, reason)
            return function(q, k, v, heads, *args, **kwargs)

    def container_function(self, q, k, v, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same for tensors in the host's containers; its own function is then the one it would take itself."""
        masked = (args[1] if len(args) > 1 else kwargs.get("mask")) is not None
        name = "optimized_attention_masked" if masked else "optimized_attention"
        return self(getattr(host_attention, name), q.take(), k.take(), v.take(), *args, **kwargs)

    def _winner(self, shape: tuple, function: Callable, args: tuple, kwargs: dict) -> str:
        trial = _trials.get(shape)
        if trial is None:
            if len(_trials) >= _MOST_SHAPES or torch.cuda.is_current_stream_capturing():
                return HOST
            with residency.outside_host_graph():
                trial = _trials[shape] = _try_all(function, args, kwargs)
            logger.info("attention %s", trial)
        return trial.winner


def is_chosen(options: Mapping | None) -> bool:
    """Whether a call's options ask for an attention of this pack's, whose rounding is not the host's."""
    return options is not None and isinstance(options.get(OVERRIDE), Attention)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _shape(q, k, v, heads: int, mask: torch.Tensor | None, kwargs: dict) -> tuple:
    """All by which kernels are chosen."""
    masked = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    options = tuple(kwargs.get(name) for name in ("skip_reshape", "skip_output_reshape", "enable_gqa", "scale"))
    precise = kwargs.get("low_precision_attention", True)
    strides = q.stride(), k.stride(), v.stride()
    return q.device, q.dtype, q.shape, k.shape, v.shape, strides, heads, masked, precise, *options


def _in_words(q, k, heads: int, mask: torch.Tensor | None) -> str:
    width = q.shape[-1] if q.dim() == 4 else q.shape[-1] // heads
    masked = "" if mask is None else ", masked"
    return f"{q.shape[0]} x {heads} heads, {q.shape[-2]:,} x {k.shape[-2]:,} tokens of {width}{masked}"


def _function(name: str, kwargs: dict) -> Callable:
    """A name from ``choices`` -> a function that is called like the host's."""
    if name in _TORCH:
        return functools.partial(_sdpa, _TORCH[name])
    if kwargs.get("low_precision_attention", True) is False:  # the host's word for calls that rounding would spoil
        raise RuntimeError("this call asks for full precision")
    return host_attention.get_attention_function(name)


def _sdpa(
    kernel: str, q, k, v, heads: int, mask=None, skip_reshape=False, skip_output_reshape=False, scale=None,
    enable_gqa=False, **_ignored,
) -> torch.Tensor:  # fmt: skip
    """torch's attention with one kernel, or in its own order of kernels, over the host's layouts."""
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (tensor.unflatten(-1, (-1, width)).transpose(1, 2) for tensor in (q, k, v))
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    with _only(kernel):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=bool(enable_gqa))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _only(kernel: str) -> contextlib.AbstractContextManager:
    if not kernel:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, kernel))


def _try_all(function: Callable, args: tuple, kwargs: dict) -> Trial:
    """Run, compare and time torch's kernels and the host's function on the tensors of a call."""
    q, k, _, heads, *rest = args
    trial = Trial(_in_words(q, k, heads, rest[0] if rest else kwargs.get("mask")), HOST)
    candidates = {HOST: function} | {name: _function(name, kwargs) for name in _TORCH}
    calls = {name: functools.partial(candidate, *args, **kwargs) for name, candidate in candidates.items()}
    try:
        truth = calls["sdpa"]()
    except RuntimeError as error:
        trial.rejected["sdpa"] = first_line(error)
        return trial
    most = _MOST_DIFFERENCE * _norm(truth)
    for name, call in calls.items():
        try:
            right = _norm(call() - truth) <= most  # which no NaN is
            if right or name == HOST:
                trial.milliseconds[name] = _milliseconds(call, 1, q.device)
            else:
                trial.rejected[name] = "gives another result"
        except RuntimeError as error:  # out of memory among them; the host's own is asked again after the trial
            trial.rejected[name] = first_line(error)
    del truth
    fastest = min(trial.milliseconds.values())
    hopeful = [name for name, ms in trial.milliseconds.items() if name == HOST or ms <= _HOPELESS * fastest]
    times = {name: [] for name in hopeful}
    for _ in range(_ROUNDS):
        for name in hopeful:
            times[name].append(_milliseconds(calls[name], 1 if fastest > _SHORT_MS else 10, q.device))
    trial.milliseconds |= {name: min(found) for name, found in times.items()}
    best, own = min(hopeful, key=trial.milliseconds.__getitem__), trial.milliseconds.get(HOST)
    trial.winner = HOST if own is not None and trial.milliseconds[best] > _WORTH * own else best
    return trial


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))


def _milliseconds(call: Callable, calls: int, device: torch.device) -> float:
    """GPU time of one call, with nothing else on the device, and ``_CPU_SHARE`` of what the CPU takes to queue it.

    The GPU first waits until the CPU has queued all ``calls``; short ones would else be timed by the CPU's speed.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    queued = time.perf_counter() - begun
    torch.cuda.synchronize(device)
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(min(2 * calls * queued, _LONGEST_WAIT) * _CYCLES))
    start.record(stream)
    for _ in range(calls):
        call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / calls + _CPU_SHARE * queued * 1e3


def use_attention(patcher: Any, choice: str, mode: str = "bf16") -> str:
    """Have a model's attention computed by ``choice`` (from ``choices``) -> what to expect, for the report.

    ``mode``: how its layers compute. BY_COMPUTE leaves models that promise the host's own result ("bf16") to the
    host's attention. An earlier choice of this pack's, such as the loader's, is no more. Raises PackError for a choice
    that is not to be had here.
    """
    if choice not in choices():
        raise PackError(f"attention: there is no {choice!r} here; there are {', '.join(choices())}")
    if choice == BY_COMPUTE:
        choice = HOST if mode == "bf16" else AUTO
    device, options = patcher.load_device, patcher.model_options.setdefault("transformer_options", {})
    if isinstance(options.get(OVERRIDE), Attention):
        del options[OVERRIDE]
        patcher.callbacks.get(patcher_extension.CallbacksMP.ON_PRE_RUN, {}).pop(KEY, None)
    if choice == HOST:
        return "ComfyUI's own"
    if not _is_gpu(device):
        return f"ComfyUI's own: {choice} is for GPUs"
    if choice == AUTO and (reason := _stands_down(patcher.model)):
        return f"ComfyUI's own, {reason}"
    if OVERRIDE in options:
        return f"that of {_owner(options[OVERRIDE])}, which is before this one in the workflow"
    options[OVERRIDE] = own = Attention(choice)
    patcher.add_callback_with_key(patcher_extension.CallbacksMP.ON_PRE_RUN, KEY, functools.partial(_look, own))
    if choice != AUTO:
        return f"{choice}, and ComfyUI's own where it cannot run"
    known = "; ".join(map(str, trials()))
    return "the fastest of torch's kernels, by trial in the first step" + (f". Known: {known}" if known else "")


def _stands_down(model: torch.nn.Module) -> str:
    """Why a trial would take a choice from somebody else, or an empty string."""
    if host_attention.optimized_attention is not getattr(host_attention, "attention_pytorch", None):
        return "which is not torch's: it was chosen when ComfyUI was started"
    for module in model.modules():
        if getattr(module.__dict__.get("_modules", {}).get("comfy_attention"), "function", None) is not None:
            return "since the model's file asks for an attention of its own"
    return ""


def _look(own: Attention, patcher: Any) -> None:
    """The host's ON_PRE_RUN: say once if a node further on has put its choice in the place of this one."""
    override = patcher.model_options.get("transformer_options", {}).get(OVERRIDE)
    if override is not own and not own.replaced:
        own.replaced = True
        logger.info("attention %s is not used: %s has put its own there", own.choice, _owner(override))


def _owner(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__
