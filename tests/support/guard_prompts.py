# SPDX-License-Identifier: Apache-2.0
"""A sound LTX-2.3 prompt to change, facts to check it with, and short forms of what the guard says."""

from __future__ import annotations

from nvfp4_video.host.doctor.facts import Fact
from nvfp4_video.host.guard import check as guard


def node(class_type: str, **inputs: object) -> dict:
    """A node of an API prompt."""
    return {"class_type": class_type, "inputs": inputs}


DISTILLED = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"


def facts(**values: object) -> dict[str, Fact]:
    """Facts of these values; the rest is not there."""
    return {name: Fact(name, "", name, value, str(value), "made") for name, value in values.items()}


HEALTHY = facts(
    prefetch_crash=False, dynamic_vram=True, async_offload_streams=2, ltxav_needs_audio=False, torch_cuda=(13, 0),
    capability=(12, 0), kitchen_backends={"cuda": True, "eager": True},
)  # fmt: skip
VULNERABLE = HEALTHY | facts(prefetch_crash=True)


def clip(**changes: dict) -> dict[str, dict]:
    """A sound one-stage LTX-2.3 graph with sound; ``changes``: inputs to replace or add, by node."""
    prompt = {
        "model": node("UNETLoader", unet_name="ltx-2.3-distilled.safetensors", weight_dtype="default"),
        "conditioning": node("LTXVConditioning", positive=["p", 0], negative=["n", 0], frame_rate=24),
        "video": node("EmptyLTXVLatentVideo", width=768, height=512, length=121, batch_size=1),
        "audio": node("LTXVEmptyLatentAudio", frames_number=121, frame_rate=24, batch_size=1, audio_vae=["av", 0]),
        "latent": node("LTXVConcatAVLatent", video_latent=["video", 0], audio_latent=["audio", 0]),
        "guider": node("CFGGuider", model=["model", 0], positive=["conditioning", 0], cfg=1.0),
        "sigmas": node("ManualSigmas", sigmas=DISTILLED),
        "sampler": node(
            "SamplerCustomAdvanced", guider=["guider", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]
        ),
        "separate": node("LTXVSeparateAVLatent", av_latent=["sampler", 0]),
        "vae": node("VAELoader", vae_name="ltx_vae.safetensors"),
        "decode": node("VAEDecode", samples=["separate", 0], vae=["vae", 0]),
        "create": node("CreateVideo", images=["decode", 0], fps=24),
        "save": node("SaveVideo", video=["create", 0]),
    }
    for name, inputs in changes.items():
        if "class_type" in inputs:
            prompt[name] = inputs
        else:
            prompt[name]["inputs"] |= inputs
    return prompt


def ids(prompt: dict, host: dict[str, Fact] = HEALTHY) -> dict[str, str]:
    """Finding id -> severity."""
    return {finding.id: finding.severity for finding in guard.check(prompt, host)}


def only(prompt: dict, host: dict[str, Fact] = HEALTHY) -> guard.Finding:
    """The one finding."""
    (finding,) = guard.check(prompt, host)
    return finding
