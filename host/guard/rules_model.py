# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on models and schedules: the crash, sound, NVFP4 that is slow, distilled or not."""

from __future__ import annotations

from collections.abc import Iterator

from ...measure.ltx import SIGMAS, SIGMAS_STAGE_2, sigmas_text
from ..doctor.cards import is_nvidia
from . import kinds
from .files import FileFacts
from .fixes import fixes_of
from .loaders import MODEL_LOADERS, OUR_MODEL_LOADER, TEXT_LOADERS, distilling_loras, names_of
from .names import shown
from .prompt_graph import Node
from .values.evaluate import Unknown
from .values.schedules import Sigmas, calculated
from .view import CFG_INPUTS, ERROR, WARNING, Finding, Sampler, View, ids_of

STAGE_2 = SIGMAS_STAGE_2["2.3"]  # and 2.5's
_SIGMA_TOLERANCE = 1e-3
_LTX2 = ("LTX-2", "LTX-2.3")
_SAMPLERS = ("KSampler", "KSamplerAdvanced")  # make their schedule themselves
# How much of the distilling LoRA makes the dev model a distilled one: the least that Lightricks' graphs run at cfg 1.
_DISTILLED_FROM = 0.5
_MOST_NAMED = 10
_LOADERS = {**MODEL_LOADERS, **TEXT_LOADERS}


def prefetch_crash(view: View) -> Iterator[Finding]:
    """Joint audio and video through a dynamic model on a host whose prefetch fails once the weights are on the GPU.

    A video-only prompt runs there (benchmarks/launch_crash.py): the audio branch's weights are never used, so no block
    ever counts as resident. LTX-2's model is the only one that this host prefetches.
    """
    dynamic, streams = view.fact("dynamic_vram"), view.fact("async_offload_streams")
    if view.fact("prefetch_crash") is not True or dynamic is False or streams == 0:
        return
    certain = dynamic is True and bool(streams)
    for sampler in view.samplers:
        if sampler.latent.kind != kinds.JOINT:
            continue
        family, model = _family(view, sampler), view.model(sampler.guided_by)
        if model.cured or not (family is None or family in _LTX2):
            continue
        yield Finding(
            "prefetch_crash",
            ERROR if certain else WARNING,
            f"This ComfyUI {'stops' if certain else 'may stop'} in the middle of joint audio and video sampling.",
            "Its prefetch (commit 783782d5, May 2026) waits on a stream that does not exist once a block's weights are "
            "all on the GPU: AttributeError, 'NoneType' object has no attribute 'wait_stream'. It concerns models "
            "under DynamicVRAM with asynchronous offload on.",
            "Put NVFP4 Launch Guard with policy `cure` between the model and this sampler, or update ComfyUI (fixed by "
            "commit c47633f3, two days later), or start it with --disable-async-offload.",
            ids_of(sampler.node, sampler.guided_by, model.loader),
        )


def no_audio_latent(view: View) -> Iterator[Finding]:
    """An audio+video model without an audio latent, where the host cannot do that."""
    if view.fact("ltxav_needs_audio") is not True:
        return
    for sampler, file in view.known_models((kinds.VIDEO,)):
        if file.family in _LTX2:
            yield Finding(
                "no_audio_latent",
                ERROR,
                "This ComfyUI cannot sample an audio and video model without an audio latent.",
                f"{file.name} is {file.family}; this ComfyUI stops in the first step on "
                "the empty sound that it then assumes. ComfyUI 0.29.0 does that, 0.30.0 no longer.",
                f"Join {shown(kinds.EMPTY_AUDIO)} of the same frames and frame rate with {shown(kinds.CONCAT)}, and "
                f"take the video from {shown(kinds.SEPARATE)} behind the sampler; or update ComfyUI.",
                ids_of(sampler.node, sampler.latent.root),
            )


def slow_nvfp4(view: View) -> Iterator[Finding]:
    """NVFP4 through ComfyUI's own loaders on an installation that computes it without comfy-kitchen's CUDA backend."""
    cuda, kitchen = view.fact("torch_cuda"), view.fact("kitchen_backends")
    if view.fact("capability") is None or not is_nvidia(view.fact):  # what is said here is true of NVIDIA's GPUs
        return
    old = isinstance(cuda, tuple) and cuda < (13, 0)
    off = kitchen.get("cuda") if isinstance(kitchen, dict) else None
    if not old and off in (None, True):
        return
    why = "comfy-kitchen's CUDA backend is off"
    if isinstance(off, str):
        why += f" ({off})"
    if old:
        why = f"PyTorch here is built for CUDA {'.'.join(map(str, cuda))}, and comfy-kitchen's NVFP4 kernels need 13"
    kinds = {kind for kind in view.graph.kinds() if names_of(kind, _LOADERS) and kind != OUR_MODEL_LOADER}
    for loader in view.graph.nodes.values() if kinds else ():
        for file in view.files(loader, _LOADERS) if loader.kind in kinds else ():
            if not file.nvfp4:
                continue
            ours = "Load it with NVFP4 Model Loader, which dequantizes with Triton, or install"
            yield Finding(
                "slow_nvfp4",
                WARNING,
                f"{file.name} is NVFP4, which this installation computes slowly.",
                f"{why}; the fallback in plain PyTorch takes five times as long per weight (measured on an H200).",
                f"{ours if names_of(loader.kind, MODEL_LOADERS) else 'Install'} PyTorch for CUDA 13.",
                (loader.id,),
            )


