# SPDX-License-Identifier: Apache-2.0
"""What the planning nodes need of the host: its own count of audio latents, tensors of sigmas, the planner's files."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch

from ..checkpoint.file.shards import open_checkpoint
from ..checkpoint.identify.components import find_components
from ..measure import ltx, settings
from ..measure.gpus import NoGpuError, pick_gpu
from ..measure.plan import RenderPlan, make_plan
from ..measure.roofline import Clip

NO_GPU = (
    "No NVIDIA GPU was found on this machine. Choose a card in `gpu`, or type its memory in `memory_gib`: the planner "
    "then says what fits it."
)


def audio_latents(frames: int, fps: float) -> int:
    """Audio latents of a clip as the running ComfyUI counts them: up to 0.25 it rounds up, later to the nearest.

    The host's formula is a method of its audio VAE, which reads nothing but ``latents_per_second``. A host without
    the method gets ``measure.ltx.audio_latents``.
    """
    try:
        host = importlib.import_module("comfy.ldm.lightricks.vae.audio_vae").AudioVAE.num_of_latents_from_frames
    except (ImportError, AttributeError):
        return ltx.audio_latents(frames, fps)
    vae = SimpleNamespace(latents_per_second=ltx.AUDIO_LATENTS_PER_SECOND)
    return int(host(vae, frames, fps))


def distilled(**wishes: object) -> tuple[settings.RenderSettings, torch.Tensor, torch.Tensor]:
    """Arguments of ``distilled_settings`` -> (settings, SIGMAS of stage 1, SIGMAS of stage 2)."""
    found = settings.distilled_settings(**wishes, count_audio=audio_latents)
    return found, torch.tensor(found.sigmas), torch.tensor(found.sigmas_stage_2)


def plan_rendering(
    path: str, clip: Clip, gpu: str, compute: str, text_encoder_gb: float = 0.0, memory_gib: float = 0.0
) -> RenderPlan | str:
    """A checkpoint on disk -> RenderPlan, or what to name where no GPU is found and none is named.

    ``gpu``: "detected" or a name of the table; 0: its memory, the usual text encoder. The planner may stand behind a
    render that is done, so that a machine without a GPU is no error.
    """
    header = open_checkpoint(path).header
    parts, encoder = find_components(header), text_encoder_gb * 1e9 or None
    try:
        chosen = pick_gpu(gpu, memory=memory_gib or None)
    except NoGpuError:
        return NO_GPU
    return make_plan(header.path.name, header.tensors, parts, clip, chosen, compute, encoder)
