# SPDX-License-Identifier: Apache-2.0
"""Walks back through a prompt along one kind of input: from a sampler to its model's loader, its latent's beginning.

Knows the class names and inputs of ComfyUI's own nodes. Other packs' nodes are recognised by their inputs where that
is safe and are unknown where it is not; every walk remembers what it found, so that shared parts are walked once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from .kinds import AUDIO, CFG_OVERRIDE, CONCAT, GUARD_NODE, JOINT, SEPARATE, SIZED, UNKNOWN, UPSAMPLER, VIDEO
from .loaders import distilling_loras
from .prompt_graph import Node, PromptGraph

# Latent in, latent of the same kind out.
_LATENT_IN = {
    "SamplerCustomAdvanced": "latent_image",
    "SamplerCustom": "latent_image",
    "KSampler": "latent_image",
    "KSamplerAdvanced": "latent_image",
    UPSAMPLER: "samples",
    "LTXVImgToVideoInplace": "latent",
    "LTXVAddGuide": "latent",
    "LTXVAddLatentGuide": "latent",
    "LTXVCropGuides": "latent",
    "SetLatentNoiseMask": "samples",
    "LTXVNormalizingSampler": "latent_image",
    "LTXVLoopingSampler": "latents",
    "LTXVTiledSampler": "latents",
    "LTXVExtendSampler": "latents",
    "LTXVImgToVideoConditionOnly": "latent",
    "LTXVImgToVideoInplaceKJ": "latent",
    "LTXVAddGuideMulti": "latent",
    "LTXAddVideoICLoRAGuide": "latent",
    "LTXAddVideoICLoRAGuideAdvanced": "latent",
    "LTXDirectorGuide": "latent",
    "LTXVSetAudioVideoMaskByTime": "av_latent",
    "LTXVLatentUpsamplerTiled": "samples",
    "LatentUpscale": "samples",
    "LatentUpscaleBy": "samples",
}
_RESAMPLED = "ModelSampling"
ENCODERS = ("VAEEncode", "VAEEncodeTiled")
_VIDEO_ROOTS = (*SIZED, *ENCODERS)
_SPLIT_SIGMAS = "SplitSigmas"
_MOST_OVERRIDES = 16  # of one model's cfg
# On the way from a decode to the video, these change how many frames there are.
_RETIMES = re.compile(r"interpol|rife|film|fps|frame|every|interleav|expand|speed|duplicat", re.IGNORECASE)


class Latent(NamedTuple):
    """``kind``: JOINT, VIDEO, AUDIO or UNKNOWN. ``root``: the node where it begins, the concat node of a joint one."""

    kind: str
    ltx: bool
    root: Node | None


class ModelPath(NamedTuple):
    """Where a MODEL comes from: ``loader``, its file, and what is on the way.

    ``lora``: a node with a distilling LoRA; ``distilling``: the strengths of all of them, None where one is unknown.
    ``cured``: a guard cures it. ``resampled``: its sampling is another than that of its class. ``overrides``: the nodes
    that change its cfg, the one nearest the sampler last.
    """

    loader: Node | None
    lora: Node | None = None
    cured: bool = False
    distilling: float | None = 0.0
    resampled: bool = False
    overrides: tuple[Node, ...] = ()


_make_latent = partial(tuple.__new__, Latent)
_NO_MODEL, _NO_LATENT = ModelPath(None), Latent(UNKNOWN, False, None)
_SEPARATED = (Latent(VIDEO, True, None), Latent(AUDIO, True, None))  # by whether it is the second output


class Walks:
    """The walks through one prompt, and what they have found."""

    def __init__(self, graph: PromptGraph):
        self.graph = graph
        self._kept: dict[str, bool] = {}
        self._schedules: dict[str, Node] = {}
        self._models: dict[str, ModelPath] = {}  # by the node that hands one on
        self._taken: dict[str, ModelPath] = {}  # by the node that takes one
        self._latents: dict[str, Latent] = {}

    def model(self, node: Node) -> ModelPath:
        """The MODEL that a node takes, along the `model` inputs up to its loader."""
        found = self._taken.get(node.id)
        if found is None:
            start = self.graph.behind(node, "model")
            found = self._models.get(start.id) if start is not None else _NO_MODEL
            if found is None:
                found = self._walk(start, self._models, _NO_MODEL, self._model_before, _model_after)
            self._taken[node.id] = found
        return found

    def latent(self, node: Node, name: str) -> Latent:
        """The LATENT at an input: from the node that makes it, through those that keep its kind."""
        passed_on = _LATENT_IN.get(node.kind) == name  # so that it is what the node itself puts out
        start = node if passed_on else self._latent_behind(node, name)
        if type(start) is Node and (known := self._latents.get(start.id)) is not None:
            return known
        return self._walk(start, self._latents, _NO_LATENT, self._latent_before)

    def schedule(self, node: Node) -> Node | None:
        """The node that makes the SIGMAS that another takes, those that only cut a schedule skipped."""
        behind = self.graph.behind(node, "sigmas")
        return self.graph.nodes.get(self._walk(behind, self._schedules, "", self._schedule_before))

    def keeps_time(self, node: Node) -> bool:
        """Whether the `images` of a node are those of a decode, one for one, as far as the names of nodes tell."""
        behind = self.graph.behind(node, "images")
        return self._walk(behind, self._kept, False, self._pictures_before, _pictures_after)

    def _walk(
        self, node: Node | None, memory: dict[str, Any], end: Any, before: Callable, after: Callable | None = None
    ) -> Any:
        """Back from node to node until ``before`` gives a result; then forth, each result from the one before."""
        path: list[Node] = []
        while type(node) is Node and (known := memory.get(node.id)) is None:
            memory[node.id] = end  # what a cycle comes back to
            path.append(node)
            node = before(node)
        result = end if node is None else known if type(node) is Node else node
        for node in path if after is None else ():
            memory[node.id] = result
        for node in reversed(path) if after is not None else ():
            memory[node.id] = result = after(self.graph, node, result)
        return result

    def _model_before(self, node: Node) -> Node | ModelPath:
        return self.graph.behind(node, "model") or ModelPath(node)

    def _schedule_before(self, node: Node) -> Node | str:
        return (self.graph.behind(node, "sigmas") if node.kind == _SPLIT_SIGMAS else None) or node.id

    def _pictures_before(self, node: Node) -> Node | bool:
        before = self.graph.behind(node, "images") or self.graph.behind(node, "image")
        return before or "decode" in node.kind.lower()

    def _latent_behind(self, node: Node, name: str) -> Node | Latent | None:
        """The node that the latent at an input is from, or the stream of a separate node, which has one an output."""
        behind = self.graph.behind(node, name)
        if behind is None or behind.kind != SEPARATE:
            return behind
        return _SEPARATED[self.graph.source(node.id, name).slot == 1]

    def _latent_before(self, node: Node) -> Node | Latent | None:
        name = _LATENT_IN.get(node.kind)
        if name is not None:
            return self._latent_behind(node, name)
        return _make_latent((*_made_by(node.kind), node))


@lru_cache(maxsize=1024)
def _made_by(kind: str) -> tuple[str, bool]:
    """Which kind of latent begins at a node of this class, and whether it is LTX's."""
    if kind == CONCAT:
        return JOINT, True
    ltx = kind.startswith(("LTXV", "EmptyLTXV"))
    if kind in _VIDEO_ROOTS:
        return VIDEO, ltx
    return AUDIO if "audio" in kind.lower() else UNKNOWN, ltx


def _model_after(graph: PromptGraph, node: Node, before: ModelPath) -> ModelPath:
    kind = node.kind
    if kind == GUARD_NODE and graph.value(node.id, "policy") == "cure":
        before = before._replace(cured=True)
    if _RESAMPLED in kind:
        before = before._replace(resampled=True)
    if kind == CFG_OVERRIDE and len(before.overrides) < _MOST_OVERRIDES:
        before = before._replace(overrides=(*before.overrides, node))
    for _, strength in distilling_loras(graph, node):
        if strength != 0:
            known = before.distilling is not None and strength is not None
            before = before._replace(lora=node, distilling=before.distilling + strength if known else None)
    return before


def _pictures_after(_: PromptGraph, node: Node, before: bool) -> bool:
    return before and not _RETIMES.search(node.kind)
