# SPDX-License-Identifier: Apache-2.0
"""Nodes that make and cut schedules of sigmas: a line a node; what a scheduler makes is computed by the host itself.

The host's functions are asked with LTX-2's own sampling, `ModelSamplingFlux` with the shift of its model class. Nodes
that need no model are run as they are, where they are ComfyUI's own. Both cost next to nothing, and there are few.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .evaluate import Given, Row, Unknown
from .latents import Joint, Video

MOST = 256  # sigmas of one schedule that are looked at
_LONGEST_TEXT = 2000
_SIGMA = re.compile(r"[-+]?(?:\d*\.*\d+)")  # ManualSigmas' own way of finding numbers
_SAMPLER, _NODES = "comfy_extras/nodes_custom_sampler.py", "nodes.py"
_SHIFT = 2.37  # of LTXV in comfy/supported_models.py, where the class cannot be asked
_TOKENS = 4096  # what LTXVScheduler takes without a latent


class Sigmas(NamedTuple):
    """A schedule, and whether another node may have changed the sampling that it was computed for."""

    values: tuple[float, ...]
    of_model: bool = False


def _manual(given: Given) -> Iterable[Any]:
    text = given.a(str, "sigmas")
    if ".." in text or len(text) > _LONGEST_TEXT:  # no number for the host either; many cost the pattern quadratic time
        raise Unknown
    return (_few(float(number[0]) for number in _SIGMA.finditer(text)),)


def _few(values: Iterable[float]) -> Sigmas:
    found = tuple(values)
    if len(found) > MOST:
        raise Unknown
    return Sigmas(found)


def _split(given: Given) -> Iterable[Any]:
    whole, step = given.a(Sigmas, "sigmas"), given.integer("step")
    if step < 0:
        raise Unknown
    return whole._replace(values=whole.values[: step + 1]), whole._replace(values=whole.values[step:])


def _split_by_denoise(given: Given) -> Iterable[Any]:
    whole = given.a(Sigmas, "sigmas")
    steps = round(max(len(whole.values) - 1, 0) * given.number("denoise"))
    return whole._replace(values=whole.values[:-steps]), whole._replace(values=whole.values[-(steps + 1) :])


def _first_set(given: Given) -> Iterable[Any]:
    whole = given.a(Sigmas, "sigmas")
    return (whole._replace(values=(float(given.number("sigma")), *whole.values[1:])),)


def _basic(given: Given) -> Iterable[Any]:
    return (calculated(given.a(str, "scheduler"), given.integer("steps"), float(given.number("denoise"))),)


def _ltxv(given: Given) -> Iterable[Any]:
    """LTXVScheduler; the latent's size shifts all but its first, its last and, where it stretches, its last but one."""
    inputs = {name: given.number(name) for name in ("max_shift", "base_shift", "terminal")}
    stretch, tokens = given.flag("stretch"), _TOKENS
    if given.has("latent"):
        found = given.maybe("latent")
        video = found.video if isinstance(found, Joint) else found
        known = video.tokens if isinstance(video, Video) and not isinstance(found, Joint) else None
        if known is None and not stretch:
            raise Unknown
        tokens = known or _TOKENS
    shift = {"max_shift": inputs["max_shift"], "base_shift": inputs["base_shift"]}
    if tokens != _TOKENS:
        # What the node makes of a latent of so many tokens is what it makes without one of another pair of shifts.
        shift["max_shift"] += (inputs["max_shift"] - inputs["base_shift"]) / (_TOKENS - 1024) * (tokens - _TOKENS)
    made = by_node("LTXVScheduler", steps=given.integer("steps"), stretch=stretch, terminal=inputs["terminal"], **shift)
    return (made,)


def _alone(kind: str, *names: str, of_model: bool = False) -> Callable[[Given], Iterable[Any]]:
    """A scheduler of the host that needs no model, or only its sampling."""
    return lambda given: (by_node(kind, of_model, **{name: _option(given, name) for name in names}),)


def _option(given: Given, name: str) -> Any:
    if name in ("steps", "model_type"):
        return given.integer(name) if name == "steps" else given.a(str, name)
    return given.number(name)


def _extended(given: Given) -> Iterable[Any]:
    whole = given.a(Sigmas, "sigmas")
    options = {name: given.number(name) for name in ("start_at_sigma", "end_at_sigma")}
    made = by_node("ExtendIntermediateSigmas", whole.of_model, sigmas=whole.values, steps=given.integer("steps"),
                   spacing=given.a(str, "spacing"), **options)  # fmt: skip
    return (made,)


def calculated(scheduler: str, steps: int, denoise: float = 1.0, sampler: str = "") -> Sigmas:
    """What BasicScheduler or a KSampler runs with; Unknown for what the host cannot make, or without a host."""
    if not 1 <= steps <= MOST or not 0 < denoise <= 1 or int(steps / denoise) > 4 * MOST:
        raise Unknown
    total = steps if denoise > 0.9999 else int(steps / denoise)
    values = _calculated(scheduler, total, sampler)
    if values is None:
        raise Unknown
    return Sigmas(values[-(steps + 1) :], of_model=True)