def distilled(view: View) -> Iterator[Finding]:
    """A distilled model sampled with guidance, or with other sigmas than its own."""
    judged: dict[tuple[str, str], str | None] = {}
    for sampler, file in view.known_models():
        evidence = _distilled_by(view, sampler, file) if file.family in _LTX2 else None
        if evidence is None:
            continue
        node, cfg = next(((node, cfg) for node, cfg in view.cfgs(sampler.guided_by) if cfg != 1.0), (None, None))
        if node is not None:
            yield Finding(
                "distilled_cfg",
                WARNING,
                f"A distilled model is sampled with cfg {cfg:g} instead of 1.",
                f"{evidence}; it was trained to run without guidance, which doubles the time of a step and harms the "
                "picture.",
                "Set cfg to 1.",
                ids_of(node, sampler.guided_by, view.model(sampler.guided_by).loader),
                fixes_of(view.graph, [(node.id, name, 1.0) for name in CFG_INPUTS if name in node.inputs]),
            )
        # With a LoRA the schedule is a matter of taste and strength.
        maker = _maker_of_sigmas(view, sampler) if file.distilled else None
        key = (maker.id, sampler.node.id) if maker is not None else None
        if key is not None and key not in judged:
            judged[key] = _foreign_schedule(view, sampler, maker)
        if key is not None and (what := judged[key]):
            yield Finding(
                "distilled_sigmas",
                WARNING,
                "A distilled model is sampled with other sigmas than those it was trained for.",
                f"{evidence}; {what}.",
                f"Use ManualSigmas with {sigmas_text(SIGMAS)} (8 steps); for a second stage {sigmas_text(STAGE_2)}, "
                f"with LTX-2 {sigmas_text(SIGMAS[5:])}.",
                ids_of(maker, sampler.node),
            )


def _distilled_by(view: View, sampler: Sampler, file: FileFacts) -> str | None:
    """What makes a sampler's model a distilled one; None if nothing does, or not enough of it, or it is not known."""
    model = view.model(sampler.guided_by)
    added = model.distilling
    if added is None or (1.0 if file.distilled else 0.0) + added < _DISTILLED_FROM:
        return None
    if file.distilled:
        return f"{file.name} is a distilled {file.family}, as {file.distilled} says"
    lora = next(iter(distilling_loras(view.graph, model.lora)))
    return f"the LoRA {lora.name} makes it a distilled model, as its file name says"


def _maker_of_sigmas(view: View, sampler: Sampler) -> Node | None:
    own = sampler.node.kind in _SAMPLERS
    return sampler.node if own else view.schedule(sampler.node)


def _foreign_schedule(view: View, sampler: Sampler, maker: Node) -> str | None:
    """What the sigmas of a sampler are; None if they are right or unknown."""
    graph = view.graph
    if maker is sampler.node:
        sigmas = _own_sigmas(view, maker)
    else:
        sigmas = view.sigmas(graph.source(sampler.node.id, "sigmas"))
    if sigmas is None or _known_schedule(sigmas.values):
        return None
    if sigmas.of_model and view.model(maker).resampled:
        return None
    numbers = ", ".join(f"{sigma:g}" for sigma in sigmas.values[:_MOST_NAMED])
    more = ", ..." if len(sigmas.values) > _MOST_NAMED else ""
    return f"{'these' if maker.kind == 'ManualSigmas' else f'those of {maker.kind}'} are {numbers}{more}"


def _own_sigmas(view: View, sampler: Node) -> Sigmas | None:
    """What a KSampler runs with, by the host's own function."""

    def number(name: str) -> float | None:
        return view.graph.number(sampler.id, name)

    names = [view.graph.value(sampler.id, name) for name in ("scheduler", "sampler_name")]
    steps = number("steps")
    if steps is None or not all(isinstance(name, str) for name in names):
        return None
    advanced = sampler.kind == "KSamplerAdvanced"
    denoise = 1.0 if advanced else number("denoise")
    start, end = (number("start_at_step"), number("end_at_step")) if advanced else (0, steps)
    if denoise is None or start is None or end is None or start < 0:
        return None
    try:
        found = calculated(names[0], int(steps), denoise, names[1])
    except Unknown:
        return None
    return found._replace(values=found.values[int(start) : int(min(end, steps)) + 1])


def _known_schedule(values: tuple[float, ...]) -> bool:
    """Whether it is one of the trained schedules or a stretch of one."""
    for known in (SIGMAS, STAGE_2):
        for start in range(len(known) - len(values) + 1):
            part = known[start : start + len(values)]
            if values and all(abs(a - b) <= _SIGMA_TOLERANCE for a, b in zip(values, part, strict=True)):
                return True
    return False


def _family(view: View, sampler: Sampler) -> str | None:
    file = view.model_file(sampler)
    return file.family if file is not None else None
