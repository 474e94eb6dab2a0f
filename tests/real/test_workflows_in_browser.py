# SPDX-License-Identifier: Apache-2.0
"""The real front end in a real Chromium opens every template, and would send just what its API-format twin says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from nvfp4_video.tests.real.harness import PACK, PACK_FOLDER, ComfyUI

NAMES = sorted(file.stem for file in (PACK / "workflows").glob("*.json"))
READY = "() => window.app?.extensionManager && window.app.graph"
STATE = """async () => {
  const every = (graph) => graph.nodes.flatMap((node) => [node, ...(node.subgraph ? every(node.subgraph) : [])]);
  const nodes = every(app.graph);
  return {
    count: app.graph.nodes.length,
    unknown: nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type),
    small: app.graph.nodes.filter((node) => node.size[1] + 1 < node.computeSize()[1]).map((node) => node.type),
    prompt: (await app.graphToPrompt()).output,
  };
}"""


@pytest.fixture(scope="module")
def page(host: ComfyUI) -> Iterator:
    """The front end, with requests to other machines answered by nothing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        # Containers run as root and give no user namespaces, which Chromium's sandbox needs.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        page.set_default_timeout(120_000)
        outside = lambda address: not address.startswith((host.url, "data:", "blob:"))  # noqa: E731
        page.route(outside, lambda route: route.fulfill(json=[], headers={"Access-Control-Allow-Origin": "*"}))
        page.goto(host.url)
        page.wait_for_function(READY)
        yield page
        browser.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_front_end_knows_every_node_and_sends_what_the_api_twin_says(page, name: str):
    graph = json.loads((PACK / "workflows" / f"{name}.json").read_text("utf-8"))
    twin = json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(graph["nodes"]))
    found = page.evaluate(STATE)
    assert found["unknown"] == []
    assert found["small"] == [], "a node is drawn over its frame"
    sent = {node: {key: entry[key] for key in ("inputs", "class_type")} for node, entry in found["prompt"].items()}
    assert sent == {node: {key: entry[key] for key in ("inputs", "class_type")} for node, entry in twin.items()}


def test_the_template_dialog_shows_every_template_with_its_picture(page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK_FOLDER, exact=True).first.click()
    for name in NAMES:
        page.get_by_text(name, exact=True).first.scroll_into_view_if_needed()  # pictures are loaded when they are seen
        picture = page.get_by_alt_text(name, exact=True)
        picture.scroll_into_view_if_needed()
        # 640 is the width of the file: the front end has a default picture for templates without one.
        page.wait_for_function("(image) => image.naturalWidth === 640", arg=picture.element_handle())
        assert page.get_by_text(name, exact=True).first.is_visible()
