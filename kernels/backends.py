# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes, and why: Triton where it runs, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib

import torch

from .errors import PackError

BACKENDS = ("triton", "torch")
TRITON_CAPABILITY = (7, 5)
BF16_CAPABILITY = (8, 0)  # conversions to BF16, and tensor cores that take it
FP8_CAPABILITY = (8, 9)


@functools.cache
def pick_backend(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """Device, "auto" or a name of ``BACKENDS`` -> (backend, reason).

    "auto" falls back to torch and says why; a backend asked for by name that cannot run raises PackError.
    """
    if requested not in (*BACKENDS, "auto"):
        raise PackError(f"unknown backend {requested!r}; expected auto, {' or '.join(BACKENDS)}")
    if requested == "torch":
        return "torch", "asked for"
    obstacle = _triton_obstacle(device)
    if not obstacle:
        return "triton", "asked for" if requested == "triton" else f"Triton runs on {_describe(device)}"
    if requested == "triton":
        raise PackError(f"the triton backend cannot run: {obstacle}; choose backend auto or torch")
    return "torch", obstacle


def _triton_obstacle(device: torch.device) -> str:
    """Why Triton cannot run on ``device``, or an empty string."""
    if device.type != "cuda":
        return f"Triton needs an NVIDIA or AMD GPU, the model is on {device.type}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return f"Triton needs compute capability {_dotted(TRITON_CAPABILITY)}, this is {_describe(device)}"
    try:
        triton_module("launch")
    except ImportError as error:
        return f"Triton is not installed ({error}); install triton, on Windows triton-windows"
    return ""


def tensor_core_obstacle(device: torch.device, kind: str, least: tuple[int, int], function: str) -> str:
    """Why Triton's rows in 8 bits and torch's ``function`` cannot meet on tensor cores of ``device``, or ""."""
    if device.type != "cuda" or not torch.version.cuda:
        return f"{kind} tensor cores are those of an NVIDIA GPU, the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        name, found = torch.cuda.get_device_name(device), _dotted(capability)
        return f"{kind} needs compute capability {_dotted(least)}, {name} has {found}"
    if not hasattr(torch, function):
        return f"torch {torch.__version__} has no torch.{function}; update torch"
    backend, reason = pick_backend(device)
    return "" if backend == "triton" else reason


def _describe(device: torch.device) -> str:
    capability = _dotted(torch.cuda.get_device_capability(device))
    return f"{torch.cuda.get_device_name(device)} (compute capability {capability})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def triton_module(name: str):
    """A file of kernels/triton, imported only when it is asked for: importing the pack needs no Triton."""
    return importlib.import_module(f".triton.{name}", __package__)
