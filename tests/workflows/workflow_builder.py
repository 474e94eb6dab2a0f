# SPDX-License-Identifier: Apache-2.0
"""Workflow templates from compact descriptions: nodes, links and groups -> the front end's JSON.

``Sheet`` collects one graph, ``save`` returns what the front end saves (version 0.4). Inputs and outputs are never
written twice: they come from what the node's definition says, and a wrong name is an error while the graph is built.

Geometry as LiteGraph draws it: a node's title lies above its position, sockets are 20 apart, then come the widgets.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .workflow_format import ALWAYS, ENTRY, EXIT, NOTES, Widget, inputs_of, is_widget, matched, widgets_of

FRONTEND, HOST = "1.49.6", "0.33.0"
TITLE, SLOT, WIDGET, PAD = 30, 20, 24, 20
TALL = 80  # a text field of several lines
GROUP_COLOR, GROUP_TITLE = "#8fbfe0", 50


@dataclass(frozen=True)
class Out:
    """An output of a node. ``points``: where its link is led through.

    ``value``: of an input of a subgraph, what the widgets show that it is linked to.
    """

    node: Node
    slot: int
    points: tuple[tuple[int, int], ...] = ()
    value: object = None

    def via(self, *points: tuple[int, int]) -> Out:
        """The same output, its link led through further points."""
        return Out(self.node, self.slot, self.points + points, self.value)


@dataclass(eq=False)
class Node:
    """One node of a sheet; ``node["name"]`` is an output. ``inputs``: name -> value or Out."""

    id: int
    kind: str
    info: Mapping
    at: tuple[int, int]
    width: int
    height: int
    title: str | None
    inputs: Mapping[str, object]
    extras: Mapping[str, object]
    widgets: list[Widget] = field(default_factory=list)

    def __getitem__(self, name: str) -> Out:
        return Out(self, self.info["output_name"].index(name))

    @property
    def bottom(self) -> int:
        return self.at[1] + self.height

    @property
    def right(self) -> int:
        return self.at[0] + self.width

    @property
    def sockets(self) -> list[tuple[str, str, Mapping, bool]]:
        return [entry for entry in inputs_of(self.info) if not is_widget(entry[1], entry[2])]


class Sheet:
    """One graph while it is built."""

    def __init__(self, name: str, info: Mapping[str, Mapping], first: int = 1):
        self.name, self.info, self.first = name, info, first
        self.nodes: list[Node] = []
        self.groups: list[dict] = []
        self.subgraphs: list[Subgraph] = []

    def note(self, at: tuple[int, int], size: tuple[int, int], title: str, text: str) -> Node:
        """A MarkdownNote."""
        extras = {"color": "#432", "bgcolor": "#653", "text": text + "\n"}
        info = {"input": {}, "output": []}
        node = Node(self.first + len(self.nodes), "MarkdownNote", info, at, *size, title, {}, extras)
        self.nodes.append(node)
        return node

    def add(
        self,
        kind: str,
        at: tuple[int, int],
        /,
        wide: int = 320,
        title: str | None = None,
        room: int = 0,
        models: Sequence[tuple[str, str, str]] = (),
        colors: tuple[str, str] | None = None,
        text_height: int = TALL,
        control: str = "fixed",
        mode: int = ALWAYS,
        match: str = "",
        **inputs: object,
    ) -> Node:
        """A node at its upper left corner. ``inputs``: widget values, and an Out for what is linked.

        ``room``: height for what the node shows after it has run. ``models``: (name, address, folder) of files that the
        front end offers to download. ``mode``: ALWAYS, MUTED or BYPASSED. ``match``: the type of sockets that take any
        one. KeyError for an input that the node does not have.
        """
        info = matched(self.info[kind], match) if match else self.info[kind]
        extras = {"models": models, "colors": colors, "control": control, "mode": mode}
        node = Node(self.first + len(self.nodes), kind, info, at, wide, 0, title, inputs, extras)
        node.widgets = list(widgets_of(info, inputs))
        unknown = inputs.keys() - {entry[0] for entry in node.sockets} - {widget.name for widget in node.widgets}
        if unknown:
            raise KeyError(f"{kind} has no input {', '.join(sorted(unknown))}")
        rows = max(len(node.sockets), len(info["output"]))
        heights = [text_height if widget.settings.get("multiline") else WIDGET for widget in node.widgets]
        heights += [WIDGET for widget in node.widgets if widget.settings.get("control_after_generate")]
        node.height = rows * SLOT + sum(heights) + 6 + room
        self.nodes.append(node)
        return node

    def group(self, title: str, *nodes: Node, left: int = 0, bottom: int = 0) -> None:
        """A frame around nodes; ``left`` and ``bottom`` widen it."""
        x = min(node.at[0] for node in nodes) - PAD - left
        y = min(node.at[1] for node in nodes) - TITLE - GROUP_TITLE
        right, lowest = max(node.right for node in nodes) + PAD, max(node.bottom for node in nodes) + PAD + bottom
        bounding = [x, y, right - x, lowest - y]
        entry = {"id": self.first + len(self.groups), "title": title, "bounding": bounding}
        self.groups.append(entry | {"color": GROUP_COLOR, "font_size": 24, "flags": {}})

    def save(self) -> dict:
        """The graph as the front end saves it."""
        links, reroutes, extensions = self._links()
        order = self._order(links)
        extra: dict[str, object] = {"ds": {"scale": 0.8, "offset": [80, 120]}, "frontendVersion": FRONTEND}
        subgraphs = self._all_subgraphs()
        if reroutes:
            extra |= {"linkExtensions": extensions, "reroutes": reroutes}
        saved = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"nvfp4-video/{self.name}")),
            "revision": 0,
            "last_node_id": max(node.id for sheet in (self, *subgraphs) for node in sheet.nodes),
            "last_link_id": max(sheet._last_link() for sheet in (self, *subgraphs)),
            "nodes": [self._node(node, links, order[node.id]) for node in self.nodes],
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": extra,
            "version": 0.4,
        }
        if subgraphs:
            saved["definitions"] = {"subgraphs": [subgraph.definition() for subgraph in subgraphs]}
        return saved

    def _all_subgraphs(self) -> list[Subgraph]:
        """Those on this sheet, and those in them."""
        return [found for subgraph in self.subgraphs for found in (subgraph, *subgraph._all_subgraphs())]

    def _links(self) -> tuple[list[list], list[dict], list[dict]]:
        """-> links, reroutes and which reroute each link ends at. Links of one output share the points they share."""
        links: list[list] = []
        reroutes: dict[tuple, dict] = {}
        extensions = []
        for node in self.nodes:
            for inlet, (name, *_) in enumerate(self._entries(node)):
                value = node.inputs.get(name)
                if not isinstance(value, Out):
                    continue
                number, parent = self.first + len(links), None
                kind = value.node.info["output"][value.slot]
                links.append([number, value.node.id, value.slot, node.id, inlet, kind])
                for count in range(1, len(value.points) + 1):
                    key = (value.node.id, value.slot, value.points[:count])
                    entry = reroutes.setdefault(key, {"id": self.first + len(reroutes)})
                    if parent is not None:
                        entry["parentId"] = parent
                    entry["pos"] = list(value.points[count - 1])
                    entry.setdefault("linkIds", []).append(number)
                    parent = entry["id"]
                if parent is not None:
                    extensions.append({"id": number, "parentId": parent})
        return links, list(reroutes.values()), extensions

    def _last_link(self) -> int:
        return self.first + len(self._links()[0]) - 1

    def _entries(self, node: Node) -> list[tuple[str, str, bool, bool]]:
        """Inputs as they are saved, sockets first: (name, type, whether it is a widget, whether it is optional)."""
        entries = [(name, kind, False, optional) for name, kind, _, optional in node.sockets]
        entries += [(widget.name, widget.kind, True, widget.optional) for widget in node.widgets]
        uploads = any(widget.settings.get("image_upload") for widget in node.widgets)
        return entries + ([("upload", "IMAGEUPLOAD", True, False)] if uploads else [])

    def _order(self, links: Sequence[Sequence]) -> dict[int, int]:
        """Node -> when it runs: after all that it needs."""
        waiting = {node.id: {link[1] for link in links if link[3] == node.id} for node in self.nodes}
        order: dict[int, int] = {}
        while waiting:
            ready = min(node for node, needs in waiting.items() if needs <= order.keys())
            order[ready] = len(order)
            del waiting[ready]
        return order

    def _node(self, node: Node, links: Sequence[Sequence], order: int) -> dict:
        saved: dict[str, object] = {
            "id": node.id, "type": node.kind, "pos": list(node.at), "size": [node.width, node.height],
            "flags": {}, "order": order, "mode": node.extras.get("mode", ALWAYS),
        }  # fmt: skip
        incoming = {link[4]: link[0] for link in links if link[3] == node.id}
        saved["inputs"] = []
        for inlet, (name, kind, widget, optional) in enumerate(self._entries(node)):
            entry: dict[str, object] = {"localized_name": name, "name": name, "type": kind}
            entry |= ({"shape": 7} if optional else {}) | ({"widget": {"name": name}} if widget else {})
            saved["inputs"].append(entry | {"link": incoming.get(inlet)})
        saved["outputs"] = [
            {"localized_name": name, "name": name, "type": kind,
             "links": [link[0] for link in links if link[1] == node.id and link[2] == slot]}
            for slot, (name, kind) in enumerate(zip(node.info.get("output_name", ()), node.info["output"], strict=True))
        ]  # fmt: skip
        if node.title:
            saved["title"] = node.title
        if node.kind in NOTES:
            saved |= {"properties": {}, "widgets_values": [node.extras["text"]]}
            return saved | {key: node.extras[key] for key in ("color", "bgcolor")}
        own = node.kind.startswith("NVFP4")
        properties: dict[str, object] = {} if own else {"cnr_id": "comfy-core", "ver": HOST}
        properties["Node name for S&R"] = node.kind
        if node.extras["models"]:
            keys = ("name", "url", "directory")
            properties["models"] = [dict(zip(keys, model, strict=True)) for model in node.extras["models"]]
        saved |= {"properties": properties, "widgets_values": self._values(node)}
        if node.extras["colors"]:
            saved["color"], saved["bgcolor"] = node.extras["colors"]
        return saved

    def _values(self, node: Node) -> list:
        values: list[object] = []
        for widget in node.widgets:
            value = node.inputs.get(widget.name)
            if isinstance(value, Out):
                value = value.value
            if value is None:
                options = widget.settings.get("options") or [""]
                first = options[0]["key"] if isinstance(options[0], dict) else options[0]
                value = widget.settings.get("default", first)
            values.append(value)
            if widget.settings.get("control_after_generate"):
                values.append(node.extras["control"])
            if widget.settings.get("image_upload"):
                values.append("image")
        return values


class Subgraph(Sheet):
    """A graph that stands as one node in another: ``define`` makes its kind known to that sheet.

    Its nodes, links, reroutes and groups count from ``first``: the front end wants each number only once in a workflow.
    """

    def __init__(self, name: str, info: Mapping[str, Mapping], first: int = 101):
        super().__init__(name, info, first)
        self.entries: list[tuple[str, str, Mapping]] = []
        self.values: dict[str, object] = {}
        self.exits: list[tuple[str, Out]] = []
        self.kind = str(uuid.uuid5(uuid.NAMESPACE_URL, f"nvfp4-video/subgraph/{name}"))

    def enter(self, name: str, kind: str, value: object = None, **settings: object) -> Out:
        """An input of the whole, of this type, as it is seen from inside; with a ``value`` it is a widget outside."""
        self.entries.append((name, kind, settings))
        if value is not None:
            self.values[name] = value
        names, kinds, _ = zip(*self.entries, strict=True)
        info = {"input": {}, "output": list(kinds), "output_name": list(names)}
        return Out(Node(ENTRY, "", info, (0, 0), 0, 0, None, {}, {}), len(self.entries) - 1, value=value)

    def leave(self, name: str, out: Out) -> None:
        """An output of the whole."""
        self.exits.append((name, out))

    def define(self, sheet: Sheet) -> str:
        """-> the kind to ``add`` to the sheet."""
        sheet.subgraphs.append(self)
        sheet.info = {
            **sheet.info,
            self.kind: {
                "input": {"required": {name: [kind, settings] for name, kind, settings in self.entries}},
                "output": [out.node.info["output"][out.slot] for _, out in self.exits],
                "output_name": [name for name, _ in self.exits],
                "display_name": self.name,
            },
        }
        return self.kind

    def stand(self, sheet: Sheet, at: tuple[int, int], wide: int, **given: Any) -> Node:
        """Put it on a sheet, its widgets with their values unless ``given`` has others; the rest as ``add``."""
        return sheet.add(self.define(sheet), at, wide, **(self.values | given))

    def _last_link(self) -> int:
        return super()._last_link() + len(self.exits)

    def definition(self) -> dict:
        """The subgraph as the front end saves it."""
        links, reroutes, extensions = self._links()
        ends_at = {entry["id"]: entry["parentId"] for entry in extensions}
        order = self._order([link for link in links if link[1] != ENTRY])
        nodes = [self._node(node, links, order[node.id]) for node in self.nodes]
        leaving = []
        for slot, (_, out) in enumerate(self.exits):
            number = self.first + len(links) + len(leaving)
            leaving.append([number, out.node.id, out.slot, EXIT, slot, out.node.info["output"][out.slot]])
            nodes[out.node.id - self.first]["outputs"][out.slot]["links"].append(number)
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        left = min(node.at[0] for node in self.nodes) - 620  # room for links to swing in, however high or low they end
        right = max(node.right for node in self.nodes) + 100
        middle = sum(node.at[1] for node in self.nodes) // len(self.nodes)
        sides = (("inputNode", ENTRY, left, self.entries), ("outputNode", EXIT, right, self.exits))
        ends = {end: {"id": node, "bounding": [x, middle, 130, 20 * len(names) + 48]} for end, node, x, names in sides}
        return {
            "id": self.kind,
            "version": 1,
            "state": {
                "lastGroupId": self.first + len(self.groups) - 1,
                "lastNodeId": self.nodes[-1].id,
                "lastLinkId": self._last_link(),
                "lastRerouteId": self.first + len(reroutes) - 1,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            **ends,
            "inputs": [
                {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.kind}/in/{name}")), "name": name, "type": kind,
                 "linkIds": [link[0] for link in links if link[1] == ENTRY and link[2] == slot],
                 "pos": [left + 110, middle + 24 + 20 * slot]}
                for slot, (name, kind, _) in enumerate(self.entries)
            ],
            "outputs": [
                {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.kind}/out/{name}")), "name": name, "type": link[5],
                 "linkIds": [link[0]], "pos": [right + 20, middle + 24 + 20 * slot]}
                for slot, ((name, _), link) in enumerate(zip(self.exits, leaving, strict=True))
            ],
            "widgets": [],
            "nodes": nodes,
            "groups": self.groups,
            "links": [
                dict(zip(keys, link, strict=True)) | ({"parentId": ends_at[link[0]]} if link[0] in ends_at else {})
                for link in links + leaving
            ],
            "reroutes": reroutes,
            "extra": {},
        }  # fmt: skip
