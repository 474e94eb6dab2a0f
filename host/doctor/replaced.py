# SPDX-License-Identifier: Apache-2.0
"""Trials of what other packs put in the place of the host's sampling functions: with a tiny joint latent, on the CPU.

A function is tried with a plain latent first. What fails on that too is not judged: it may need more than a trial has.
The host's own functions are not tried. A function is tried once, never beside a prompt, and leaves torch's generators
as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import trials
from .facts import comfy, module

FROM_SAMPLER = "comfy.k_diffusion.sampling.sample_"  # and the sampler's name
_PICTURE, _SOUND = (1, 2, 2, 2, 2), (1, 2, 3, 2)
_STEPS = (1.0, 0.5, 0.0)
_judged: dict[str, tuple[Callable, str | None]] = {}  # name -> the function tried last, what is wrong with it


def joint_sampling_crash() -> tuple[tuple[tuple[str, str], ...], str]:
    """(Function of the host, whose code in its place cannot take a joint latent), ..."""
    found, texts = [], []
    for name, function in trials.replaced():
        trial = _TRIALS.get(name) or (_through_sampler if name.startswith(FROM_SAMPLER) else None)
        if trial is None:
            continue
        if not _knows_joint():
            return (), "no, this ComfyUI has no joint latents"
        if name not in _judged or _judged[name][0] is not function:
            trials.only_while_idle()
            _judged[name] = function, _wrong_with(trial, function)
        if wrong := _judged[name][1]:
            found.append((name, trials.origin(function)))
            texts.append(f"{name} is {found[-1][1]}'s, which {wrong}")
    return tuple(found), "yes: " + "; ".join(texts) if texts else "no"


def _knows_joint() -> bool:
    """Whether the host has the type of joint latents, which came with LTX-2."""
    try:
        comfy("nested_tensor")
    except ModuleNotFoundError as error:
        if error.name != "comfy.nested_tensor":
            raise
        return False
    return True


def _wrong_with(trial: Callable[[Callable, Any], Any], function: Callable) -> str | None:
    """What a function does to a joint latent instead of giving one of the same shapes; None if it does that."""
    torch = module("torch")
    with trials.generators_kept(torch):
        try:
            if tuple(trial(function, torch.zeros(_PICTURE)).shape) != _PICTURE:
                return None
        except Exception:  # it needs what is not here
            return None
        nested = comfy("nested_tensor").NestedTensor([torch.zeros(_PICTURE), torch.zeros(_SOUND)])
        try:
            made = trial(function, nested)
        except Exception as error:
            return f"stops on a joint latent ({type(error).__name__})"
    try:
        shapes = [tuple(part.shape) for part in made.unbind()] if made.is_nested else []
    except (AttributeError, TypeError):  # it gives no latent at all
        shapes = []
    return None if shapes == [_PICTURE, _SOUND] else "loses a part of a joint latent"


def _through_channels(function: Callable, latent: Any) -> Any:
    """``fix_empty_latent_channels(model, latent)``."""
    latent_format = comfy("latent_formats").LatentFormat()
    latent_format.latent_channels, latent_format.latent_dimensions = _PICTURE[1], 3
    return function(SimpleNamespace(get_model_object=lambda _: latent_format), latent)


def _through_guider(function: Callable, latent: Any) -> Any:
    """``CFGGuider.sample``, which packs a joint latent into one tensor for what it calls, and unpacks the result."""
    torch = module("torch")
    cpu = torch.device("cpu")
    guider = comfy("samplers").CFGGuider(comfy("model_patcher").ModelPatcher(torch.nn.Identity(), cpu, cpu))

    def packed(noise: Any, latent_image: Any, *_: Any, **__: Any) -> Any:
        if getattr(noise, "is_nested", False) or getattr(latent_image, "is_nested", False):
            raise TypeError("a joint latent that was not packed")
        return latent_image

    guider.outer_sample = packed
    return function(guider, latent, latent, None, torch.tensor(_STEPS), disable_pbar=True)


def _through_sampler(function: Callable, latent: Any) -> Any:
    """A function of k_diffusion, which gets a joint latent packed: (1, 1, all its numbers)."""
    torch, utils = module("torch"), comfy("utils")
    made_of = comfy("model_sampling")
    sampling = type("Sampling", (made_of.ModelSamplingFlux, made_of.CONST), {})()
    patcher = SimpleNamespace(get_model_object=lambda _: sampling)
    inner = SimpleNamespace(model_patcher=patcher, model_sampling=sampling)
    inner.inner_model = inner

    def model(x: Any, sigma: Any, model_options: Any = None, **_: Any) -> Any:
        denoised = torch.zeros_like(x)
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            function({"denoised": denoised, "uncond_denoised": denoised})
        return denoised

    model.inner_model = inner
    nested = getattr(latent, "is_nested", False)
    x, shapes = utils.pack_latents(latent.unbind()) if nested else (latent, None)
    options = {"model_options": {}, "seed": 0}
    made = function(model, x, torch.tensor(_STEPS), extra_args=options, callback=None, disable=True)
    return comfy("nested_tensor").NestedTensor(utils.unpack_latents(made, shapes)) if nested else made


_TRIALS: dict[str, Callable[[Callable, Any], Any]] = {
    "comfy.sample.fix_empty_latent_channels": _through_channels,
    "comfy.samplers.CFGGuider.sample": _through_guider,
}
