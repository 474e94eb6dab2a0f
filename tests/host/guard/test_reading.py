# SPDX-License-Identifier: Apache-2.0
"""What a text is that somebody wants checked: unwrapped, converted or refused, and never silently not understood."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvfp4_video.host.guard import reading
from nvfp4_video.host.guard.reading import API, EMPTY, SAVED, NotRead, read, understand
from nvfp4_video.tests.support.guard_prompts import clip, ids
from nvfp4_video.tests.workflows.workflow_format import recorded

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(path.name for path in (ROOT / "workflows" / "api").glob("*.json"))
PROMPT = clip(video={"length": 120})
GRAPH = {
    "nodes": [
        {"id": 7, "type": "EmptyLTXVLatentVideo", "inputs": [], "outputs": [], "widgets_values": [770, 512, 120, 1]}
    ],
    "links": [],
    "version": 0.4,
}


@pytest.fixture
def host_classes(monkeypatch):
    """-> a function that puts node classes, as recorded of a host, into this process."""

    def put(*left_out: str) -> None:
        classes = {
            name: SimpleNamespace(INPUT_TYPES=lambda info=info: info["input"], OUTPUT_NODE=False)
            for name, info in recorded().items()
        }
        classes |= {entry["class_type"]: SimpleNamespace(OUTPUT_NODE=False) for entry in PROMPT.values()} | classes
        for name in left_out:
            classes.pop(name)
        monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=classes))

    return put


def told(data: object) -> reading.Reading:
    return read(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("wrapped", "place"),
    [
        (PROMPT, ""),
        ({"prompt": PROMPT, "client_id": "x", "extra_data": {"extra_pnginfo": {"workflow": GRAPH}}}, "prompt"),
        ({"input": {"workflow": PROMPT}}, "input.workflow"),
        ({"workflow": PROMPT}, "workflow"),
        ({"output": PROMPT, "workflow": GRAPH}, "output"),
        ({"input": {"payload": {"prompt": json.dumps(PROMPT)}}}, "input.payload.prompt"),
        (
            {"id": {"prompt": [3, "id", PROMPT, {"extra_pnginfo": {"workflow": GRAPH}}, ["save"]], "outputs": {}}},
            "id.prompt.2",
        ),
        ([{"body": {"output": PROMPT}}], "0.body.output"),
    ],
    ids=["bare", "request", "serverless", "app", "front end", "text in text", "history", "list"],
)
def test_a_prompt_is_found_in_whatever_it_is_wrapped(wrapped, place):
    found = told(wrapped)
    assert (found.shape, found.place, found.prompt) == (API, place, PROMPT)
    assert (found.nodes, found.understood, found.unknown) == (len(PROMPT), len(PROMPT), ())
    assert "frames" in ids(found.prompt)
    assert str(found).endswith(f"all {len(PROMPT)} nodes understood.")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_does_not_matter(encoding):
    assert read(json.dumps(PROMPT).encode(encoding)).prompt == PROMPT


@pytest.mark.parametrize("data", [{"prompt": {}}, {"input": {"workflow": {}}}, {"nodes": [], "links": []}])
def test_what_is_empty_is_called_empty_and_not_sound(data):
    found = told(data)
    assert (found.shape, str(found)) == (EMPTY, "There are no nodes in it, so nothing was checked.")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "this is empty"),
        (b"\xef\xbb\xbf \n", "this is empty"),
        (b"{", "this is not JSON"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xfe\xfe\x00\x01", "this is not text"),
        (b"[" * 200_000, "nested too deeply"),
        (b"{}", "this is empty"),
        (b"[]", "this is empty"),
        (b"3", "this is a single value"),
        (b'{"a": 1, "b": {"c": {"d": 2}}}', "an object with `a`, `b`"),
        (b'[{"nodes": "many"}]', "a list of 1 entries"),
    ],
)
def test_what_holds_no_prompt_is_refused_by_what_it_is(body, words):
    with pytest.raises(NotRead, match=words):
        read(body)


def test_every_thing_that_was_not_understood_is_counted_and_named(host_classes):
    host_classes("VAEDecode")
    found = told(PROMPT | {"note": "hello", "odd": {"class_type": 3}, "late": {"inputs": {}}})
    assert (found.nodes, found.understood) == (len(PROMPT) + 3, len(PROMPT) - 1)
    assert found.unknown[0] == "3 entries that are not nodes (note, odd, late)"
    assert found.unknown[1].startswith("1 node of a class that this ComfyUI does not have (VAEDecode)")
    assert f"{found.understood} of {found.nodes} nodes understood" in str(found)


def test_entries_of_a_saved_workflow_that_are_no_nodes_are_counted():
    found = told({"nodes": [*GRAPH["nodes"], None, {"type": 3}], "links": []})
    assert found.nodes == 3 and "2 of its entries are not nodes" in str(found)


def test_of_several_prompts_the_first_is_read_and_the_others_are_not_forgotten():
    found = told({"a": {"prompt": PROMPT}, "b": {"prompt": clip()}, "c": {"prompt": clip()}})
    assert (found.place, found.unknown) == ("a.prompt", ("2 more in the same text",))


def test_a_saved_workflow_is_converted_by_the_classes_of_the_host(host_classes):
    host_classes()
    found = told({"workflow": GRAPH})
    assert (found.shape, found.place, found.unknown) == (SAVED, "workflow", ())
    assert found.prompt["7"]["inputs"] == {"width": 770, "height": 512, "length": 120, "batch_size": 1}


def test_a_saved_workflow_without_a_host_says_whose_values_it_cannot_read():
    found = told(GRAPH)
    assert (found.nodes, found.understood) == (1, 0)
    assert found.unknown == ("1 node with values that could not be read (EmptyLTXVLatentVideo #7)",)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("with_host", [True, False])
def test_a_shipped_workflow_comes_out_as_the_front_end_exports_it(host_classes, name, with_host):
    exported = json.loads((ROOT / "workflows" / "api" / name).read_text(encoding="utf-8"))
    if with_host:
        host_classes()
    found = read((ROOT / "workflows" / name).read_bytes())
    assert found.shape == SAVED and found.prompt.keys() == exported.keys()
    for node, entry in exported.items():
        assert found.prompt[node]["class_type"] == entry["class_type"]
        assert found.prompt[node]["inputs"] == entry["inputs"], entry["class_type"]


S = {"id": "s", "nodes": [{"type": "s", "id": 2}]}


@pytest.mark.parametrize(
    "data",
    [
        {"nodes": [None, 3, {"type": []}, {"type": "A", "id": {}, "inputs": [1, {"link": []}]}], "links": 5},
        {
            "nodes": [{"type": "A", "id": 1, "inputs": {"a": 1}, "mode": "x"}],
            "links": [None, [1], [1, 1, 0, 1, 0, "*"]],
        },
        {"nodes": [{"type": "s", "id": 1}], "links": [], "definitions": {"subgraphs": [S]}},
        {"nodes": [{"type": "s", "id": 1, "properties": 3}], "definitions": {"subgraphs": [None, S | {"links": {}}]}},
        {"1": {"class_type": "A", "inputs": []}, "2": None, "3": {"class_type": {}}},
    ],
)
def test_wild_types_do_not_raise(data, host_classes):
    for prepare in (lambda: None, host_classes):
        prepare()
        assert understand(data).shape in (API, SAVED, EMPTY)
