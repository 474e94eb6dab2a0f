# SPDX-License-Identifier: Apache-2.0
"""A prompt in API form as a graph: links followed, literal values found, without running or trusting anything in it.

A prompt is ``{"<id>": {"class_type": "...", "inputs": {"<name>": value or ["<id>", slot]}}}``; nodes of subgraphs have
ids like ``12:34``. Whatever does not fit, an unknown id, a cycle, an entry of another shape, means "unknown" here; the
host refuses it later in its own words. Nothing recurses, and what a walk found on its way is remembered for the next
one, so that all questions together cost a few visits a node, whatever the shape of the prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

# Nodes that hand on what they get, and nodes that hold a value, with the name of the input in question.
_PASSING = {"Reroute": "", "ReroutePrimitive|pysssss": "value"}
_VALUES = {
    "PrimitiveInt": "value",
    "PrimitiveFloat": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "PrimitiveBoolean": "value",
    "PrimitiveNode": "value",
    "INTConstant": "value",
    "FloatConstant": "value",
    "easy int": "value",
    "easy float": "value",
}
_SWITCHES = ("ComfySwitchNode", "ComfySoftSwitchNode")
_TRANSPARENT = frozenset((*_PASSING, *_SWITCHES))
_LITERALS = (str, int, float, type(None))
_LONGEST_NAMES = 300  # of id and class together: both go into messages, and no editor makes longer ones
_LONGEST_NUMBER = 40
_LEAST, _MOST = 1e-9, 1e12  # no input of a node that the guard knows takes numbers beyond, and products stay finite


class Link(NamedTuple):
    """Output ``slot`` of node ``node``."""

    node: str
    slot: int


class Node(NamedTuple):
    """One node of the prompt; ``inputs`` holds literals and links as they were sent, ``kind`` its class name."""

    id: str
    kind: str
    inputs: Mapping[str, Any]


def as_link(value: Any) -> Link | None:
    """``["<id>", slot]`` -> Link; None for everything else, a list of values included."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    node, slot = value
    if type(node) is str and type(slot) is int:
        return Link(node, slot)
    if type(node) is int and type(slot) is int and abs(node) < _MOST:
        return Link(str(node), slot)
    return None


