# SPDX-License-Identifier: Apache-2.0
"""What a prompt graph does, in the terms the guard's rules speak: samplers, their models and latents, decodes."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from .files import FileFacts, file_facts
from .fixes import Fix
from .kinds import ALL_LATENTS, JOINT, SIZED, VIDEO
from .loaders import ALL_LOADERS, MODEL_LOADERS, Names, names_of
from .prompt_graph import Link, Node, PromptGraph
from .vaes import Use, find_uses, saved_nodes
from .values.evaluate import as_number
from .values.latents import Joint, Sound, Video, video_of
from .values.pictures import Picture
from .values.schedules import Sigmas
from .walks import ENCODERS, Latent, Walks

CFG_INPUTS = ("cfg", "video_cfg", "audio_cfg", "cfg_conds", "cfg_cond2_negative")
_LONGEST_LIST, _MOST_PARAMETERS = 400, 8
_FEW_LOADERS = 25  # of up to four files each, so that all are looked up
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


class Sampler(NamedTuple):
    """A sampling node. ``guided_by``: the node that takes the MODEL and holds the cfg, itself or its guider."""

    node: Node
    guided_by: Node
    latent: Latent


_make_sampler = partial(tuple.__new__, Sampler)  # a prompt may have thousands; see links.py


class View(Walks):
    """One prompt and the host's facts, for one check, which may last until ``until`` (of ``time.monotonic``)."""

    def __init__(self, graph: PromptGraph, facts: Mapping[str, Any], until: float = float("inf")):
        super().__init__(graph)
        self._facts = facts
        self._until = until
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
        names = names_of(loader.kind, table) if loader is not None else None
        return self._file(self.graph.value(loader.id, names.inputs[0]), names.folders) if names is not None else None

    def files(self, loader: Node, table: Mapping[str, Names]) -> list[FileFacts]:
        """What is in all the files that a loader names."""
        names = names_of(loader.kind, table)
        widgets = names.inputs if names is not None else ()
        found = (self._file(self.graph.value(loader.id, widget), names.folders) for widget in widgets)
        return [file for file in found if file is not None]

    def _file(self, name: Any, folders: tuple[str, ...]) -> FileFacts | None:
        """Of a prompt that names very many files, the first hundred are known."""
        if not isinstance(name, str):
            return None
        key = name, folders
        if key not in self._files:
            if len(self._files) >= _MOST_FILES:
                return None
            self.keep_time()
            self._files[key] = file_facts(name, folders)
        return self._files[key]

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
            found.append(_make_sampler((node, guided_by, sampled)))
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

    @cached_property
    def saved(self) -> set[str]:
        """The nodes whose pictures are saved, not only previewed, and whatever else is needed for that."""
        return saved_nodes(self)

    def model_file(self, sampler: Sampler) -> FileFacts | None:
        """What is in the file of the model that a sampler has."""
        if not self._knows_models:
            return None
        loader = self.model(sampler.guided_by).loader
        if loader is None:
            return None
        if loader.id not in self._model_files:
            self._model_files[loader.id] = self.file(loader, MODEL_LOADERS)
        return self._model_files[loader.id]

    def known_models(self, latents: Container[str] = ALL_LATENTS) -> Iterator[tuple[Sampler, FileFacts]]:
        """The samplers of these kinds of latents of whose model it is known what is in its file."""
        for sampler in self.samplers if self._knows_models else ():
            if sampler.latent.kind in latents and (file := self.model_file(sampler)) is not None:
                yield sampler, file

    @cached_property
    def _knows_models(self) -> bool:
        """Whether anything may be known of any model's file: there are few loaders, where there may be many samplers.

        With many loaders not all files are looked up, and those come first that a rule asks for first.
        """
        loaders = self.graph.of_kind(*(kind for kind in self.graph.kinds() if names_of(kind, ALL_LOADERS) is not None))
        if len(loaders) > _FEW_LOADERS:
            return True
        return any(self.file(loader, MODEL_LOADERS) is not None for loader in loaders)

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
        picture = self.graph.computed(root.id, "pixels") if root.kind in ENCODERS else None
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
        overrides = self.model(guided_by).overrides if "cfg" in guided_by.inputs else ()
        found = [(guided_by, self.graph.number(guided_by.id, name)) for name in CFG_INPUTS]
        listed = self.graph.value(guided_by.id, "cfg_values")
        if isinstance(listed, str) and len(listed) <= _LONGEST_LIST:
            found += [(guided_by, as_number(text)) for text in listed.split(",")]
        parameters = zip(range(_MOST_PARAMETERS), self._parameters(guided_by), strict=False)
        found += [(node, self.graph.number(node.id, "cfg")) for _, node in parameters]
        for override in overrides:  # the one nearest the sampler wins where two overlap
            start, end = (self.graph.number(override.id, name) for name in ("start_percent", "end_percent"))
            if start is None or end is None:
                return []
            if start <= 0 and end >= 1:
                found = []
            if start < end:
                found.append((override, self.graph.number(override.id, "cfg")))
        return [(node, cfg) for node, cfg in found if cfg is not None]

    def _parameters(self, guider: Node) -> Iterator[Node]:
        """The GuiderParameters of a MultimodalGuider, one behind the other."""
        return (self.graph.nodes[link.node] for link in self.graph.chain(guider.id, "parameters"))


def _sampled_by(node: Node) -> str:
    """What a sampler calls the latent it samples, "" if it has none."""
    inputs = node.inputs
    return "latent_image" if "latent_image" in inputs else "latents" if "latents" in inputs else ""
