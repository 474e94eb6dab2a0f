# SPDX-License-Identifier: Apache-2.0
"""The web extension in a real Chromium with the real front end: toast, panel, copy, jump to a node, renderers, themes.

The front end is the package comfyui-frontend-package over a stubbed host (frontend_server.py); COMFYUI_FRONTEND names
the folder of another one. test_guard_on_host.py does the same with a real ComfyUI. Screenshots are in the tests'
temporary folders (``pytest --basetemp=shots``).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from nvfp4_video.tests.web.doctor_page import EVENT, DoctorPage
from nvfp4_video.tests.web.frontend_server import PACK, node_definitions

HERE = Path(__file__).resolve().parent
# What the two routes answer for WORKFLOW on a ComfyUI of 3 May 2026.
ANSWERS = json.loads((HERE / "answers.json").read_text("utf-8"))
REPORT, FINDINGS = ANSWERS["report"], ANSWERS["findings"]
WORKFLOW = json.loads((HERE / "workflow.json").read_text("utf-8"))
CRASH, FRAMES = FINDINGS
COMMAND = REPORT["launch"]["command"]
VUE = {"Comfy.VueNodes.Enabled": True}
LIGHT = {"Comfy.ColorPalette": "light"}
NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', { value: undefined })"
HOSTILE = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"

renderers = pytest.mark.parametrize("settings", [{}, VUE], ids=["classic", "vue"])
themes = pytest.mark.parametrize("settings", [{}, LIGHT, LIGHT | VUE], ids=["dark", "light", "light-vue"])


@pytest.fixture
def visit(enter) -> Callable:
    """visit(settings, routes=..., scripts=...) -> (page, server), with WORKFLOW open."""

    def start(settings: dict | None = None, routes: dict | None = None, scripts: tuple[str, ...] = ()):
        answered = {"/nvfp4/report": REPORT, "/nvfp4/check": {"findings": FINDINGS}} if routes is None else routes
        page, server = enter(node_definitions(WORKFLOW), settings, answered, scripts)
        page.load(WORKFLOW)
        return page, server

    return start


def luminance(colour: str) -> float:
    """"rgb(255, 0, 0)" or "color(srgb 1 0 0)" -> relative luminance of WCAG 2."""
    parts = [float(number) / (255 if colour.startswith("rgb") else 1) for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page: DoctorPage, selector: str, behind: str) -> float:
    """Contrast ratio of WCAG 2 between an element's text and the background of another one."""
    style = "(element, name) => getComputedStyle(element)[name]"
    text = page.panel.locator(selector).first.evaluate(style, "color")
    back = page.page.locator(behind).first.evaluate(style, "backgroundColor")
    high, low = sorted((luminance(text), luminance(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_nothing_is_asked_of_the_routes_before_the_panel_opens(visit):
    page, server = visit()
    assert server.calls == []
    page.open_panel()
    assert [path for path, _ in server.calls] == ["/nvfp4/report", "/nvfp4/check"]


def test_the_panel_shows_findings_models_launch_and_facts(visit):
    page, _ = visit()
    page.open_panel()
    text = page.panel.text_content()
    for finding in FINDINGS:
        for part in (finding["title"], finding["why"], finding["remedy"]):
            assert part.replace("`", "") in text
    for model in REPORT["models"]:
        assert model["name"] in text and model["text"] in text
    assert "Fast path" in text and "No NVFP4 layers" in text
    assert COMMAND in text and REPORT["launch"]["flags"][0]["why"] in text
    assert "(measured by us, H200)" in text
    for fact in REPORT["facts"]:
        assert fact["label"] in text and fact["text"] in text
    assert REPORT["findings"][0]["title"] not in text, "the host's finding repeats the workflow's"
    assert page.panel.locator("dd[title='torch.version.cuda']").inner_text() == "13.0"
    page.shot("panel")


def test_flags_that_nobody_recommends_are_shown_on_demand_with_what_they_do(visit):
    others = [{"flag": "--disable-comfy-compiler", "what": "switches off `it` all"}]
    report = REPORT | {"launch": REPORT["launch"] | {"others": others}}
    page, _ = visit(routes={"/nvfp4/report": report, "/nvfp4/check": {"findings": FINDINGS}})
    page.open_panel()
    shown = page.panel.locator("details", has_text="Other flags of this ComfyUI")
    assert not shown.locator("dd").is_visible()
    shown.locator("summary").click()
    assert shown.locator("dt").inner_text() == "--disable-comfy-compiler"
    assert shown.locator("dd").inner_text() == "Switches off it all"
    page.shot("flags")


def test_the_check_gets_the_prompt_of_the_open_workflow(visit):
    page, server = visit()
    page.open_panel()
    prompt = server.calls[-1][1]["prompt"]
    assert prompt["2"]["class_type"] == "NVFP4ModelLoader"
    assert prompt["17"]["inputs"]["guider"] == ["12", 0]
    page.page.evaluate("() => (app.rootGraph.getNodeById(10).widgets.find((w) => w.name === 'length').value = 97)")
    page.button("Check again").click()
    page.wait_checked()
    assert server.calls[-1][1]["prompt"]["10"]["inputs"]["length"] == 97


@renderers
def test_a_finding_becomes_a_toast_whose_details_open_the_panel(visit, settings):
    page, _ = visit(settings)
    page.find(FINDINGS)
    toast = page.toasts()
    toast.wait_for()
    assert CRASH["title"] in toast.inner_text() and "(and 1 more)" in toast.inner_text()
    page.settle()
    page.shot("toast")
    details = toast.get_by_role("button", name="Details")
    details.focus()
    page.page.keyboard.press("Enter")
    page.panel.get_by_text(FRAMES["title"]).wait_for()
    toast.wait_for(state="detached")


def test_the_toast_of_a_refused_workflow_says_that_it_was_not_run_and_why(visit):
    page, _ = visit()
    page.send(EVENT, {"findings": [CRASH], "refused": True})
    page.toasts().get_by_text("Not run: the policy of the launch guard is block.").wait_for()
    page.settle()
    page.shot("refused")
    page.find([CRASH])
    page.toasts().get_by_text("Not run").wait_for(state="detached")
    assert CRASH["title"] in page.toasts().inner_text()


def test_no_line_of_the_panel_ends_within_a_flag(visit):
    flags = "--cpu --listen --port --base-directory --disable-api-nodes --database-url --disable-dynamic-vram"
    report = REPORT | {"facts": [fact | {"text": flags} for fact in REPORT["facts"]]}
    page, _ = visit(routes={"/nvfp4/report": report, "/nvfp4/check": {"findings": []}})
    page.open_panel()
    lines = page.panel.locator(".nd-facts dd span").evaluate_all(
        "(spans) => spans.map((span) => [span.textContent, Math.round(span.offsetHeight / 18)])"
    )
    assert [text for text, _ in lines[: len(flags.split())]] == flags.split()
    assert {count for _, count in lines} == {1}


def test_a_second_finding_replaces_the_first_toast(visit):
    page, _ = visit()
    page.find([CRASH])
    page.toasts().wait_for()
    page.find([FRAMES])
    page.toasts().get_by_text(FRAMES["title"]).wait_for()
    page.toasts().filter(has_text=CRASH["title"]).wait_for(state="detached")
    assert page.toasts().count() == 1


def test_the_tabs_icon_counts_errors_and_warnings(visit):
    page, _ = visit()
    badge = page.tab().get_by_text("2", exact=True)
    page.find([*FINDINGS, FRAMES | {"severity": "info"}])
    badge.wait_for()
    page.find([])
    badge.wait_for(state="detached")


def test_the_setting_silences_toast_and_badge(visit):
    page, _ = visit({"NVFP4.guard.enabled": False})
    page.find(FINDINGS)
    page.open_panel()
    assert FRAMES["title"] in page.panel.inner_text()
    assert page.toasts().count() == 0
    assert page.tab().get_by_text("2", exact=True).count() == 0


def test_the_settings_are_registered_with_their_defaults(visit):
    page, _ = visit()
    values = page.page.evaluate(
        "() => ['enabled', 'policy'].map((name) => app.extensionManager.setting.get(`NVFP4.guard.${name}`))"
    )
    assert values == [True, "warn"]
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.page.get_by_text("NVFP4 Video", exact=True).last.click()
    page.page.get_by_text("When a queued workflow is in danger").wait_for()
    page.shot("settings")


def test_copying_puts_command_and_report_on_the_clipboard(visit):
    page, _ = visit()
    page.open_panel()
    page.button("Copy command").click()
    page.panel.get_by_text("Copied.").wait_for()
    assert page.page.evaluate("() => navigator.clipboard.readText()") == COMMAND
    page.button("Copy report").click()
    page.page.wait_for_function("async (old) => (await navigator.clipboard.readText()) !== old", arg=COMMAND)
    copied = page.page.evaluate("() => navigator.clipboard.readText()")
    assert "Compute capability: 9.0 (torch.cuda.get_device_properties)" in copied
    assert f"error: {CRASH['title']} (#17, #12, #2)" in copied and COMMAND in copied


def test_copying_works_on_a_page_without_a_clipboard(visit):
    page, _ = visit(scripts=(NO_CLIPBOARD,))
    page.open_panel()
    page.page.evaluate(
        "() => document.addEventListener('copy', () => (window.copied = document.activeElement.value), { once: true })"
    )
    button = page.button("Copy command")
    button.click()
    page.panel.get_by_text("Copied.").wait_for()
    assert page.page.evaluate("() => window.copied") == COMMAND
    assert button.evaluate("(element) => element === document.activeElement")


@renderers
def test_a_node_button_selects_and_centres_the_node(visit, settings):
    page, _ = visit(settings)
    page.open_panel()
    page.button("Go to SamplerCustomAdvanced (17)").click()
    page.page.wait_for_function("() => app.canvas.selectedItems.size === 1")
    assert page.selected() == ["17"]
    assert page.distance_from_centre("17") < 30
    if settings:
        drawn = page.page.locator("[data-node-id='17']").first.bounding_box()
        centre = page.page.locator("#graph-canvas").bounding_box()
        assert abs(drawn["x"] + drawn["width"] / 2 - centre["x"] - centre["width"] / 2) < 30
    page.shot("jump")


@renderers
def test_a_node_inside_a_subgraph_leads_to_the_outermost_node(visit, settings):
    findings = [FRAMES | {"nodes": ["%s:10"]}]
    page, server = visit(settings, {"/nvfp4/report": REPORT, "/nvfp4/check": lambda body: {"findings": findings}})
    outer = page.page.evaluate(
        """() => {
          const { node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(10)]));
          app.canvas.openSubgraph(node.subgraph, node);
          return String(node.id);
        }"""
    )
    findings[0]["nodes"] = [f"{outer}:10"]
    page.open_panel()
    prompt = server.calls[-1][1]["prompt"]
    assert f"{outer}:10" in prompt
    page.panel.get_by_role("button", name=f"({outer}:10)").click()
    page.page.wait_for_function("() => app.canvas.graph === app.rootGraph && app.canvas.selectedItems.size === 1")
    assert page.selected() == [outer]
    page.settle()
    assert page.distance_from_centre(outer) < 30


def test_a_node_of_another_workflow_has_a_button_that_does_nothing(visit):
    page, _ = visit(routes={"/nvfp4/report": REPORT, "/nvfp4/check": {"findings": [FRAMES | {"nodes": ["999"]}]}})
    page.open_panel()
    button = page.button("Node 999 is not in the open workflow")
    assert button.is_disabled()


@themes
def test_text_is_readable_in_every_theme(visit, settings):
    page, _ = visit(settings)
    page.open_panel()
    card = ".nvfp4-doctor li.nd-card"
    header = ".nvfp4-doctor header"
    assert contrast(page, "h2", header) > 7
    assert contrast(page, ".nd-title span", card) > 7
    assert contrast(page, "li .nd-muted", card) > 4.5
    for tone in ("nd-error", "nd-warning", "nd-fast"):
        assert contrast(page, f"li.{tone} .nd-tone", card) > 4.5
    assert contrast(page, "dl.nd-facts dt", header) > 4.5
    assert contrast(page, "pre", ".nvfp4-doctor pre") > 7
    page.shot("theme")


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(visit):
    page, _ = visit()
    page.open_panel()
    page.button("Check again").focus()
    reached = []
    for _ in range(20):
        name, outline, inside = page.page.evaluate(
            """() => {
              const element = document.activeElement;
              const name = element.ariaLabel ?? element.textContent;
              const inside = element.closest('.nvfp4-doctor') !== null;
              return [name.trim(), getComputedStyle(element).outlineStyle, inside];
            }"""
        )
        if not inside:
            break
        assert reached == [] or outline == "solid", f"{name} does not show its focus"
        reached.append(name)
        page.page.keyboard.press("Tab")
    groups = list(dict.fromkeys(fact["group"] for fact in REPORT["facts"]))
    nodes = [[f"({node})" for node in finding["nodes"]] for finding in FINDINGS]
    found = [*nodes[0], "Apply: length = 121", *nodes[1]]
    expected = ["Check again", "Copy report", *found, "Launch command", "Copy command", *groups]
    assert len(reached) == len(expected)
    assert all(name.endswith(end) for name, end in zip(reached, expected, strict=True))


def test_text_of_the_server_is_never_html(visit):
    report = copy.deepcopy(REPORT)
    for record in (*report["facts"], *report["models"], *report["launch"]["flags"], report["launch"]):
        record.update({key: HOSTILE for key, value in record.items() if isinstance(value, str)})
    findings = [{key: HOSTILE for key in ("id", "severity", "title", "why", "remedy")} | {"nodes": [HOSTILE]}]
    page, _ = visit(routes={"/nvfp4/report": report, "/nvfp4/check": {"findings": findings}})
    page.find(findings)
    page.open_panel()
    assert HOSTILE in page.panel.inner_text()
    assert page.page.locator(".nvfp4-doctor img, .nvfp4-doctor b, [role=alert] img").count() == 0
    assert page.page.title() != "run"


def test_a_changed_workflow_makes_the_findings_stale(visit):
    page, _ = visit()
    page.open_panel()
    assert page.status() == ""
    page.load(WORKFLOW)
    page.panel.get_by_text("The workflow has changed since this check.").wait_for()
    page.button("Check again").click()
    page.page.wait_for_function("() => document.querySelector('.nvfp4-doctor [role=status]').textContent === ''")


def test_the_panel_survives_closing_and_opening(visit):
    page, server = visit()
    page.open_panel()
    page.page.get_by_text("Offloading", exact=True).click()
    page.tab().click()
    page.panel.wait_for(state="detached")
    page.open_panel()
    page.page.wait_for_function("() => document.querySelectorAll('.nvfp4-doctor details').length > 0")
    assert [path for path, _ in server.calls].count("/nvfp4/report") == 2
    assert page.panel.locator("details:not([open]) summary").all_inner_texts() == ["Offloading"]


def test_a_server_without_the_routes_is_said_to_be_without_them(visit):
    page, server = visit(routes={})
    page.open_panel()
    page.panel.get_by_text("The server part of NVFP4 Video does not answer.").wait_for()
    assert page.button("Copy report").is_disabled()
    assert [path for path, _ in server.calls] == ["/nvfp4/report"]
    # Chromium itself logs the 404 that the click caused.
    assert len(page.problems) == 1 and "/nvfp4/report" in page.problems.pop()


def test_a_workflow_that_cannot_be_checked_leaves_the_report_standing(visit):
    page, _ = visit(routes={"/nvfp4/report": REPORT})
    page.open_panel()
    text = page.panel.inner_text()
    assert "The open workflow could not be checked." in text and COMMAND in text
    assert len(page.problems) == 1 and "/nvfp4/check" in page.problems.pop()


@pytest.mark.parametrize(
    ("locale", "refresh"), [("ja", "再チェック"), ("zh", "重新检查"), ("zh-TW", "重新檢查"), ("fr", "Check again")]
)
def test_the_panel_speaks_the_users_language_or_english(visit, locale, refresh):
    page, _ = visit({"Comfy.Locale": locale})
    page.open_panel()
    assert page.button(refresh).is_visible()
    page.shot(f"locale-{locale}")


def test_without_translations_the_panel_has_plain_words(visit):
    page, _ = visit(routes={"/nvfp4/report": REPORT, "/nvfp4/check": {"findings": FINDINGS}, "/i18n": {}})
    page.open_panel()
    assert page.button("Copy command").is_visible()
    assert page.panel.get_by_text("Warning", exact=True).count() > 0


def keys(branch: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in branch.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


@pytest.mark.parametrize("language", ["zh", "zh-TW", "ja"])
@pytest.mark.parametrize("name", ["main", "settings", "commands"])
def test_every_language_has_every_text(language, name):
    files = (PACK / "locales" / tag / f"{name}.json" for tag in ("en", language))
    english, other = (json.loads(file.read_text("utf-8")) for file in files)
    # Groups and labels of facts come from the server in English; the other languages may translate them.
    own = {key for key in keys(other) if key.startswith(("nvfp4Doctor.groups.", "nvfp4Doctor.facts."))}
    assert keys(other) - own == keys(english)


def test_no_text_holds_what_the_front_ends_translator_takes_for_syntax():
    for file in (PACK / "locales").glob("*/*.json"):
        if file.stem != "nodeDefs":
            assert not set("@|") & set(file.read_text("utf-8")), file.name
