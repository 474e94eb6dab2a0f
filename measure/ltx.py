# SPDX-License-Identifier: Apache-2.0
"""What is fixed about LTX-2.x: how its latents divide a clip, and what the distilled models sample with.

Video: 32 x 32 pixels of 8 frames make one latent of 128 channels; the first frame has one of its own, so sides are
multiples of 32 and frame counts 8k + 1. Audio: 16,000 samples a second, one MEL frame per 160 samples, one latent of
8 x 16 numbers per 4 MEL frames: 25 latents a second. Sigmas: as Lightricks publishes them for the distilled models; a
scheduler with 8 steps gives other values.
"""

from __future__ import annotations

from collections.abc import Sequence

VERSIONS = ("2.3", "2.5", "2.0")
SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
SIGMAS_STAGE_2 = {"2.0": SIGMAS[5:], "2.3": (0.85, 0.725, 0.4219, 0.0), "2.5": (0.85, 0.725, 0.4219, 0.0)}
CFG = 1.0
SPATIAL, TEMPORAL, VIDEO_CHANNELS = 32, 8, 128
AUDIO_CHANNELS, AUDIO_BINS = 8, 16
_MEL_PER_LATENT = 4
AUDIO_LATENTS_PER_SECOND = 16_000 / 160 / _MEL_PER_LATENT
# Where the positions of the 2.x models end: `positional_embedding_max_pos` of LTX-2.3 is [20, 2048, 2048].
MAX_SECONDS, MAX_SIDE = 20.0, 2048


def audio_latents(frames: int, fps: float) -> int:
    """Latents of a sound track as long as the picture, as ComfyUI 0.33 counts them: round(frames / fps * 25)."""
    return round(frames / fps * AUDIO_LATENTS_PER_SECOND)


def mel_frames(latents: int) -> int:
    """MEL frames that ``latents`` audio latents decode to: 4n - 3, because the first one is not repeated."""
    return _MEL_PER_LATENT * latents - (_MEL_PER_LATENT - 1)


def latent_size(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Pixels and frames -> (frames, height, width) of the video latent; what does not divide is cut off."""
    return (frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL


def whole_schedule(steps: int) -> tuple[float, ...]:
    """``steps`` of the distilled sigmas, spread over all of them: the last step ends at 0, in a finished clip."""
    last = len(SIGMAS) - 1
    return tuple(SIGMAS[round(step * last / steps)] for step in range(steps + 1))


def sigmas_text(sigmas: Sequence[float]) -> str:
    """Sigmas as ManualSigmas reads them: `1.0, 0.99375, ...`."""
    return ", ".join(map(str, sigmas))
