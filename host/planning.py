# SPDX-License-Identifier: Apache-2.0
"""What the planning nodes need of the host: its own count of audio latents, tensors of sigmas, the planner's files."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch

from ..checkpoint.file.shards import open_checkpoint
from ..checkpoint.identify.components import find_components
from ..measure import ltx, settings
from ..measure.gpus import pick_gpu
from ..measure.plan import RenderPlan, make_plan
from ..measure.roofline import Clip


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


def plan_rendering(path: str, clip: Clip, gpu: str, compute: str, text_encoder_gb: float = 0.0) -> RenderPlan:
    """A checkpoint on disk -> RenderPlan. ``gpu``: "detected" or a name of the table; 0 GB: the usual text encoder."""
    header = open_checkpoint(path).header
    components = find_components(header)
    size = text_encoder_gb * 1e9 or None
    return make_plan(header.path.name, header.tensors, components, clip, pick_gpu(gpu), compute, size)
