# SPDX-License-Identifier: Apache-2.0
"""Whether the shipped workflows can be read on the canvas: nothing overlaps, links run to the right and in the open."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.tests.workflows.workflow_builder import SLOT, TITLE, WIDGET
from nvfp4_video.tests.workflows.workflow_format import ENTRY, EXIT, NOTES, link_of

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
LEVELS = {
    f"{file.stem}/{level.get('name', '')}".rstrip("/"): level
    for file in sorted(FOLDER.glob("*.json"))
    for graph in [json.loads(file.read_text("utf-8"))]
    for level in (graph, *graph.get("definitions", {}).get("subgraphs", []))
}
every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
Point = tuple[float, float]


def rectangle(node: dict) -> tuple[float, float, float, float]:
    """Left, top with the title, right, bottom."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def output_at(node: dict, slot: int) -> Point:
    return node["pos"][0] + node["size"][0], node["pos"][1] + SLOT * (slot + 0.7)


def input_at(node: dict, inlet: int) -> Point:
    """Sockets come first; the socket of a widget is beside it."""
    sockets = [entry for entry in node["inputs"] if "widget" not in entry]
    x, y = node["pos"]
    if "widget" not in node["inputs"][inlet]:
        return x, y + SLOT * (inlet + 0.7)
    rows = max(len(sockets), len(node["outputs"]))
    return x, y + SLOT * rows + WIDGET * (inlet - len(sockets) + 0.5) + 4


def path(level: dict, link: tuple) -> list[Point]:
    """Points on a link as LiteGraph draws it: curves that leave and enter sockets level, straight between reroutes."""
    nodes = {node["id"]: node for node in level["nodes"]}
    number, source, slot, target, inlet, _ = link
    kept = level["reroutes"] if "inputNode" in level else level["extra"].get("reroutes", [])
    reroutes = {entry["id"]: entry for entry in kept}
    ending = level["links"] if "inputNode" in level else level["extra"].get("linkExtensions", [])
    end = {entry["id"]: entry.get("parentId") for entry in ending}.get(number)
    between: list[Point] = []
    while end is not None:
        between.insert(0, tuple(reroutes[end]["pos"]))
        end = reroutes[end].get("parentId")
    start = level["inputs"][slot]["pos"] if source == ENTRY else output_at(nodes[source], slot)
    stops = [start, *between, input_at(nodes[target], inlet)]
    points: list[Point] = []
    for index, (start, stop) in enumerate(itertools.pairwise(stops)):
        reach = math.dist(start, stop) / 4
        first = (start[0] + reach, start[1]) if index == 0 else start
        last = (stop[0] - reach, stop[1]) if index == len(stops) - 2 else stop
        for step in range(101):
            t = step / 100
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            corners = (start, first, last, stop)
            points.append(tuple(sum(w * c[axis] for w, c in zip(weights, corners, strict=True)) for axis in (0, 1)))
    return points


def inner_links(level: dict) -> Iterator[tuple]:
    """The links between two nodes of a level."""
    for link in map(link_of, level["links"]):
        if link[1] != ENTRY and link[3] != EXIT:
            yield link


@every_level
def test_nodes_do_not_overlap(level: dict):
    for one, other in itertools.combinations(level["nodes"], 2):
        a, b = rectangle(one), rectangle(other)
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one['type']} over {other['type']}"


@every_level
def test_nothing_lies_below_a_note_which_the_newer_renderer_draws_as_long_as_its_text(level: dict):
    for note in [node for node in level["nodes"] if node["type"] in NOTES]:
        left, top, right, _ = rectangle(note)
        others = [rectangle(node) for node in level["nodes"] if node is not note]
        assert [box for box in others if box[1] > top and box[0] < right and left < box[2]] == []


@every_level
def test_every_node_sits_in_one_group_and_groups_do_not_overlap(level: dict):
    bounds = [group["bounding"] for group in level["groups"]]
    if not bounds:
        return
    for (x, y, width, height), (x2, y2, width2, height2) in itertools.combinations(bounds, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    for node in level["nodes"]:
        x, y, right, bottom = rectangle(node)
        inside = 0
        for left, top, width, height in bounds:
            outside = right <= left or left + width <= x or bottom <= top or top + height <= y
            contained = left <= x and right <= left + width and top <= y and bottom <= top + height
            assert outside or contained, f"{node['type']} crosses the border of a group"
            inside += contained
        assert inside == (node["type"] not in NOTES), f"{node['type']} is in {inside} groups"


@every_level
def test_group_titles_fit_into_their_frames(level: dict):
    for group in level["groups"]:
        assert len(group["title"]) * group["font_size"] * 0.42 < group["bounding"][2], group["title"]


@every_level
def test_links_run_from_left_to_right(level: dict):
    nodes = {node["id"]: node for node in level["nodes"]}
    for link, source, _, target, _, _ in inner_links(level):
        assert rectangle(nodes[source])[2] < rectangle(nodes[target])[0], f"link {link} runs backwards"


@every_level
def test_no_link_passes_behind_a_node_that_it_does_not_belong_to(level: dict):
    hidden = []
    for link in [link for link in map(link_of, level["links"]) if link[3] != EXIT]:
        points = path(level, link)
        for node in level["nodes"]:
            if node["id"] in (link[1], link[3]):
                continue
            left, top, right, bottom = rectangle(node)
            if any(left < x < right and top < y < bottom for x, y in points):
                hidden.append(f"{link[0]} from {link[1]} to {link[3]} behind {node['id']} {node['type']}")
    assert hidden == []
