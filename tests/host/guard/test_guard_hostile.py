# SPDX-License-Identifier: Apache-2.0
"""What anybody may post: the server stays up, the work is in proportion, what cannot be read goes on as it came."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.host import border
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import limit as guard_limit
from nvfp4_video.host.guard import routes
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.host.guard.files import FileFacts
from nvfp4_video.host.guard.limit import within
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.samples import shapes
from nvfp4_video.tests.support.guard_prompts import HEALTHY, VULNERABLE, clip, facts, ids, node
from server import PromptServer

PATIENCE = 30  # seconds after which a test gives up on what should never wait
DISTILLED = FileFacts("ltx.safetensors", "LTX-2.3", None, False, True, "its file name")


@pytest.fixture
def host(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> PromptServer:
    """A vulnerable host, a fresh server, no memory of failures; a file called distilled is a distilled model."""
    monkeypatch.setattr(routes, "probe", lambda: VULNERABLE | facts(torch_cuda=(12, 8), ltxav_needs_audio=True))
    monkeypatch.setattr(border, "_references", {})
    monkeypatch.setattr(guard_limit, "_started", [])
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: DISTILLED if name.startswith("distilled") else None)
    return PromptServer.instance


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The host's table of node classes: SaveVideo and PreviewAny are outputs."""
    kinds = {entry["class_type"] for entry in clip().values()} | {"ComfySwitchNode", "KSampler"}
    table = {kind: type(kind, (), {"OUTPUT_NODE": kind == "SaveVideo"}) for kind in kinds}
    table["PreviewAny"] = type("PreviewAny", (), {"OUTPUT_NODE": True})
    monkeypatch.setitem(sys.modules, "nodes", types.SimpleNamespace(NODE_CLASS_MAPPINGS=table))
    return table


@pytest.mark.parametrize("client", [{}, [], {"a": 1}, 3, True, None, 1.5])
def test_nothing_is_sent_to_a_client_that_is_no_text(client: object, host):
    after = routes.on_prompt({"prompt": clip(), "client_id": client})
    assert host.sent == []
    assert after["extra_data"]["nvfp4_findings"], "the prompt was checked all the same"


@pytest.mark.parametrize("extra", [None, [], "text", 3])
def test_extra_data_of_another_type_is_left_for_the_host_to_refuse(extra: object, host):
    data = {"prompt": clip(), "extra_data": extra}
    assert routes.on_prompt(data) is data


@pytest.mark.parametrize("targets", [[{}], [[], None, 3], ["save", {}], {"save": 1}, "save", 7])
def test_targets_of_any_type_are_no_obstacle(targets: object, host):
    data = {"prompt": clip(), "partial_execution_targets": targets}
    assert routes.on_prompt(data)["prompt"] is data["prompt"]
    assert not border._references


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_the_place_of_the_settings_is_not_waited_for(host, tmp_path):
    path = tmp_path / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert within(PATIENCE, routes._settings) == {}


def test_wild_prompts_go_on_as_they_came_and_no_rule_fails(host, caplog):
    for seed in range(2500):
        data = shapes.wild(seed)
        before = dict(data)
        after = routes.on_prompt(data)
        assert data == before or any(value != value for value in data.values()), "the body itself is not written to"
        assert after.keys() - {"extra_data"} == data.keys() - {"extra_data"}
        assert all(after[key] is data[key] for key in data if key != "extra_data")
        if after is not data:
            extra = dict(after["extra_data"])
            json.dumps(extra.pop(routes.IN_HISTORY))
            assert extra == data.get("extra_data", {})
    assert not border._references
    assert guard.NOT_CHECKED not in caplog.text


def test_wild_bodies_of_a_check_are_answered(host):
    pytest.importorskip("aiohttp")
    from nvfp4_video.tests.host.guard.test_guard_routes import answer, request

    for seed in range(40):
        try:
            body = json.dumps(shapes.wild(seed)).encode()
        except ValueError:  # numbers of more digits than Python writes
            continue
        assert answer(routes.post_check(request(body)))[0] in (200, 400)


