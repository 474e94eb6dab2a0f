# SPDX-License-Identifier: Apache-2.0
"""A prompt in API form as a graph: links followed, literal values found, without running or trusting anything in it.

A prompt is ``{"<id>": {"class_type": "...", "inputs": {"<name>": value or ["<id>", slot]}}}``; nodes of subgraphs have
ids like ``12:34``. Whatever does not fit, an unknown id, a cycle, an entry of another shape, means "unknown" here; the
host refuses it later in its own words. Nothing recurses, and what a walk found on its way is remembered for the next
one, so that all questions together cost a few visits a node, whatever the shape of the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from .inputs import downscale_of, film_of, picture_of
from .links import Link, Node, as_link, make_node
from .upstream import Parents
from .values.evaluate import PLAIN, Values, as_number
from .values.latents import LATENTS
from .values.numbers import CHOICES, NUMBERS
from .values.pictures import PICTURES
from .values.schedules import SCHEDULES

__all__ = ["Link", "Node", "PromptGraph", "as_link"]

ROWS = {**NUMBERS, **PICTURES, **LATENTS, **SCHEDULES}
READERS = {"picture": picture_of, "film": film_of, "downscale": downscale_of}
_LITERALS = (str, int, float, type(None))
_LONGEST_NAMES = 300  # of id and class together: both go into messages, and no editor makes longer ones


class PromptGraph:
    """The well-formed nodes of a prompt, in its order, in ``nodes``."""

    def __init__(self, prompt: Any):
        self.nodes = nodes = dict[str, Node]()
        self._origins: dict[Link, Link | None] = {}
        for key, entry in prompt.items() if isinstance(prompt, Mapping) else ():
            if type(entry) is not dict and not isinstance(entry, Mapping):  # the class itself is asked in no time
                continue
            kind, inputs = entry.get("class_type"), entry.get("inputs")
            if isinstance(kind, str) and isinstance(key, str) and len(kind) + len(key) <= _LONGEST_NAMES:
                if type(inputs) is not dict and not isinstance(inputs, Mapping):
                    inputs = {}
                nodes[key] = make_node((key, kind, inputs))
        self._values = Values(nodes, ROWS, CHOICES, READERS)
        self.parents = Parents(nodes, CHOICES, self._values.chosen)

    def of_kind(self, *kinds: str) -> list[Node]:
        """The nodes of these classes."""
        return [node for kind in kinds for node in self._by_kind.get(kind, ())]

    def kinds(self) -> Iterable[str]:
        """The classes that there are nodes of."""
        return self._by_kind.keys()

    def source(self, node: str, name: str) -> Link | None:
        """Where an input's value is made, reroutes and decided switches skipped; None without such a node."""
        found = self.nodes.get(node)
        return self.origin(as_link(found.inputs.get(name))) if found is not None else None

    def behind(self, node: Node, name: str) -> Node | None:
        """The node of ``source``, where the output does not matter."""
        given = node.inputs.get(name)
        if type(given) is list and len(given) == 2 and type(given[0]) is str and type(given[1]) is int:
            found = self.nodes.get(given[0])  # nearly always; the rest is as_link's to tell
            if found is None or found.kind not in CHOICES:
                return found
        link = self.origin(as_link(given))
        return self.nodes[link.node] if link is not None else None

    def origin(self, link: Link | None) -> Link | None:
        """A link -> the output it stands for, reroutes and decided switches skipped."""
        node = self.nodes.get(link.node) if link is not None else None
        if node is None or node.kind not in CHOICES:  # nearly always
            return link if node is not None else None
        if link in self._origins:
            return self._origins[link]
        if self._values.chosen(link) is None:
            return link
        path = []
        while link is not None and link not in self._origins:
            self._origins[link] = None  # what a cycle comes back to
            path.append(link)
            behind = self._values.chosen(link)
            if behind is None:
                self._origins[link] = link if link.node in self.nodes else None
                break
            link = behind
        found = self._origins.get(link) if link is not None else None
        for passed in path:
            self._origins[passed] = found
        return found

    def value(self, node: str, name: str) -> Any:
        """The number, text or truth an input has, as far as constants decide it; None if it is absent or unknown."""
        found = self.computed(node, name)
        return found if isinstance(found, _LITERALS) else None

    def number(self, node: str, name: str) -> float | None:
        """As ``value``, as a number that can be meant; text that spells one counts, as it does for the host."""
        found = as_number(self.computed(node, name))
        return None if found is None else float(found)

    def computed(self, node: str, name: str) -> Any:
        """As ``value``, and for what is no literal a record of values/: Picture, Video, Joint, Sigmas and so on."""
        found = self.nodes.get(node)
        if found is None:
            return None
        given = found.inputs.get(name)
        if type(given) in PLAIN:
            return given
        return self._values.read(given)

    def output(self, link: Link | None) -> Any:
        """What ``computed`` says of an input, of an output."""
        return self._values.at(link)

    def chain(self, node: str, name: str) -> Iterator[Link]:
        """The outputs along one kind of input, nearest first: a sampler's `model` through every LoRA to the loader."""
        seen = set()
        link = self.source(node, name)
        while link is not None and link.node not in seen:
            seen.add(link.node)
            yield link
            link = self.source(link.node, name)

    def before(self, nodes: Iterable[str]) -> set[str]:
        """The nodes that these have links to."""
        return set(itertools.chain.from_iterable(map(self.parents.__getitem__, nodes)))

    @cached_property
    def used(self) -> set[str]:
        """The nodes that another one has a link to."""
        return self.before(self.nodes)

    def upstream(self, starts: Iterable[str]) -> set[str]:
        """All nodes that these need, themselves included."""
        return self._reach(starts, self.parents)

    def downstream(self, starts: Iterable[str]) -> set[str]:
        """All nodes that need one of these, themselves included."""
        return self._reach(starts, self._children)

    def restricted_to(self, targets: Iterable[str]) -> PromptGraph:
        """The part of the graph that these nodes need."""
        kept = self.upstream(targets)
        if len(kept) == len(self.nodes):
            return self
        part = PromptGraph(None)
        part.nodes = {name: node for name, node in self.nodes.items() if name in kept}
        part._values, part.parents = self._values, self.parents  # what a kept node needs is kept too
        return part

    def two_values_of(self, marks: Mapping[str, Hashable]) -> dict[str, set[Hashable]]:
        """``marks``: node -> value -> for each node up to two different values among the marked nodes it needs.

        A node takes two values at most, so that each link is walked twice at most, cycles included.
        """
        first: dict[str, Hashable] = {}
        second: dict[str, Hashable] = {}
        waiting: list[tuple[Iterable[str], Hashable]] = [((node,), value) for node, value in marks.items()]
        children = self._children
        while waiting:
            nodes, value = waiting.pop()
            for node in nodes:
                if node not in first:
                    if node not in children:
                        continue
                    first[node] = value
                elif node in second or first[node] == value:
                    continue
                else:
                    second[node] = value
                if children[node]:
                    waiting.append((children[node], value))
        return {node: {value, second[node]} if node in second else {value} for node, value in first.items()}

    @cached_property
    def order(self) -> dict[str, int]:
        """Node -> its place in the prompt."""
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def _by_kind(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            found.setdefault(node.kind, []).append(node)
        return found

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for parent in self.parents[node]:
                found[parent].append(node)
        return found

    def _reach(self, starts: Iterable[str], neighbours: Mapping[str, Iterable[str]]) -> set[str]:
        waiting = [start for start in starts if start in self.nodes]
        seen = set(waiting)
        add, wait = seen.add, waiting.append
        for node in waiting:  # which grows meanwhile
            for found in neighbours[node]:
                if found not in seen:
                    add(found)
                    wait(found)
        return seen
