# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine and its software: versions, the GPU that ComfyUI computes on, memory.

Each function answers one question of probe.py: -> (value, text), or it raises.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from .facts import Unknown, comfy, gib, module

NVIDIA, AMD, INTEL, APPLE, CPU = "NVIDIA", "AMD", "Intel", "Apple", "CPU"
_MAKERS = {"xpu": INTEL, "mps": APPLE, "cpu": CPU}  # by torch's kind of device
CPU_ONLY = "ComfyUI computes on the CPU here"
MEMINFO = Path("/proc/meminfo")
_WSL = re.compile("microsoft", re.IGNORECASE)  # in the release of WSL's kernels, and in no other
_AMD_NAME = re.compile(r"\bAMD\b|\bRadeon\b")  # what ZLUDA shows to a torch built for CUDA, too
# NVIDIA's systems on a chip by name, for a torch that does not tell whether a GPU is integrated.
_UNIFIED_NAME = re.compile(r"\b(GB10|Thor|Orin|Xavier)\b")


def version_of(*packages: str) -> tuple[str, str]:
    """Version of the first of these packages that is installed."""
    for package in packages[:-1]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return (version := importlib.metadata.version(package)), version
    return (version := importlib.metadata.version(packages[-1])), version


def comfyui_version() -> tuple[str, str]:
    return (version := module("comfyui_version").__version__), version


def frontend_version() -> tuple[str, str]:
    arguments = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    chosen = getattr(arguments, "front_end_version", "@latest")
    if getattr(arguments, "front_end_root", None) or not str(chosen).endswith("@latest"):
        raise Unknown("a launch flag chose another front end than the installed package")
    return version_of("comfyui-frontend-package")


def torch_version() -> tuple[str, str]:
    return (version := str(module("torch").__version__)), version


def _cuda_version() -> tuple[int, ...]:
    version = module("torch").version.cuda
    if not version:
        raise Unknown("this torch is built without CUDA")
    return tuple(int(part) for part in version.split(".")[:2])


def torch_cuda() -> tuple[tuple[int, ...], str]:
    version = _cuda_version()
    return version, ".".join(map(str, version))


def system() -> tuple[str, str]:
    name = f"{platform.system()} {platform.machine()}"
    under = " under WSL" if _WSL.search(platform.release()) else ""
    return name + under, f"{name}{under}, Python {platform.python_version()}"


def _torch_device():
    """The device on which ComfyUI computes, or would."""
    torch = module("torch")
    if "comfy" in sys.modules:
        return comfy("model_management").get_torch_device()
    if not torch.cuda.is_available():
        raise Unknown("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def device():
    """As ``_torch_device``, if torch counts it as a CUDA device, which AMD's GPUs are too."""
    found = _torch_device()
    if found.type != "cuda":
        raise Unknown(CPU_ONLY if found.type == "cpu" else f"ComfyUI computes on {found.type} here")
    return found


def _properties():
    return module("torch").cuda.get_device_properties(device())


def gpu_maker() -> tuple[str, str]:
    """Whose device ComfyUI computes on: NVIDIA, AMD, INTEL, APPLE, CPU, or torch's name for any other kind."""
    found = _torch_device()
    if found.type != "cuda":
        maker = _MAKERS.get(found.type, found.type)
        return maker, CPU_ONLY if maker == CPU else f"{maker} ({found.type})"
    hip = getattr(module("torch").version, "hip", None)
    maker = AMD if hip or _AMD_NAME.search(module("torch").cuda.get_device_properties(found).name) else NVIDIA
    return maker, f"{maker} (ROCm {hip})" if hip else maker


def gpu_name() -> tuple[str, str]:
    return (name := _properties().name), name


def capability() -> tuple[tuple[int, int], str]:
    found = _properties()
    if gpu_maker()[0] == AMD:  # torch fills in the numbers of its architecture, which mean something else
        raise Unknown(f"AMD's GPUs have none; this one is {getattr(found, 'gcnArchName', 'of unknown architecture')}")
    return (found.major, found.minor), f"{found.major}.{found.minor}"


def gpu_memory() -> tuple[int, str]:
    total, free = _properties().total_memory, module("torch").cuda.mem_get_info(device())[0]
    note = ", page cache counted as used" if unified_memory()[0] else ""
    return total, f"{gib(total)}, {gib(free)} free{note} (CUDA)"


def unified_memory() -> tuple[bool, str]:
    found = _properties()
    unified = bool(getattr(found, "is_integrated", 0)) or bool(_UNIFIED_NAME.search(found.name))
    return unified, "yes, GPU and CPU share one memory" if unified else "no"


def _meminfo() -> dict[str, int]:
    """Entries of /proc/meminfo in bytes."""
    if not MEMINFO.exists():
        raise Unknown(f"{platform.system()} has no /proc/meminfo")
    lines = (line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[2:] == ["kB"]}


def memory_available() -> tuple[int, str]:
    if not MEMINFO.exists():
        found = module("psutil").virtual_memory()
        return found.available, f"{gib(found.available)} of {gib(found.total)}"
    found = _meminfo()
    return found["MemAvailable"], f"{gib(found['MemAvailable'])} of {gib(found['MemTotal'])}"


def memory_total() -> tuple[int, str]:
    total = _meminfo()["MemTotal"] if MEMINFO.exists() else module("psutil").virtual_memory().total
    return total, gib(total)


def page_cache() -> tuple[int, str]:
    cached = _meminfo()["Cached"]
    return cached, f"{gib(cached)}, which the system gives back when programs need it"
