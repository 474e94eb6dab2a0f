# SPDX-License-Identifier: Apache-2.0
"""API-format prompts for a real ComfyUI: joint audio+video sampling of a scaled-down LTX-2.x model."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...checkpoint.identify.signatures import context_width

SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
MODEL, LORA, STATS, FILM = "model", "lora", "stats", "saved film"


def nvfp4_loader(model_name: str, **inputs: str) -> dict:
    """NVFP4ModelLoader; further inputs (dialect, backend, config_from, ...) by name."""
    settings = {"model_name": model_name, "compute": "bf16", "dialect": "auto", "backend": "auto"}
    return {"class_type": "NVFP4ModelLoader", "inputs": settings | inputs}


def stock_loader(unet_name: str) -> dict:
    """The host's own UNETLoader, for comparison."""
    return {"class_type": "UNETLoader", "inputs": {"unet_name": unet_name, "weight_dtype": "default"}}


def sampling(
    loader: dict,
    config: Mapping,
    lora_name: str | None = None,
    lora_strength: float = 1.0,
    width: int = 64,
    height: int = 64,
    frames: int = 9,
    frame_rate: float = 25.0,
    seed: int = 1,
) -> dict[str, dict]:
    """Loader node, transformer config -> prompt: 8 distilled steps, euler, cfg 1, seeded noise and conditioning."""
    model = [LORA if lora_name else MODEL, 0]
    prompt = {
        MODEL: loader,
        "text": _node("StandInConditioning", seed=seed, tokens=32, dim=context_width(config)),
        "conditioning": _node("LTXVConditioning", positive=["text", 0], negative=["text", 0], frame_rate=frame_rate),
        "video": _node("EmptyLTXVLatentVideo", width=width, height=height, length=frames, batch_size=1),
        "audio": _node("StandInAudioLatent", frames_number=frames, frame_rate=frame_rate, batch_size=1),
        "latent": _node("LTXVConcatAVLatent", video_latent=["video", 0], audio_latent=["audio", 0]),
        "guider": _node(
            "CFGGuider", model=model, positive=["conditioning", 0], negative=["conditioning", 1], cfg=1.0
        ),
        "sampler": _node("KSamplerSelect", sampler_name="euler"),
        "sigmas": _node("ManualSigmas", sigmas=SIGMAS),
        "noise": _node("RandomNoise", noise_seed=seed),
        "sampled": _node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        STATS: _node("StandInLatentStats", latent=["sampled", 0]),
    }
    if lora_name:
        prompt[LORA] = _node(
            "LoraLoaderModelOnly", model=[MODEL, 0], lora_name=lora_name, strength_model=lora_strength
        )
    return prompt


def film(prompt: Mapping[str, dict], video_vae: str, audio_vae: str, frame_rate: float = 25.0) -> dict[str, dict]:
    """The prompt of ``sampling`` -> the same that decodes its latents by our VAE loader and saves a film with sound."""
    vaes = {
        f"{kind} vae": _node("NVFP4VAELoader", vae_name=name, kind=kind, allow_preview=False)
        for kind, name in (("video", video_vae), ("audio", audio_vae))
    }
    return {
        **prompt,
        **vaes,
        "latents": _node("LTXVSeparateAVLatent", av_latent=["sampled", 0]),
        "pictures": _node("VAEDecode", samples=["latents", 0], vae=["video vae", 0]),
        "sound": _node("LTXVAudioVAEDecode", samples=["latents", 1], audio_vae=["audio vae", 0]),
        "film": _node("CreateVideo", images=["pictures", 0], audio=["sound", 0], fps=frame_rate),
        FILM: _node("SaveVideo", video=["film", 0], filename_prefix="demo", format="auto", codec="auto"),
    }


def stats_of(outputs: Mapping) -> list[dict]:
    """Outputs of a finished prompt (``history[id]["outputs"]``) -> StandInLatentStats' entries: video, audio."""
    return json.loads(outputs[STATS]["text"][0])


def _node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}
