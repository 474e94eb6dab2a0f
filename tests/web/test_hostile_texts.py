# SPDX-License-Identifier: Apache-2.0
"""What files say, in a real Chromium: it is read on the page as it stands; it runs nothing, and nothing is fetched.

The texts are those that the nodes themselves send for a checkpoint with such a layer. COMFYUI_FRONTEND names another
front end than the installed one; those before 1.45 put progress texts into the page as HTML, uncleaned.
"""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from nvfp4_video.host.show import tell
from nvfp4_video.measure.escape import html
from nvfp4_video.nodes.checkpoint import NVFP4Inspect
from nvfp4_video.nodes.model import NVFP4ModelLoader
from nvfp4_video.tests.support.hostile import ESCAPE, SCRIPT, SHOWN, checkpoint
from nvfp4_video.tests.web.doctor_page import EVENT
from nvfp4_video.tests.web.test_reports import TEXT, VUE, renderers, run, visit  # noqa: F401 - a fixture
from server import PromptServer

NODE = ("NVFP4Inspect",)
LAYER = SCRIPT + ESCAPE
# A layer's name is written with care for its length; here all of it has to be on the page.
READ = SCRIPT + SHOWN
FINDING = {"id": "odd", "severity": "error", "title": READ, "why": LAYER, "remedy": LAYER, "nodes": ["1"]}


@pytest.fixture
def name(stub_comfy, tmp_path: Path) -> str:
    for folder in ("checkpoints", "diffusion_models"):
        checkpoint(tmp_path / "models" / folder / "x.safetensors", LAYER)
    return "x.safetensors"


def watched(page) -> list[str]:
    """The addresses that the page asks for from now on."""
    asked: list[str] = []
    page.page.on("request", lambda request: asked.append(request.url))
    return asked


def assert_nothing_ran(page, asked: list[str]) -> None:
    page.settle()
    assert page.page.evaluate("() => window.ran ?? null") is None
    assert [url for url in asked if "fetched" in url] == []
    assert page.page.locator("img[src*=fetched]").count() == 0


@renderers
def test_a_layer_s_name_in_a_report_is_text(visit, settings, name):  # noqa: F811
    page = visit(settings, NODE)
    asked = watched(page)
    run(page, {"1": {"text": NVFP4Inspect.execute(name).ui["text"]}})
    shown = page.page.locator(TEXT)
    shown.wait_for()
    assert READ in shown.text_content()
    assert_nothing_ran(page, asked)


@renderers
def test_a_name_in_a_progress_text_is_text(visit, settings):  # noqa: F811
    page = visit(settings, NODE)
    asked = watched(page)
    tell(types.SimpleNamespace(hidden=types.SimpleNamespace(unique_id="1")), f"1 of 2: {LAYER}")
    ((text, node),) = PromptServer.instance.sent[-1:]
    page.send("execution_start", {"prompt_id": "job"})
    page.send("executing", {"node": "1", "display_node": "1", "prompt_id": "job"})
    page.send_progress(node, text)
    page.page.get_by_text(f"1 of 2: {html(LAYER)}").wait_for()
    assert_nothing_ran(page, asked)


@renderers
def test_a_layer_s_name_in_an_error_is_text(visit, settings, name):  # noqa: F811
    page = visit(settings, NODE)
    asked = watched(page)
    with pytest.raises(ValueError) as raised:
        NVFP4ModelLoader.execute(name, "bf16", "comfy")
    assert READ in str(raised.value)
    job = {"prompt_id": "job", "timestamp": 1}
    page.send("execution_start", job)
    page.send("executing", {"node": "1", "display_node": "1"} | job)
    error = {"node_id": "1", "node_type": "NVFP4Inspect", "executed": [], "exception_type": "CheckpointError"}
    error |= {"exception_message": str(raised.value), "traceback": [str(raised.value)], "current_inputs": {}}
    page.send("execution_error", error | {"current_outputs": {}} | job)
    page.page.wait_for_timeout(2000)  # newer front ends show errors only of jobs that they have queued themselves
    assert_nothing_ran(page, asked)
    page.problems[:] = []  # the dialog asks for the host's log, which nobody serves here


def test_a_finding_is_text_in_its_toast_and_in_the_panel(visit):  # noqa: F811
    page = visit(types=NODE)
    asked = watched(page)
    page.server.routes["/nvfp4/report"] = {"facts": [], "models": [], "launch": None}
    page.server.routes["/nvfp4/check"] = {"findings": [FINDING]}
    page.send(EVENT, {"findings": [FINDING]})
    page.toasts().wait_for()
    assert READ in page.toasts().text_content()
    page.open_panel()
    assert page.panel.text_content().count(READ) >= 3, "title, reason and remedy, made visible by the panel itself"
    assert_nothing_ran(page, asked)
