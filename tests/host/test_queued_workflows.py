"""A real ComfyUI offers the shipped templates, and accepts each once files of the right names are in place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from nvfp4_video.checkpoint import synthetic
from nvfp4_video.tests.host.harness import PACK, PACK_FOLDER, ComfyUI

FILES = sorted((PACK / "workflows").glob("*.json"))
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# Nodes that only the front end knows.
NOTES = {"MarkdownNote", "Note"}


def api_prompt(graph: dict, info: dict) -> dict:
    """A saved graph and /object_info -> what the front end would send to /prompt, without the titles."""
    sources = {link: [str(source), slot] for link, source, slot, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in info, f"the host does not know {node['type']}"
        inputs = _widget_values(node, info[node["type"]]["input"])
        for entry in node["inputs"]:
            if entry["link"] is not None:
                inputs[entry["name"]] = sources[entry["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widget_values(node: dict, spec: dict) -> dict:
    """The positional ``widgets_values`` under the names of the host's inputs; optional ones may be missing."""
    stored, found = iter(node.get("widgets_values", [])), {}

    def take(specs: dict, optional: bool, prefix: str = "") -> None:
        for name, (kind, *rest) in specs.items():
            settings = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES or settings.get("widgetType")):
                continue
            value = next(stored, None)
            if value is None:
                assert optional, f"{node['type']} stores no value for {prefix}{name}"
                return
            found[prefix + name] = value
            if settings.get("control_after_generate"):
                assert next(stored) in ("fixed", "increment", "decrement", "randomize")
            if kind == "COMFY_DYNAMICCOMBO_V3":
                (chosen,) = [option for option in settings["options"] if option["key"] == value]
                take(chosen["inputs"].get("required", {}), optional, f"{prefix}{name}.")
                take(chosen["inputs"].get("optional", {}), True, f"{prefix}{name}.")

    take(spec.get("required", {}), False)
    take(spec.get("optional", {}), True)
    return found


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def graph(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text("utf-8"))


@pytest.fixture
def files(host: ComfyUI, graph: dict) -> Iterator[None]:
    """Small full checkpoints under the names in the graph; afterwards they are gone, and so is what was queued."""
    models = [model for node in graph["nodes"] for model in node["properties"].get("models", [])]
    folders = {model["name"]: model["directory"] for model in models}
    names = {str(value) for node in graph["nodes"] for value in node.get("widgets_values", [])}
    names = {name for name in names if name.endswith(".safetensors") and "\n" not in name}
    paths = [host.base / "models" / folders.get(name, "diffusion_models") / name for name in names]
    for path in paths:
        synthetic.write(path, "comfy_markers", *synthetic.small_ltx23(), full=True)
    yield
    host.post("/queue", {"clear": True})
    host.post("/interrupt", {})
    deadline = time.monotonic() + 60
    while host.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    for path in paths:
        path.unlink()


def test_the_template_gallery_lists_every_workflow_of_the_pack(host: ComfyUI):
    assert sorted(host.get("/workflow_templates")[PACK_FOLDER]) == [file.stem for file in FILES]


def test_the_host_accepts_the_graph_once_the_files_are_there(host: ComfyUI, graph: dict, files: None):
    prompt = api_prompt(graph, host.get("/object_info"))
    answer = host.post("/prompt", {"prompt": prompt, "client_id": "nvfp4-video-tests"})
    assert answer["prompt_id"] and answer["node_errors"] == {}


def test_every_linked_socket_is_one_the_host_has(host: ComfyUI, graph: dict):
    info, nodes = host.get("/object_info"), {node["id"]: node for node in graph["nodes"]}
    for link, source, slot, target, inlet, kind in graph["links"]:
        start, end = nodes[source], nodes[target]
        assert info[start["type"]]["output"][slot] == kind, f"link {link}: {start['type']} has another output there"
        spec = info[end["type"]]["input"]
        assert end["inputs"][inlet]["name"] in {**spec.get("required", {}), **spec.get("optional", {})}, f"link {link}"
