# SPDX-License-Identifier: Apache-2.0
"""The guard in a real ComfyUI: silent on a sound prompt, heard by clients of the API, and its cure on a real model.

The rule used over HTTP is one that a CPU can meet, a FLUX VAE on LTX latents. The prefetch crash needs a GPU, or the
host's own prefetch made to run on the CPU, which guard_in_process.py does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nvfp4_video.tests.real import harness
from nvfp4_video.tests.real.harness import ComfyUI, HostError, facts_in_host
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
MARK = "facts: "


@pytest.fixture(scope="module")
def guarded() -> Iterator[ComfyUI]:
    """A ComfyUI of this file's own, since its log and settings are looked at; one VAE, FLUX's, is there."""
    with ComfyUI(custom_nodes=[HERE / "standin_nodes"]) as running:
        path = running.base / "models" / "vae" / "ae.safetensors"
        save_file({"decoder.conv_in.weight": torch.zeros(1, 16, 3, 3)}, path)
        yield running


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def decoding(**more: dict) -> dict[str, dict]:
    """A prompt with an error that the guard sees and the host does not before it runs; one output, ``shown``."""
    return {
        "video": node("EmptyLTXVLatentVideo", width=64, height=64, length=9, batch_size=1),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
        "decoded": node("VAEDecode", samples=["video", 0], vae=["vae", 0]),
        "shown": node("PreviewImage", images=["decoded", 0]),
    } | more


def sound() -> dict[str, dict]:
    return {
        "video": node("EmptyLTXVLatentVideo", width=64, height=64, length=9, batch_size=1),
        "stats": node("StandInLatentStats", latent=["video", 0]),
    }


def lines(host: ComfyUI, start: int = 0) -> list[str]:
    """Lines of the guard in the log."""
    return [line for line in host.log()[start:].splitlines() if "NVFP4 guard" in line]


def choose(host: ComfyUI, policy: str) -> None:
    """Save the user's choice as the front end does."""
    request = urllib.request.Request(host.url + "/settings", data=json.dumps({"NVFP4.guard.policy": policy}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def status(host: ComfyUI, route: str, data: bytes | None = None, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(host.url + route, data=data, headers=named)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_sound_start_and_a_sound_prompt_leave_no_line_of_the_guard(guarded: ComfyUI):
    entry = guarded.queue(sound())
    assert lines(guarded) == []
    assert "nvfp4_findings" not in entry["prompt"][3]


def test_a_client_of_the_api_finds_the_warning_in_the_log_and_in_the_history(guarded: ComfyUI):
    start = len(guarded.log())
    prompt = decoding(stats=node("StandInLatentStats", latent=["video", 0]))
    prompt_id = guarded.post("/prompt", {"prompt": prompt})["prompt_id"]
    (line,) = lines(guarded, start)
    assert "ae.safetensors cannot decode LTX latents" in line and "NVFP4 VAE Loader" in line and "decoded" in line
    history: dict = {}
    for _ in range(600):
        history = guarded.get(f"/history/{prompt_id}")
        if history:
            break
        time.sleep(0.1)
    (finding,) = history[prompt_id]["prompt"][3]["nvfp4_findings"]
    assert (finding["id"], finding["nodes"]) == ("foreign_vae", ["decoded", "vae"])


@pytest.mark.parametrize("client", [{}, [1], 3, True])
def test_a_client_that_is_no_text_does_not_end_the_server(client: object, guarded: ComfyUI):
    for prompt in ({}, {"vae": decoding()["vae"]}):
        body = json.dumps({"prompt": prompt, "client_id": client}).encode()
        status(guarded, "/prompt", body, Content_Type="application/json")
    assert guarded.queue(sound())["status"]["status_str"] == "success"


def test_what_no_output_needs_blocks_nothing(guarded: ComfyUI):
    choose(guarded, "block")
    try:
        dead = {name: entry for name, entry in decoding().items() if name != "shown"}
        assert guarded.queue(dead | sound())["status"]["status_str"] == "success"
    finally:
        choose(guarded, "warn")


def test_the_client_that_queued_the_prompt_gets_the_findings_on_its_websocket_and_no_other_does(guarded: ComfyUI):
    aiohttp = pytest.importorskip("aiohttp")

    async def listen(client: str) -> list[dict]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{guarded.url}/ws?clientId={client}") as ws:
            data = {"prompt": decoding(), "client_id": "ours"}
            await asyncio.to_thread(guarded.post, "/prompt", data)
            heard = []
            with contextlib.suppress(asyncio.TimeoutError):
                while not heard:
                    message = await ws.receive(timeout=5)
                    event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                    heard += [event["data"]] if event.get("type") == "nvfp4.findings" else []
            return heard

    (event,) = asyncio.run(listen("ours"))
    assert [finding["id"] for finding in event["findings"]] == ["foreign_vae"]
    assert asyncio.run(listen("theirs")) == []


def test_check_answers_the_same_without_queueing(guarded: ComfyUI):
    start = len(guarded.log())
    (finding,) = guarded.post("/nvfp4/check", {"prompt": decoding()})["findings"]
    assert (finding["id"], finding["severity"]) == ("foreign_vae", "error")
    assert lines(guarded, start) == []
    assert guarded.get("/queue")["queue_pending"] == []


def test_under_block_the_host_refuses_the_prompt_at_the_node_in_question(guarded: ComfyUI):
    choose(guarded, "block")
    try:
        with pytest.raises(HostError) as refused:
            guarded.post("/prompt", {"prompt": decoding(other=node("PreviewAny", source="text"))})
        assert "node decoded (NVFP4LaunchGuard)" in str(refused.value)
        assert "ae.safetensors cannot decode LTX latents" in str(refused.value)
        assert guarded.queue(sound())["status"]["status_str"] == "success"
    finally:
        choose(guarded, "warn")


def test_a_blocking_guard_in_the_graph_refuses_and_a_warning_one_overrides_the_user_s_block(guarded: ComfyUI):
    def graph(policy: str) -> dict:
        guard = node("NVFP4LaunchGuard", model=["lora", 0], policy=policy)
        return decoding(guard=guard, lora=node("LoraLoaderModelOnly", model=["guard", 0], lora_name="x"))

    with pytest.raises(HostError, match=r"node decoded \(NVFP4LaunchGuard\)"):
        guarded.post("/prompt", {"prompt": graph("block")})
    choose(guarded, "block")
    try:
        # The guard's own branch has a cycle, which the host drops; the decode is accepted although it is in error.
        assert "prompt_id" in guarded.post("/prompt", {"prompt": graph("warn")})
    finally:
        choose(guarded, "warn")


def test_the_host_s_own_validation_takes_only_the_guard_s_three_policies(guarded: ComfyUI):
    with pytest.raises(HostError, match="'off'; expected one of warn, cure, block"):
        guarded.post("/prompt", {"prompt": {"1": node("NVFP4LaunchGuard", model=None, policy="off")}})


def test_the_report_node_shows_the_report_in_the_history(guarded: ComfyUI):
    outputs = guarded.queue({"1": node("NVFP4HostReport")})["outputs"]
    assert f"ComfyUI: {guarded.version}" in outputs["1"]["text"][0]
    assert guarded.queue({"1": node("NVFP4HostReport")})["outputs"]["1"]["text"]


def test_the_nodes_are_offered_with_their_inputs(guarded: ComfyUI):
    info = guarded.object_info("NVFP4LaunchGuard")
    assert info["output"] == ["MODEL", "STRING"] and info["output_node"] is True
    assert list(info["input"]["required"]) == ["model", "policy"]
    assert guarded.object_info("NVFP4HostReport")["output"] == ["STRING"]


def test_the_report_holds_no_path_of_the_machine(guarded: ComfyUI):
    for prefix in ("", "/api"):
        text = json.dumps(guarded.get(f"{prefix}/nvfp4/report"))
        assert json.loads(text)["schema"] == 1
        assert str(guarded.base) not in text and str(harness.PACK) not in text and str(guarded.path) not in text


@pytest.mark.parametrize("headers", [{"Origin": "https://elsewhere.example"}, {"Sec_Fetch_Site": "cross-site"}])
def test_cross_site_calls_are_refused_as_the_host_refuses_them_for_its_own_routes(guarded: ComfyUI, headers: dict):
    body = json.dumps({"prompt": {}}).encode()
    expected = status(guarded, "/prompt", **headers)
    if expected != 403:
        pytest.skip(f"ComfyUI {guarded.version} answers {expected} itself")
    assert status(guarded, "/nvfp4/report", **headers) == 403
    assert status(guarded, "/nvfp4/check", body, **headers) == 403
    assert status(guarded, "/nvfp4/report") == status(guarded, "/nvfp4/check", body) == 200


def test_a_pack_that_is_there_twice_adds_the_guard_once(tmp_path: Path):
    base = tmp_path / "base"
    for name in ("first", "second"):
        folder = base / "custom_nodes" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(harness.PACK, target_is_directory=True)
    with ComfyUI(base=base, pack=None) as running:
        save_file({"decoder.conv_in.weight": torch.zeros(1, 16, 3, 3)}, base / "models" / "vae" / "ae.safetensors")
        start = len(running.log())
        running.post("/prompt", {"prompt": decoding()})
        assert len(lines(running, start)) == 1


@pytest.fixture(scope="module")
def cured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What guard_in_process.py found."""
    facts = facts_in_host(HERE / "guard_in_process.py", str(tmp_path_factory.mktemp("cure")), mark=MARK, timeout=600)
    if facts["ltx"] is None:
        pytest.skip(f"ComfyUI {facts['version']} builds the embeddings connectors in their released size only")
    return facts


def test_the_flag_reaches_a_real_model_on_without_the_cure_and_off_with_it(cured: dict):
    plain, treated = cured["flags"]["plain"], cured["flags"]["cured"]
    if plain == [None, None]:
        pytest.skip(f"ComfyUI {cured['version']} does not prefetch blocks")
    assert (plain, treated) == ([True, True], [False, False])


def test_the_proof_holds_only_with_the_cure(cured: dict):
    assert cured["proof"]["cured"].startswith("prefetch flag True -> False")
    assert "expected [False]" in cured["proof"]["plain"]


def test_with_resident_blocks_sampling_stops_exactly_on_a_vulnerable_host_and_the_cure_avoids_it(cured: dict):
    if cured["prefetch_crash"]:
        assert "wait_stream" in cured["joint"]["plain"]
    else:
        assert cured["joint"]["plain"] == "equal"
    assert cured["joint"]["cured"] == "equal"


def test_video_without_sound_fails_exactly_where_the_probe_says_so(cured: dict):
    assert (cured["video"] == "runs") == (not cured["ltxav_needs_audio"])


def test_the_guard_node_s_cure_wraps_the_model_only_where_the_host_needs_it(cured: dict):
    assert cured["guard"]["same"] == (not cured["prefetch_crash"])
    assert ("not needed" in cured["guard"]["report"]) == (not cured["prefetch_crash"])
