# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on what other packs and launch flags do to a prompt that would be sound on a plain ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..doctor.profiles import AUDIO_FLAGS
from ..doctor.replaced import FROM_SAMPLER
from . import kinds
from .links import Node
from .loaders import AUDIO_VAE_LOADERS
from .view import ERROR, Finding, View, ids_of

# Nodes that encode sound: how they call the VAE, and the loaders that give them LTX's in the dtype of the flags.
_ENCODERS = {
    "LTXVAudioVAEEncode": ("audio_vae", (*AUDIO_VAE_LOADERS, "VAELoader")),
    "VAEEncodeAudio": ("vae", tuple(AUDIO_VAE_LOADERS)),
}
_SAMPLES_WITHOUT_NOISE = ("DisableNoise",)


def whose_noise(fact: Callable[[str], Any]) -> str:
    """The file whose code stands in the place of the host's ``prepare_noise``; ``fact``: id -> value."""
    return dict(fact("replaced_sampling") or ()).get("comfy.sample.prepare_noise", "another pack")


def replaced_noise(view: View) -> Iterator[Finding]:
    """Joint audio and video where another pack's ``prepare_noise`` makes noise for a plain latent only."""
    if view.fact("joint_noise_crash") is not True:
        return
    whose = whose_noise(view.fact)
    pack = whose.partition("/")[0]
    for sampler in view.samplers:
        if sampler.latent.kind != kinds.JOINT:
            continue
        noise = view.graph.source(sampler.node.id, "noise")
        if noise is not None and view.graph.nodes[noise.node].kind in _SAMPLES_WITHOUT_NOISE:
            continue
        yield Finding(
            "replaced_noise",
            ERROR,
            f"{pack} has replaced ComfyUI's noise by one that cannot take joint audio and video.",
            f"comfy.sample.prepare_noise is {whose}'s. Tried with a joint latent, it stops or makes noise for the "
            "picture alone, on which the sampler stops with tensors of different sizes.",
            _without(pack),
            ids_of(sampler.node),
        )


def replaced_sampling(view: View) -> Iterator[Finding]:
    """Joint audio and video through another pack's sampling function that was tried and cannot take it."""
    crash = view.fact("joint_sampling_crash")
    if not isinstance(crash, tuple) or not crash:
        return
    for sampler in view.samplers:
        if sampler.latent.kind != kinds.JOINT:
            continue
        used = FROM_SAMPLER + str(_sampler_name(view, sampler.node))
        found = next((entry for entry in crash if not entry[0].startswith(FROM_SAMPLER) or entry[0] == used), None)
        if found is None:
            continue
        name, whose = found
        pack = whose.partition("/")[0]
        yield Finding(
            "replaced_sampling",
            ERROR,
            f"{pack} has replaced a sampling function of ComfyUI by one that cannot take joint audio and video.",
            f"{name} is {whose}'s. Tried with a joint latent, it stops or loses a part of it.",
            _without(pack),
            ids_of(sampler.node),
        )


def _sampler_name(view: View, node: Node) -> Any:
    chosen = view.graph.behind(node, "sampler") or node
    return view.graph.value(chosen.id, "sampler_name")


def _without(pack: str) -> str:
    return (
        f"Update {pack}, or disable it: --disable-all-custom-nodes with --whitelist-custom-nodes and the packs that "
        "this workflow needs starts ComfyUI without it."
    )


def audio_dtype(view: View) -> Iterator[Finding]:
    """Sound that is encoded by ComfyUI's audio VAE in another dtype than FP32."""
    started = view.fact("launch_flags")
    flags = [flag for flag in AUDIO_FLAGS if isinstance(started, (list, tuple)) and flag in started]
    if not flags:
        return
    for encoder in view.graph.of_kind(*_ENCODERS):
        name, loaders = _ENCODERS[encoder.kind]
        link = view.graph.source(encoder.id, name)
        loader = view.graph.nodes[link.node] if link is not None else None
        if loader is None or loader.kind not in loaders:
            continue
        yield Finding(
            "audio_dtype",
            ERROR,
            f"With {flags[0]} ComfyUI stops where it encodes sound.",
            "The flag gives every VAE that dtype, also LTX's audio VAE, for which ComfyUI lists FP32 alone: its "
            "encoder gets the spectrum of the sound in FP32.",
            f"Start ComfyUI without {flags[0]}, or load this VAE with NVFP4 VAE Loader, which keeps it in FP32.",
            ids_of(encoder, loader),
        )
