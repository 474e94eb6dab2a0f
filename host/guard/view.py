# SPDX-License-Identifier: Apache-2.0
"""What a prompt graph does, in the terms the guard's rules speak: samplers, their models and latents, decodes.

Knows the class names and inputs of ComfyUI's own nodes. Other packs' nodes are recognised by their inputs where that
is safe and are unknown where it is not; every walk remembers what it found, so that shared parts are walked once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .files import FileFacts, file_facts
from .fixes import Fix
from .loaders import MODEL_LOADERS, Names, distilling_loras, names_of
from .prompt_graph import Link, Node, PromptGraph
from .vaes import Use, find_uses
from .values.evaluate import as_number
from .values.latents import Joint, Sound, Video, video_of
from .values.pictures import Picture
from .values.schedules import Sigmas

GUARD_NODE = "NVFP4LaunchGuard"
CONCAT, SEPARATE, EMPTY_AUDIO = "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "LTXVEmptyLatentAudio"
UPSAMPLER, CONDITIONING = "LTXVLatentUpsampler", "LTXVConditioning"
# Nodes that make a film of pictures, and how they call its frame rate.
FILMS = {
    "CreateVideo": "fps", "VHS_VideoCombine": "frame_rate", "SaveWEBM": "fps", "SaveAnimatedWEBP": "fps",
    "SaveAnimatedPNG": "fps",
}  # fmt: skip
SPLIT_SIGMAS = "SplitSigmas"
# Nodes that have width and height, and how they call the length.
SIZED = {"EmptyLTXVLatentVideo": "length", "LTXVImgToVideo": "length", "LTXVBaseSampler": "num_frames"}
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
_ENCODERS = ("VAEEncode", "VAEEncodeTiled")
_VIDEO_ROOTS = (*SIZED, *_ENCODERS)

# On the way from a decode to the video, these change how many frames there are.
_RETIMES = re.compile(r"interpol|rife|film|fps|frame", re.IGNORECASE)
CFG_INPUTS = ("cfg", "video_cfg", "audio_cfg", "cfg_conds")
_LONGEST_LIST, _MOST_PARAMETERS = 400, 8
_MOST_FILES = 100  # a prompt names a few; each one costs looks into several folders

ERROR, WARNING, INFO = "error", "warning", "info"


class OutOfTime(Exception):
    """A check went on for longer than it may."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a prompt or the host, ``title`` a sentence. ``nodes``: ids in the API prompt.

    ``severity``: ERROR, the run fails or its result is unusable; WARNING, it is slower or worse than meant; INFO.
    ``fixes``: the cure, if it is values of widgets; ``action``: what the button that sets them does besides, if any.
    """

    id: str
    severity: str
    title: str
    why: str
    remedy: str
    nodes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    action: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"nodes": list(self.nodes), "fixes": [fix._asdict() for fix in self.fixes]}


def ids_of(*nodes: Node | None) -> tuple[str, ...]:
    """The ids of those that are there, each once."""
    return tuple(dict.fromkeys(node.id for node in nodes if node is not None))


class Latent(NamedTuple):
    """``kind``: JOINT, VIDEO, AUDIO or UNKNOWN. ``root``: the node where it begins, the concat node of a joint one."""

    kind: str
    ltx: bool
    root: Node | None


class ModelPath(NamedTuple):
    """Where a MODEL comes from: ``loader``, its file, and what is on the way.

    ``lora``: a node with a distilling LoRA; ``distilling``: the strengths of all of them, None where one is unknown.
    ``cured``: a guard cures it. ``resampled``: its sampling is another than that of its class.
    """

    loader: Node | None
    lora: Node | None = None
    cured: bool = False
    distilling: float | None = 0.0
    resampled: bool = False


_NO_MODEL, _NO_LATENT = ModelPath(None), Latent(UNKNOWN, False, None)
_SEPARATED = (Latent(VIDEO, True, None), Latent(AUDIO, True, None))  # by whether it is the second output


class Sampler(NamedTuple):
    """A sampling node. ``guided_by``: the node that takes the MODEL and holds the cfg, itself or its guider."""

    node: Node
    guided_by: Node
    latent: Latent


class View:
    """One prompt and the host's facts, for one check, which may last until ``until`` (of ``time.monotonic``)."""

    def __init__(self, graph: PromptGraph, facts: Mapping[str, Any], until: float = float("inf")):
        self.graph = graph
        self._facts = facts
        self._until = until
        self._kept: dict[str, bool] = {}
        self._schedules: dict[str, Node] = {}
        self._models: dict[str, ModelPath] = {}  # by the node that hands one on
        self._taken: dict[str, ModelPath] = {}  # by the node that takes one
        self._latents: dict[str, Latent] = {}
        self._model_files: dict[str, FileFacts | None] = {}  # by loader
        self._files: dict[tuple[str, tuple[str, ...]], FileFacts | None] = {}

    def keep_time(self) -> None:
        """Raises OutOfTime when the check has lasted too long; asked before each rule and each file."""
        if time.monotonic() > self._until:
            raise OutOfTime

    def fact(self, name: str) -> Any:
        """A fact's value, None if it is unknown."""
        return getattr(self._facts.get(name), "value", None)

    def file(self, loader: Node | None, table: Mapping[str, Names]) -> FileFacts | None:
        """What is in the file that a loader is about."""
        found = self.files(loader, table, 1)
        return found[0] if found else None

    def files(self, loader: Node | None, table: Mapping[str, Names], most: int | None = None) -> list[FileFacts]:
        """What is in the files that a loader names; of a prompt that names very many, the first hundred are known."""
        names = names_of(loader.kind, table) if loader is not None else None
        found = []
        for widget in names.inputs[:most] if names is not None else ():
            name = self.graph.value(loader.id, widget)
            key = name, names.folders
            if not isinstance(name, str) or (key not in self._files and len(self._files) >= _MOST_FILES):
                continue
            if key not in self._files:
                self.keep_time()
                self._files[key] = file_facts(name, names.folders)
            found.append(self._files[key])
        return [file for file in found if file is not None]

    @cached_property
    def samplers(self) -> list[Sampler]:
        """Every node that takes a latent, or makes its own, and a model, or a guider in its place."""
        found = []
        for node in self.graph.nodes.values():
            inputs = node.inputs
            guided = "guider" in inputs
            if not (guided or "model" in inputs):
                continue
            latent = _sampled_by(node)
            makes = node.kind == "LTXVBaseSampler"
            if not (latent or makes):
                continue
            guided_by = self.graph.behind(node, "guider") if guided else node
            if guided_by is None:
                continue
            sampled = Latent(VIDEO, True, node) if makes else self.latent(node, latent)
            found.append(Sampler(node, guided_by, sampled))
        return found

    @cached_property
    def joint(self) -> list[Sampler]:
        """The samplers of joint latents that begin at a node that is known, one for each such node."""
        found: dict[str, Sampler] = {}
        for sampler in self.samplers:
            if sampler.latent.kind == JOINT and sampler.latent.root is not None:
                found.setdefault(sampler.latent.root.id, sampler)
        return list(found.values())

    @cached_property
    def sized(self) -> list[tuple[Node, Sampler]]:
        """The nodes that set size and length of a latent that is sampled, each once."""
        found: dict[str, tuple[Node, Sampler]] = {}
        done = set()
        for sampler in self.samplers:
            root = sampler.latent.root
            if root is None or root.id in done:
                continue
            done.add(root.id)
            if sampler.latent.kind == JOINT:
                root = self.latent(root, "video_latent").root
            if root is not None and root.kind in SIZED:
                found.setdefault(root.id, (root, sampler))
        return list(found.values())

    @cached_property
    def vaes(self) -> list[Use]:
        """Every VAE at a node that decodes, encodes or upscales pictures with it."""
        return find_uses(self)

    def model(self, node: Node) -> ModelPath:
        """The MODEL that a node takes, along the `model` inputs up to its loader."""
        found = self._taken.get(node.id)
        if found is None:
            behind = self.graph.behind(node, "model")
            found = self._walk(behind, self._models, _NO_MODEL, self._model_before, _model_after)
            self._taken[node.id] = found
        return found

    def model_file(self, sampler: Sampler) -> FileFacts | None:
        """What is in the file of the model that a sampler has."""
        loader = self.model(sampler.guided_by).loader if self._loads_models else None
        if loader is None:
            return None
        if loader.id not in self._model_files:
            self._model_files[loader.id] = self.file(loader, MODEL_LOADERS)
        return self._model_files[loader.id]

    @cached_property
    def _loads_models(self) -> bool:
        return any(names_of(kind, MODEL_LOADERS) for kind in self.graph.kinds())

    def latent(self, node: Node, name: str) -> Latent:
        """The LATENT at an input: from the node that makes it, through those that keep its kind."""
        passed_on = _LATENT_IN.get(node.kind) == name  # so that it is what the node itself puts out
        start = node if passed_on else self._latent_behind(node, name)
        return start if type(start) is Latent else self._walk(start, self._latents, _NO_LATENT, self._latent_before)

    def schedule(self, node: Node) -> Node | None:
        """The node that makes the SIGMAS that another takes, those that only cut a schedule skipped."""
        behind = self.graph.behind(node, "sigmas")
        return self.graph.nodes.get(self._walk(behind, self._schedules, "", self._schedule_before))

    def video(self, link: Link | None) -> Video | None:
        """Size, length, batch and guides of the video latent on a link, that of a joint one too, as far as known."""
        found = self.graph.output(link)
        found = found.video if isinstance(found, Joint) else found
        return found if isinstance(found, Video) else None

    def sampled(self, sampler: Sampler) -> Video | None:
        """The video latent that a sampler gets, as far as known; pictures that were encoded for an LTX model too."""
        found = self.video(self.graph.source(sampler.node.id, _sampled_by(sampler.node)))
        root = sampler.latent.root
        if sampler.latent.kind == JOINT and root is not None:
            root = self.latent(root, "video_latent").root
        if found is not None or root is None:
            return found
        if root.kind in SIZED:
            return video_of(*self.asked(root))
        picture = self.graph.computed(root.id, "pixels") if root.kind in _ENCODERS else None
        file = self.model_file(sampler)
        if not isinstance(picture, Picture) or file is None or not (file.family or "").startswith("LTX"):
            return None
        return video_of(*picture)

    def sound(self, link: Link | None) -> Sound | None:
        """Length and batch of the audio latent on a link, that of a joint one too, as far as known."""
        found = self.graph.output(link)
        found = found.sound if isinstance(found, Joint) else found
        return found if isinstance(found, Sound) else None

    def sigmas(self, link: Link | None) -> Sigmas | None:
        """The schedule on a link, where the host can compute it."""
        found = self.graph.output(link)
        return found if isinstance(found, Sigmas) else None

    def asked(self, node: Node) -> tuple[float | None, float | None, float | None]:
        """Width, height and length that a node of SIZED is asked for, before the host rounds them."""
        names = ("width", "height", SIZED[node.kind])
        return tuple(self.graph.number(node.id, name) for name in names)

    def cfgs(self, guided_by: Node) -> list[tuple[Node, float]]:
        """Every cfg that a sampler or guider works with, and the node that has it."""
        found = [(guided_by, self.graph.number(guided_by.id, name)) for name in CFG_INPUTS]
        listed = self.graph.value(guided_by.id, "cfg_values")
        if isinstance(listed, str) and len(listed) <= _LONGEST_LIST:
            found += [(guided_by, as_number(text)) for text in listed.split(",")]
        parameters = zip(range(_MOST_PARAMETERS), self._parameters(guided_by), strict=False)
        found += [(node, self.graph.number(node.id, "cfg")) for _, node in parameters]
        return [(node, cfg) for node, cfg in found if cfg is not None]

    def _parameters(self, guider: Node) -> Iterator[Node]:
        """The GuiderParameters of a MultimodalGuider, one behind the other."""
        return (self.graph.nodes[link.node] for link in self.graph.chain(guider.id, "parameters"))

    def keeps_time(self, node: Node) -> bool:
        """Whether the `images` of a node are those of a decode, one for one, as far as the names of nodes tell."""
        behind = self.graph.behind(node, "images")
        return self._walk(behind, self._kept, False, self._pictures_before, _pictures_after)

    def _walk(
        self, node: Node | None, memory: dict[str, Any], end: Any, before: Callable, after: Callable | None = None
    ) -> Any:
        """Back from node to node until ``before`` gives a result; then forth, each result from the one before."""
        path, result = [], end
        while node is not None:
            known = memory.get(node.id)
            if known is not None:
                result = known
                break
            memory[node.id] = end  # what a cycle comes back to
            path.append(node)
            node = before(node)
            if type(node) is not Node:
                result = end if node is None else node
                break
        for node in reversed(path):
            if after is not None:
                result = after(self.graph, node, result)
            memory[node.id] = result
        return result

    def _model_before(self, node: Node) -> Node | ModelPath:
        return self.graph.behind(node, "model") or ModelPath(node)

    def _schedule_before(self, node: Node) -> Node | str:
        return (self.graph.behind(node, "sigmas") if node.kind == SPLIT_SIGMAS else None) or node.id

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
        kind = node.kind
        if kind in _LATENT_IN:
            return self._latent_behind(node, _LATENT_IN[kind])
        if kind == CONCAT:
            return Latent(JOINT, True, node)
        ltx = kind.startswith(("LTXV", "EmptyLTXV"))
        if kind in _VIDEO_ROOTS:
            return Latent(VIDEO, ltx, node)
        return Latent(AUDIO if "audio" in kind.lower() else UNKNOWN, ltx, node)


def _model_after(graph: PromptGraph, node: Node, before: ModelPath) -> ModelPath:
    if node.kind == GUARD_NODE and graph.value(node.id, "policy") == "cure":
        before = before._replace(cured=True)
    if _RESAMPLED in node.kind:
        before = before._replace(resampled=True)
    for _, strength in distilling_loras(graph, node):
        if strength != 0:
            known = before.distilling is not None and strength is not None
            before = before._replace(lora=node, distilling=before.distilling + strength if known else None)
    return before


def _pictures_after(_: PromptGraph, node: Node, before: bool) -> bool:
    return before and not _RETIMES.search(node.kind)


def _sampled_by(node: Node) -> str:
    """What a sampler calls the latent it samples, "" if it has none."""
    inputs = node.inputs
    return "latent_image" if "latent_image" in inputs else "latents" if "latents" in inputs else ""
