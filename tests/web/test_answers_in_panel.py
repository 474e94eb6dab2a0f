# SPDX-License-Identifier: Apache-2.0
"""NVFP4 Doctor with the answers of other machines and of prompts that were understood in part, in a real Chromium.

The answers are made by the pack itself; the host is stubbed (frontend_server.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nvfp4_video.host.doctor.facts import GIB, Fact
from nvfp4_video.host.doctor.profiles import launch_profile
from nvfp4_video.host.guard import reading
from nvfp4_video.tests.web.doctor_page import DoctorPage
from nvfp4_video.tests.web.frontend_server import node_definitions

HERE = Path(__file__).resolve().parent
WORKFLOW = json.loads((HERE / "workflow.json").read_text("utf-8"))
REPORT = json.loads((HERE / "answers.json").read_text("utf-8"))["report"] | {"findings": []}
RADEON = {
    "gpu_maker": "AMD", "gpu_name": "AMD Radeon RX 7900 XTX", "gpu_memory": 24 * GIB, "dynamic_vram": False,
    "known_flags": frozenset(("--disable-dynamic-vram", "--disable-pinned-memory", "--disable-async-offload")),
    "launch_flags": ["--disable-dynamic-vram"], "prefetch_crash": False,
}  # fmt: skip
WRAPPED = {"input": {"workflow": {"1": {"class_type": "SaveVideo", "inputs": {}}, "note": "mine"}}}


@pytest.fixture
def visit(enter) -> Callable:
    """visit(report, answer) -> a page whose panel is open."""

    def start(report: dict, answer: dict) -> DoctorPage:
        page, _ = enter(node_definitions(WORKFLOW), {}, {"/nvfp4/report": report, "/nvfp4/check": answer})
        page.load(WORKFLOW)
        page.open_panel()
        page.settle()
        page.shot("panel")
        return page

    return start


def test_an_amd_owner_reads_advice_for_amd_s_gpus_only(visit):
    facts = {name: Fact(name, "", name, value, str(value), "made") for name, value in RADEON.items()}
    page = visit(REPORT | {"launch": launch_profile(facts).as_dict()}, {"findings": []})
    text = page.panel.get_by_role("region", name="Launch command").inner_text()
    assert "AMD GPU" in text and "was not run on GPUs of AMD" in text
    assert "--disable-dynamic-vram --disable-pinned-memory --disable-async-offload" in text
    assert "leave that out" not in text and "matters more" not in text
    assert "Nothing found." in page.panel.inner_text(), "the twin: all was understood"


def test_of_what_was_understood_in_part_nothing_is_called_sound(visit):
    found = reading.understand(WRAPPED)
    page = visit(REPORT, {"findings": [], "reading": found.as_dict()})
    text = page.panel.inner_text()
    assert "Nothing found in the 1 of 2 nodes that were understood." in text and "Nothing found.\n" not in text
    assert "found at input.workflow; 1 of 2 nodes understood. Unknown: 1 entry that is not a node (note)." in text
    page.button("Copy report").click()
    page.panel.get_by_text("Copied.").wait_for()
    assert str(found) in page.page.evaluate("() => navigator.clipboard.readText()")
