# SPDX-License-Identifier: Apache-2.0
"""The planner: a file's header, a clip and a GPU -> what fits, what bounds a step, what NVFP4 changes.

The header comes in as plain mappings, so that this stays free of the checkpoint code; the `plan` command and the
NVFP4Planner node read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from ..kernels.errors import PackError
from .escape import report
from .fit import PARTLY, RESIDENT, STREAMING, SWAPPING, TEXT_ENCODER, TOO_LARGE, Fit, advice, fit
from .gpus import Gpu
from .roofline import (
    MODES,
    STEP_ERROR,
    Clip,
    Step,
    TensorEntry,
    Transformer,
    decode_work,
    modes_of,
    prefill_seconds,
    read_model,
    step,
    vae_decode,
)
from .text import gib, table

# A step that takes less than this share of BF16's is called faster.
_FASTER = 0.9
_STEPS = 8
_TITLES = {
    TEXT_ENCODER: "text encoder",
    "text_projection": "text projection",
    "diffusion_model": "diffusion model",
    "video_vae": "video VAE",
    "audio_vae": "audio VAE and vocoder",
}
_VERDICTS = {
    RESIDENT: "fits all at once",
    SWAPPING: "does not fit all at once; it runs, models take turns in GPU memory",
    PARTLY: "does not fit; it runs, partly resident: the rest of the diffusion model is streamed in every step",
    STREAMING: "does not fit; it runs, with all of the diffusion model streamed in every step",
    TOO_LARGE: "does not fit",
}


class HasNames(Protocol):
    """What is needed of a component: tensor name in the file -> name without the component's prefix."""

    names: Mapping[str, str]


@dataclass(frozen=True)
class Choice:
    """The model in a format, computed in a mode. ``seconds``: a step, including the ``streamed`` bytes for it."""

    stored: str
    mode: str
    size: float
    verdict: str
    seconds: float
    floor: float
    bound: str
    streamed: float


