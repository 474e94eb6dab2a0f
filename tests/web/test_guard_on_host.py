# SPDX-License-Identifier: Apache-2.0
"""Panel and toast in a real ComfyUI: its front end, its websocket, our routes, a prompt that is really queued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real.harness import ComfyUI
from nvfp4_video.tests.real.models import small_model_of
from nvfp4_video.tests.web.doctor_page import DoctorPage, chromium
from nvfp4_video.tests.workflows import workflow_format as form
from nvfp4_video.tests.workflows.workflow_builder import Sheet

pytestmark = pytest.mark.host

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
# Asks for 120 frames, which are not 8k + 1.
WORKFLOW = json.loads((Path(__file__).resolve().parent / "workflow.json").read_text("utf-8"))
QUEUE = """async () => {
  const { api } = await import('/scripts/api.js');
  const { output } = await app.graphToPrompt();
  await api.fetchApi('/prompt', { method: 'POST', body: JSON.stringify({ prompt: output, client_id: api.clientId }) });
}"""


@pytest.fixture(scope="module")
def host() -> Iterator[ComfyUI]:
    with ComfyUI() as running:
        for name, value in SETTINGS.items():
            running.post(f"/settings/{name}", value)
        yield running


@pytest.fixture(params=[False, True], ids=["classic", "vue"])
def page(host, request, tmp_path: Path) -> Iterator[DoctorPage]:
    host.post("/settings/Comfy.VueNodes.Enabled", request.param)
    with chromium() as browser:
        opened = DoctorPage(browser, host.url, tmp_path, host=True)
        yield opened
        opened.close()
        assert opened.problems == []


def test_the_panel_shows_this_host_and_checks_the_open_workflow(host, page):
    page.load(WORKFLOW)
    page.open_panel()
    text = page.panel.text_content()
    report = host.get("/nvfp4/report")
    for fact in report["facts"]:
        assert fact["label"] in text, fact["id"]
    assert host.version in text and report["launch"]["command"] in text
    page.shot("panel")
    page.panel.locator("li", has_text="120 frames").get_by_role("button", name="(10)").click()
    page.page.wait_for_function("() => app.canvas.selectedItems.size === 1")
    assert page.selected() == ["10"]
    assert page.distance_from_centre("10") < 30


def test_a_queued_prompt_brings_the_toast_whose_details_open_the_panel(page):
    page.load(WORKFLOW)
    page.page.evaluate(QUEUE)
    toast = page.toasts()
    toast.get_by_text("120 frames").wait_for()
    page.settle()
    page.shot("toast")
    toast.get_by_role("button", name="Details").click()
    page.wait_checked()
    page.panel.get_by_text("120 frames").wait_for()
    # The host refuses the prompt: it has no output node. Chromium logs that.
    assert len(page.problems) == 1 and "/prompt" in page.problems.pop()


def two_nodes(model: str) -> dict:
    """NVFP4 Model Loader, its report shown, as the front end saves them."""
    info = form.node_info(NODES)
    sheet = Sheet("missing", info)
    loader = sheet.add("NVFP4ModelLoader", (0, 0), 420, model_name=model)
    sheet.add("PreviewAny", (520, 0), 420, room=160, source=loader["report"])
    return sheet.save()


def test_a_model_that_is_missing_is_made_by_the_button_and_the_workflow_runs(host, page):
    state, config, packed = small_model_of(host)
    source = host.base / "models" / "diffusion_models" / "small-bf16.safetensors"
    synthetic.write(source, "bf16_decoded", state, config, packed)
    made = host.base / "output" / "diffusion_models" / "small-bf16_nvfp4.safetensors"
    made.unlink(missing_ok=True)
    page.load(two_nodes("small-nvfp4.safetensors"))
    page.page.evaluate("() => app.refreshComboInNodes()")
    page.page.evaluate("() => app.queuePrompt(0, 1)")
    button = page.toasts().get_by_role("button", name="Make the NVFP4 file and run")
    button.wait_for()
    page.settle()
    page.shot("missing")
    button.click()
    page.page.wait_for_function("() => app.rootGraph.nodes[0].widgets[0].value === 'small-bf16.safetensors'")
    page.page.wait_for_function(
        "(name) => app.rootGraph.nodes[1].widgets.some((widget) => String(widget.value).includes(name))", arg=made.name
    )
    page.settle()
    page.shot("made")
    assert made.is_file()
    chosen = "() => app.rootGraph.nodes[0].widgets[0].value"
    page.page.locator("#graph-canvas").focus()
    for _ in range(3):  # some front ends count the text that Preview as Text has got as a step of its own
        if page.page.evaluate(chosen) != "small-nvfp4.safetensors":
            page.page.keyboard.press("Control+z")
            page.settle()
    assert page.page.evaluate(chosen) == "small-nvfp4.safetensors"
    # The host refuses the first prompt, which Chromium and the front end log.
    assert page.problems and not any("/extensions/nvfp4-video/" in problem for problem in page.problems)
    page.problems.clear()
