# SPDX-License-Identifier: Apache-2.0
"""Reports on nodes in a real Chromium with the real front end: after a job, when they come back, and how they read.

The host is stubbed (frontend_server.py); COMFYUI_FRONTEND names the folder of another front end than the installed one.
tests/real/test_reports_in_browser.py runs every reporting node in a real ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.web.doctor_page import DoctorPage
from nvfp4_video.tests.web.frontend_server import node_definitions

SCHEMAS = [node.GET_SCHEMA() for node in NODES]
REPORTING = [schema.node_id for schema in SCHEMAS if schema.is_output_node]
OTHER, FOREIGN = "NVFP4ModelLoader", "NVFP4OfAnotherPack"
ORIGIN = "custom_nodes.nvfp4-video"
REPORT = """Verdict of {node}: fits all at once, with {flag}.
  models/some_folder/another_folder/ltx-2.3-22b-distilled_nvfp4.safetensors is read in place, which preview-like words

phase   weights  working  always free  in all   fits alone  fits beside the rest
encode  11.3 GB  3.2 GB   1.3 GB       15.8 GB  yes         yes
sample  17.6 GB  0.9 GB   1.3 GB       19.8 GB  yes         yes

Reason: the finest detail is 3.96 of that one octave below."""
HOSTILE = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"
VUE, LIGHT = {"Comfy.VueNodes.Enabled": True}, {"Comfy.ColorPalette": "light"}
WIDTH = 310
PICTURE = "filename=large.png&subfolder=&type=temp"
TEXT = ".nvfp4-report"

OPENED = "() => app.extensionManager.workflow.activeWorkflow?.changeTracker && app.rootGraph.nodes.length > 0"
# What a workflow's file and the prompt made from it hold.
SAVED = """async () => {
  const { nodes } = app.rootGraph.serialize();
  const values = nodes.map(({ widgets_values, properties }) => [widgets_values ?? [], properties]);
  return JSON.stringify([values, (await app.graphToPrompt()).output]);
}"""
# A selector -> the words in those elements that stand in more than one line.
BROKEN_WORDS = """(selector) => [...document.querySelectorAll(selector)].flatMap((paragraph) => {
  const broken = [];
  const walker = document.createTreeWalker(paragraph, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    for (const { 0: word, index } of walker.currentNode.data.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, index);
      range.setEnd(walker.currentNode, index + word.length);
      if (new Set([...range.getClientRects()].map(({ top }) => Math.round(top))).size > 1) broken.push(word);
    }
  }
  return broken;
})"""

renderers = pytest.mark.parametrize("settings", [{}, VUE], ids=["classic", "vue"])


def workflow(*types: str) -> dict:
    """A workflow with one node of each type, their ids from 1, in a row."""
    nodes = [
        {
            "id": number, "type": name, "pos": [(number - 1) % 5 * (WIDTH + 40), (number - 1) // 5 * 420],
            "size": [WIDTH, 80], "flags": {}, "order": number, "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [],
        }
        for number, name in enumerate(types, 1)
    ]  # fmt: skip
    return {
        "id": "5c9f1d5e-0000-4000-8000-00000000abcd", "revision": 0, "last_node_id": len(nodes), "last_link_id": 0,
        "nodes": nodes, "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def report(node: str) -> str:
    return REPORT.format(node=node, flag="--disable-async-offload")


@pytest.fixture
def visit(enter) -> Callable:
    """visit(settings, types, reports) -> page with a workflow of those nodes."""

    def start(settings: dict | None = None, types=tuple(REPORTING), reports: dict | None = None) -> DoctorPage:
        definitions = node_definitions(workflow(*{*types, OTHER}))
        for name in definitions.keys() & {*REPORTING, OTHER}:
            definitions[name] |= {"python_module": ORIGIN, "output_node": name in REPORTING}
        page, page.server = enter(definitions, settings, {"/nvfp4/reports": {"reports": reports or {}}})
        # The front end opens a workflow of its own first; one that is loaded before that has no tab of its own.
        page.page.wait_for_function(OPENED)
        page.settle()
        page.load(workflow(*types))
        return page

    return start


def run(page: DoctorPage, outputs: dict[str, dict], end: str = "execution_success") -> None:
    """What a host sends while a job runs that gives these outputs."""
    job = {"prompt_id": "job"}
    page.send("execution_start", job)
    for node, output in outputs.items():
        page.send("executing", {"node": node, "display_node": node} | job)
        page.send("executed", {"node": node, "display_node": node, "output": output} | job)
    page.send(end, job | {"node_id": None, "node_type": None, "executed": []})
    page.send("executing", {"node": None} | job)


def outputs(types=tuple(REPORTING)) -> dict[str, dict]:
    """Node id -> its ``ui``, as a host sends it."""
    return {str(number): {"text": [report(name)]} for number, name in enumerate(types, 1)}


def first_lines(page: DoctorPage) -> list[str]:
    """The first line of every report on the screen, in the order of the alphabet."""
    return page.page.evaluate(
        "(p) => [...document.querySelectorAll(p)].filter((e) => e.checkVisibility()).map((e) => e.innerText).sort()",
        f"{TEXT} p:first-child",
    )


def expect(page: DoctorPage, lines: list[str]) -> None:
    """Wait until the reports on the screen begin with these lines, and see that it stays so."""
    for _ in range(100):
        if first_lines(page) == sorted(lines):
            break
        page.page.wait_for_timeout(200)
    page.settle()
    assert first_lines(page) == sorted(lines)


def verdicts(types=tuple(REPORTING)) -> list[str]:
    return [report(name).splitlines()[0] for name in types]


def test_every_node_that_shows_a_report_is_one_that_the_host_sends_again_when_it_is_cached():
    """The host sends the output of a cached node only if it is an output node."""
    source = {node: Path(__import__(node.__module__, fromlist=["_"]).__file__).read_text("utf-8") for node in NODES}
    for node, schema in zip(NODES, SCHEMAS, strict=True):
        own = source[node].partition(f"class {node.__name__}(")[2].partition("\nclass ")[0]
        assert ("ui=" in own) == bool(schema.is_output_node), schema.node_id


@renderers
def test_every_reporting_node_keeps_its_text_after_the_job_and_in_a_tab_shown_again(visit, settings):
    page = visit(settings)
    expect(page, [])
    before = page.page.evaluate(SAVED)
    run(page, outputs())
    expect(page, verdicts())
    page.shot("after")
    assert page.page.evaluate(SAVED) == before, "a saved workflow holds no reports"
    page.load(workflow(OTHER))
    expect(page, [])
    page.page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    expect(page, verdicts())


@renderers
def test_a_node_has_its_progress_text_or_its_report_and_never_both(visit, settings):
    node = REPORTING[:1]
    page = visit(settings, node)
    progress = page.page.get_by_text("3.1 GB of 4.2 GB")
    for _ in range(2):
        page.send("execution_start", {"prompt_id": "job"})
        page.send("executing", {"node": "1", "display_node": "1", "prompt_id": "job"})
        page.send_progress("1", "3.1 GB of 4.2 GB")
        progress.wait_for()
        expect(page, [])
        run(page, outputs(node))
        progress.wait_for(state="detached")
        expect(page, verdicts(node))
    page.server.routes["/nvfp4/reports"] = {"reports": outputs(node)}
    page.send_progress("1", "3.1 GB of 4.2 GB")
    progress.wait_for()
    expect(page, [])
    run(page, {}, end="execution_interrupted")
    progress.wait_for(state="detached")
    expect(page, verdicts(node))


@renderers
@pytest.mark.parametrize("end", ["execution_interrupted", "execution_error"])
def test_a_node_whose_first_job_did_not_end_keeps_no_time_left(visit, settings, end):
    node = REPORTING[:1]
    page = visit(settings, node)
    page.send("execution_start", {"prompt_id": "job"})
    page.send("executing", {"node": "1", "display_node": "1", "prompt_id": "job"})
    page.send_progress("1", "45 s left")
    page.page.get_by_text("45 s left").wait_for()
    run(page, {}, end=end)
    page.page.get_by_text("45 s left").wait_for(state="detached")


@renderers
def test_a_workflow_opened_anew_gets_its_reports_from_the_history(visit, settings):
    page = visit(settings, reports=outputs())
    expect(page, verdicts())
    with page.page.expect_request("**/nvfp4/reports*") as asked:
        page.page.reload()
    expect(page, verdicts())
    query = parse_qs(urlsplit(asked.value.url).query)
    assert query["node"] == [f"{number} {name}" for number, name in enumerate(REPORTING, 1)]
    assert query["workflow"] == [workflow()["id"]]


@renderers
def test_a_node_in_a_subgraph_has_its_report(visit, settings):
    node = REPORTING[:1]
    page = visit(settings, node)
    outer = page.page.evaluate(
        """() => {
          const { node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(1)]));
          app.canvas.openSubgraph(node.subgraph, node);
          return String(node.id);
        }"""
    )
    inner = f"{outer}:1"
    run(page, {inner: outputs(node)["1"]})
    expect(page, verdicts(node))
    page.server.routes["/nvfp4/reports"] = {"reports": {inner: {"text": ["Another verdict"]}}}
    with page.page.expect_request("**/nvfp4/reports*") as asked:
        run(page, {})
    assert parse_qs(urlsplit(asked.value.url).query)["node"] == [f"{inner} {node[0]}"]
    expect(page, ["Another verdict"])


def test_nodes_of_other_packs_and_workflows_without_reports_are_left_alone(visit):
    page = visit(types=(FOREIGN, OTHER))
    run(page, {"1": {"text": ["not ours"]}, "2": {"text": ["a loader has no report on it"]}})
    expect(page, [])
    assert page.server.calls == []


def test_a_host_without_the_route_still_shows_the_reports_of_its_jobs(visit):
    page = visit()
    page.server.routes["/nvfp4/reports"] = None
    run(page, outputs())
    expect(page, verdicts())
    # Chromium itself logs the 404.
    assert all("/nvfp4/reports" in page.problems.pop() for _ in page.problems[:])


@renderers
def test_on_a_narrow_node_tables_keep_their_columns_and_no_word_is_broken(visit, settings):
    page = visit(settings, REPORTING[:1])
    run(page, {"1": {"text": [report("x")], "nvfp4_picture": [PICTURE]}})
    link = page.page.locator(TEXT).get_by_role("link", name="Large picture")
    link.wait_for()
    assert link.get_attribute("href").endswith(f"/view?{PICTURE}") and link.get_attribute("target") == "_blank"
    expect(page, [report("x").splitlines()[0]])
    page.shot("narrow")
    table = page.page.locator(f"{TEXT} pre")
    lines = table.inner_text().splitlines()
    assert lines == report("x").splitlines()[3:6]
    high, wide, room = table.evaluate("(e) => [e.clientHeight, e.scrollWidth, e.clientWidth]")
    assert wide > room > 0.7 * WIDTH, "the table scrolls in the node, which keeps its width"
    assert high < 16 * (len(lines) + 2), "a row of the table is a line"
    assert page.page.evaluate(BROKEN_WORDS, f"{TEXT} p") == []
    assert page.page.locator(TEXT).evaluate("(e) => e.firstChild.firstChild.scrollWidth <= e.clientWidth")
    top = page.page.locator(f"{TEXT} p").first.bounding_box()
    frame = page.page.locator(TEXT).bounding_box()
    assert frame["y"] <= top["y"] and top["y"] + top["height"] <= frame["y"] + frame["height"]


def test_a_report_is_text_and_its_copy_is_what_the_host_sent(visit):
    page = visit(types=REPORTING[:1])
    path = f"models/{'folder/' * 12}file.safetensors"
    sent = f"{HOSTILE}\n{HOSTILE}  {HOSTILE}\n{HOSTILE}  {HOSTILE}\n{path}"
    run(page, {"1": {"text": [sent], "nvfp4_picture": [f"{PICTURE}&{HOSTILE}"]}})
    expect(page, [HOSTILE])
    shown = page.page.locator(TEXT)
    assert path in shown.inner_text()
    assert shown.locator("img, b").count() == 0
    assert page.page.title() != "run"
