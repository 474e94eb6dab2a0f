# SPDX-License-Identifier: Apache-2.0
"""How the front end stores a graph, and what it makes of it: widgets by position, links, subgraphs, the API format.

What a node has for inputs and outputs comes from ``node_info``, which has the shape of ComfyUI's /object_info: for the
host's nodes recorded in ``data/core_nodes.json`` by make_workflows.py, for the pack's own taken from their schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).resolve().parents[1] / "data" / "core_nodes.json"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
MATCH = "COMFY_MATCHTYPE_V3"  # the type of a socket that takes the type of what is linked to it
# Inputs whose choices are the files that are there.
FILE_INPUTS = {
    "model_name", "vae_name", "file_name", "config_from", "text_encoder", "clip_name", "image", "projection",
    "lora_name", "calibration", "source",
}  # fmt: skip
# Nodes that only the front end knows.
NOTES = {"MarkdownNote", "Note"}
ENTRY, EXIT = -10, -20  # the ends of a subgraph, as node ids
ALWAYS, MUTED, BYPASSED = 0, 2, 4  # whether a node runs: Ctrl + M mutes, Ctrl + B bypasses


@dataclass(frozen=True)
class Widget:
    """One value a node stores. ``kind``: INT, COMBO and so on; ``optional``: a node may be saved without it."""

    name: str
    kind: str
    settings: Mapping
    optional: bool


def recorded() -> dict[str, dict]:
    """The host's nodes as recorded: the part of /object_info that decides about a graph."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def node_info(own: Sequence[type]) -> dict[str, dict]:
    """The pack's node classes -> /object_info of them and of the recorded nodes."""
    info = recorded()
    for node in own:
        schema = node.GET_SCHEMA()
        info[schema.node_id] = {
            "input": {part: dict(specs) for part, specs in node.INPUT_TYPES().items()},
            "output": [output.io_type for output in schema.outputs],
            "output_name": [output.display_name or output.io_type for output in schema.outputs],
            "display_name": schema.display_name,
        }
    return info


def inputs_of(info: Mapping) -> Iterator[tuple[str, str, Mapping, bool]]:
    """What /object_info says of one node -> (name, type, settings, optional) in order; "COMBO" for every list."""
    for part in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(part, {}).items():
            settings = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, settings = "COMBO", settings | {"options": kind}
            yield name, kind, settings, part == "optional"


def matched(info: Mapping, kind: str) -> dict:
    """/object_info of one node with this type for its sockets that take any one, as the front end saves it."""
    inputs = {
        part: {name: [kind, {"forceInput": True}] if spec[0] == MATCH else spec for name, spec in specs.items()}
        for part, specs in info["input"].items()
    }
    return {**info, "input": inputs, "output": [kind if found == MATCH else found for found in info["output"]]}


def is_widget(kind: str, settings: Mapping) -> bool:
    """Whether the front end shows a field for an input of this type."""
    return (kind in WIDGET_TYPES or bool(settings.get("widgetType"))) and not settings.get("forceInput")


def widgets_of(info: Mapping, values: Mapping[str, object]) -> Iterator[Widget]:
    """The widgets of a node in the order of its stored values, with those that a choice in ``values`` brings along."""
    for name, kind, settings, optional in inputs_of(info):
        if is_widget(kind, settings):
            yield from _unfold(name, kind, settings, optional, values)


def _unfold(name: str, kind: str, settings: Mapping, optional: bool, values: Mapping) -> Iterator[Widget]:
    yield Widget(name, kind, settings, optional)
    if kind == "COMFY_DYNAMICCOMBO_V3":
        chosen = values.get(name, settings["options"][0]["key"])
        (option,) = [option for option in settings["options"] if option["key"] == chosen]
        for inner, inner_kind, inner_settings, inner_optional in inputs_of({"input": option["inputs"]}):
            yield from _unfold(f"{name}.{inner}", inner_kind, inner_settings, optional or inner_optional, values)


