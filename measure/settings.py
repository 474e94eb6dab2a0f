# SPDX-License-Identifier: Apache-2.0
"""What a distilled LTX-2.x model has to be given: sizes it can make, frame counts, audio length, sigmas.

Two stages sample at half the size first, so that the final sides are multiples of 64. ComfyUI's nodes round other
values down without a word. What is fixed about the model is in ltx.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..kernels.errors import PackError
from . import ltx

ONE_STAGE, TWO_STAGES = "one stage", "two stages"
STAGES = (ONE_STAGE, TWO_STAGES)
AS_SET = "as set"
# Card -> stages -> width, height, frames: the largest usual size whose sampling takes less than two minutes, by the
# planner, on the slowest card of that memory that is in wide use (RTX 3060, 5060 Ti, 3090, 5090, GB10), in `bf16`.
CARDS = {
    "12 GB": {ONE_STAGE: (768, 512, 121), TWO_STAGES: (960, 512, 121)},
    "16 GB": {ONE_STAGE: (960, 544, 121), TWO_STAGES: (1280, 704, 121)},
    "24 GB": {ONE_STAGE: (1280, 704, 121), TWO_STAGES: (1536, 896, 121)},
    "32 GB": {ONE_STAGE: (1536, 896, 121), TWO_STAGES: (1920, 1088, 121)},
    "Spark": {ONE_STAGE: (1280, 704, 121), TWO_STAGES: (1536, 896, 121)},
}
# LTXVEmptyLatentAudio's limit for its frame count.
MAX_AUDIO_FRAMES = 1000
_SMALLEST_SIDE = 64  # of EmptyLTXVLatentVideo


@dataclass(frozen=True)
class RenderSettings:
    """All numbers of one render.

    ``width`` and ``height`` are those of the first stage, whose latent is made empty; ``final_width`` and
    ``final_height`` those of the clip. ``notes``: what was changed and why, and what to know.
    """

    version: str
    stages: str
    width: int
    height: int
    final_width: int
    final_height: int
    frames: int
    fps: float
    audio_latents: int
    sigmas: tuple[float, ...]
    sigmas_stage_2: tuple[float, ...]
    cfg: float
    notes: tuple[str, ...]

    @property
    def frame_rate(self) -> int:
        """``fps`` as a whole number, for inputs that take nothing else."""
        return max(round(self.fps), 1)

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.frames / self.fps

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"frame_rate": self.frame_rate, "seconds": self.seconds}

    def __str__(self) -> str:
        stages = "one stage of 8 steps"
        if self.stages == TWO_STAGES:
            stages = f"8 steps at {self.width}x{self.height}, latent upscaled twice, then 3 steps"
        lines = [
            f"LTX-{self.version} distilled: {self.final_width}x{self.final_height}, {self.frames} frames at "
            f"{self.fps:g} fps, {self.seconds:.2f} s; {stages}; cfg {self.cfg:g}",
            f"audio: {self.audio_latents} latents, {self.audio_latents / ltx.AUDIO_LATENTS_PER_SECOND:.2f} s",
            f"sigmas: {', '.join(f'{sigma:g}' for sigma in self.sigmas)}",
        ]
        if self.stages == TWO_STAGES:
            lines.append(f"sigmas of stage 2: {', '.join(f'{sigma:g}' for sigma in self.sigmas_stage_2)}")
        return "\n".join([*lines, *self.notes])


def distilled_settings(
    width: int,
    height: int,
    frames: int = 121,
    fps: float = 24.0,
    *,
    seconds: float = 0.0,
    stages: str = ONE_STAGE,
    version: str = "2.3",
    card: str = AS_SET,
    count_audio: Callable[[int, float], int] = ltx.audio_latents,
) -> RenderSettings:
    """Wishes -> RenderSettings the model can make, each wish moved to the nearest possible value (of two, the smaller).

    ``width``, ``height``: of the finished clip. ``seconds``: if above 0, decides instead of ``frames``. ``card``: one
    of CARDS decides instead of all four.
    ``count_audio``: (frames, fps) -> audio latents; a running ComfyUI's own, where there is one. PackError for a
    value that means nothing.
    """
    _check(width, height, frames, fps, seconds, stages, version, card)
    notes = []
    if card != AS_SET:
        (width, height, frames), seconds = CARDS[card][stages], 0.0
        notes.append(
            f"card: the size and length for {card}; what is set for width, height, frames and seconds does not count. "
            "In `compute`, bf16 loses nothing; fp8 is faster from compute capability 8.9 on"
        )
    step = ltx.SPATIAL * (2 if stages == TWO_STAGES else 1)
    final_width, final_height = (_nearest(side, step, _SMALLEST_SIDE * step // ltx.SPATIAL) for side in (width, height))
    wanted = seconds * fps if seconds > 0 else frames
    count = max(ltx.TEMPORAL * math.ceil((wanted - 1) / ltx.TEMPORAL - 0.5), 0) + 1
    latents = count_audio(count, fps)
    if (final_width, final_height) != (width, height):
        why = "both stages need sides that are multiples of 32, so the final ones" if step > ltx.SPATIAL else "sides"
        notes.append(f"size: {width}x{height} -> {final_width}x{final_height}; {why} are multiples of {step}")
    if seconds > 0:
        notes.append(f"frames: {seconds:g} s at {fps:g} fps are {wanted:g} frames -> {count}, the nearest 8k + 1")
    elif count != frames:
        notes.append(f"frames: {frames} -> {count}; the VAE makes 8k + 1, and ComfyUI would round down without a word")
    notes += _cautions(final_width, final_height, count, fps)
    scale = step // ltx.SPATIAL
    return RenderSettings(
        version, stages, final_width // scale, final_height // scale, final_width, final_height, count, fps, latents,
        ltx.SIGMAS, ltx.SIGMAS_STAGE_2[version], ltx.CFG, tuple(notes),
    )  # fmt: skip


def _check(
    width: int, height: int, frames: int, fps: float, seconds: float, stages: str, version: str, card: str
) -> None:
    for name, value in (("width", width), ("height", height), ("frames", frames), ("fps", fps)):
        if not (math.isfinite(value) and value > 0):
            raise PackError(f"{name} is {value}; expected a number above 0")
    if not (math.isfinite(seconds) and seconds >= 0):
        raise PackError(f"seconds is {seconds}; expected 0 (frames decides) or a length above it")
    choices = ("stages", stages, STAGES), ("version", version, ltx.VERSIONS), ("card", card, (AS_SET, *CARDS))
    for name, value, known in choices:
        if value not in known:
            raise PackError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _nearest(side: int, step: int, smallest: int) -> int:
    """The multiple of ``step`` that is nearest, the smaller of two; at least ``smallest``."""
    return max(-((step - 2 * side) // (2 * step)) * step, smallest)


def _cautions(width: int, height: int, frames: int, fps: float) -> list[str]:
    notes = []
    if fps != round(fps):
        notes.append(
            f"fps: {fps:g} is not whole; `frame_rate` is {max(round(fps), 1)} and makes the sound drift, so connect "
            "`fps`. A ComfyUI whose empty audio latent takes whole numbers only cannot make this clip in sync"
        )
    if frames / fps > ltx.MAX_SECONDS:
        notes.append(f"length: {frames / fps:.1f} s; the model's positions end at {ltx.MAX_SECONDS:g} s")
    if max(width, height) > ltx.MAX_SIDE:
        notes.append(f"size: the model's positions end at {ltx.MAX_SIDE} pixels")
    if frames > MAX_AUDIO_FRAMES:
        notes.append(f"frames: LTXV Empty Latent Audio takes {MAX_AUDIO_FRAMES} at most")
    return notes
