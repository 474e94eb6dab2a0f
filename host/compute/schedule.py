# SPDX-License-Identifier: Apache-2.0
"""Which steps of a sampling compute more exactly than the model was loaded to: the same bytes, another mode.

A schedule gives the mode of a step from its sigma. A layer computes there in the more exact one of that mode and its
own, so that no step is coarser than without a schedule, and layers that are weight-only anyway stay so. Modes are set
for one call of the model and taken back after it: other workflow branches that share the weights see nothing of it.
CUDA graphs are captured for each mode by itself (graph_key.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy import patcher_extension

from ...kernels.errors import PackError
from .graph_key import SCHEDULED
from .linear import choose_mode, modes_of
from .modes import MODES, describe

KEY = "nvfp4_video.schedule"
FIRST_AND_LAST, FIRST, LAST, RANGES = STEPS = ("first and last", "first", "last", "by sigma")
# A sampler may come back to a step's sigma by its own arithmetic.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Range:
    """Sigmas from ``low`` to ``high``, both included, compute in ``mode``."""

    low: float
    high: float
    mode: str

    def __str__(self) -> str:
        return f"{self.mode} at sigma {self.low:g} to {self.high:g}"


def parse_ranges(text: str) -> tuple[Range, ...]:
    """ "0.9-1=bf16, 0-0.3=fp8" -> its ranges, of which the first that holds a sigma counts. Raises PackError."""
    found = []
    for item in filter(None, (piece.strip() for piece in re.split(r"[,;\n]", text))):
        match = re.fullmatch(r"(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*=\s*(\w+)", item)
        if match is None:
            raise PackError(f"ranges: found {item[:80]!r}; expected FROM-TO=MODE in sigmas, such as 0.9-1=bf16")
        low, high, mode = float(match[1]), float(match[2]), match[3]
        if mode not in MODES:
            raise PackError(f"ranges: unknown mode {mode[:9]!r} for {match[1]}-{match[2]}; expected {', '.join(MODES)}")
        if not low <= high < math.inf:
            raise PackError(f"ranges: found {match[1]}-{match[2]}; expected the smaller sigma first")
        found.append(Range(low, high, mode))
    if not found:
        raise PackError("ranges: found none; expected FROM-TO=MODE in sigmas, such as 0.9-1=bf16")
    return tuple(found)


def mode_at(steps: str, ranges: Sequence[Range], sigma: float, sigmas: Sequence[float]) -> str:
    """One of STEPS, ``ranges`` for RANGES, a step's sigma and the sampling's sigmas -> its mode, "" as loaded.

    The last step is the one that starts at the last sigma but one; what lies between two sigmas belongs to no end.
    """
    if steps == RANGES:
        return next((one.mode for one in ranges if one.low - _TOLERANCE <= sigma <= one.high + _TOLERANCE), "")
    if len(sigmas) < 2:
        return ""
    ends = {FIRST: sigmas[:1], LAST: sigmas[-2:-1], FIRST_AND_LAST: (sigmas[0], sigmas[-2])}[steps]
    return "bf16" if any(abs(sigma - end) <= _TOLERANCE * max(1.0, end) for end in ends) else ""


@contextlib.contextmanager
def computing_in(mode: str, model: torch.nn.Module) -> Iterator[None]:
    """Have the model's NVFP4 layers compute in ``mode`` where their own is coarser, until the body is left."""
    changed = []
    try:
        for module in model.modules():
            own = module.__dict__.get("nvfp4_mode")
            if own is not None and MODES.index(own) > MODES.index(mode):
                changed.append((module, own))
                choose_mode(module, mode)
        yield
    finally:
        for module, own in changed:
            choose_mode(module, own)


def use_schedule(patcher: Any, steps: str, ranges: str = "") -> str:
    """Let a model compute by a schedule -> what to expect, for the report. Raises PackError, see ``parse_ranges``.

    With several schedules on one model the most exact mode counts.
    """
    if steps not in STEPS:
        raise PackError(f"steps: found {steps!r}; expected {', '.join(STEPS)}")
    parsed = parse_ranges(ranges) if steps == RANGES else ()
    modes = modes_of(patcher.model.diffusion_model)
    if not modes:
        return "none: the model has no NVFP4 layer of the NVFP4 Model Loader"
    if set(modes) == {"bf16"}:
        return "none: all layers compute in bf16 already; load the model with compute int8, fp8, fp4 or auto"
    wrapper = functools.partial(_apply, steps, parsed)
    patcher.add_wrapper_with_key(patcher_extension.WrappersMP.APPLY_MODEL, KEY, wrapper)
    where = "; ".join(map(str, parsed)) if parsed else f"bf16 in the {steps} step"
    return f"{where}; otherwise as loaded: {describe(modes)}"


def _apply(steps: str, ranges: Sequence[Range], executor: Callable, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's APPLY_MODEL wrapper: one call of the model at sigma ``t``."""
    options = next((one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "sample_sigmas" in one), {})
    sigmas = options.get("sample_sigmas")
    sigmas = [] if sigmas is None else sigmas.tolist()
    mode = mode_at(steps, ranges, float(t.max()), sigmas)
    if not mode:
        return executor(x, t, *args, **kwargs)
    outer = options.get(SCHEDULED)
    options[SCHEDULED] = mode if outer is None else min(mode, outer, key=MODES.index)
    try:
        with computing_in(mode, executor.class_obj.diffusion_model):
            return executor(x, t, *args, **kwargs)
    finally:
        if outer is None:
            del options[SCHEDULED]
        else:
            options[SCHEDULED] = outer
