# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on joint graphs of sound and picture: streams, batches, guides, the rate the model is told."""

from __future__ import annotations

from collections.abc import Iterator

from ...measure.ltx import TEMPORAL
from . import kinds
from .fixes import fixes_of
from .links import Node
from .names import shown
from .vaes import DECODE
from .values.latents import BATCHED, GUIDING, Conditioning, Sound, Video, frames_of
from .view import ERROR, WARNING, Finding, View, ids_of

DEFAULT_RATE = 25.0  # what the model takes where the conditioning has no frame rate: comfy/model_base.py
# Nodes that take one stream of a joint latent, by input.
_PICTURE = {
    "VAEDecode": "samples",
    "VAEDecodeTiled": "samples",
    "LTXVTiledVAEDecode": "latents",
    "LTXVSpatioTemporalTiledVAEDecode": "latents",
    "LTXVLatentUpsampler": "samples",
    "LTXVCropGuides": "latent",
    "LTXVAddGuide": "latent",
    "LTXVImgToVideoInplace": "latent",
    kinds.CONCAT: "video_latent",
}
_SOUND = {"LTXVAudioVAEDecode": "samples", kinds.CONCAT: "audio_latent"}
# Those that find their stream in a joint latent themselves.
_TAKE_JOINT = ("VAEDecode", "VAEDecodeTiled", "LTXVAudioVAEDecode", kinds.CONCAT)
_POSITIVE = ("positive", "conditioning", "cond1")  # how samplers and guiders call what the model is told
_MAKE_SOUND = (kinds.EMPTY_AUDIO, "LTXVAudioVAEEncode")
_NAMES = {kinds.VIDEO: "the video latent", kinds.AUDIO: "the audio latent", kinds.JOINT: "a joint latent"}


def swapped_streams(view: View) -> Iterator[Finding]:
    """The sound where the picture is meant, the picture where the sound is, a joint latent where one of them is."""
    for table, meant in ((_PICTURE, kinds.VIDEO), (_SOUND, kinds.AUDIO)):
        for node in view.graph.of_kind(*table):
            got = _stream(view, node, table[node.kind])
            if got in (kinds.UNKNOWN, meant) or (got == kinds.JOINT and node.kind in _TAKE_JOINT):
                continue
            maker = view.graph.behind(node, table[node.kind])
            remedy = f"Connect {_NAMES[meant]} instead"
            if maker.kind == kinds.SEPARATE:
                remedy += f": output {2 if meant == kinds.AUDIO else 1} of {shown(kinds.SEPARATE)}"
            elif got == kinds.JOINT:
                remedy += f", by way of {shown(kinds.SEPARATE)}"
            yield Finding(
                "swapped_streams",
                ERROR,
                f"{node.kind} gets {_NAMES[got]} for its `{table[node.kind]}`.",
                f"It works on {_NAMES[meant]}; the shapes do not fit, and ComfyUI stops here or in what follows.",
                f"{remedy}.",
                ids_of(node, maker),
            )
    for node in view.graph.of_kind(kinds.SEPARATE):
        got = _stream(view, node, "av_latent")
        if got in (kinds.VIDEO, kinds.AUDIO) and node.id in view.graph.used:
            yield Finding(
                "swapped_streams",
                ERROR,
                f"{shown(kinds.SEPARATE)} gets {_NAMES[got]}, in which there is nothing to separate.",
                "It takes the second stream of a joint latent, which is not there, and stops.",
                f"Join both latents with {shown(kinds.CONCAT)} before the sampler, or leave the node out.",
                ids_of(node, view.graph.behind(node, "av_latent")),
            )


def _stream(view: View, node: Node, name: str) -> str:
    """Which stream an input gets, UNKNOWN where that is not certain."""
    found = view.latent(node, name)
    if found.kind != kinds.AUDIO or found.root is None or found.root.kind in _MAKE_SOUND:
        return found.kind
    # The name alone says sound, and the node may put out more than that.
    made = view.graph.output(view.graph.source(node.id, name))
    return kinds.VIDEO if isinstance(made, Video) else kinds.AUDIO if isinstance(made, Sound) else kinds.UNKNOWN


