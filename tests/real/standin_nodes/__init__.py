# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what a scaled-down LTX-2.x graph cannot get from files: text conditioning, an audio latent, an oracle.

A custom node pack of its own, linked into a real ComfyUI by the tests and the demo; no part of NVFP4 Video. V1 nodes,
so that every host loads it.
"""

from __future__ import annotations

import hashlib
import json
import types

import torch


class StandInConditioning:
    """Seeded normal values in place of a text encoder's output."""

    CATEGORY = "NVFP4/tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        """``dim`` is cross_attention_dim + audio_cross_attention_dim (LTX-2.3) or 2 * caption_channels (LTX-2.0)."""
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32}),
                "tokens": ("INT", {"default": 32, "min": 1, "max": 4096}),
                "dim": ("INT", {"default": 192, "min": 1, "max": 65536}),
            }
        }

    def make(self, seed: int, tokens: int, dim: int):
        """-> one CONDITIONING of (1, tokens, dim) FP32."""
        values = torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(seed))
        return ([[values, {}]],)


class StandInAudioLatent:
    """The latent of LTXVEmptyLatentAudio without an audio VAE: (batch, 8, round(frames / rate * 25), 16) zeros."""

    CATEGORY = "NVFP4/tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        """Names as in LTXVEmptyLatentAudio."""
        return {
            "required": {
                "frames_number": ("INT", {"default": 9, "min": 1, "max": 1000}),
                "frame_rate": ("FLOAT", {"default": 25.0, "min": 1.0, "max": 1000.0}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def make(self, frames_number: int, frame_rate: float, batch_size: int):
        """-> the latent dict; 25 latents a second = 16000 Hz / hop 160 / 4."""
        length = round(frames_number / frame_rate * 25)
        return ({"samples": torch.zeros(batch_size, 8, length, 16), "sample_rate": 16000, "type": "audio"},)


class StandInLatentStats:
    """Facts about a latent as JSON, so that two runs can be compared through /history without reading files."""

    CATEGORY = "NVFP4/tests"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "measure"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        """A latent, nested (audio + video) or plain."""
        return {"required": {"latent": ("LATENT",)}}

    def measure(self, latent: dict):
        """-> JSON list, one entry a stream: shape, finite, mean, std, sha256 of the contiguous FP32 bytes."""
        samples = latent["samples"]
        streams = samples.unbind() if getattr(samples, "is_nested", False) else (samples,)
        text = json.dumps([_stats(stream.detach().float().cpu().contiguous()) for stream in streams])
        return {"ui": {"text": (text,)}, "result": (text,)}


class _Writer:
    """What TextGenerateLTX2Prompt asks of a CLIP; its tokens are the text itself."""

    def __init__(self):
        self.tokenizer = types.SimpleNamespace(clip_name="gemma4")

    def tokenize(self, text: str, **_: object) -> str:
        return text

    def generate(self, tokens: str, **_: object) -> str:
        return tokens

    def decode(self, tokens: str) -> str:
        return f"written out: {tokens}"


class StandInTextEncoder:
    """In the place of a text encoder that writes prompts."""

    CATEGORY = "NVFP4/tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        """Nothing."""
        return {"required": {}}

    def make(self):
        """-> the CLIP."""
        return (_Writer(),)


def _stats(stream: torch.Tensor) -> dict:
    return {
        "shape": list(stream.shape),
        "finite": bool(torch.isfinite(stream).all()),
        "mean": float(stream.mean()),
        "std": float(stream.std()),
        "sha256": hashlib.sha256(stream.numpy().tobytes()).hexdigest(),
    }


_NODES = (StandInConditioning, StandInAudioLatent, StandInLatentStats, StandInTextEncoder)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
