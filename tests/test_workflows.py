"""The shipped workflow templates as files: one consistent graph each, of nodes that exist, with settings that agree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.nodes import NODES

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
TITLE_HEIGHT = 30
MODEL_FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae"}
OUR_NODES = {node.GET_SCHEMA().node_id: node for node in NODES}

GRAPHS = {file.stem: json.loads(file.read_text("utf-8")) for file in FILES}

every_workflow = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
one_stage = pytest.mark.parametrize("graph", [GRAPHS["ltx23_nvfp4_t2v_audio"]], ids=["ltx23_nvfp4_t2v_audio"])


def by_id(graph: dict) -> dict[int, dict]:
    return {node["id"]: node for node in graph["nodes"]}


def values(node: dict) -> dict:
    """Widget -> value: the values are stored in the order of the inputs that are widgets."""
    return dict(widgets(node))


def widgets(node: dict) -> Iterator[tuple[str, object]]:
    if node["type"] == "MarkdownNote":
        return
    stored = iter(node.get("widgets_values", []))
    for entry in node["inputs"]:
        if "widget" in entry:
            yield entry["name"], next(stored)
            if entry["name"] == "noise_seed":
                yield "control_after_generate", next(stored)
    assert list(stored) == [], f"{node['type']} stores values of widgets that it does not list"


def of_type(graph: dict, node_type: str) -> list[dict]:
    return [values(node) for node in graph["nodes"] if node["type"] == node_type]


def rectangle(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def test_thumbnails_belong_to_a_template():
    assert {file.stem for file in FOLDER.glob("*.jpg")} <= GRAPHS.keys()


@every_workflow
def test_ids_are_unique_and_the_counters_stand_at_the_last(graph: dict):
    nodes, links = [node["id"] for node in graph["nodes"]], [link[0] for link in graph["links"]]
    assert graph["version"] == 0.4
    assert len(set(nodes)) == len(nodes) and graph["last_node_id"] == max(nodes)
    assert len(set(links)) == len(links) and graph["last_link_id"] == max(links)
    assert sorted(node["order"] for node in graph["nodes"]) == list(range(len(nodes)))


@every_workflow
def test_links_are_known_to_both_of_their_nodes_and_to_no_other(graph: dict):
    nodes = by_id(graph)
    for link, source, slot, target, inlet, kind in graph["links"]:
        start, end = nodes[source]["outputs"][slot], nodes[target]["inputs"][inlet]
        assert link in start["links"] and end["link"] == link
        assert kind == start["type"] and end["type"] in (kind, "*"), f"link {link}: {start['type']} -> {end['type']}"
        assert nodes[source]["order"] < nodes[target]["order"]
    outgoing = [link for node in graph["nodes"] for output in node["outputs"] for link in output["links"] or []]
    incoming = [entry["link"] for node in graph["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(outgoing) == sorted(incoming) == sorted(link[0] for link in graph["links"])


@every_workflow
def test_every_node_of_the_pack_exists_with_these_inputs_outputs_and_choices(graph: dict):
    ours = [node for node in graph["nodes"] if node["type"].startswith("NVFP4")]
    assert "NVFP4ModelLoader" in {node["type"] for node in ours}
    for node in ours:
        shown = OUR_NODES[node["type"]].INPUT_TYPES()
        options = shown["required"] | shown.get("optional", {})
        order = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        assert {entry["name"] for entry in node["inputs"]} == options.keys()
        assert order == [name for name in options if name in order], "values are stored in the schema's order"
        outputs = OUR_NODES[node["type"]].GET_SCHEMA().outputs
        assert [output["type"] for output in node["outputs"]] == [output.io_type for output in outputs]
        files = {"model_name", "vae_name", "config_from"}
        for name, value in values(node).items():
            kind, settings = options[name]
            if kind == "COMBO" and name not in files:
                assert value in settings["options"], f"{node['type']}.{name}"


@every_workflow
def test_nodes_do_not_overlap_and_sit_in_at_most_one_group(graph: dict):
    for one, other in itertools.combinations(graph["nodes"], 2):
        a, b = rectangle(one), rectangle(other)
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one['type']} over {other['type']}"
    for node in graph["nodes"]:
        x, y, right, bottom = rectangle(node)
        inside = 0
        for left, top, width, height in (group["bounding"] for group in graph["groups"]):
            outside = right <= left or left + width <= x or bottom <= top or top + height <= y
            contained = left <= x and right <= left + width and top <= y and bottom <= top + height
            assert outside or contained, f"{node['type']} crosses the border of a group"
            inside += contained
        assert inside <= 1


@every_workflow
def test_links_run_from_left_to_right(graph: dict):
    nodes = by_id(graph)
    for link, source, _, target, _, _ in graph["links"]:
        assert rectangle(nodes[source])[2] < rectangle(nodes[target])[0], f"link {link} runs backwards"


@one_stage
def test_the_sigmas_are_the_eight_distilled_steps_at_cfg_1(graph: dict):
    assert [settings["sigmas"] for settings in of_type(graph, "ManualSigmas")] == [SIGMAS]
    assert [settings["cfg"] for settings in of_type(graph, "CFGGuider")] == [1]


@every_workflow
def test_frames_are_8k_plus_1_in_both_latents_and_sizes_multiples_of_32(graph: dict):
    (video,), (audio,) = of_type(graph, "EmptyLTXVLatentVideo"), of_type(graph, "LTXVEmptyLatentAudio")
    assert video["length"] == audio["frames_number"] and video["length"] % 8 == 1
    assert video["width"] % 32 == video["height"] % 32 == 0


@every_workflow
def test_the_frame_rate_is_the_same_in_three_places(graph: dict):
    (conditioning,), (audio,) = of_type(graph, "LTXVConditioning"), of_type(graph, "LTXVEmptyLatentAudio")
    (video,) = of_type(graph, "CreateVideo")
    assert conditioning["frame_rate"] == audio["frame_rate"] == video["fps"]


@every_workflow
def test_no_preview_decoder_is_chosen_or_let_pass(graph: dict):
    loaders = of_type(graph, "NVFP4VAELoader")
    assert loaders and all("tae" not in settings["vae_name"] for settings in loaders)
    assert not any(settings["allow_preview"] for settings in loaders)


@every_workflow
def test_files_to_download_are_chosen_on_their_node_and_linked_in_the_note(graph: dict):
    (note,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    models = [(model, node) for node in graph["nodes"] for model in node["properties"].get("models", [])]
    assert models
    for model, node in models:
        assert model["name"] in node["widgets_values"]
        assert model["directory"] in MODEL_FOLDERS
        assert model["url"].startswith("https://") and model["url"].endswith("/" + model["name"])
        assert f"[{model['name']}]({model['url']})" in note
    for node in graph["nodes"]:
        for value in values(node).values():
            assert not str(value).endswith(".safetensors") or value in note, f"the note does not explain {value}"
