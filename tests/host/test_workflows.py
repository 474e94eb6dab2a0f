"""A real ComfyUI offers the shipped templates, and accepts each once files of the right names are in place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def empty_queue(host: ComfyUI) -> Iterator[None]:
    """Whatever a test queued is stopped and dropped again."""
    yield
    host.post("/queue", {"clear": True})
    host.post("/interrupt", {})


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def graph(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text("utf-8"))


def put_files(graph: dict, base: Path) -> None:
    """Stand-ins for the files that the graph names: a small full checkpoint, under all names that are missing."""
    models = [model for node in graph["nodes"] for model in node["properties"].get("models", [])]
    folders = {model["name"]: model["directory"] for model in models}
    names = {value for node in graph["nodes"] for value in node.get("widgets_values", []) if isinstance(value, str)}
    for name in names:
        path = base / "models" / folders.get(name, "diffusion_models") / name
        if name.endswith(".safetensors") and "\n" not in name and not path.exists():
            synthetic.write(path, "comfy_markers", *synthetic.small_ltx23(), full=True)


def test_the_template_gallery_lists_every_workflow_of_the_pack(host: ComfyUI):
    assert sorted(host.get("/workflow_templates")[PACK_FOLDER]) == [file.stem for file in FILES]


def test_the_host_accepts_the_graph_once_the_files_are_there(host: ComfyUI, graph: dict, empty_queue: None):
    put_files(graph, host.base)
    prompt = api_prompt(graph, host.get("/object_info"))
    answer = host.post("/prompt", {"prompt": prompt, "client_id": "nvfp4-video-tests"})
    assert answer["prompt_id"] and answer["node_errors"] == {}


def test_every_socket_of_the_graph_is_one_the_host_knows(host: ComfyUI, graph: dict):
    info = host.get("/object_info")
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        spec = info[node["type"]]["input"]
        known = {**spec.get("required", {}), **spec.get("optional", {})}
        linked = [entry["name"] for entry in node["inputs"] if entry["link"] is not None]
        assert set(linked) <= known.keys(), f"{node['type']} has no input of that name"
        assert [output["type"] for output in node["outputs"]] == info[node["type"]]["output"]