@pytest.mark.parametrize("field", ["length", "width", "frames_number", "frame_rate", "fps", "cfg"])
def test_numbers_that_nobody_can_mean_are_unknown(field: str, host):
    for number in (1e-300, 10**4400, -(10**400), 1e308, math.nan, math.inf, -math.inf, "1e-300", "9" * 5000):
        prompt = clip()
        for entry in prompt.values():
            if field in entry["inputs"]:
                entry["inputs"][field] = number
        assert ids(prompt) == {}


@pytest.mark.parametrize("shape", shapes.PROMPTS)
def test_the_work_on_a_prompt_grows_with_its_size_alone(shape: str, host):
    """In calls of functions, Python's own included, which depend on nothing but the prompt."""
    work = []
    for size in (500, 2000):
        prompt, calls = shapes.PROMPTS[shape](size), 0

        def count(frame: object, event: str, function: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            guard.check(prompt, VULNERABLE)
        finally:
            sys.setprofile(before)
        work.append(calls / size)
    assert work[1] < 1.5 * work[0] + 5, f"calls, a node: {work}"


def test_chains_longer_than_any_stack_are_followed_to_their_ends():
    count = 30_000
    prompt = {str(i): node("PrimitiveInt", value=[str(i + 1), 0], model=[str(i + 1), 0]) for i in range(count)}
    prompt |= {str(count): node("PrimitiveInt", value=24)}
    graph = PromptGraph(prompt)
    assert graph.value("0", "value") == 24
    view = guard_view.View(graph, {})
    assert view.model(graph.nodes["0"]).loader.id == str(count)
    sigmas = {str(i): node("SplitSigmas", sigmas=[str(i + 1), 0]) for i in range(count)}
    split = PromptGraph(sigmas | {str(count): node("ManualSigmas", sigmas="1, 0")})
    assert guard_view.View(split, {}).schedule(split.nodes["0"]).kind == "ManualSigmas"


def test_a_prompt_of_many_faults_gets_a_hundred_findings_and_one_that_says_so(host):
    found = guard.check(shapes.samplers(400), VULNERABLE)
    assert len(found) == guard.MOST_FINDINGS + 1
    assert found[-1].id == "more" and found[0].severity == guard.ERROR


def test_of_very_many_files_the_first_hundred_are_looked_at(host, monkeypatch):
    asked = []
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: asked.append(name))
    guard.check(shapes.files(1000), HEALTHY)
    assert len(asked) == len(set(asked)) == 100


def test_a_rule_that_fails_is_one_finding_with_a_reference_and_the_others_still_speak(host, caplog, monkeypatch):
    def broken(view: guard_view.View) -> Iterator[guard.Finding]:
        yield guard.Finding("kept", guard.INFO, "said before it broke.", "", "")
        raise RuntimeError("the rule is broken")

    monkeypatch.setattr(guard, "RULES", (broken, *guard.RULES, broken))
    for _ in range(3):
        found = guard.check(clip(), VULNERABLE)
        assert [finding.id for finding in found] == ["prefetch_crash", "kept", "kept", "not_checked"]
        assert "broken, broken" in found[-1].why
    (record,) = [record for record in caplog.records if "failed, reference" in record.getMessage()]
    reference = record.getMessage().partition("reference ")[2].split()[0]
    assert reference in found[-1].remedy and "the rule is broken" in caplog.text


def test_what_cannot_be_read_at_all_is_one_finding(host, monkeypatch):
    def broken(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(guard, "View", broken)
    assert [finding.id for finding in guard.check(clip(), VULNERABLE)] == ["not_checked"]


def test_rules_for_which_no_time_is_left_are_named(host):
    (finding,) = guard.check(clip(), VULNERABLE, limit=-1.0)
    assert finding.id == "not_checked" and "wrong_vae, " in finding.why


def test_a_check_that_does_not_end_lets_the_prompt_through_and_the_next_ones_do_not_wait(host, caplog, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(routes, "LIMIT", 0.05)
    monkeypatch.setattr(guard_limit, "MOST_LATE", 1)
    monkeypatch.setattr(routes.guard, "check", lambda *_: released.wait(PATIENCE) and [])
    data = {"prompt": clip(), "client_id": "someone"}
    try:
        for _ in range(2):
            after = routes.on_prompt(data)
            assert after["prompt"] is data["prompt"]
            assert [finding["id"] for finding in after["extra_data"]["nvfp4_findings"]] == ["not_checked"]
        assert sum(thread.name == "nvfp4-guard" for thread in threading.enumerate()) == 1
    finally:
        released.set()
        guard_limit._started[0].join()
    assert within(PATIENCE, lambda: 3) == 3, "what has ended makes room"


def test_a_check_of_doctor_s_that_does_not_end_is_answered(host, monkeypatch):
    pytest.importorskip("aiohttp")
    from nvfp4_video.tests.host.guard.test_guard_routes import answer, request

    released = threading.Event()
    monkeypatch.setattr(routes, "CHECK_LIMIT", 0.05)
    monkeypatch.setattr(routes, "probe", lambda: released.wait(PATIENCE))
    try:
        status, found = answer(routes.post_check(request(b'{"prompt": {}}')))
    finally:
        released.set()
    assert status == 200 and [finding["id"] for finding in found["findings"]] == ["not_checked"]


def test_what_no_output_needs_is_not_judged_and_blocks_nothing(host, classes, tmp_path):
    path = Path(tmp_path, "user", "default", "comfy.settings.json")
    path.parent.mkdir(parents=True)
    path.write_text('{"NVFP4.guard.policy": "block"}', encoding="utf-8")
    dead = clip()
    del dead["save"]
    dead["text"] = node("PreviewAny", source="text")
    data = {"prompt": dead}
    assert routes.on_prompt(data) is data
    assert routes.on_prompt({"prompt": clip()})["prompt"].keys() == {"sampler"}


def test_the_side_that_a_switch_does_not_take_is_not_judged(host, classes):
    prompt = clip(video={"length": 120})
    prompt["still"] = node("PreviewAny")
    prompt["switch"] = node("ComfySwitchNode", switch=True, on_true=["still", 0], on_false=["create", 0])
    prompt["save"]["inputs"]["video"] = ["switch", 0]
    assert ids(prompt, VULNERABLE) == {}
    prompt["switch"]["inputs"]["switch"] = False
    assert {"prefetch_crash", "frames"} <= ids(prompt, VULNERABLE).keys()


def test_a_prompt_without_outputs_is_judged_as_a_whole(host, classes):
    prompt = clip()
    del prompt["save"]
    assert "prefetch_crash" in ids(prompt, VULNERABLE)


def test_a_class_that_is_not_there_or_cannot_say_counts_as_an_output(host, classes):
    prompt = clip()
    del classes["SaveVideo"]
    assert "prefetch_crash" in ids(prompt, VULNERABLE)

    class Faulty(type):
        @property
        def OUTPUT_NODE(cls) -> bool:  # noqa: N802
            raise RuntimeError

    classes["SaveVideo"] = Faulty("SaveVideo", (), {})
    assert "prefetch_crash" in ids(prompt, VULNERABLE)


def test_work_within_its_limit_gives_its_result_and_its_error():
    assert within(PATIENCE, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(PATIENCE, lambda: {}["x"])


def test_the_loop_is_not_held_by_a_check_of_doctor_s(host, monkeypatch):
    pytest.importorskip("aiohttp")
    from nvfp4_video.tests.host.guard.test_guard_routes import request

    threads = []
    monkeypatch.setattr(routes, "probe", lambda: threads.append(threading.current_thread()) or HEALTHY)
    asyncio.run(routes.post_check(request(b'{"prompt": {}}')))
    assert threads[0] is not threading.main_thread()
