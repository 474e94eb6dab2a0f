# SPDX-License-Identifier: Apache-2.0
"""Links of a saved workflow, followed as the front end follows them; values by position."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from nvfp4_video.host.guard.saved_graph import converted
from nvfp4_video.host.guard.saved_values import values_of

TYPES = {
    "Make": {
        "required": {"width": ("INT", {}), "seed": ("INT", {}), "name": (["a", "b"], {}), "rate": ("FLOAT,INT", {})}
    },
    "Use": {"required": {"latent": ("LATENT",)}, "optional": {"amount": ("FLOAT", {"default": 1.0})}},
    "Both": {"required": {"a": ("LATENT",), "b": ("IMAGE",)}},
    "Choose": {
        "required": {
            "mode": (
                "COMFY_DYNAMICCOMBO_V3",
                {"options": [
                    {"key": "one", "inputs": {"required": {"size": ("INT", {})}}},
                    {"key": "two", "inputs": {"required": {"x": ("INT", {}), "y": ("BOOLEAN", {})}}},
                ]},
            ),
            "last": ("STRING", {}),
        }
    },
}  # fmt: skip
CLASSES = {name: SimpleNamespace(INPUT_TYPES=lambda types=types: types) for name, types in TYPES.items()}
MAKE = {
    "id": 1,
    "type": "Make",
    "inputs": [],
    "outputs": [{"type": "LATENT"}],
    "widgets_values": [64, 7, "randomize", "a", 24],
}


def node(number: int, kind: str, link: int | None = None, name: str = "latent", **more: object) -> dict:
    """A saved node with one input and one output of a latent."""
    inputs = [{"name": name, "type": "LATENT", "link": link}]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": [{"type": "LATENT"}]} | more


def graph(*nodes: dict, links: list, **more: object) -> dict:
    return {"nodes": list(nodes), "links": links} | more


def inputs(found: dict) -> dict:
    return converted(found, CLASSES).prompt["9"]["inputs"]


USE = node(9, "Use", 2, widgets_values=[0.5])


def test_values_get_their_names_and_the_control_after_a_seed_is_none():
    found = converted(graph(MAKE, links=[]), CLASSES)
    assert found.prompt == {"1": {"class_type": "Make", "inputs": {"width": 64, "seed": 7, "name": "a", "rate": 24}}}
    assert not found.unread and not found.notes


@pytest.mark.parametrize(
    "between",
    [
        [node(2, "Reroute", 1, "")],
        [node(2, "Use", 1, mode=4)],
        [node(2, "SetNode", 1, widgets_values=["x"]), node(3, "GetNode", widgets_values=["x"], inputs=[])],
    ],
    ids=["reroute", "bypassed", "Set and Get"],
)
def test_a_link_is_followed_through_what_the_front_end_takes_out(between):
    links = [[1, 1, 0, 2, 0, "LATENT"], [2, between[-1]["id"], 0, 9, 0, "LATENT"]]
    found = converted(graph(MAKE, *between, USE, links=links), CLASSES)
    assert found.prompt.keys() == {"1", "9"}
    assert found.prompt["9"]["inputs"] == {"amount": 0.5, "latent": ["1", 0]}


def test_a_muted_node_brings_nothing_and_a_primitive_its_value():
    links = [[2, 1, 0, 9, 0, "LATENT"], [3, 4, 0, 9, 1, "FLOAT"]]
    primitive = {"id": 4, "type": "PrimitiveNode", "outputs": [{"type": "FLOAT"}], "widgets_values": [0.25, "fixed"]}
    use = USE | {
        "inputs": [*USE["inputs"], {"name": "amount", "type": "FLOAT", "widget": {"name": "amount"}, "link": 3}]
    }
    assert inputs(graph(MAKE | {"mode": 2}, primitive, use, links=links)) == {"amount": 0.25}


def test_a_bypassed_node_hands_on_the_input_of_the_same_type():
    both = {
        "id": 2, "type": "Both", "mode": 4, "outputs": [{"type": "IMAGE"}, {"type": "LATENT"}],
        "inputs": [{"name": "a", "type": "LATENT", "link": 1}, {"name": "b", "type": "IMAGE", "link": None}],
    }  # fmt: skip
    assert inputs(graph(MAKE, both, USE, links=[[1, 1, 0, 2, 0, "LATENT"], [2, 2, 1, 9, 0, "LATENT"]]))["latent"] == [
        "1",
        0,
    ]
    assert "latent" not in inputs(graph(MAKE, both, USE, links=[[1, 1, 0, 2, 0, "LATENT"], [2, 2, 0, 9, 0, "IMAGE"]]))


def subgraph(**instance: object) -> dict:
    """A graph whose nodes 1 and 9 are joined by an instance of a subgraph that holds a Use and hands its width on."""
    inner_make = MAKE | {"id": 5, "inputs": [{"name": "width", "type": "INT", "widget": {"name": "width"}, "link": 11}]}
    definition = {
        "id": "sub", "nodes": [node(3, "Use", 10, widgets_values=[0.75]), inner_make],
        "inputs": [{"name": "latent", "type": "LATENT"}, {"name": "width", "type": "INT"}],
        "outputs": [{"name": "LATENT", "type": "LATENT"}],
        "links": [
            {"id": 10, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "LATENT"},
            {"id": 11, "origin_id": -10, "origin_slot": 1, "target_id": 5, "target_slot": 0, "type": "INT"},
            {"id": 12, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
        ],
    }  # fmt: skip
    entries = [{"name": "latent", "type": "LATENT", "link": 1}]
    entries.append({"name": "width", "type": "INT", "widget": {"name": "width"}, "link": None})
    standing = {"id": 2, "type": "sub", "inputs": entries, "outputs": [{"type": "LATENT"}], "widgets_values": [96]}
    links = [[1, 1, 0, 2, 0, "LATENT"], [2, 2, 0, 9, 0, "LATENT"]]
    return graph(MAKE, standing | instance, USE, links=links, definitions={"subgraphs": [definition]})


def test_a_subgraph_is_unfolded_with_what_comes_into_it():
    found = converted(subgraph(), CLASSES)
    assert found.prompt.keys() == {"1", "2:3", "2:5", "9"}
    assert found.prompt["2:3"]["inputs"] == {"amount": 0.75, "latent": ["1", 0]}
    assert found.prompt["2:5"]["inputs"]["width"] == 96
    assert found.prompt["9"]["inputs"]["latent"] == ["2:3", 0]


def test_values_that_an_instance_brings_out_of_its_subgraph_are_those_of_the_instance():
    proxies = {"properties": {"proxyWidgets": [["-1", "width"], ["3", "amount"]]}, "widgets_values": [128, 0.125]}
    found = converted(subgraph(**proxies), CLASSES).prompt
    assert (found["2:5"]["inputs"]["width"], found["2:3"]["inputs"]["amount"]) == (128, 0.125)


def test_a_value_that_an_instance_does_not_tell_is_unknown_and_not_the_one_inside():
    found = converted(subgraph(widgets_values=[1, 2, 3]), CLASSES)
    assert "width" not in found.prompt["2:5"]["inputs"] and list(found.unread) == ["2:5"]


def test_an_instance_without_values_leaves_those_inside():
    found = converted(subgraph(widgets_values=[]), CLASSES)
    assert found.prompt["2:5"]["inputs"]["width"] == 64 and not found.unread


def test_a_bypassed_or_muted_subgraph_is_not_unfolded():
    assert converted(subgraph(mode=4), CLASSES).prompt["9"]["inputs"]["latent"] == ["1", 0]
    muted = converted(subgraph(mode=2), CLASSES).prompt
    assert muted.keys() == {"1", "9"} and "latent" not in muted["9"]["inputs"]


def test_what_only_a_browser_could_tell_is_named():
    everywhere = {"id": 3, "type": "Anything Everywhere", "inputs": []}
    found = converted(graph(MAKE, everywhere, {"id": 4, "type": "workflow>old"}, links=[]), CLASSES)
    assert found.prompt.keys() == {"1"} and found.lost == 1
    assert "Anything Everywhere" in found.notes[0] and "group nodes" in found.notes[1]


def test_a_link_is_followed_however_long_the_way_is():
    between = [node(10 + number, "Use", 10 + number, mode=4) for number in range(5000)]
    links = [[10, 1, 0, 10, 0, "LATENT"]]
    links += [[11 + number, 10 + number, 0, 11 + number, 0, "LATENT"] for number in range(4999)]
    links += [[2, 5009, 0, 9, 0, "LATENT"]]
    assert inputs(graph(MAKE, *between, USE, links=links))["latent"] == ["1", 0]


def test_cycles_and_dangling_links_come_to_nothing():
    reroutes = [node(2, "Reroute", 3), node(3, "Reroute", 1)]
    links = [[1, 2, 0, 3, 0, "*"], [3, 3, 0, 2, 0, "*"], [2, 3, 0, 9, 0, "*"]]
    assert "latent" not in inputs(graph(*reroutes, USE, links=links))
    assert "latent" not in inputs(graph(USE, links=[]))


@pytest.mark.parametrize(
    ("kind", "stored", "found"),
    [
        ("Choose", ["one", 4, "end"], {"mode": "one", "mode.size": 4, "last": "end"}),
        ("Choose", ["two", 4, True, "end"], {"mode": "two", "mode.x": 4, "mode.y": True, "last": "end"}),
        ("Make", [64, 7, "a", 24.5], {"width": 64, "seed": 7, "name": "a", "rate": 24.5}),
        ("Make", [64, 7, "fixed", "a", 24, "upload"], {"width": 64, "seed": 7, "name": "a", "rate": 24}),
        ("Use", [], {}),
        ("Make", ["wide", 7, "a", 24], None),
        ("Make", [True, 7, "a", 24], None),
        ("Make", [64], None),
        ("Use", {"amount": 2.0, "x": 1}, {"amount": 2.0, "x": 1}),
    ],
)
def test_values_by_position_are_read_by_the_class_or_not_at_all(kind, stored, found):
    expected = ({}, False) if found is None else (found, True)
    assert values_of({"type": kind, "widgets_values": stored}, CLASSES) == expected


def test_without_a_class_the_node_s_own_list_of_widgets_decides_if_it_is_whole():
    entries = [{"name": name, "widget": {"name": name}} for name in ("width", "seed", "name")]
    saved = {"type": "Elsewhere", "inputs": entries, "widgets_values": [64, 7, "randomize", "a"]}
    assert values_of(saved, None) == ({"width": 64, "seed": 7, "name": "a"}, True)
    assert values_of(saved | {"inputs": entries[:1]}, None) == ({}, False)


def test_a_class_that_fails_to_tell_its_inputs_is_as_one_that_is_not_there():
    def broken():
        raise RuntimeError("no folder")

    classes = {"Broken": SimpleNamespace(INPUT_TYPES=broken)}
    assert values_of({"type": "Broken", "widgets_values": [1]}, classes) == ({}, False)