def batches(view: View) -> Iterator[Finding]:
    """Different batch sizes of the two streams that are sampled together."""
    if all(node.inputs.get("batch_size", 1) == 1 for node in view.graph.of_kind(*BATCHED)):
        return
    for sampler in view.joint:
        concat = sampler.latent.root
        video = view.video(view.graph.source(concat.id, "video_latent"))
        sound = view.sound(view.graph.source(concat.id, "audio_latent"))
        counts = [stream.batch if stream is not None else None for stream in (video, sound)]
        if None in counts or counts[0] == counts[1]:
            continue
        yield Finding(
            "batches",
            ERROR,
            f"The picture's batch size is {counts[0]}, the sound's {counts[1]}, and sampling stops.",
            "Both streams are one batch for the model, which ComfyUI packs into one tensor.",
            "Set the same `batch_size` in both empty latents.",
            ids_of(concat, sampler.node),
            fixes_of(view.graph, [(empty.id, "batch_size", int(counts[0])) for empty in _empty_sound(view, concat)]),
        )


def _empty_sound(view: View, concat: Node) -> list[Node]:
    """The empty latent of the sound that a concat node joins, if it is one."""
    root = view.latent(concat, "audio_latent").root
    return [root] if root is not None and root.kind == kinds.EMPTY_AUDIO else []


def uncropped_guides(view: View) -> Iterator[Finding]:
    """Guides that are still behind the clip when it is decoded."""
    for use in view.vaes if view.graph.of_kind(*GUIDING) else ():
        if use.task != DECODE or use.node.id not in view.saved:
            continue
        name = _PICTURE.get(use.node.kind)
        video = view.video(view.graph.source(use.node.id, name)) if name is not None else None
        if video is None or not video.guides:
            continue
        extra = frames_of(video.guides)
        count = "its guides" if extra is None else f"{extra * TEMPORAL} frames of its guides"
        guides = [view.graph.nodes[guide.node] for guide in video.guides]
        yield Finding(
            "uncropped_guides",
            WARNING,
            f"The clip ends with {count}, which were not cropped.",
            f"{guides[0].kind} puts the latents of its pictures behind the clip, where they stay in the decoded film.",
            "Put LTXVCropGuides between the sampler and the decode, with the conditioning that leaves the guide.",
            ids_of(use.node, *guides[:8]),
        )


def old_model(view: View) -> Iterator[Finding]:
    """A model that knows no sound, in a joint graph."""
    for sampler, file in view.known_models((kinds.JOINT,)):
        if file.family == "LTX-Video":
            yield Finding(
                "old_model",
                ERROR,
                f"{file.name} is LTX-Video (0.9.x), which knows no sound, and stops on a joint latent.",
                "Joint latents of sound and picture are for LTX-2 and later.",
                "Choose an LTX-2 model, or sample the video latent alone.",
                ids_of(sampler.node, view.model(sampler.guided_by).loader, sampler.latent.root),
            )


def untold_rate(view: View) -> Iterator[Finding]:
    """A conditioning without a frame rate, where sound or film have another than the one that the model then takes."""
    graph = view.graph
    rated: set[str] | None = None
    sounds: dict[str, tuple[Node | None, float | None]] = {}
    for sampler in view.samplers:
        root = sampler.latent.root
        if sampler.latent.kind != kinds.JOINT or root is None:
            continue
        if root.id not in sounds:
            audio = view.latent(root, "audio_latent").root
            empty = audio is not None and audio.kind == kinds.EMPTY_AUDIO
            sounds[root.id] = audio, graph.number(audio.id, "frame_rate") if empty else None
        audio, rate = sounds[root.id]
        if rate is None or rate == DEFAULT_RATE:
            continue
        name = next((name for name in _POSITIVE if name in sampler.guided_by.inputs), _POSITIVE[0])
        conditioning = graph.behind(sampler.guided_by, name)
        if conditioning is None or conditioning.kind == kinds.CONDITIONING:
            continue
        told = graph.output(graph.source(sampler.guided_by.id, name))
        if not isinstance(told, Conditioning) or told.rate is not None:
            continue
        if rated is None:
            rated = graph.downstream(node.id for node in graph.of_kind(kinds.CONDITIONING))
        if conditioning.id in rated:
            continue  # told by a node whose rate is not known
        yield Finding(
            "untold_rate",
            WARNING,
            f"The model is told no frame rate and takes {DEFAULT_RATE:g}; the sound is for {rate:g}.",
            "Without LTXVConditioning the model spaces the frames for 25 a second, and sound and picture drift apart.",
            f"Put LTXVConditioning with {rate:g} between the text and {sampler.guided_by.kind}.",
            ids_of(sampler.guided_by, audio),
        )
