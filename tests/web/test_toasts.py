# SPDX-License-Identifier: Apache-2.0
"""Messages of the pack in a real Chromium: errors of its nodes, remedies, values that a click sets.

Screenshots are in the tests' temporary folders (``pytest --basetemp=shots``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nvfp4_video.tests.web.doctor_page import DoctorPage
from nvfp4_video.tests.web.frontend_server import node_definitions

HERE = Path(__file__).resolve().parent
ANSWERS = json.loads((HERE / "answers.json").read_text("utf-8"))
WORKFLOW = json.loads((HERE / "workflow.json").read_text("utf-8"))
CRASH, FRAMES = ANSWERS["findings"]
VUE = {"Comfy.VueNodes.Enabled": True}
ORIGIN = "custom_nodes.nvfp4-video"
MESSAGE = "ltx-2.3.safetensors: it holds NVFP4 weights, but nothing says in which layout; set `dialect`"
JOB = {"prompt_id": "job"}
WIDGET = "app.rootGraph.getNodeById({node}).widgets.find((widget) => widget.name === 'model_name')"
SMALL = {"width": 1280, "height": 800}

renderers = pytest.mark.parametrize("settings", [{}, VUE], ids=["classic", "vue"])


@pytest.fixture
def visit(enter) -> Callable:
    """visit(settings, check, prompt) -> page with the workflow; what /nvfp4/check and /prompt answer."""

    def start(
        settings: dict | None = None, check: Callable | dict | None = None, prompt: Callable | None = None
    ) -> DoctorPage:
        definitions = node_definitions(WORKFLOW)
        for name, definition in definitions.items():
            if name.startswith("NVFP4"):
                definition |= {"python_module": ORIGIN, "display_name": "NVFP4 Model Loader"}
        routes = {
            "/nvfp4/report": ANSWERS["report"] | {"findings": []}, "/nvfp4/check": check or {"findings": []},
            "/prompt": prompt or JOB | {"number": 1, "node_errors": {}}, "/nvfp4/reports": {"reports": {}},
        }  # fmt: skip
        page, server = enter(definitions, settings, routes)
        page.page.set_viewport_size(SMALL)
        page.load(WORKFLOW)
        page.settle()
        return page

    return start


def fail(page: DoctorPage, node: str, kind: str) -> None:
    """A job that was queued here and ends in an error of a node."""
    page.page.evaluate("() => app.queuePrompt(0, 1)")
    page.send("execution_start", JOB | {"timestamp": 1})
    page.send("executing", JOB | {"node": node, "display_node": node})
    error = {"exception_message": MESSAGE + "\n", "exception_type": "nvfp4_video.CheckpointError"}
    rest = {"executed": [], "traceback": [], "current_inputs": {}, "current_outputs": []}
    page.send("execution_error", JOB | {"node_id": node, "node_type": kind} | error | rest)


def length(page: DoctorPage, node: str = "10") -> int:
    return page.page.evaluate(
        "(id) => app.rootGraph.getNodeById(id).widgets.find((widget) => widget.name === 'length').value", node
    )


@renderers
def test_an_error_of_our_node_shows_its_own_message_and_leads_to_the_node(visit, settings):
    page = visit(settings)
    page.find([CRASH])
    fail(page, "2", "NVFP4ModelLoader")
    toast = page.page.locator(".nvfp4-toast", has_text=MESSAGE)
    toast.wait_for()
    assert "NVFP4 Model Loader #2" in toast.inner_text()
    box = page.page.get_by_test_id("error-overlay")
    box.wait_for()
    page.settle()
    page.shot("error")
    above = box.bounding_box()
    for shown in page.page.locator(".nvfp4-toast").all():
        assert shown.bounding_box()["y"] > above["y"] + above["height"], "a message covers ComfyUI's own"
    toast.get_by_role("button", name="Go to the node").click()
    page.page.wait_for_function("() => app.canvas.selectedItems.size === 1")
    assert page.selected() == ["2"]
    toast.wait_for(state="detached")


def test_the_message_goes_when_the_next_job_begins(visit):
    page = visit()
    fail(page, "2", "NVFP4ModelLoader")
    page.page.locator(".nvfp4-toast").wait_for()
    page.send("execution_start", JOB | {"timestamp": 2})
    page.page.locator(".nvfp4-toast").wait_for(state="detached")


def test_an_error_of_another_pack_s_node_is_left_to_the_front_end(visit):
    page = visit()
    fail(page, "17", "SamplerCustomAdvanced")
    page.page.get_by_test_id("error-overlay").wait_for()
    page.settle()
    assert page.page.locator(".nvfp4-toast").count() == 0


def test_a_finding_s_message_carries_the_remedy_and_can_be_closed(visit):
    page = visit()
    page.find([FRAMES])
    toast = page.toasts()
    toast.wait_for()
    assert FRAMES["remedy"].replace("`", "") in toast.inner_text()
    toast.get_by_role("button", name="Close").click()
    toast.wait_for(state="detached")


@renderers
def test_apply_sets_the_value_checks_again_and_can_be_undone(visit, settings):
    def check(body: dict) -> dict:
        return {"findings": [FRAMES] if body["prompt"]["10"]["inputs"]["length"] == 120 else []}

    page = visit(settings, check)
    page.open_panel()
    page.button("Apply: length = 121").click()
    page.panel.get_by_text("Nothing found.").wait_for()
    assert "Ctrl+Z" in page.status() and length(page) == 121
    page.shot("applied")
    page.page.locator("#graph-canvas").focus()
    page.page.keyboard.press("Control+z")
    page.page.wait_for_function(
        "() => app.rootGraph.getNodeById(10).widgets.find((widget) => widget.name === 'length').value === 120"
    )
    assert length(page) == 120


def test_apply_in_the_message_does_the_same(visit):
    page = visit()
    page.find([FRAMES])
    page.toasts().get_by_role("button", name="Apply: length = 121").click()
    page.toasts().wait_for(state="detached")
    assert length(page) == 121


@renderers
def test_a_value_inside_a_subgraph_is_set_where_the_prompt_takes_it_from(visit, settings):
    finding = copy.deepcopy(FRAMES)
    page = visit(settings)
    outer = page.page.evaluate(
        """() => {
          const { node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(10)]));
          return String(node.id);
        }"""
    )
    finding["fixes"] = [{"node": f"{outer}:10", "input": "length", "value": 121}]
    page.find([finding])
    page.toasts().get_by_role("button", name="Apply").click()
    page.toasts().wait_for(state="detached")
    value = page.page.evaluate("async (id) => (await app.graphToPrompt()).output[id].inputs.length", f"{outer}:10")
    assert value == 121


def test_a_widget_that_is_not_there_any_more_changes_nothing(visit):
    check = {"findings": [FRAMES | {"fixes": [{"node": "10", "input": "gone", "value": 1}, *FRAMES["fixes"]]}]}
    page = visit(check=check)
    page.open_panel()
    page.button("Apply").click()
    page.panel.get_by_text("The open workflow has no such widget").wait_for()
    assert length(page) == 120


@renderers
def test_a_missing_file_is_made_and_the_workflow_queued_by_one_button_which_can_be_undone(visit, settings):
    queued = []

    def prompt(body: dict) -> dict:
        queued.append(body["prompt"]["2"]["inputs"])
        return JOB | {"number": 1, "node_errors": {}}

    page = visit(settings, prompt=prompt)
    model = f"{WIDGET.format(node=2)}.value"
    before = page.page.evaluate(model)
    fixes = [{"node": "2", "input": "model_name", "value": "source.safetensors"}]
    page.find([CRASH | {"id": "unmade", "fixes": fixes, "action": "make"}])
    page.toasts().get_by_role("button", name="Make the NVFP4 file and run").click()
    page.toasts().wait_for(state="detached")
    page.page.wait_for_function(f"() => {model} === 'source.safetensors'")
    page.page.wait_for_timeout(1000)
    assert [inputs["model_name"] for inputs in queued] == ["source.safetensors"]
    page.page.locator("#graph-canvas").focus()
    page.page.keyboard.press("Control+z")
    page.page.wait_for_function(f"(before) => {model} === before", arg=before)
