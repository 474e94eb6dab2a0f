# SPDX-License-Identifier: Apache-2.0
"""``doctor PROMPT``: what a file is, what was understood of it, and an exit that is never 0 for what was not read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from nvfp4_video.cli import doctor
from nvfp4_video.cli.console import CommandError, Console
from nvfp4_video.tests.support.guard_prompts import clip


@pytest.fixture
def judge(stub_comfy, monkeypatch, tmp_path: Path):
    """judge(content) -> (report, whether all is well), as with a ComfyUI."""
    monkeypatch.setattr(doctor, "_connect", lambda: True)
    path = tmp_path / "prompt.json"

    def run(content: object) -> tuple[dict, bool]:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return doctor.run_doctor(argparse.Namespace(release=None, prompt=path), Console())

    return run


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"input": {"workflow": p}}, lambda p: {"output": p}])
def test_a_prompt_is_judged_whatever_it_is_wrapped_in(judge, wrap, capsys):
    report, sound = judge(wrap(clip(video={"length": 120})))
    assert not sound and "frames" in [finding["id"] for finding in report["findings"]]
    assert report["reading"]["nodes"] == report["reading"]["understood"] == 13
    assert "all 13 nodes understood." in capsys.readouterr().out
    assert judge(wrap(clip()))[1], "the twin: a sound prompt"


def test_nothing_is_called_sound_that_was_understood_in_part(judge, capsys):
    judge(clip() | {"note": "mine"})
    shown = " ".join(capsys.readouterr().out.split())
    assert "13 of 14 nodes understood. Unknown: 1 entry that is not a node (note)." in shown
    assert "none in what was understood" in shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        ({}, "is empty"),
        ({"prompt": {}}, "nothing was checked"),
        ({"nodes": [], "links": []}, "nothing was checked"),
        ([1, 2], "a list of 2 entries"),
        (b"\x89PNG", "a PNG picture"),
        (b"{", "this is not JSON"),
    ],
)
def test_what_holds_no_prompt_ends_with_its_reason(judge, content, words):
    with pytest.raises(CommandError, match=words):
        judge(content)
