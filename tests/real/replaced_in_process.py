# SPDX-License-Identifier: Apache-2.0
"""Trials of sampling functions in the host's own process: its own ones, and ones like those of older packs.

usage: <the host's python> replaced_in_process.py, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import in_process

PACK = "/srv/ComfyUI/custom_nodes/ComfyUI_Old/sampling.py"


def of_pack(function):
    """The function as one of another pack's file."""
    code = function.__code__.replace(co_filename=PACK)
    return type(function)(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def without_packing(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False):
    return self.outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar)


def counts(model, latent_image, *_, **__):
    importlib.import_module("torch").count_nonzero(latent_image)
    return latent_image


def of_pictures(model, x, sigmas, extra_args=None, callback=None, disable=None):
    *_, height, width = x.shape
    if len(x.shape) < 4 or height < 2:
        raise ValueError("no picture")
    return x


def needs_more(model, x, sigmas, settings, extra_args=None, callback=None, disable=None):
    return x


def gather() -> dict:
    replaced = importlib.import_module("nvfp4_video.host.doctor.replaced")
    trials = importlib.import_module("nvfp4_video.host.doctor.trials")
    torch = importlib.import_module("torch")
    sample, samplers = in_process.comfy("sample"), in_process.comfy("samplers")
    functions = importlib.import_module("comfy.k_diffusion.sampling")
    found = {"own": replaced.joint_sampling_crash()}
    judged, wrong = [], []
    for name in trials.sampler_functions():
        function = getattr(functions, name)
        try:
            replaced._through_sampler(function, torch.zeros(replaced._PICTURE))
        except Exception:  # noqa: S112  (it needs what is not here, and is not judged)
            continue
        judged.append(name)
        wrong += [name] if replaced._wrong_with(replaced._through_sampler, function) else []
    found |= {"judged": judged, "wrong": wrong}

    def passes_on(self, *arguments, **named):
        return own(self, *arguments, **named)

    own = samplers.CFGGuider.sample
    for place, name, function in (
        (samplers.CFGGuider, "sample", of_pack(without_packing)), (samplers.CFGGuider, "sample", of_pack(passes_on)),
        (sample, "fix_empty_latent_channels", of_pack(counts)), (functions, "sample_euler", of_pack(of_pictures)),
        (functions, "sample_euler", of_pack(needs_more)), (functions, "sample_of_a_pack", of_pack(of_pictures)),
    ):  # fmt: skip
        before = getattr(place, name, None)
        setattr(place, name, function)
        found[f"{name} {function.__name__}"] = replaced.joint_sampling_crash()
        setattr(place, name, before) if before is not None else delattr(place, name)
    return found


def main() -> None:
    in_process.bring_up_host()
    sys.stdout.write(f"\n{in_process.MARK}{json.dumps(gather())}\n")


if __name__ == "__main__":
    main()
