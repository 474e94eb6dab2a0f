# SPDX-License-Identifier: Apache-2.0
"""What of the host's history is a node's report, and what a node's output shows."""

from __future__ import annotations

import asyncio
import json
import types
from urllib.parse import parse_qs

import numpy as np
import pytest
from nvfp4_video.host import show
from nvfp4_video.host.guard import routes
from server import PromptServer

WORKFLOW, ANOTHER, NO_ID = "5c9f1d5e-0000-4000-8000-00000000abcd", "another", "00000000-0000-0000-0000-000000000000"
NODES = {"1": "NVFP4Inspect", "3:2": "NVFP4Planner"}


def entry(workflow: object, outputs: dict, classes: dict[str, str] = NODES) -> dict:
    """A prompt of the history, as the host keeps it."""
    prompt = {node: {"class_type": name, "inputs": {}} for node, name in classes.items()}
    extra = {"extra_pnginfo": {"workflow": workflow}} if workflow is not None else {}
    return {"prompt": (1, "id", prompt, extra, list(classes)), "outputs": outputs, "status": {}}


def texts(*entries: dict, workflow: str = WORKFLOW, nodes: dict[str, str] = NODES) -> dict[str, str]:
    found = show.reports({str(number): one for number, one in enumerate(entries)}, workflow, nodes)
    return {node: output["text"][0] for node, output in found.items()}


def said(text: str) -> dict:
    return {"text": (text,), "images": [{"filename": "a.png"}]}


def test_the_last_report_of_each_node_of_the_workflow_is_found():
    mine = {"id": WORKFLOW}
    found = texts(
        entry(mine, {"1": said("old"), "3:2": said("plan")}),
        entry({"id": ANOTHER}, {"1": said("not mine")}),
        entry(mine, {"1": said("new")}),
        entry(mine, {}),
    )
    assert found == {"1": "new", "3:2": "plan"}


def test_only_text_and_large_picture_are_given():
    output = said("a") | {show.PICTURE: ["filename=b.png"]}
    found = show.reports({"p": entry({"id": WORKFLOW}, {"1": output})}, WORKFLOW, NODES)
    assert found == {"1": {"text": ("a",), show.PICTURE: ["filename=b.png"]}}


def test_a_node_that_has_become_another_and_nodes_of_other_packs_get_nothing():
    classes = NODES | {"9": "PreviewAny"}
    mine = entry({"id": WORKFLOW}, {"1": said("a"), "9": said("b"), "dynamic": said("c")}, classes)
    assert texts(mine, nodes=NODES | {"1": "NVFP4Split", "9": "PreviewAny"}) == {}


@pytest.mark.parametrize("saved", [{"id": NO_ID}, {"id": None}, {}])
def test_a_workflow_that_had_no_id_when_it_ran_is_known_by_its_nodes(saved: dict):
    classes = NODES | {"9": "PreviewAny"}
    ran = entry(saved, {"1": said("a"), "9": said("b")}, classes)
    assert texts(ran) == {"1": "a"}
    assert texts(ran, nodes={"1": "NVFP4Split"}) == {} and texts(ran, nodes={"2": "NVFP4Inspect"}) == {}


@pytest.mark.parametrize("saved", [None, 7, [], "workflow"])
def test_a_prompt_without_a_workflow_has_no_canvas(saved: object):
    assert texts(entry(saved, {"1": said("a")})) == {}


def test_the_route_answers_for_the_nodes_that_are_asked_for(stub_comfy):
    web = pytest.importorskip("aiohttp.web")
    multidict = pytest.importorskip("multidict")
    PromptServer.instance.prompt_queue.history = {"p": entry({"id": WORKFLOW}, {"1": said("a"), "3:2": said("b")})}
    asked = multidict.MultiDict([("workflow", WORKFLOW), ("node", "1 NVFP4Inspect"), ("node", "nonsense")])
    response = asyncio.run(routes.get_reports(types.SimpleNamespace(query=asked)))
    assert isinstance(response, web.Response) and json.loads(response.text) == {"reports": {"1": {"text": ["a"]}}}


def test_the_large_picture_is_named_in_words_and_the_compact_one_is_shown(stub_comfy):
    compact, large = (show.to_image(np.zeros((4, width, 3), np.uint8)) for width in (620, 1600))
    shown = show.show(None, "text", compact, large)
    assert [image["size"] for image in shown["images"]] == [(4, 620, 3)]
    assert parse_qs(*shown[show.PICTURE]) == {"filename": ["preview.png"], "type": ["temp"]}


def test_progress_goes_to_the_node_that_runs_and_nowhere_without_a_server(stub_comfy, monkeypatch):
    node = type("Running", (), {"hidden": types.SimpleNamespace(unique_id="7")})
    show.tell(node, "half")
    assert PromptServer.instance.sent == [("half", "7")]
    monkeypatch.setattr(PromptServer, "instance", None)
    show.tell(node, "half")
