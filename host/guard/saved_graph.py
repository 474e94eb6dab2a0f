# SPDX-License-Identifier: Apache-2.0
"""A workflow as the front end saves it -> the prompt it would queue, as far as that can be told without a browser.

Links are followed through reroutes, Set and Get, bypassed nodes and subgraphs, whose nodes get ids like ``12:34``;
muted nodes are left out. A saved graph has ``nodes`` with ``type``, ``mode`` (0, 2 muted, 4 bypassed), ``inputs`` with
``link``, and ``widgets_values``; ``links`` are [id, node, slot, node, slot, type], in subgraphs objects. What other
packs do to a graph in the browser is not done here: it is named in ``notes``. Nothing recurses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .saved_values import values_of

_MUTED, _BYPASSED = 2, 4
_ENTRY, _EXIT = "-10", "-20"  # the ends of a subgraph, as node ids
_REROUTES = ("Reroute", "Reroute (rgthree)")
_SETTERS, _GETTERS = ("SetNode", "easy setNode"), ("GetNode", "easy getNode")
_PRIMITIVE = "PrimitiveNode"
_DRAWN = {
    "Note", "MarkdownNote", "Label (rgthree)", "Bookmark (rgthree)", "Fast Groups Bypasser (rgthree)",
    "Fast Groups Muter (rgthree)", "Fast Bypasser (rgthree)", "Fast Muter (rgthree)",
    "Fast Actions Button (rgthree)", "Node Collector (rgthree)",
}  # fmt: skip
_BROWSER_ONLY = {*_REROUTES, *_SETTERS, *_GETTERS, _PRIMITIVE, *_DRAWN}
_BROADCASTS = ("Anything Everywhere", "Prompts Everywhere", "Seed Everywhere")
_GROUPS = ("workflow>", "workflow/")
_DEEPEST, _LARGEST = 8, 50_000  # _LARGEST: nodes and links together
_NOTHING = object()  # what a link to a muted node brings: no input at all


@dataclass
class Converted:
    """``unread``: ids of nodes of whose values some are unknown. ``lost``: nodes that are not in the prompt at all."""

    prompt: Mapping[str, Any]
    unread: dict[str, None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    lost: int = 0


@dataclass(frozen=True)
class _Value:
    """A value that the front end writes in place of a link; ``known``: whether it could be read."""

    value: Any = None
    known: bool = True


class _Level:
    """The nodes and links of the graph, or of one instance of a subgraph in it."""

    def __init__(self, graph: Mapping[str, Any], prefix: str = "", parent: _Level | None = None, instance: Any = None):
        self.graph, self.prefix, self.parent, self.instance = graph, prefix, parent, instance
        self.nodes = {_id(node): node for node in _dicts(graph.get("nodes")) if isinstance(node.get("type"), str)}
        self.links = dict(filter(None, map(_link, _list(graph.get("links")))))
        self.exits = {slot: name for name, (_, _, end, slot) in self.links.items() if end == _EXIT}
        self.inner: dict[str, _Level] = {}
        self.setters = {
            name: node for node in self.nodes.values() if node["type"] in _SETTERS and (name := _first_value(node))
        }
        self.given: dict[str, Any] = {}  # values that the instance has for inputs of the subgraph
        self.forced: dict[str, dict[str, Any]] = {}  # and for widgets of nodes in it


def converted(graph: Mapping[str, Any], classes: Mapping[str, Any] | None) -> Converted:
    """``classes``: the host's node classes by name, where it runs; they say which value belongs to which widget."""
    return _Conversion(graph, classes).result()