def stored_values(node: Mapping, info: Mapping) -> dict[str, object]:
    """A saved node -> widget -> value. The values are stored by position, and a choice decides what follows it."""
    stored, found = iter(node.get("widgets_values") or []), {}

    def take(widget: Widget) -> None:
        value = next(stored, None)
        if value is None:
            assert widget.optional, f"{node['type']} stores no value for {widget.name}"
            return
        found[widget.name] = value
        if widget.settings.get("control_after_generate"):
            assert next(stored) in ("fixed", "increment", "decrement", "randomize")

    # The generator looks at ``found`` only when it comes to what depends on it.
    for widget in widgets_of(info, found):
        take(widget)
    return found


def api_prompt(graph: Mapping, info: Mapping, titles: bool = False) -> dict[str, dict]:
    """A saved graph and /object_info -> what the front end sends to /prompt; ``titles`` as in its API export.

    A subgraph is unfolded: its nodes have the ids ``<where it stands>:<node in it>``. A muted node is left out with the
    links that begin there; a bypassed one hands on, for each output, its first input of that type.
    """
    definitions = {definition["id"]: definition for definition in graph.get("definitions", {}).get("subgraphs", [])}
    prompt: dict[str, dict] = {}
    _unfold_nodes(graph["nodes"], [link_of(link) for link in graph["links"]], "", [], definitions, info, titles, prompt)
    return prompt


def link_of(link: Sequence | Mapping) -> tuple[int, int, int, int, int, str]:
    """A link as graphs or as subgraphs save it -> (id, source, its slot, target, its slot, type)."""
    if isinstance(link, Mapping):
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return tuple(link[name] for name in names)
    return tuple(link)


def _unfold_nodes(nodes, links, prefix, given, definitions, info, titles, prompt) -> dict[int, list]:
    """Add the nodes of one level to ``prompt``; ``given``: what comes into it. -> its output slot -> source."""
    by_link = {link[0]: link for link in links}
    outputs: dict[int, dict[int, list]] = {}

    def source(number: int) -> object:
        _, origin, slot, *_ = by_link[number]
        if origin == ENTRY:
            return given[slot]
        return outputs[origin].get(slot) if origin in outputs else [f"{prefix}{origin}", slot]

    for node in sorted(nodes, key=lambda node: node["order"]):
        if node["type"] in NOTES:
            continue
        if node["mode"] != ALWAYS:
            outputs[node["id"]] = _handed_on(node, source) if node["mode"] == BYPASSED else {}
            continue
        linked = {entry["name"]: source(entry["link"]) for entry in node["inputs"] if entry["link"] is not None}
        linked = {name: found for name, found in linked.items() if found is not None}
        if node["type"] in definitions:
            inner = definitions[node["type"]]
            values = iter(node["widgets_values"])
            stored = {entry["name"]: next(values) for entry in node["inputs"] if "widget" in entry}
            passed = [(stored | linked)[entry["name"]] for entry in inner["inputs"]]
            inner_links = [link_of(link) for link in inner["links"]]
            place = f"{prefix}{node['id']}:"
            outputs[node["id"]] = _unfold_nodes(
                inner["nodes"], inner_links, place, passed, definitions, info, titles, prompt
            )
            continue
        assert node["type"] in info, f"the host does not know {node['type']}"
        entry = {"inputs": stored_values(node, info[node["type"]]) | linked, "class_type": node["type"]}
        if titles:
            entry["_meta"] = {"title": node.get("title") or info[node["type"]].get("display_name") or node["type"]}
        prompt[f"{prefix}{node['id']}"] = entry
    return {link[4]: source(link[0]) for link in links if link[3] == EXIT}


def _handed_on(node: Mapping, source: Callable[[int], object]) -> dict[int, object]:
    """A bypassed node -> its output slot -> what comes in at its first input of that type."""
    came = {entry["type"]: source(entry["link"]) for entry in reversed(node["inputs"]) if entry["link"] is not None}
    return {slot: came.get(output["type"]) for slot, output in enumerate(node["outputs"])}
