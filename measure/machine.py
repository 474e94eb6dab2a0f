# SPDX-License-Identifier: Apache-2.0
"""Hardware and versions that a measured number depends on. torch is imported late, see host/bench/session.py."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "comfy-kitchen", "comfy-aimdo", "safetensors", "numpy")


def version(package: str) -> str | None:
    """Installed version of a distribution, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Date, processor, system, versions, and the first CUDA device if there is one."""
    import torch

    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": device.name,
            "compute_capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "l2_mib": round(device.L2_cache_size / 2**20, 1),
            "gpu_memory_gib": round(device.total_memory / 2**30, 1),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "allocator": torch.cuda.get_allocator_backend(),
        }
    return found


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", "\n".join(_lines("/proc/driver/nvidia/version")))
    return found.group() if found else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