class PromptGraph:
    """The well-formed nodes of a prompt, in its order, in ``nodes``."""

    def __init__(self, prompt: Any):
        self.nodes: dict[str, Node] = {}
        self._origins: dict[Link, Link | None] = {}
        self._values: dict[tuple[str, str], Any] = {}
        self._passes: dict[str, Link | None] = {}
        for key, entry in prompt.items() if isinstance(prompt, Mapping) else ():
            kind = entry.get("class_type") if _is_mapping(entry) else None
            if isinstance(kind, str) and isinstance(key, str) and len(kind) + len(key) <= _LONGEST_NAMES:
                inputs = entry.get("inputs")
                self.nodes[key] = Node(key, kind, inputs if _is_mapping(inputs) else {})

    def of_kind(self, *kinds: str) -> list[Node]:
        """The nodes of these classes."""
        return [node for kind in kinds for node in self._by_kind.get(kind, ())]

    def source(self, node: str, name: str) -> Link | None:
        """Where an input's value is made, reroutes and decided switches skipped; None without such a node."""
        found = self.nodes.get(node)
        return self.origin(as_link(found.inputs.get(name))) if found is not None else None

    def origin(self, link: Link | None) -> Link | None:
        """A link -> the output it stands for, reroutes and decided switches skipped."""
        node = self.nodes.get(link.node) if link is not None else None
        if node is None or node.kind not in _TRANSPARENT:  # nearly always
            return link if node is not None else None
        if link in self._origins:
            return self._origins[link]
        path = []
        while link is not None and link not in self._origins:
            self._origins[link] = None  # what a cycle comes back to
            path.append(link)
            node = self.nodes.get(link.node)
            if node is not None and node.id not in self._passes:
                self._passes[node.id] = self._passed_on(node)
            behind = self._passes[node.id] if node is not None else None
            if behind is None:
                self._origins[link] = link if node else None
                break
            link = behind
        found = self._origins.get(link) if link is not None else None
        for passed in path:
            self._origins[passed] = found
        return found

    def value(self, node: str, name: str) -> Any:
        """The literal an input has, through reroutes and primitives; None if it is absent or computed."""
        path, found = [], self.nodes[node].inputs.get(name) if node in self.nodes else None
        if isinstance(found, _LITERALS):
            return found
        while node in self.nodes:
            found, key = None, (node, name)
            if key in self._values:
                found = self._values[key]
                break
            self._values[key] = None  # what a cycle comes back to
            path.append(key)
            given = self.nodes[node].inputs.get(name)
            if isinstance(given, Mapping):
                given = given.get("__value__")
            if (link := as_link(given)) is None:
                found = None if isinstance(given, (list, tuple, Mapping)) else given
                break
            link = self.origin(link)
            if link is None or self.nodes[link.node].kind not in _VALUES:
                break
            node, name = link.node, _VALUES[self.nodes[link.node].kind]
        for key in path:
            self._values[key] = found
        return found

    def number(self, node: str, name: str) -> float | None:
        """As ``value``, as a number that can be meant; text that spells one counts, as it does for the host."""
        found = self.value(node, name)
        if isinstance(found, bool) or not isinstance(found, (int, float, str)):
            return None
        try:
            number = float(found[:_LONGEST_NUMBER] if isinstance(found, str) else found)
        except (ValueError, OverflowError):
            return None
        return number if number == 0 or _LEAST <= abs(number) <= _MOST else None

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
        return {parent for node in nodes for parent in self._parents[node]}

    def upstream(self, starts: Iterable[str]) -> set[str]:
        """All nodes that these need, themselves included."""
        return _reach(starts, self._parents)

    def downstream(self, starts: Iterable[str]) -> set[str]:
        """All nodes that need one of these, themselves included."""
        return _reach(starts, self._children)

    def restricted_to(self, targets: Iterable[str]) -> PromptGraph:
        """The part of the graph that these nodes need."""
        kept = self.upstream(targets)
        part = PromptGraph(None)
        part.nodes = {name: node for name, node in self.nodes.items() if name in kept}
        part._parents = {name: self._parents[name] for name in part.nodes}  # what a kept node needs is kept too
        return part

    def two_values_of(self, marks: Mapping[str, Hashable]) -> dict[str, set[Hashable]]:
        """``marks``: node -> value -> for each node up to two different values among the marked nodes it needs.

        A node takes two values at most, so that each link is walked twice at most, cycles included.
        """
        found: dict[str, set[Hashable]] = {}
        waiting = [(node, value) for node, value in marks.items() if node in self.nodes]
        while waiting:
            node, value = waiting.pop()
            known = found.setdefault(node, set())
            if value not in known and len(known) < 2:
                known.add(value)
                waiting += [(child, value) for child in self._children[node]]
        return found

    def _passed_on(self, node: Node) -> Link | None:
        """What a reroute or a decided switch stands for, None for every other node."""
        if node.kind in _PASSING:
            name = _PASSING[node.kind]
            given = [node.inputs.get(name)] if name else node.inputs.values()
            return next((link for value in given if (link := as_link(value))), None)
        if node.kind in _SWITCHES and isinstance(node.inputs.get("switch"), bool):
            return as_link(node.inputs.get("on_true" if node.inputs["switch"] else "on_false"))
        return None

    @cached_property
    def _by_kind(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            found.setdefault(node.kind, []).append(node)
        return found

    @cached_property
    def _parents(self) -> dict[str, list[str]]:
        found = {}
        for node in self.nodes.values():
            given: Iterable[Any] = node.inputs.values()
            if node.kind in _SWITCHES and (chosen := self._passed_on(node)):
                given = [chosen]  # the host runs no other side of a decided switch
            links = [link.node for value in given if (link := as_link(value)) is not None]
            found[node.id] = [parent for parent in dict.fromkeys(links) if parent in self.nodes]
        return found

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {node: [] for node in self.nodes}
        for node, parents in self._parents.items():
            for parent in parents:
                found[parent].append(node)
        return found


def _is_mapping(value: Any) -> bool:
    return type(value) is dict or isinstance(value, Mapping)  # asking the abstract class takes ten times as long


def _reach(starts: Iterable[str], neighbours: Mapping[str, list[str]]) -> set[str]:
    seen = {start for start in starts if start in neighbours}
    waiting = list(seen)
    while waiting:
        for found in neighbours[waiting.pop()]:
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen
