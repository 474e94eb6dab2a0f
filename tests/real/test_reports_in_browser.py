# SPDX-License-Identifier: Apache-2.0
"""Every reporting node in a real ComfyUI and its front end: text after the job, after a reload, cached, reopened.

COMFYUI_FRONTEND names the folder of another front end than the installed one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.real.harness import ComfyUI, HostError, run_in_host
from nvfp4_video.tests.real.small_files import FP8, NVFP4
from nvfp4_video.tests.web.doctor_page import DoctorPage, chromium
from nvfp4_video.tests.web.test_reports import OPENED, expect

SMALL_FILES = Path(__file__).resolve().parent / "small_files.py"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
CLIP = {"width": 256, "height": 192, "batch_size": 3, "color": 8421504}
# Node id -> class, values that differ from the node's own.
GRAPH = {
    "1": ("NVFP4Inspect", {"file_name": NVFP4}),
    "2": ("NVFP4Split", {"file_name": NVFP4, "overwrite": True}),
    "3": ("NVFP4Quantize", {"file_name": FP8, "estimate_only": True}),
    "4": ("NVFP4DistilledSettings", {"frames": 120}),
    "5": ("NVFP4Planner", {"file_name": NVFP4, "gpu": "RTX 5090"}),
    "6": ("NVFP4ModelLoader", {"model_name": NVFP4}),
    "7": ("NVFP4LaunchGuard", {"model": ["6", 0]}),
    "8": ("NVFP4HostReport", {}),
    "9": ("EmptyImage", CLIP),
    "10": ("NVFP4Sharpness", {"images": ["9", 0]}),
    "11": ("NVFP4Compare", {"images_a": ["9", 0], "images_b": ["9", 0]}),
    "12": ("NVFP4Verify", {"file_name": NVFP4, "source": FP8}),
    "13": ("NVFP4Repair", {"file_name": NVFP4}),
    "14": ("NVFP4Calibrate", {"model": ["6", 0], "file_name": FP8}),
}
# The nodes side by side, as narrow as nodes are, and all of them in view.
GRID = """() => {
  app.rootGraph.nodes.forEach((node, index) => {
    node.setSize([310, node.size[1]]);
    node.pos = [(index % 7) * 340, Math.floor(index / 7) * 800];
  });
  app.canvas.ds.scale = 0.55;
  app.canvas.ds.offset = [150, 120];
  app.canvas.setDirty(true, true);
}"""
# A first line of each node -> how it begins.
VERDICTS = {
    "1": f"{NVFP4}: full checkpoint", "2": "video VAE: ", "3": "ltx-2.3-22b-distilled-fp8", "4": "LTX-2.3 distilled: ",
    "5": "fits all at once", "7": "nothing found", "8": "nothing found; models: ", "10": "Verdict: undecided.",
    "11": "The pictures are identical.", "12": f"{NVFP4} against {FP8}: as good as",
    "13": f"{NVFP4}: nothing to repair", "14": "168 of 168 layers (recipe LTX-2.3)",
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[ComfyUI]:
    base = tmp_path_factory.mktemp("reports")
    made = run_in_host(SMALL_FILES, str(base / "models"))
    if made.returncode:
        raise HostError(made.stderr[-2000:])
    with ComfyUI(base=base, env={"OMP_NUM_THREADS": "1"}) as running:
        for name, value in SETTINGS.items():
            running.post(f"/settings/{name}", value)
        yield running


def prompt(host: ComfyUI) -> dict:
    """GRAPH with every value that a node has by itself."""
    filled = {}
    for number, (name, values) in GRAPH.items():
        own = {}
        for part in host.object_info(name)["input"].values():
            for widget, (kind, *options) in part.items() if part else ():
                if isinstance(kind, list) or (options and "default" in options[0]) or kind == "COMBO":
                    choices = kind if isinstance(kind, list) else (options[0].get("options") or [None])
                    own[widget] = options[0].get("default", choices[0]) if options else choices[0]
        filled[number] = {"class_type": name, "inputs": own | values}
    return filled


def run(host: ComfyUI, page) -> dict:
    """Press Run and wait until the history has the job -> its outputs."""
    posted = lambda response: response.request.method == "POST" and response.url.endswith("/prompt")  # noqa: E731
    with page.expect_response(posted) as response:
        page.get_by_test_id("queue-button").click()
    job = response.value.json()["prompt_id"]
    for _ in range(600):
        if job in (history := host.get(f"/history/{job}")):
            status = history[job]["status"]
            assert status["status_str"] == "success", json.dumps(status["messages"])[-3000:]
            return history[job]["outputs"]
        page.wait_for_timeout(200)
    raise AssertionError("the job did not end")


def test_the_graph_has_every_reporting_node():
    reporting = {node.GET_SCHEMA().node_id for node in NODES if node.GET_SCHEMA().is_output_node}
    assert {name for name, _ in GRAPH.values()} >= reporting
    assert {GRAPH[number][0] for number in VERDICTS} == reporting


def seen(opened: DoctorPage, lines: dict[str, str]) -> None:
    """Every node on the screen at once, as the canvas renderer draws no others, and on each its report."""
    opened.page.wait_for_function("(count) => window.app?.rootGraph?.nodes.length === count", arg=len(GRAPH))
    opened.page.wait_for_function(OPENED)
    opened.settle()
    opened.page.evaluate(GRID)
    expect(opened, [*lines.values()])


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_text_is_there_after_the_job_reloaded_cached_and_reopened(host: ComfyUI, vue: bool, tmp_path: Path):
    host.post("/settings/Comfy.VueNodes.Enabled", vue)
    with chromium() as browser:
        opened = DoctorPage(browser, host.url, tmp_path, host=True)
        page = opened.page
        page.wait_for_function(OPENED)
        opened.settle()
        page.evaluate("(graph) => app.loadApiJson(graph, 'reports')", prompt(host))
        page.wait_for_function("(count) => app.rootGraph.nodes.length === count", arg=len(GRAPH))
        outputs = run(host, page)
        lines = {number: outputs[number]["text"][0].splitlines()[0] for number in VERDICTS}
        for number, begin in VERDICTS.items():
            assert lines[number].startswith(begin), lines[number]
        seen(opened, lines)
        opened.shot("after")

        page.reload()
        seen(opened, lines)
        opened.shot("reloaded")

        lines |= {number: output["text"][0].splitlines()[0] for number, output in run(host, page).items()}
        seen(opened, lines)

        page.evaluate("() => app.loadGraphData(app.rootGraph.serialize(), true, true)")
        seen(opened, lines)
        opened.close()
        assert opened.problems == []
