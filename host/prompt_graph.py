"""A prompt in API form as a graph: links followed, literal values found, without running or trusting anything in it.

A prompt is ``{"<id>": {"class_type": "...", "inputs": {"<name>": value or ["<id>", slot]}}}``; nodes of subgraphs have
ids like ``12:34``. Whatever does not fit, an unknown id, a cycle, an entry of another shape, means "unknown" here; the
host refuses it later in its own words. Nothing recurses, and no walk visits a node twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
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


class Link(NamedTuple):
    """Output ``slot`` of node ``node``."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """One node of the prompt; ``inputs`` holds literals and links as they were sent."""

    id: str
    kind: str
    inputs: Mapping[str, Any]


def as_link(value: Any) -> Link | None:
    """``["<id>", slot]`` -> Link; None for everything else, a list of values included."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    node, slot = value
    return Link(str(node), slot) if type(slot) is int and type(node) in (str, int) else None


class PromptGraph:
    """The well-formed nodes of a prompt, in its order, in ``nodes``."""

    def __init__(self, prompt: Any):
        self.nodes: dict[str, Node] = {}
        self._origins: dict[Link, Link | None] = {}
        for key, entry in prompt.items() if isinstance(prompt, Mapping) else ():
            kind = entry.get("class_type") if isinstance(entry, Mapping) else None
            if isinstance(kind, str):
                inputs = entry.get("inputs")
                self.nodes[str(key)] = Node(str(key), kind, inputs if isinstance(inputs, Mapping) else {})

    def of_kind(self, *kinds: str) -> list[Node]:
        """The nodes of these classes."""
        return [node for kind in kinds for node in self._by_kind.get(kind, ())]

    def linked(self, node: str, name: str) -> bool:
        """Whether that input is a link, wherever it leads."""
        return node in self.nodes and as_link(self.nodes[node].inputs.get(name)) is not None

    def source(self, node: str, name: str) -> Link | None:
        """Where an input's value is made, reroutes and decided switches skipped; None without such a node."""
        return self.origin(as_link(self.nodes[node].inputs.get(name))) if node in self.nodes else None

    def origin(self, link: Link | None) -> Link | None:
        """A link -> the output it stands for, reroutes and decided switches skipped."""
        path = []
        while link is not None and link not in self._origins:
            self._origins[link] = None  # what a cycle comes back to
            path.append(link)
            node = self.nodes.get(link.node)
            behind = self._passed_on(node) if node else None
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
        seen = set()
        while node in self.nodes and node not in seen:
            seen.add(node)
            found = self.nodes[node].inputs.get(name)
            if isinstance(found, Mapping):
                found = found.get("__value__")
            if as_link(found) is None:
                return None if isinstance(found, (list, tuple, Mapping)) else found
            link = self.origin(as_link(found))
            if link is None or self.nodes[link.node].kind not in _VALUES:
                return None
            node, name = link.node, _VALUES[self.nodes[link.node].kind]
        return None

    def number(self, node: str, name: str) -> float | None:
        """As ``value``, as a finite number; text that spells one counts, as it does for the host."""
        found = self.value(node, name)
        if isinstance(found, bool) or not isinstance(found, (int, float, str)):
            return None
        try:
            number = float(found)
        except (ValueError, OverflowError):
            return None
        return number if abs(number) < float("inf") else None

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
        return part

    def needed_by_each(self, marked: Collection[str]) -> Callable[[str], frozenset[str]]:
        """-> needed(node), those of ``marked`` it needs, itself included. Nodes in or behind a cycle need none."""
        names = list(marked)
        bits = {node: 1 << index for index, node in enumerate(names)}
        waiting = {node: len(parents) for node, parents in self._parents.items()}
        ready = deque(node for node, count in waiting.items() if not count)
        masks: dict[str, int] = {}
        while ready:
            node = ready.popleft()
            mask = bits.get(node, 0)
            for parent in self._parents[node]:
                mask |= masks[parent]
            masks[node] = mask
            for child in self._children[node]:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
        @cache
        def spelled(mask: int) -> frozenset[str]:
            found = []
            while mask:
                lowest = mask & -mask
                found.append(names[lowest.bit_length() - 1])
                mask ^= lowest
            return frozenset(found)

        return lambda node: spelled(masks.get(node, 0))

    def _passed_on(self, node: Node) -> Link | None:
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
            links = (as_link(value) for value in node.inputs.values())
            found[node.id] = list(dict.fromkeys(link.node for link in links if link and link.node in self.nodes))
        return found

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {node: [] for node in self.nodes}
        for node, parents in self._parents.items():
            for parent in parents:
                found[parent].append(node)
        return found


def _reach(starts: Iterable[str], neighbours: Mapping[str, list[str]]) -> set[str]:
    seen = {start for start in starts if start in neighbours}
    waiting = list(seen)
    while waiting:
        for found in neighbours[waiting.pop()]:
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen
