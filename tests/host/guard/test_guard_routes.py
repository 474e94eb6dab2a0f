# SPDX-License-Identifier: Apache-2.0
"""The guard on the host's server: what it adds, what the prompt handler does, and that it never stands in the way."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import types
from pathlib import Path

import pytest
from nvfp4_video.host import border
from nvfp4_video.host.guard import routes
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.nodes.guard import NVFP4LaunchGuard
from nvfp4_video.tests.support.guard_prompts import HEALTHY, VULNERABLE, clip, facts, node
from server import PromptServer


@pytest.fixture
def host(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> PromptServer:
    """A vulnerable host with a fresh server, and no memory of failures."""
    monkeypatch.setattr(routes, "probe", lambda: VULNERABLE)
    monkeypatch.setattr(border, "_references", {})
    return PromptServer.instance


def save_settings(tmp_path: Path, content: object) -> None:
    path = tmp_path / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("nvfp4_video.host.guard.routes")]


def queued(**more: object) -> dict:
    """A body of POST /prompt."""
    return {"prompt": clip(), "client_id": "someone", "extra_data": {"extra_pnginfo": {"workflow": 1}}} | more


def request(body: bytes) -> types.SimpleNamespace:
    """As much of an aiohttp request as the route reads."""

    async def iter_chunked(size: int):
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return types.SimpleNamespace(content=types.SimpleNamespace(iter_chunked=iter_chunked))


def answer(coroutine) -> tuple[int, dict]:
    """-> status, JSON."""
    response = asyncio.run(coroutine)
    return response.status, json.loads(response.text)


def test_routes_and_handler_are_added_once_however_often_the_pack_is_loaded(host):
    routes.start()
    routes.start()
    assert [(route.method, route.path) for route in host.routes] == [
        ("GET", "/nvfp4/report"),
        ("POST", "/nvfp4/check"),
        ("GET", "/nvfp4/reports"),
    ]
    assert len(host.on_prompt_handlers) == 1


def test_without_a_server_nothing_is_added(stub_comfy, monkeypatch):
    monkeypatch.setattr(PromptServer, "instance", None)
    routes.start()


def test_start_up_logs_one_line_on_a_vulnerable_host_and_none_on_a_healthy_one(host, caplog, monkeypatch):
    routes.start()
    (line,) = lines(caplog)
    assert line.startswith("NVFP4 guard: warning: This ComfyUI stops") and "cure" in line and "\n" not in line
    caplog.clear()
    monkeypatch.setattr(PromptServer, "instance", PromptServer(None))
    monkeypatch.setattr(routes, "probe", lambda: HEALTHY)
    with caplog.at_level(logging.DEBUG):
        routes.start()
    assert lines(caplog) == []


def test_a_finding_is_logged_sent_to_the_client_and_kept_in_the_history(host, caplog):
    data = queued()
    before = copy.deepcopy(data)
    after = routes.on_prompt(data)
    assert after["prompt"] == before["prompt"] and data == before
    (line,) = lines(caplog)
    assert "joint audio and video" in line and "(nodes sampler, guider, model)" in line
    ((event, sent),) = host.sent
    assert (event, [finding["id"] for finding in sent["findings"]]) == ("nvfp4.findings", ["prefetch_crash"])
    assert after["extra_data"] == {"extra_pnginfo": {"workflow": 1}, "nvfp4_findings": sent["findings"]}


def test_a_prompt_with_very_many_findings_does_not_flood_the_log(host, caplog):
    prompt = clip()
    for number in range(30):
        prompt[f"s{number}"] = prompt["sampler"]
    after = routes.on_prompt({"prompt": prompt})
    assert len(lines(caplog)) == routes.MOST_LINES + 1
    assert lines(caplog)[-1].endswith("11 more findings on this prompt")
    assert len(after["extra_data"]["nvfp4_findings"]) == 31


def test_a_prompt_without_client_or_extra_data_is_warned_about_in_the_log_and_the_history(host, caplog):
    after = routes.on_prompt({"prompt": clip()})
    assert len(lines(caplog)) == 1 and host.sent == []
    assert [finding["id"] for finding in after["extra_data"]["nvfp4_findings"]] == ["prefetch_crash"]


def test_a_sound_prompt_goes_on_as_it_came(host, caplog, monkeypatch):
    monkeypatch.setattr(routes, "probe", lambda: HEALTHY)
    data = queued()
    assert routes.on_prompt(data) is data
    assert lines(caplog) == []
    sent = ("nvfp4.findings", {"findings": [], "refused": False})
    assert host.sent == [sent], "the client drops what it was told of another prompt"


def test_switched_off_the_handler_is_silent_unless_a_guard_is_in_the_graph(host, caplog, tmp_path):
    save_settings(tmp_path, {"NVFP4.guard.enabled": False})
    data = queued()
    assert routes.on_prompt(data) is data and lines(caplog) == []
    data["prompt"]["guard"] = node("NVFP4LaunchGuard", model=["model", 0], policy="warn")
    routes.on_prompt(data)
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("content", ["{", "[1]", '{"NVFP4.guard.policy": 7}', "[" * 5000])
def test_settings_that_cannot_be_read_mean_the_defaults(content: str, host, tmp_path):
    save_settings(tmp_path, content)
    assert routes.on_prompt(queued())["prompt"] == clip()


def test_the_user_s_block_replaces_the_prompt_by_one_that_fails_where_the_trouble_is(host, caplog, tmp_path):
    save_settings(tmp_path, {"NVFP4.guard.policy": "block"})
    after = routes.on_prompt(queued(partial_execution_targets=["save"]))
    assert after["prompt"].keys() == {"sampler"}
    assert "partial_execution_targets" not in after and after["client_id"] == "someone"
    refused = after["prompt"]["sampler"]
    assert refused["class_type"] == "NVFP4LaunchGuard"
    reason = NVFP4LaunchGuard.validate_inputs(refused["inputs"]["policy"])
    assert "wait_stream" in reason and "--disable-async-offload" in reason
    assert len(lines(caplog)) == 1
    ((_, sent),) = host.sent
    assert sent["refused"] is True and [finding["id"] for finding in sent["findings"]] == ["prefetch_crash"]


def test_block_lets_warnings_through(host, tmp_path, monkeypatch):
    save_settings(tmp_path, {"NVFP4.guard.policy": "block"})
    monkeypatch.setattr(routes, "probe", lambda: HEALTHY)
    data = queued(prompt=clip(video={"length": 120}))
    assert routes.on_prompt(data)["prompt"] == data["prompt"]
    assert [sent["refused"] for _, sent in host.sent] == [False]


@pytest.mark.parametrize(("policy", "refused"), [("warn", False), ("block", True)])
def test_a_guard_in_the_graph_overrides_the_user_s_policy(policy: str, refused: bool, host, tmp_path):
    save_settings(tmp_path, {"NVFP4.guard.policy": "warn" if refused else "block"})
    data = queued()
    data["prompt"]["guard"] = node("NVFP4LaunchGuard", model=["model", 0], policy=policy)
    assert ("save" not in routes.on_prompt(data)["prompt"]) == refused


def test_outputs_that_will_not_run_are_not_checked(host, caplog):
    data = queued(partial_execution_targets=["other"])
    data["prompt"]["other"] = node("PreviewAny", source="text")
    assert routes.on_prompt(data) is data and lines(caplog) == []


def test_several_errors_at_one_node_are_one_refusal_with_both_reasons(host):
    finding = routes.guard.check(clip(), VULNERABLE)[0]
    prompt = routes._refused({"prompt": {}}, [finding, finding])["prompt"]
    assert list(prompt) == ["sampler"]
    assert prompt["sampler"]["inputs"]["policy"].count("wait_stream") == 2


@pytest.mark.parametrize("data", [None, [], "text", {}, {"prompt": None}, {"prompt": [1]}, {"prompt": {"1": 2}}])
def test_a_body_that_is_no_prompt_goes_on_as_it_came(data: object, host, caplog):
    assert routes.on_prompt(data) is data
    assert lines(caplog) == []


def test_a_failure_of_the_guard_is_logged_once_with_its_traceback_and_never_stops_a_prompt(host, caplog, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("the guard is broken")

    monkeypatch.setattr(routes.guard, "check", broken)
    data = queued()
    before = copy.deepcopy(data)
    assert all(routes.on_prompt(data) is data for _ in range(3)) and data == before
    (record,) = [record for record in caplog.records if record.name == "nvfp4_video.host.border"]
    assert "unchecked and unchanged" in record.getMessage() and "the guard is broken" in caplog.text


def test_a_probe_that_fails_does_not_stop_the_start(host, caplog, monkeypatch):
    def broken() -> None:
        raise RuntimeError("no facts")

    monkeypatch.setattr(routes, "probe", broken)
    routes.start()
    assert len(host.on_prompt_handlers) == 1 and "no facts" in caplog.text


def test_check_answers_with_findings_and_keeps_nothing(host):
    pytest.importorskip("aiohttp")
    status, found = answer(routes.post_check(request(json.dumps({"prompt": clip()}).encode())))
    assert status == 200
    assert [finding["id"] for finding in found["findings"]] == ["prefetch_crash"]
    assert set(found["findings"][0]) == {"id", "severity", "title", "why", "remedy", "nodes", "action", "fixes"}
    assert host.sent == []
    assert found["reading"] | {"text": ""} == {
        "shape": "API prompt", "place": "prompt", "nodes": 13, "understood": 13, "unknown": [], "text": "",
    }  # fmt: skip


def test_check_reads_a_wrapped_prompt_and_says_where_it_was(host, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(routes, "probe", lambda: HEALTHY)
    body = json.dumps({"input": {"workflow": clip(video={"length": 120}) | {"comment": "mine"}}}).encode()
    status, found = answer(routes.post_check(request(b"\xef\xbb\xbf" + body)))
    assert (status, [finding["id"] for finding in found["findings"]]) == (200, ["frames", "audio_length"])
    assert (found["reading"]["place"], found["reading"]["nodes"], found["reading"]["understood"]) == (
        "input.workflow",
        14,
        13,
    )
    assert "found at input.workflow; 13 of 14 nodes understood. Unknown: 1 entry that is not a node (comment)." in str(
        found
    )


def test_an_empty_canvas_gets_no_all_clear(host):
    pytest.importorskip("aiohttp")
    status, found = answer(routes.post_check(request(b'{"prompt": {}}')))
    assert (status, [finding["id"] for finding in found["findings"]]) == (200, ["not_checked"])
    assert found["findings"][0]["severity"] == "info" and found["reading"]["shape"] == "empty"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"prompt": 3}', b"\xff\xfe", b"[" * 100_000])
def test_check_refuses_what_is_no_prompt(body: bytes, host):
    pytest.importorskip("aiohttp")
    status, found = answer(routes.post_check(request(body)))
    assert status == 400 and "expected" in found["error"]


def test_check_stops_reading_a_body_that_is_too_large(host, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(routes, "MAX_BODY", 1 << 20)
    assert answer(routes.post_check(request(b" " * (1 << 20) + b"{}")))[0] == 413


def test_the_report_holds_facts_launch_and_host_findings_and_no_path(host, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(routes, "probe", lambda: routes_probe() | facts(prefetch_crash=True))
    status, report = answer(routes.get_report(None))
    assert status == 200 and report["schema"] == 1
    assert {"facts", "models", "findings", "launch"} <= report.keys()
    text = json.dumps(report)
    assert str(Path.home()) not in text and str(tmp_path) not in text


def routes_probe() -> dict:
    """The facts of this process."""
    from nvfp4_video.host.doctor.probe import probe

    return probe()


def test_the_handler_looks_at_a_prompt_twice_at_most(host, monkeypatch):
    built = []
    original = PromptGraph.__init__
    monkeypatch.setattr(PromptGraph, "__init__", lambda self, prompt: built.append(1) or original(self, prompt))
    routes.on_prompt(queued())
    assert len(built) <= 2