class _Conversion:
    def __init__(self, graph: Mapping[str, Any], classes: Mapping[str, Any] | None):
        self.classes = classes
        definitions = graph.get("definitions")
        subgraphs = _dicts(definitions.get("subgraphs")) if isinstance(definitions, Mapping) else ()
        self.definitions = {str(entry.get("id")): entry for entry in subgraphs}
        self.resolved: dict[tuple[int, str], Any] = {}
        self.left_out = self.strange = 0
        self.broadcasts = self.groups = False
        self.levels = list(self._levels(graph))

    def _levels(self, graph: Mapping[str, Any]) -> Iterator[_Level]:
        """The graph and every subgraph instance that runs, the outer ones first."""
        waiting, size = deque([(_Level(graph), 0)]), 0  # of what was unfolded
        while waiting:
            level, depth = waiting.popleft()
            yield level
            for name, node in level.nodes.items():
                definition = self.definitions.get(node["type"])
                if definition is None or node.get("mode") in (_MUTED, _BYPASSED):
                    continue
                if depth >= _DEEPEST or size > _LARGEST:
                    self.left_out += 1
                    continue
                level.inner[name] = inner = _Level(definition, f"{level.prefix}{name}:", level, node)
                size += 1 + len(inner.nodes) + len(inner.links)
                _hand_in(inner, node)
                waiting.append((inner, depth + 1))

    def result(self) -> Converted:
        self.strange = sum(len(_list(level.graph.get("nodes"))) - len(level.nodes) for level in self.levels)
        found = Converted({}, lost=self.left_out + self.strange)
        for level in self.levels:
            for name, node in level.nodes.items():
                kind = node["type"]
                if node.get("mode") in (_MUTED, _BYPASSED) or kind in _BROWSER_ONLY or name in level.inner:
                    continue
                if kind.startswith(_BROADCASTS):
                    self.broadcasts = True
                    continue
                if kind in self.definitions:
                    continue  # counted in left_out
                if kind.startswith(_GROUPS):
                    self.groups, found.lost = True, found.lost + 1
                    continue
                inputs, whole = self._inputs(level, name, node)
                found.prompt[level.prefix + name] = {"class_type": kind, "inputs": inputs}
                if not whole:
                    found.unread[level.prefix + name] = None
        found.notes = tuple(self._notes())
        return found

    def _notes(self) -> Iterator[str]:
        if self.strange:
            yield f"{self.strange} of its entries are not nodes, or have the id of another one"
        if self.left_out:
            yield f"{self.left_out} subgraphs beyond a depth of {_DEEPEST} or {_LARGEST:,} nodes and links"
        if self.broadcasts:
            yield "the links that Anything Everywhere makes in the browser"
        if self.groups:
            yield "group nodes, the older form of subgraphs"

    def _inputs(self, level: _Level, name: str, node: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """-> inputs of a node in API form, and whether all its values could be read."""
        inputs, whole = values_of(node, self.classes)
        inputs |= level.forced.get(name, {})
        for entry in _dicts(node.get("inputs")):
            if entry.get("link") is None or not isinstance(entry.get("name"), str):
                continue
            brought = self._origin(level, str(entry["link"]))
            if isinstance(brought, _Value):
                whole &= brought.known
                inputs.pop(entry["name"], None)
                if brought.known:
                    inputs[entry["name"]] = brought.value
            elif brought is not _NOTHING:
                inputs[entry["name"]] = brought
        return inputs, whole

    def _origin(self, level: _Level, link: str) -> Any:
        """A link -> ["<id>", slot], a _Value, or _NOTHING."""
        path, found = [], _NOTHING
        step: Any = (level, link)
        while isinstance(step, tuple):
            level, link = step
            key = (id(level), link)
            if key in self.resolved:
                found = self.resolved[key]
                break
            self.resolved[key] = _NOTHING  # what a cycle comes back to
            path.append(key)
            step = self._before(level, link)
        else:
            found = step
        for key in path:
            self.resolved[key] = found
        return found

    def _before(self, level: _Level, link: str) -> Any:
        """One step back along a link: (level, link) to go on with, or what ``_origin`` answers."""
        if link not in level.links:
            return _NOTHING
        origin, slot, _, _ = level.links[link]
        if origin == _ENTRY:
            return self._into(level, slot)
        node = level.nodes.get(origin)
        if node is None or node.get("mode") == _MUTED:
            return _NOTHING
        kind = node["type"]
        if node.get("mode") == _BYPASSED:
            return _along(level, _passed_on(node, slot))
        if kind in _REROUTES:
            return _along(level, next(iter(_dicts(node.get("inputs"))), None))
        if kind == _PRIMITIVE:
            values = _list(node.get("widgets_values"))
            return _Value(values[0]) if values else _Value(known=False)
        if kind in _GETTERS:
            return _set_by(level, _first_value(node))
        if origin in level.inner:
            inner = level.inner[origin]
            return (inner, inner.exits[slot]) if slot in inner.exits else _NOTHING
        return [level.prefix + origin, slot]

    def _into(self, level: _Level, slot: int) -> Any:
        """What comes into a subgraph at one of its inputs."""
        entries = _dicts(level.graph.get("inputs"))
        if level.parent is None or not 0 <= slot < len(entries):
            return _NOTHING
        name = entries[slot].get("name")
        outer = next((entry for entry in _dicts(level.instance.get("inputs")) if entry.get("name") == name), None)
        if outer is not None and outer.get("link") is not None:
            return level.parent, str(outer["link"])
        if name in level.given:
            return _Value(level.given[name])
        # An instance that stores no values leaves the node in the subgraph its own.
        told = outer is not None and outer.get("widget") and _list(level.instance.get("widgets_values"))
        return _Value(known=False) if told else _NOTHING


def _hand_in(inner: _Level, instance: Mapping[str, Any]) -> None:
    """Note which values an instance of a subgraph has for its inputs, and for widgets that were brought out of it."""
    values = _list(instance.get("widgets_values"))
    properties = instance.get("properties")
    proxies = _list(properties.get("proxyWidgets")) if isinstance(properties, Mapping) else []
    own = [entry.get("name") for entry in _dicts(instance.get("inputs")) if entry.get("widget")]
    if not proxies and len(values) == len(own):
        inner.given = dict(zip(own, values, strict=True))
    elif len(values) == len(proxies):
        for proxy, value in zip(proxies, values, strict=True):
            node, name = (_list(proxy) + [None, None])[:2]
            if str(node) == "-1":
                inner.given[name] = value
            elif isinstance(name, str):
                inner.forced.setdefault(str(node), {})[name] = value


def _along(level: _Level, entry: Mapping[str, Any] | None) -> Any:
    return _NOTHING if entry is None or entry.get("link") is None else (level, str(entry["link"]))


def _set_by(level: _Level | None, name: str | None) -> Any:
    """What a Get node gets: the input of the Set node of that name, in its own graph or one around it."""
    while level is not None:
        if name in level.setters:
            return _along(level, next(iter(_dicts(level.setters[name].get("inputs"))), None))
        level = level.parent
    return _Value(known=False)


def _passed_on(node: Mapping[str, Any], slot: int) -> Mapping[str, Any] | None:
    """The input that a bypassed node hands on at an output: the one beside it if it fits, else the first that does."""
    inputs, outputs = _dicts(node.get("inputs")), _dicts(node.get("outputs"))
    wanted = str(outputs[slot].get("type")) if 0 <= slot < len(outputs) else "*"
    if slot < len(inputs) and _fits(inputs[slot], wanted):
        return inputs[slot]
    same = [entry for entry in inputs if str(entry.get("type")) == wanted]
    return next(iter(same or [entry for entry in inputs if _fits(entry, wanted)]), None)


def _fits(entry: Mapping[str, Any], wanted: str) -> bool:
    kinds, wishes = str(entry.get("type")).split(","), wanted.split(",")
    return "*" in kinds or "*" in wishes or bool(set(kinds) & set(wishes))


def _link(entry: Any) -> tuple[str, tuple[str, int, str, int]] | None:
    """A link as graphs or as subgraphs save it -> id, (source, its slot, target, its slot); None for anything else."""
    if isinstance(entry, Mapping):
        parts = [entry.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    else:
        parts = _list(entry)[:5]
    if len(parts) < 5 or type(parts[2]) is not int or type(parts[4]) is not int:
        return None
    return str(parts[0]), (str(parts[1]), parts[2], str(parts[3]), parts[4])


def _id(node: Mapping[str, Any]) -> str:
    return str(node.get("id"))


def _first_value(node: Mapping[str, Any]) -> str | None:
    values = node.get("widgets_values")
    first = next(iter(values.values() if isinstance(values, Mapping) else _list(values)), None)
    return first if isinstance(first, str) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; the positions stay those of the list, since slots are positions."""
    return [entry if isinstance(entry, Mapping) else {} for entry in _list(value)]
