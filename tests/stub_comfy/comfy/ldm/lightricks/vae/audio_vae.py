# SPDX-License-Identifier: Apache-2.0
"""The audio VAE's classes. Up to 0.15 AudioVAE took ``(state_dict, metadata)`` and no VocoderWithBWE was there."""

from __future__ import annotations

__all__ = ["AudioVAE", "VocoderWithBWE"]


class AudioVAE:
    """Here it is only looked at: today's hosts build it in ``comfy.sd.VAE``."""

    def __init__(self, *args, **kwargs):
        raise RuntimeError("the stub has no audio VAE of its own")


class VocoderWithBWE:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("the stub has no vocoder of its own")
