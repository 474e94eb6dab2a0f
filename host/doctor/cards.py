# SPDX-License-Identifier: Apache-2.0
"""Whose GPU it is, and what is said to owners of other ones than NVIDIA's: advice of their own, or that there is none.

This pack was run on NVIDIA's GPUs only. What makes a GeForce faster can be what stops a Radeon, so nothing that is said
to the owner of one is said to that of the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .machine import AMD, CPU, NVIDIA

_AMD_FLAGS = ("--disable-dynamic-vram", "--disable-pinned-memory", "--disable-async-offload")
_BY_NAME = (
    (re.compile(r"\b(AMD|Radeon|Instinct)\b"), AMD),
    (re.compile(r"\b(Intel|Arc)\b"), "Intel"),
    (re.compile(r"\bApple\b"), "Apple"),
)


def maker_of(value: Callable[[str], Any]) -> str | None:
    """``value``: fact id -> its value -> who made the GPU, NVIDIA where only the name of another one would tell."""
    if maker := value("gpu_maker"):
        return maker
    name = value("gpu_name")
    if not isinstance(name, str):
        return None
    return next((maker for pattern, maker in _BY_NAME if pattern.search(name)), NVIDIA)


def is_nvidia(value: Callable[[str], Any]) -> bool:
    """Whether advice for NVIDIA's GPUs fits: not if another maker, or none, is known."""
    return maker_of(value) in (NVIDIA, None)


def advice(maker: str, known: Collection[str], started: Collection[str]) -> Iterator[str]:
    """For the note of a launch profile. ``known``: flags of this host; ``started``: those it was started with."""
    if maker == CPU:
        yield "ComfyUI computes on the CPU here, and no flag makes LTX-2 practical there."
        if "--cpu" in started:
            yield "It was started with --cpu: leave that out, if this machine has a GPU that torch knows."
        return
    yield f"NVFP4 Video was not run on GPUs of {maker}, so it recommends no flag for them."
    flags = [flag for flag in _AMD_FLAGS if flag in known] if maker == AMD else []
    if flags:
        yield (
            f"Others report that LTX-2.3 stalled while it was loaded unless `{' '.join(flags)}` was given (thread "
            "13730, Radeon RX 7900 XTX), and that --disable-pinned-memory alone was enough for a stalling VAE (thread "
            "16062, Radeon RX 9070 XT): where ComfyUI stalls or stops, try them, and keep those that help."
        )
