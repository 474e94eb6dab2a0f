# SPDX-License-Identifier: Apache-2.0
"""Known faults, told by trying the functions that have them: with tiny arguments, on the CPU, nothing is left behind.

Each function answers one question of probe.py: -> (whether the fault is there, text), or it raises.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from .facts import Unknown, comfy, module

# Functions through which every sampling goes, as (module of the host, class or "", name); other packs replace them.
_SAMPLING = (
    ("comfy.sample", "", "prepare_noise"),
    ("comfy.sample", "", "fix_empty_latent_channels"),
    ("comfy.sample", "", "sample"),
    ("comfy.sample", "", "sample_custom"),
    ("comfy.samplers", "", "sample"),
    ("comfy.samplers", "KSampler", "sample"),
    ("comfy.samplers", "KSAMPLER", "sample"),
    ("comfy.samplers", "CFGGuider", "sample"),
    ("comfy.samplers", "CFGGuider", "outer_sample"),
    ("comfy.samplers", "CFGGuider", "inner_sample"),
)
_SAMPLERS = "comfy.k_diffusion.sampling"
_DEFINITION = re.compile(r"^def (sample_\w+)\(", re.MULTILINE)
_VIDEO, _AUDIO = (1, 2, 2, 2, 2), (1, 2, 3, 2)  # shapes of a joint latent, small
_tried: list[tuple[Any, tuple[bool, str]]] = []  # the last function tried, and what came of it


def prefetch_crash() -> tuple[bool, str]:
    """A queue whose first block needed no copy, so that there is no stream to wait for. Pops it; nothing else happens.

    Introduced by ComfyUI's pull request 13618, cured by 13703; in no release.
    """
    try:
        prefetch = comfy("model_prefetch")
    except ModuleNotFoundError as error:
        if error.name != "comfy.model_prefetch":
            raise
        return False, "no, this ComfyUI does not prefetch blocks"
    try:
        prefetch.prefetch_queue_pop([(None, (None, None)), None], module("torch").device("cpu"), None)
    except AttributeError as error:
        if "wait_stream" not in str(error):
            raise
        return True, "yes: a model that stays on the GPU as a whole can stop with 'wait_stream'"
    return False, "no"


def ltxav_needs_audio() -> tuple[bool, str]:
    """The rotary embedding of no audio tokens, the shape on which ComfyUI 0.29.0 stops; cured by pull request 15132."""
    try:
        comfy("ldm.lightricks.av_model")
    except ModuleNotFoundError as error:
        if error.name != "comfy.ldm.lightricks.av_model":
            raise
        return False, "no, this ComfyUI has no LTX-2"
    rotary = getattr(comfy("ldm.lightricks.model"), "freqs_cis_matrix", None)
    if rotary is None:
        return False, "no"
    torch = module("torch")
    try:
        rotary(torch.zeros(1, 0, 4), 0, True, 2, torch.float32)
    except RuntimeError:
        return True, "yes: LTX-2 cannot sample without an audio latent"
    return False, "no"


def joint_noise_crash() -> tuple[bool, str]:
    """Noise for a nested latent from a ``comfy.sample.prepare_noise`` that another pack put there.

    One written before LTX-2 stops, or makes noise for the picture alone, on which the sampler stops. The host's own is
    not tried. A trial runs once a function, since it seeds torch's generators, which are put back, and never beside a
    prompt, whose noise that could change.
    """
    function = dict(replaced()).get("comfy.sample.prepare_noise")
    if function is None:
        return False, "no, it is ComfyUI's own"
    if not (_tried and _tried[0][0] is function):
        _tried[:] = [(function, _try_noise(function))]
    return _tried[0][1]


def replaced_sampling() -> tuple[tuple[tuple[str, str], ...], str]:
    """(Function of the host, whose code stands in its place), ... -- named, not judged."""
    found = tuple((name, origin(function)) for name, function in replaced())
    return found, ", ".join(f"{name} is {whose}'s" for name, whose in found) or "none"


def origin(function: Callable) -> str:
    """Where the code of a function is from: the pack's folder and the file in it, without the path before them."""
    code = _code(function)
    if code is None:
        return str(getattr(type(function), "__module__", "an unknown module")).rpartition("/")[2]
    parts = PurePath(code.co_filename.replace("\\", "/")).parts
    if "custom_nodes" in parts:
        return "/".join(parts[len(parts) - parts[::-1].index("custom_nodes") :])
    return "/".join(parts[-2:])


def replaced() -> Iterator[tuple[str, Callable]]:
    """Names and functions of the host's sampling whose code is from another file than the module they stand in."""
    for place, owner, name in itertools.chain(_SAMPLING, ((_SAMPLERS, "", name) for name in sampler_functions())):
        host = sys.modules.get(place)  # what nobody has imported, nobody has replaced
        function = getattr(getattr(host, owner, None) if owner else host, name, None)
        own = getattr(host, "__file__", None)
        if function is None or own is None:
            continue
        code = _code(function)
        if code is None or os.path.realpath(code.co_filename) != os.path.realpath(own):
            yield ".".join(filter(None, (place, owner, name))), function


def sampler_functions() -> tuple[str, ...]:
    """The host's own functions of k_diffusion, by name; packs add more to that module, which replace nothing."""
    return _defined_in(getattr(sys.modules.get(_SAMPLERS), "__file__", None))


@functools.lru_cache(maxsize=1)
def _defined_in(file: str | None) -> tuple[str, ...]:
    """The functions `sample_...` that a file defines."""
    try:
        return tuple(_DEFINITION.findall(Path(file).read_text(encoding="utf-8"))) if file else ()
    except (OSError, UnicodeDecodeError):
        return ()


def _code(function: Any) -> Any:
    """The code that runs first; None for what is not written in Python. torch's own decorators are looked through."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    if code is not None and "torch" in PurePath(code.co_filename).parts and hasattr(function, "__wrapped__"):
        return _code(function.__wrapped__)
    return code


def _try_noise(function: Callable) -> tuple[bool, str]:
    only_while_idle()
    torch, whose = module("torch"), origin(function)
    nested = comfy("nested_tensor").NestedTensor([torch.zeros(_VIDEO), torch.zeros(_AUDIO)])
    with generators_kept(torch):
        if tuple(function(torch.zeros(_VIDEO), 0, None).shape) != _VIDEO:
            raise Unknown(f"{whose} makes noise of another shape for a plain latent too")
        try:
            noise = function(nested, 0, None)
            shapes = [tuple(part.shape) for part in noise.unbind()] if getattr(noise, "is_nested", False) else []
        except Exception as error:
            return True, f"yes: {whose} stops on them ({type(error).__name__})"
    if shapes != [_VIDEO, _AUDIO]:
        return True, f"yes: {whose} makes noise for the picture alone"
    return False, f"no, {whose} takes both"


def only_while_idle() -> None:
    """Raises Unknown beside a running prompt, whose noise a trial could change."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if getattr(getattr(server, "prompt_queue", None), "currently_running", None):
        raise Unknown("another pack replaced it, and it is not tried while a prompt runs")


@contextlib.contextmanager
def generators_kept(torch: Any) -> Iterator[None]:
    """Whatever is seeded in here, torch's generators go on as before."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(gpus)):
        yield
