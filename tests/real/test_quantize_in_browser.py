# SPDX-License-Identifier: Apache-2.0
"""The quantiser in the real front end: Run shows how far it is, Cancel stops it, and Run again goes on from there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.tests.real.harness import ComfyUI
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny
from nvfp4_video.tests.web.doctor_page import DoctorPage, chromium

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
LAYERS, SIDE = 60, 2048  # 500 MB: work for a while on one core of any machine
MARK = json.dumps({"mark": "of the cancelled run"}) + "\n"
RATE = re.compile(r"^[\d.]+ [kMG]?B of \d{3} MB, [\d.]+ [kMG]?B/s, \d+ s left$")
# The tab's title is "[share of the workflow][share of this node] name" while a node runs.
PERCENT = "() => Number(document.title.match(/(\\d+)%\\] NVFP4Quantize/)?.[1] ?? -1)"
STATE = f"() => [({PERCENT})(), app.rootGraph.nodes[0].progress ?? -1]"
IDLE = "() => !document.title.includes('%') && !app.rootGraph.nodes[0].progress"


@pytest.fixture(scope="module")
def host() -> Iterator[ComfyUI]:
    """A server of this file's own, as it changes settings; on one core, so that the work lasts anywhere."""
    with ComfyUI(env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}) as running:
        for name, value in SETTINGS.items():
            running.post(f"/settings/{name}", value)
        yield running


@pytest.fixture(scope="module")
def source(host: ComfyUI) -> Path:
    """A checkpoint with LTX-2.3's names, whose Linears all have the same random weight."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = [f"{PREFIX}transformer_blocks.{block}.ff.net.0.proj.weight" for block in range(LAYERS)]
    return save(host.base / "models" / "checkpoints" / "large.safetensors", tiny() | dict.fromkeys(names, weight))


@pytest.fixture(params=[False, True], ids=["classic", "vue"])
def front_end(host: ComfyUI, source: Path, request, tmp_path: Path) -> Iterator[DoctorPage]:
    """The front end with the node in it; ``.target`` is the file it is to write."""
    host.post("/settings/Comfy.VueNodes.Enabled", request.param)
    with chromium() as browser:
        opened = DoctorPage(browser, host.url, tmp_path, host=True)
        name = request.node.callspec.id
        widgets = {"file_name": source.name, "contents": "whole checkpoint", "quality": "best", "name": name}
        widgets |= {"protect_audio": False, "protect_cross_attention": False}
        widgets |= {"estimate_only": False, "overwrite": False}
        graph = {"1": {"class_type": "NVFP4Quantize", "inputs": widgets}}
        opened.page.evaluate("(graph) => app.loadApiJson(graph, 'quantize')", graph)
        opened.page.wait_for_function("() => app.rootGraph.nodes.length === 1")
        opened.target = host.base / "output" / "checkpoints" / f"{name}_nvfp4.safetensors"
        yield opened
        opened.close()
        assert opened.problems == []


def run(page) -> str:
    """Press Run -> the id of the prompt that the front end sends."""
    posted = lambda response: response.request.method == "POST" and response.url.endswith("/prompt")  # noqa: E731
    with page.expect_response(posted) as response:
        page.get_by_test_id("queue-button").click()
    return response.value.json()["prompt_id"]


def ended(host: ComfyUI, prompt: str) -> dict:
    """Wait for a prompt's end -> its history entry."""
    deadline = time.monotonic() + 300
    while prompt not in (history := host.get(f"/history/{prompt}")):
        assert time.monotonic() < deadline, "the prompt did not end"
        time.sleep(0.1)
    return history[prompt]


def made(journal: str) -> list[str]:
    """The large layers that a journal calls finished, in its order."""
    units = [line.get("unit", "") for line in map(json.loads, journal.splitlines())]
    return [unit for unit in units if ".ff.net.0.proj" in unit]


def test_progress_is_visible_cancel_stops_it_and_running_again_goes_on_from_there(host, source, front_end):
    page, target = front_end.page, front_end.target
    part, journal = (target.with_name(target.name + end) for end in (".part", ".part.journal"))
    text = page.get_by_text(RATE)

    prompt = run(page)
    seen, texts = [[-1, -1]], []
    for _ in range(3):
        page.wait_for_function(f"(last) => ({PERCENT})() > last", arg=seen[-1][0])
        seen.append(page.evaluate(STATE))
    for _ in range(2):
        text.filter(has_not_text=texts[-1] if texts else "nothing yet").wait_for()
        texts.append(text.inner_text())
        seen.append(page.evaluate(STATE))
    front_end.shot("running")
    percents, shares = zip(*seen[1:], strict=True)
    assert list(percents) == sorted(percents) and percents[0] < percents[-1] < 100
    assert list(shares) == sorted(shares) and 0 <= shares[0] < shares[-1] < 1
    assert texts[0] != texts[1]

    page.get_by_role("button", name="Cancel current run", exact=True).click()
    entry = ended(host, prompt)
    page.wait_for_function(IDLE)
    front_end.shot("cancelled")
    assert any(event == "execution_interrupted" for event, _ in entry["status"]["messages"])
    assert sorted(path.name for path in target.parent.glob(f"{target.name}*")) == [part.name, journal.name]

    # A run that began anew would empty the journal, and the line written here with it; what is open outlives the end.
    with journal.open("a+", encoding="utf-8") as file:
        file.write(MARK)
        file.seek(0)
        before = file.read()
        assert 0 < len(made(before)) < LAYERS
        entry = ended(host, run(page))
        file.seek(0)
        after = file.read()
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"]["messages"])[-3000:]
    page.get_by_text("sha256").first.wait_for()
    page.wait_for_function(IDLE)
    front_end.shot("finished")
    assert not part.exists() and not journal.exists() and target.is_file()
    assert after.startswith(before)
    assert len(made(after)) == len(set(made(after))) == LAYERS, "a layer was made twice"
    assert verify(target, source).ok
