# SPDX-License-Identifier: Apache-2.0
"""Facts about how this ComfyUI was started and what it decided: flags, offloading, its compiler, NVFP4 backends.

Each function answers one question of probe.py: -> (value, text), or it raises.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping

from .facts import NOT_STARTED, PATH, Unknown, arguments, comfy, gib, module, running
from .machine import device


def known_flags() -> tuple[frozenset[str], str]:
    """The options this host's command line knows."""
    actions = comfy("cli_args").parser._actions
    flags = frozenset(flag for action in actions for flag in action.option_strings if flag.startswith("--"))
    return flags, str(len(flags))


def launch_flags() -> tuple[list[str], str]:
    """The flags this process was started with; numbers are shown, names, paths and the port are not."""
    if not running():
        raise Unknown(NOT_STARTED)
    actions = comfy("cli_args").parser._actions
    options = {option: action for action in actions for option in action.option_strings}
    flags = []
    for word in (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")):
        option = word if word in options else next((name for name in options if name.startswith(word)), None)
        if option is None:
            continue
        action = options[option]
        value = getattr(arguments(), action.dest, None)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and action.dest != "port"
        flags.append(f"{option} {value}" if number else option)
    return flags, " ".join(flags) or "none"


def pinned_memory() -> tuple[bool, str]:
    most = comfy("model_management").MAX_PINNED_MEMORY
    return most > 0, f"on, up to {gib(most)}" if most > 0 else "off"


def mmap() -> tuple[bool, str]:
    mapped = not comfy("utils").DISABLE_MMAP
    return mapped, "on" if mapped else "off, by --disable-mmap"


def async_offload_streams() -> tuple[int, str]:
    streams = comfy("model_management").NUM_STREAMS
    if isinstance(getattr(arguments(), "async_offload", None), bool) and streams == 1:
        streams = 0  # hosts before 0.3.76 call the compute stream their first
    text = f"on, {streams} streams" if streams else "off"
    return streams, text if running() else f"{text} (without launch flags)"


def dynamic_vram() -> tuple[bool, str]:
    try:
        memory = comfy("memory_management")
    except ModuleNotFoundError as error:
        if error.name != "comfy.memory_management":
            raise
        return False, "no, this ComfyUI has none"
    allocator = getattr(memory, "aimdo_allocator", None)  # how 0.12 to 0.14 told
    enabled = bool(getattr(memory, "aimdo_enabled", allocator is not None))
    if not enabled and not running():
        raise Unknown(f"{NOT_STARTED}, and its main.py decides")
    return enabled, "on" if enabled else "off"


def compiler() -> tuple[bool, str]:
    """Whether the host records what a step allocates and maps the same memory again (its Comfy Compiler)."""
    try:
        enabled = getattr(comfy("model_prefetch"), "malloc_graph_enabled", None)
    except ModuleNotFoundError as error:
        if error.name != "comfy.model_prefetch":
            raise
        enabled = None
    if enabled is None:
        return False, "no, this ComfyUI has none"
    if getattr(arguments(), "disable_comfy_compiler", False):
        return False, "off, by --disable-comfy-compiler"
    device = comfy("model_management").get_torch_device()
    if device.type != "cuda":
        return False, f"off, it needs CUDA and ComfyUI computes on {device.type} here"
    if not dynamic_vram()[0]:
        return False, "off, it needs DynamicVRAM"
    if not enabled(device):
        return False, "off, ComfyUI does not say why"
    text = "on"
    if getattr(arguments(), "disable_cuda_graphs", False):
        text += ", without CUDA graphs (--disable-cuda-graphs)"
    if getattr(arguments(), "assert_graph_breaks", False):
        text += ", stops where it would record a step anew (--assert-graph-breaks)"
    return True, text


def _registry():
    """comfy-kitchen's registry of backends, after ComfyUI, if there is one, has switched some of them off."""
    kitchen = module("comfy_kitchen")
    with contextlib.suppress(ImportError):
        comfy("quant_ops")
    return kitchen.registry


def kitchen_backends() -> tuple[dict[str, bool | str], str]:
    found = {name: _state_of(name, state) for name, state in sorted(_registry().list_backends().items())}
    return found, ", ".join(f"{name} on" if state is True else f"{name} off ({state})" for name, state in found.items())


def _state_of(name: str, state: Mapping) -> bool | str:
    """An entry of kitchen's list -> True, or why it is off."""
    if not state["available"]:
        reason = str(state.get("unavailable_reason") or "not available")
        return "its library cannot be loaded" if PATH.search(reason) else reason
    if not state["disabled"]:
        return True
    version = module("torch").version.cuda
    if name == "cuda":
        return f"ComfyUI wants a torch for CUDA 13.0 or newer, this one is for {version or 'no CUDA'}"
    if name == "triton":
        return "ComfyUI wants --enable-triton-backend; this pack's own kernels do not"
    return "switched off"


def nvfp4_compute() -> tuple[str, str]:
    """How ComfyUI's own Linear computes with an NVFP4 weight."""
    supports = getattr(comfy("model_management"), "supports_nvfp4_compute", None)
    if supports is None:
        return "none", "not at all, this ComfyUI knows no NVFP4"
    native, registry = supports(device()), _registry()
    if native:
        backend = registry.get_capable_backend("scaled_mm_nvfp4")
        text = "on FP4 tensor cores (W4A4)"
        return ("fp4", text) if backend == "cuda" else (f"fp4 {backend}", f"{text} by the {backend} backend")
    backend = registry.get_capable_backend("dequantize_nvfp4")
    return f"emulated {backend}", f"no FP4 tensor cores: every weight is dequantized, by the {backend} backend"


def own_backend() -> tuple[str, str]:
    """How this pack's Linear dequantises."""
    name, reason = importlib.import_module("...kernels.backends", __package__).pick_backend(device())
    return name, f"{name} ({reason})"
