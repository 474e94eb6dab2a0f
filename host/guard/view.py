# SPDX-License-Identifier: Apache-2.0
"""What a prompt graph does, in the terms the guard's rules speak: samplers, their models and latents, decodes.

Knows the class names and inputs of ComfyUI's own nodes. Other packs' nodes are recognised by their inputs where that
is safe and are unknown where it is not; every walk remembers what it found, so that shared parts are walked once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from ..files import VAE_FOLDERS
from .files import FileFacts, file_facts, name_says_distilled
from .prompt_graph import Link, Node, PromptGraph

GUARD_NODE = "NVFP4LaunchGuard"
OUR_MODEL_LOADER, OUR_VAE_LOADER = "NVFP4ModelLoader", "NVFP4VAELoader"
# Loader class -> the input that names the file, and the model folders it is looked up in.
MODEL_LOADERS = {
    OUR_MODEL_LOADER: ("model_name", ("diffusion_models", "checkpoints")),
    "UNETLoader": ("unet_name", ("diffusion_models",)),
    "CheckpointLoaderSimple": ("ckpt_name", ("checkpoints",)),
    "CheckpointLoader": ("ckpt_name", ("checkpoints",)),
}
TEXT_LOADERS = {
    "LTXAVTextEncoderLoader": ("text_encoder", ("text_encoders",)),
    "CLIPLoader": ("clip_name", ("text_encoders",)),
}
VAE_LOADERS = {
    OUR_VAE_LOADER: ("vae_name", VAE_FOLDERS),
    "VAELoader": ("vae_name", ("vae", "vae_approx")),
    "VAELoaderKJ": ("vae_name", ("vae", "vae_approx")),
    "CheckpointLoaderSimple": ("ckpt_name", ("checkpoints",)),
    "CheckpointLoader": ("ckpt_name", ("checkpoints",)),
}
CONCAT, SEPARATE, EMPTY_AUDIO = "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "LTXVEmptyLatentAudio"
UPSAMPLER, CONDITIONING, CREATE_VIDEO = "LTXVLatentUpsampler", "LTXVConditioning", "CreateVideo"
SPLIT_SIGMAS = "SplitSigmas"
SIZED = ("EmptyLTXVLatentVideo", "LTXVImgToVideo")  # have width, height, length
JOINT, VIDEO, AUDIO, UNKNOWN = "joint", "video", "audio", "unknown"

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
}
_VIDEO_ROOTS = (*SIZED, "VAEEncode", "VAEEncodeTiled")
_SAMPLES = ("samples", "latents", "latent")
_SAVING = ("save", "videocombine", "video_combine", "createvideo")

# On the way from a decode to the video, these change how many frames there are.
_RETIMES = re.compile(r"interpol|rife|film|fps|frame", re.IGNORECASE)
_MOST_FILES = 100  # a prompt names a few; each one costs looks into several folders

ERROR, WARNING, INFO = "error", "warning", "info"


class OutOfTime(Exception):
    """A check went on for longer than it may."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a prompt or the host. ``title`` is one sentence; ``nodes``: ids in the API prompt.

    ``severity``: ERROR, the run fails or its result is unusable; WARNING, it is slower or worse than meant; INFO.
    """

    id: str
    severity: str
    title: str
    why: str
    remedy: str
    nodes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"nodes": list(self.nodes)}


def ids_of(*nodes: Node | None) -> tuple[str, ...]:
    """The ids of those that are there, each once."""
    return tuple(dict.fromkeys(node.id for node in nodes if node is not None))


class Latent(NamedTuple):
    """``kind``: JOINT, VIDEO, AUDIO or UNKNOWN. ``root``: the node where it begins, the concat node of a joint one."""

    kind: str
    ltx: bool
    root: Node | None


class ModelPath(NamedTuple):
    """Where a MODEL comes from: ``loader``, its file, a distilling LoRA on the way, whether a guard cures it."""

    loader: Node | None
    lora: Node | None
    cured: bool


class Sampler(NamedTuple):
    """A sampling node. ``guided_by``: the node that takes the MODEL and holds the cfg, itself or its guider."""

    node: Node
    guided_by: Node
    model: ModelPath
    latent: Latent


@dataclass(frozen=True)
class Decode:
    """A VAE decode. ``final``: its picture is saved, not only previewed."""

    node: Node
    loader: Node
    vae_file: FileFacts
    tiled: bool
    final: bool
    ltx: bool


class View:
    """One prompt and the host's facts, for one check, which may last until ``until`` (of ``time.monotonic``)."""

    def __init__(self, graph: PromptGraph, facts: Mapping[str, Any], until: float = float("inf")):
        self.graph = graph
        self._facts = facts
        self._until = until
        self._kept: dict[Link, bool] = {}
        self._schedules: dict[Link, Node | None] = {}
        self._models: dict[Link, ModelPath] = {}
        self._latents: dict[Link, Latent] = {}
        self._files: dict[tuple[str, str], FileFacts | None] = {}

    def keep_time(self) -> None:
        """Raises OutOfTime when the check has lasted too long; asked before each rule and each file."""
        if time.monotonic() > self._until:
            raise OutOfTime

    def fact(self, name: str) -> Any:
        """A fact's value, None if it is unknown."""
        return getattr(self._facts.get(name), "value", None)

    def file(self, loader: Node | None, table: Mapping[str, tuple[str, tuple[str, ...]]]) -> FileFacts | None:
        """What is in the file that a loader names; of a prompt that names very many, the first hundred are known."""
        if loader is None or loader.kind not in table:
            return None
        widget, folders = table[loader.kind]
        name = self.graph.value(loader.id, widget)
        key = loader.kind, name
        if not isinstance(name, str) or (key not in self._files and len(self._files) >= _MOST_FILES):
            return None
        if key not in self._files:
            self.keep_time()
            self._files[key] = file_facts(name, folders)
        return self._files[key]

    @cached_property
    def samplers(self) -> list[Sampler]:
        """Every node that takes a latent and a model, or a guider in its place."""
        found = []
        for node in self.graph.nodes.values():
            if "latent_image" not in node.inputs or not ("model" in node.inputs or "guider" in node.inputs):
                continue
            guided_by = node
            if "model" not in node.inputs:
                guider = self.graph.source(node.id, "guider")
                if guider is None:
                    continue
                guided_by = self.graph.nodes[guider.node]
            model = self.model(self.graph.source(guided_by.id, "model"))
            found.append(Sampler(node, guided_by, model, self.latent(self.graph.source(node.id, "latent_image"))))
        return found

    @cached_property
    def sized(self) -> list[tuple[Node, Sampler]]:
        """The nodes that set size and length of a latent that is sampled, each once."""
        found = {}
        for sampler in self.samplers:
            root = sampler.latent.root
            if sampler.latent.kind == JOINT and root is not None:
                root = self.latent(self.graph.source(root.id, "video_latent")).root
            if root is not None and root.kind in SIZED:
                found.setdefault(root.id, (root, sampler))
        return list(found.values())

    @cached_property
    def decodes(self) -> list[Decode]:
        """Video decodes whose VAE's file is known."""
        nodes = {}
        for node in self.graph.nodes.values():
            if "vae" in node.inputs and _decodes(node.kind):
                nodes[node.id] = node
        if not nodes:
            return []
        final = self.graph.upstream(node.id for node in self.graph.nodes.values() if _saves(node.kind))
        found = []
        for node in nodes.values():
            link = self.graph.source(node.id, "vae")
            loader = self.graph.nodes[link.node] if link else None
            file = self.file(loader, VAE_LOADERS)
            if file is not None:
                samples = next((name for name in _SAMPLES if name in node.inputs), _SAMPLES[0])
                ltx = self.latent(self.graph.source(node.id, samples)).ltx
                found.append(Decode(node, loader, file, "tiled" in node.kind.lower(), node.id in final, ltx))
        return found

    def model(self, link: Link | None) -> ModelPath:
        """The MODEL on a link, along the `model` inputs up to its loader."""
        end = ModelPath(None, None, False)
        return self._walk(link, self._models, end, self._model_before, self._model_after)

    def latent(self, link: Link | None) -> Latent:
        """The LATENT on a link: from the node that makes it, through those that keep its kind."""
        end = Latent(UNKNOWN, False, None)
        return self._walk(link, self._latents, end, self._latent_before, lambda _, before: before)

    def schedule(self, link: Link | None) -> Node | None:
        """The node that makes the SIGMAS on a link, those that only cut a schedule skipped."""
        return self._walk(link, self._schedules, None, self._schedule_before, lambda _, before: before)

    def keeps_time(self, link: Link | None) -> bool:
        """Whether the pictures on a link are those of a decode, one for one, as far as the names of nodes tell."""
        return self._walk(link, self._kept, False, self._pictures_before, self._pictures_after)

    def _walk(self, link: Link | None, memory: dict, end: Any, before: Callable, after: Callable) -> Any:
        """Back along links until ``before`` gives a result, not a link; then forth, each result from the one before."""
        if link in memory:
            return memory[link]
        path, result = [], end
        while link is not None:
            if link in memory:
                result = memory[link]
                break
            memory[link] = end  # what a cycle comes back to
            path.append(link)
            step = before(self.graph.nodes[link.node], link.slot)
            if not isinstance(step, Link):
                result = end if step is None else step
                break
            link = step
        for link in reversed(path):
            result = memory[link] = after(self.graph.nodes[link.node], result)
        return result

    def _model_before(self, node: Node, _: int) -> Link | ModelPath:
        return self.graph.source(node.id, "model") or ModelPath(node, None, False)

    def _model_after(self, node: Node, before: ModelPath) -> ModelPath:
        if node.kind == GUARD_NODE and self.graph.value(node.id, "policy") == "cure":
            return before._replace(cured=True)
        if "lora_name" in node.inputs and name_says_distilled(self.graph.value(node.id, "lora_name")):
            return before._replace(lora=node) if self.graph.number(node.id, "strength_model") else before
        return before

    def _schedule_before(self, node: Node, _: int) -> Link | Node:
        return (self.graph.source(node.id, "sigmas") if node.kind == SPLIT_SIGMAS else None) or node

    def _pictures_before(self, node: Node, _: int) -> Link | bool:
        before = self.graph.source(node.id, "images") or self.graph.source(node.id, "image")
        return before or "decode" in node.kind.lower()

    def _pictures_after(self, node: Node, before: bool) -> bool:
        return before and not _RETIMES.search(node.kind)

    def _latent_before(self, node: Node, slot: int) -> Link | Latent | None:
        kind = node.kind
        if kind in _LATENT_IN:
            return self.graph.source(node.id, _LATENT_IN[kind])
        if kind == CONCAT:
            return Latent(JOINT, True, node)
        if kind == SEPARATE:
            return Latent(AUDIO if slot == 1 else VIDEO, True, None)
        ltx = kind.startswith(("LTXV", "EmptyLTXV"))
        if kind in _VIDEO_ROOTS:
            return Latent(VIDEO, ltx, node)
        return Latent(AUDIO if "audio" in kind.lower() else UNKNOWN, ltx, node)


@lru_cache(maxsize=1024)
def _decodes(kind: str) -> bool:
    return "decode" in kind.lower() and "audio" not in kind.lower()


@lru_cache(maxsize=1024)
def _saves(kind: str) -> bool:
    return any(word in kind.lower() for word in _SAVING)
