# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI offers the shipped templates, and accepts each once files of the right names are in place."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.make_workflows import bare_inputs
from nvfp4_video.tests.real.harness import PACK, PACK_FOLDER, ComfyUI
from nvfp4_video.tests.workflows import workflow_format as form
from PIL import Image

FILES = sorted((PACK / "workflows").glob("*.json"))
RECORDED_FROM = "0.33.0"
FILE_INPUTS = {"text_encoder", "ckpt_name", "clip_name", "image", "model_name", "lora_name"}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def graph(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text("utf-8"))


@pytest.fixture
def files(host: ComfyUI, graph: dict) -> Iterator[None]:
    """Small full checkpoints under the names in the graph; afterwards they are gone, and so is what was queued."""
    levels = (graph, *graph["definitions"]["subgraphs"])
    nodes = [node for level in levels for node in level["nodes"] if node["type"] not in form.NOTES]
    folders = {model["name"]: model["directory"] for node in nodes for model in node["properties"].get("models", [])}
    names = {str(value) for node in nodes for value in node.get("widgets_values", [])}
    names = {name for name in names if name.endswith(".safetensors")}
    paths = [host.base / "models" / folders.get(name, "checkpoints") / name for name in names]
    there = {path: path.read_bytes() for path in paths if path.exists()}
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        synthetic.write(path, "comfy_markers", *synthetic.small_ltx23(), full=True)
    Image.new("RGB", (64, 64)).save(host.base / "input" / "example.png")
    yield
    host.post("/queue", {"clear": True})
    host.post("/interrupt", {})
    deadline = time.monotonic() + 60
    while host.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    for path in paths:
        path.unlink()
    for path, content in there.items():
        path.write_bytes(content)


def test_the_template_gallery_lists_every_workflow_of_the_pack_and_shows_its_thumbnail(host: ComfyUI):
    assert sorted(host.get("/workflow_templates")[PACK_FOLDER]) == [file.stem for file in FILES]
    for file in FILES:
        address = f"{host.url}/api/workflow_templates/{PACK_FOLDER}/{quote(file.stem)}.jpg"
        with urllib.request.urlopen(address) as answer:
            assert answer.read() == file.with_suffix(".jpg").read_bytes()


def test_the_host_accepts_the_graph_once_the_files_are_there(host: ComfyUI, graph: dict, files: None):
    prompt = form.api_prompt(graph, host.get("/object_info"))
    answer = host.post("/prompt", {"prompt": prompt, "client_id": "nvfp4-video-tests"})
    assert answer["prompt_id"] and answer["node_errors"] == {}


def test_every_linked_socket_is_one_the_host_has(host: ComfyUI, graph: dict):
    info = host.get("/object_info")
    inner = graph.get("definitions", {}).get("subgraphs", [])
    own = {level["id"] for level in inner}
    for level in (graph, *inner):
        nodes = {node["id"]: node for node in level["nodes"]}
        for link, source, slot, target, inlet, kind in map(form.link_of, level["links"]):
            if source in nodes and (start := nodes[source]["type"]) not in own:
                known = info[start]["output"][slot]
                assert known in (kind, form.MATCH), f"link {link}: {start} has another output there"
            if target in nodes and (end := nodes[target]["type"]) not in own:
                names = {name for part in ("required", "optional") for name in info[end]["input"].get(part, {})}
                assert nodes[target]["inputs"][inlet]["name"] in names, f"link {link}"


def test_the_recorded_nodes_are_those_of_this_host(host: ComfyUI):
    if host.version != RECORDED_FROM:
        pytest.skip(f"tests/data/core_nodes.json was recorded from ComfyUI {RECORDED_FROM}, this is {host.version}")
    info = host.get("/object_info")
    for name, node in form.recorded().items():
        found = {"input": bare_inputs(info[name]["input"])} | {key: info[name][key] for key in node if key != "input"}
        # Which files there are differs from host to host.
        assert without_files(found) == without_files(node), name


def test_the_host_has_every_input_and_output_of_the_recorded_nodes(host: ComfyUI):
    if [int(part) for part in host.version.split(".")] < [int(part) for part in RECORDED_FROM.split(".")]:
        pytest.skip(f"tests/data/core_nodes.json was recorded from ComfyUI {RECORDED_FROM}, this is {host.version}")
    info = host.get("/object_info")
    for name, node in form.recorded().items():
        assert info[name]["output"] == node["output"], name
        assert kinds(node["input"]).items() <= kinds(bare_inputs(info[name]["input"])).items(), name


def kinds(inputs: dict) -> dict[tuple[str, str], str]:
    """(required or optional, name) -> the type, that of a choice being COMBO."""
    return {
        (part, name): "COMBO" if isinstance(spec[0], list) else spec[0]
        for part, specs in inputs.items()
        for name, spec in specs.items()
    }


def without_files(node: dict) -> dict:
    """A recorded node without the choices of its file inputs."""
    node = json.loads(json.dumps(node))
    for specs in node["input"].values():
        for name, spec in specs.items():
            if isinstance(spec[0], list) and name in FILE_INPUTS:
                spec[0] = []
            elif name in FILE_INPUTS:
                spec[1].pop("options", None)
    return node
