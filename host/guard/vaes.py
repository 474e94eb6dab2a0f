# SPDX-License-Identifier: Apache-2.0
"""Which VAE is at which node of a prompt: where it is from, and what the node does with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from .files import FileFacts
from .links import Link, Node
from .loaders import AUDIO_VAE_LOADERS, OUR_VAE_LOADER, UPSCALER_LOADERS, VAE_LOADERS, names_of

if TYPE_CHECKING:
    from .view import View

PICTURES, SOUND = "video", "audio"
DECODE, ENCODE, UPSCALE = "decode", "encode", "upscale"
TILED = "VAEDecodeTiled"
# Lightricks' nodes that tile by themselves, in the scale that the VAE says it has.
OWN_TILES = ("LTXVTiledVAEDecode", "LTXVSpatioTemporalTiledVAEDecode")
# Nodes that encode pictures, with the input that holds them and whether they do it for LTX latents.
ENCODERS = {
    "VAEEncode": False,
    "VAEEncodeTiled": False,
    "LTXVImgToVideo": True,
    "LTXVImgToVideoInplace": True,
    "LTXVAddGuide": True,
    "LTXVImgToVideoConditionOnly": True,
    "LTXVImgToVideoInplaceKJ": True,
    "LTXVAddGuideMulti": True,
    "LTXAddVideoICLoRAGuide": True,
    "LTXAddVideoICLoRAGuideAdvanced": True,
}
UPSCALERS = ("LTXVLatentUpsampler", "LTXVLatentUpsamplerTiled")
_SAMPLES = ("samples", "latents", "latent")
_SAVED = "save_output"  # of Video Combine (VHS): off, it is a preview
_SAVING = re.compile(r"save|video_?combine|createvideo", re.IGNORECASE)


class _Held(NamedTuple):
    """The VAE on a link, as ``Use`` has it."""

    loader: Node
    kind: str | None
    file: FileFacts | None


class Use(NamedTuple):
    """A VAE at ``node``, which does ``task`` with it.

    ``kind``: PICTURES or SOUND, what the VAE is for, None if it is not known.
    """

    node: Node
    task: str
    loader: Node
    kind: str | None
    file: FileFacts | None

    @property
    def tiled(self) -> bool:
        """Whether it is a decode in tiles."""
        return "tiled" in self.node.kind.lower()


_make_use = partial(tuple.__new__, Use)  # a prompt may have thousands; see links.py


def find_uses(view: View) -> list[Use]:
    """Every node with a VAE for pictures at an input called `vae`."""
    nodes = {}
    for node in view.graph.nodes.values():
        if "vae" in node.inputs and (task := _task(node.kind)):
            nodes[node.id] = node, task
    held: dict[Link, _Held] = {}
    found = []
    for node, task in nodes.values():
        link = view.graph.source(node.id, "vae")
        if link is None:
            continue
        if link not in held:
            held[link] = _held(view, view.graph.nodes[link.node])
        if held[link].kind is not None or task == DECODE:  # of an unknown VAE only its decodes are of interest
            found.append(_make_use((node, task, *held[link])))
    return found


def is_ltx(view: View, use: Use) -> bool:
    """Whether the node works on LTX latents."""
    if use.task != DECODE:
        return ENCODERS.get(use.node.kind, use.task == UPSCALE)
    samples = next((name for name in _SAMPLES if name in use.node.inputs), _SAMPLES[0])
    return view.latent(use.node, samples).ltx


def saved_nodes(view: View) -> set[str]:
    """Those whose pictures are saved, not only previewed, and whatever else is needed for that."""
    saving = (node.id for node in view.graph.nodes.values() if _saves(node.kind))
    return view.graph.upstream(node for node in saving if view.graph.value(node, _SAVED) is not False)


def find_sounds(view: View) -> Iterator[tuple[Node, Node, str | None]]:
    """Node, loader and kind of every VAE at an input called `audio_vae`."""
    for node in view.graph.nodes.values():
        if "audio_vae" in node.inputs and (link := view.graph.source(node.id, "audio_vae")) is not None:
            loader = view.graph.nodes[link.node]
            yield node, loader, _kind(view, loader, view.file(loader, VAE_LOADERS))


def upscaler_of(view: View, node: Node) -> tuple[Node | None, str | None]:
    """The loader of a latent upscaler's model, and the file that it names, as far as they are known."""
    link = view.graph.source(node.id, "upscale_model")
    loader = view.graph.nodes[link.node] if link is not None else None
    names = names_of(loader.kind, UPSCALER_LOADERS) if loader is not None else None
    name = view.graph.value(loader.id, names.inputs[0]) if names is not None else None
    return loader, name if isinstance(name, str) else None


def _held(view: View, loader: Node) -> _Held:
    file = view.file(loader, VAE_LOADERS)
    return _Held(loader, _kind(view, loader, file), file)


def _kind(view: View, loader: Node, file: FileFacts | None) -> str | None:
    """What the VAE of a loader is for; of a file that holds both, a checkpoint's or a loader's own choice counts."""
    if names_of(loader.kind, AUDIO_VAE_LOADERS) is not None:
        return SOUND
    if loader.kind == OUR_VAE_LOADER and (chosen := view.graph.value(loader.id, "kind")) in (PICTURES, SOUND):
        return chosen
    if file is None:
        return None
    if file.vae is not None:
        return PICTURES
    return SOUND if file.sound is not None and "ckpt_name" not in loader.inputs else None


@lru_cache(maxsize=1024)
def _task(kind: str) -> str:
    """What a node of this class does with its `vae`, "" if that is not known, or not with pictures."""
    if kind in ENCODERS:
        return ENCODE
    if kind in UPSCALERS:
        return UPSCALE
    return DECODE if "decode" in kind.lower() and "audio" not in kind.lower() else ""


@lru_cache(maxsize=1024)
def _saves(kind: str) -> bool:
    return bool(_SAVING.search(kind))