@dataclass(frozen=True)
class RenderPlan:
    """Everything the planner has to say. ``model`` and ``step`` are None where it cannot predict, ``notes`` say why."""

    file: str
    gpu: Gpu
    clip: Clip
    mode: str
    fit: Fit
    model: Transformer | None
    step: Step | None
    choices: tuple[Choice, ...]
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether the model runs without weights being streamed in every step."""
        return self.fit.verdict in (RESIDENT, SWAPPING)

    @property
    def seconds(self) -> float | None:
        """A step with what is streamed for it, if both go on at the same time."""
        return max(self.step.seconds, self.fit.stream_seconds) if self.step else None

    def as_dict(self) -> dict:
        """For JSON."""
        plain = {"file": self.file, "gpu": self.gpu.as_dict(), "clip": asdict(self.clip) | {"tokens": self.clip.tokens}}
        plain |= {"mode": self.mode, "runs": self.runs, "seconds": self.seconds}
        plain |= {"fit": self.fit.as_dict(), "advice": advice(self.fit)}
        plain |= {"step": self.step.as_dict() if self.step else None}
        plain |= {"choices": [asdict(one) for one in self.choices]}
        return plain | {"changes": list(self.changes), "notes": list(self.notes)}

    def __str__(self) -> str:
        return report(_lines(self))


def make_plan(
    file: str, tensors: Mapping[str, TensorEntry], components: Mapping[str, HasNames], clip: Clip, gpu: Gpu,
    mode: str = "bf16", text_encoder_bytes: float | None = None,
) -> RenderPlan:  # fmt: skip
    """File name, its header entries and components, clip, GPU, compute mode -> RenderPlan.

    PackError for a file without a diffusion model, an empty clip, or a mode that the GPU cannot run.
    """
    if "diffusion_model" not in components:
        raise PackError(f"{file}: no diffusion model is in it; choose a full checkpoint or a diffusion model")
    if not clip.fps > 0 or clip.tokens["video"] <= 0:
        raise PackError(f"{clip.width}x{clip.height}, {clip.frames} frames at {clip.fps:g} fps is no clip; expected "
                         "at least 32x32, 1 frame and an fps above 0")  # fmt: skip
    if gpu.known and modes_of(gpu)[mode]:
        raise PackError(f"{mode} compute: {modes_of(gpu)[mode]}; choose bf16")
    sizes = {part: sum(tensors[name].nbytes for name in found.names) for part, found in components.items()}
    model = read_model({own: tensors[name] for name, own in components["diffusion_model"].names.items()})
    own_vae = components["video_vae"].names.values() if "video_vae" in components else ()
    version = "2.5" if "decoder.conv_in_x_t.weight" in own_vae else ""
    options = {"text_encoder": text_encoder_bytes, "vae_version": version}
    found = fit(sizes, clip, gpu, model=model, mode=mode, **options)
    notes = [gpu.choice] if gpu.choice else []
    if model is None:
        notes.append("not an LTX transformer: sizes only; its working memory and times are not predicted")
    elif not gpu.known:
        why = gpu.note or "it is not in the table"
        notes.append(f"no times for {gpu.name}: {why}. State its bandwidth and TFLOP/s for them")
    if model is None or not gpu.known:
        return RenderPlan(file, gpu, clip, mode, found, model, None, (), (), tuple(notes))
    notes += [f"{other} compute: {reason}" for other, reason in modes_of(gpu).items() if reason]
    choices = tuple(_choices(sizes, model, clip, gpu, options))
    now = step(model, clip, gpu, mode)
    return RenderPlan(file, gpu, clip, mode, found, model, now, choices, tuple(_changes(choices)), tuple(notes))


def _choices(sizes: Mapping[str, float], model: Transformer, clip: Clip, gpu: Gpu, options: Mapping):
    for stored in ("BF16", "FP8", "NVFP4"):
        other = model.stored_as(stored)
        size = sizes["diffusion_model"] + other.weight_bytes - model.weight_bytes
        for mode in MODES[: {"BF16": 1, "FP8": 2, "NVFP4": 3}[stored]]:
            if modes_of(gpu)[mode]:
                continue
            one = step(other, clip, gpu, mode)
            found = fit({**sizes, "diffusion_model": size}, clip, gpu, model=other, mode=mode, **options)
            streams = found.stream_seconds > one.seconds
            bound = "bound by the bus" if streams else one.bound
            seconds = max(one.seconds, found.stream_seconds)
            yield Choice(stored, mode, size, found.verdict, seconds, one.floor, bound, found.streamed)


def _changes(choices: tuple[Choice, ...]):
    """One sentence for each way to compute NVFP4: what it changes against BF16."""
    plain = next(one for one in choices if one.stored == "BF16")
    fp8 = next(one for one in choices if one.stored == "FP8")
    for one in (one for one in choices if one.stored == "NVFP4"):
        smaller = f"{1 - one.size / plain.size:.0%} smaller than BF16, {1 - one.size / fp8.size:.0%} than FP8"
        ratio = one.seconds / plain.seconds
        what = "size, not speed" if ratio >= _FASTER else "size and speed"
        streams = "; BF16 has to be streamed in every step" if plain.streamed > one.streamed == 0 else ""
        same = ", the same products" if one.mode == "bf16" else ""
        yield f"{one.mode} compute: {what} ({smaller}; {ratio:.2f}x the step{same}{streams})"


def _lines(plan: RenderPlan):
    clip, gpu, found = plan.clip, plan.gpu, plan.fit
    tokens = clip.tokens
    yield f"{_VERDICTS[found.verdict]} ({gib(found.total)} of weights, {gib(gpu.memory)} of memory)"
    yield from (f"  {line}" for line in advice(found))
    yield ""
    yield f"{plan.file} on {gpu.name}, {plan.mode} compute"
    if gpu.choice:
        yield gpu.choice
    yield (
        f"{clip.width}x{clip.height}, {clip.frames} frames at {clip.fps:g} fps: {tokens['video']:,} video tokens, "
        f"{tokens['audio']:,} audio tokens"
    )
    yield ""
    rows = [("weights", "size", "")]
    for name, title in _TITLES.items():
        if name in found.sizes:
            rows.append((title, gib(found.sizes[name]), "assumed: not in this file" if name in found.assumed else ""))
    yield from table(rows)
    yield ""
    rows = [("phase", "weights", "working", "always free", "in all", "fits alone", "with the rest")]
    for one in found.phases:
        numbers = (gib(value) for value in (one.weights, one.working, one.free, one.needs))
        rows.append((one.name, *numbers, "yes" if one.alone else "no", "yes" if one.beside_the_rest else "no"))
    yield from table(rows)
    if plan.step:
        yield ""
        yield from _times(plan, plan.step)
    said = [note for note in plan.notes if note != gpu.choice]
    if said:
        yield ""
        yield from said
    if gpu.note or gpu.source:
        yield f"values of {gpu.name}: {'; '.join(filter(None, [gpu.source, gpu.note]))}"


def _times(plan: RenderPlan, now: Step):
    yield f"a step: {plan.seconds:.2f} s predicted, {now.floor:.2f} s at least; {now.bound}"
    parts = {
        "math": "Linears",
        "weights": "waiting for weights",
        "attention": "attention",
        "between": "norms, gates, GELU",
    }
    shares = ", ".join(f"{title} {now.shares[kind]:.3f} s" for kind, title in parts.items())
    yield f"  GPU {now.gpu_seconds:.2f} s ({shares}); CPU {now.cpu_seconds:.2f} s of launches"
    error = f"within {STEP_ERROR:.0%} on an H200, unknown elsewhere"
    yield f"  {_STEPS} steps: {_STEPS * plan.seconds:.1f} s. Errors: {error}"
    gpu = plan.gpu
    size = plan.fit.sizes[TEXT_ENCODER]
    yield (
        f"at least: prompt {prefill_seconds(gpu, size, plan.clip.text_tokens):.2f} s, a token that the text encoder "
        f"writes {1000 * decode_work(gpu, size).floor:.1f} ms (memory-bound), "
        f"VAE decode {vae_decode(gpu, plan.clip):.2f} s"
    )
    yield ""
    rows = [("format", "compute", "size", "step", "at least", "memory", "bound by")]
    for one in plan.choices:
        numbers = gib(one.size), f"{one.seconds:.2f} s", f"{one.floor:.2f} s"
        bound = one.bound.replace("bound by ", "").replace("-bound", "").replace(" alike", "")
        rows.append((one.stored, one.mode, *numbers, one.verdict, bound))
    yield from table(rows)
    yield ""
    yield "what NVFP4 changes here:"
    yield from (f"  {line}" for line in plan.changes)