@lru_cache(maxsize=128)
def _calculated(scheduler: str, steps: int, sampler: str) -> tuple[float, ...] | None:
    try:
        samplers = importlib.import_module("comfy.samplers")
        if scheduler not in samplers.SCHEDULER_NAMES:
            return None
        cut = sampler in samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        made = samplers.calculate_sigmas(_sampling(), scheduler, steps + cut)
        values = tuple(made.tolist())
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError):
        return None
    return (*values[:-2], values[-1]) if cut else values


@lru_cache(maxsize=1)
def _sampling() -> Any:
    """The host's sampling object of an LTX-2 model."""
    sampling = importlib.import_module("comfy.model_sampling")
    models = importlib.import_module("comfy.supported_models")
    settings = getattr(getattr(models, "LTXAV", None), "sampling_settings", {"shift": _SHIFT})
    made = type("Sampling", (sampling.ModelSamplingFlux, sampling.CONST), {})
    return made(type("Config", (), {"sampling_settings": settings})())


class _Model:
    """Of a MODEL what schedulers ask it for."""

    @staticmethod
    def get_model_object(name: str) -> Any:
        if name != "model_sampling":
            raise AttributeError(name)
        return _sampling()


def by_node(kind: str, of_model: bool = False, **inputs: Any) -> Sigmas:
    """What a scheduler node of the running ComfyUI makes of numbers, or of sigmas; Unknown without it.

    ``of_model``: whether the sampling of the model counts, which a node without ``sigmas`` is then given.
    """
    if not 1 <= inputs.get("steps", 1) <= MOST:
        raise Unknown
    values = _by_node(kind, of_model, tuple(sorted(inputs.items())))
    if values is None or len(values) > MOST:
        raise Unknown
    return Sigmas(values, of_model)


@lru_cache(maxsize=128)
def _by_node(kind: str, of_model: bool, inputs: tuple[tuple[str, Any], ...]) -> tuple[float, ...] | None:
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", None)
    made_by = classes.get(kind) if isinstance(classes, Mapping) else None
    if not str(getattr(made_by, "RELATIVE_PYTHON_MODULE", "")).startswith("comfy_extras."):
        return None  # another pack's, whose code is not ours to run
    given = dict(inputs)
    try:
        if "sigmas" in given:
            given["sigmas"] = importlib.import_module("torch").tensor(given["sigmas"])
        elif of_model:
            given["model"] = _Model
        return tuple(made_by.execute(**given).result[0].tolist())
    except (ImportError, AttributeError, TypeError, ValueError, LookupError, RuntimeError, ArithmeticError):
        return None


SCHEDULES = {
    "ManualSigmas": Row(_manual, _SAMPLER),
    "SplitSigmas": Row(_split, _SAMPLER),
    "SplitSigmasDenoise": Row(_split_by_denoise, _SAMPLER),
    "SetFirstSigma": Row(_first_set, _SAMPLER),
    "BasicScheduler": Row(_basic, _SAMPLER),
    "LTXVScheduler": Row(_ltxv, "comfy_extras/nodes_lt.py"),
    "KarrasScheduler": Row(_alone("KarrasScheduler", "steps", "sigma_max", "sigma_min", "rho"), _SAMPLER),
    "ExponentialScheduler": Row(_alone("ExponentialScheduler", "steps", "sigma_max", "sigma_min"), _SAMPLER),
    "PolyexponentialScheduler": Row(
        _alone("PolyexponentialScheduler", "steps", "sigma_max", "sigma_min", "rho"), _SAMPLER
    ),
    "LaplaceScheduler": Row(_alone("LaplaceScheduler", "steps", "sigma_max", "sigma_min", "mu", "beta"), _SAMPLER),
    "AlignYourStepsScheduler": Row(
        _alone("AlignYourStepsScheduler", "model_type", "steps", "denoise"), "comfy_extras/nodes_align_your_steps.py"
    ),
    "GITSScheduler": Row(_alone("GITSScheduler", "coeff", "steps", "denoise"), "comfy_extras/nodes_gits.py"),
    "OptimalStepsScheduler": Row(
        _alone("OptimalStepsScheduler", "model_type", "steps", "denoise"), "comfy_extras/nodes_optimalsteps.py"
    ),
    "BetaSamplingScheduler": Row(
        _alone("BetaSamplingScheduler", "steps", "alpha", "beta", of_model=True), _SAMPLER
    ),
    "SDTurboScheduler": Row(_alone("SDTurboScheduler", "steps", "denoise", of_model=True), _SAMPLER),
    "ExtendIntermediateSigmas": Row(_extended, _SAMPLER),
    "VPScheduler": Row(_alone("VPScheduler", "steps", "beta_d", "beta_min", "eps_s"), _SAMPLER),
}
