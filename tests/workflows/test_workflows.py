# SPDX-License-Identifier: Apache-2.0
"""The shipped workflow templates as files: one consistent graph each, of nodes that exist, with settings that agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
from nvfp4_video.host.files import NO_LORA
from nvfp4_video.measure.settings import distilled_settings
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.workflows import workflow_format as form
from nvfp4_video.tests.workflows import workflow_graphs
from nvfp4_video.tests.workflows.workflow_files import CALIBRATION, GIGABYTES

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
GRAPHS = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))}
INFO = form.node_info(NODES)
MODEL_FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae", "latent_upscale_models", "loras"}
# What the settings node decides: (node, input) -> its output.
SETTINGS = {
    ("EmptyLTXVLatentVideo", "width"): "width",
    ("EmptyLTXVLatentVideo", "height"): "height",
    ("EmptyLTXVLatentVideo", "length"): "frames",
    ("LTXVEmptyLatentAudio", "frames_number"): "frames",
    ("LTXVEmptyLatentAudio", "frame_rate"): "fps",
    ("LTXVConditioning", "frame_rate"): "fps",
    ("CreateVideo", "fps"): "fps",
    ("CFGGuider", "cfg"): "cfg",
    ("LTXVDualCFGGuider", "video_cfg"): "cfg",
    ("LTXVDualCFGGuider", "audio_cfg"): "cfg",
}
OUTPUTS = INFO["NVFP4DistilledSettings"]["output_name"]
GUIDERS = ("CFGGuider", "LTXVDualCFGGuider")
# What the front end fits into 1920x1080 at 97 % and more, and into 1280x800 at 65 %; below 57 % it draws no text.
CANVAS = (1440, 880)

every_workflow = pytest.mark.parametrize("name", GRAPHS)
CLIPS = [name for name in GRAPHS if "LTX" in name]
every_clip = pytest.mark.parametrize("name", CLIPS)


def levels(graph: dict) -> Iterator[tuple[list[dict], list[tuple]]]:
    """(nodes, links) of the graph and of each of its subgraphs."""
    for level in (graph, *graph.get("definitions", {}).get("subgraphs", [])):
        yield level["nodes"], [form.link_of(link) for link in level["links"]]


def info_of(graph: dict) -> dict:
    """What is known of the nodes, and of the graph's own subgraphs."""
    own = {
        inner["id"]: {
            "input": {"required": {entry["name"]: [entry["type"], {}] for entry in inner["inputs"]}},
            "output": [entry["type"] for entry in inner["outputs"]],
        }
        for inner in graph.get("definitions", {}).get("subgraphs", [])
    }
    return INFO | own


def all_nodes(graph: dict) -> list[dict]:
    return [node for nodes, _ in levels(graph) for node in nodes]


def of_type(graph: dict, node_type: str) -> list[dict]:
    """The stored values of all nodes of a type."""
    return [form.stored_values(node, INFO[node_type]) for node in all_nodes(graph) if node["type"] == node_type]


def prompt_of(name: str) -> dict[str, dict]:
    """What the front end sends for a workflow, its subgraphs unfolded."""
    return form.api_prompt(GRAPHS[name], INFO)


def of_class(prompt: dict, *kinds: str) -> dict[str, dict]:
    """The inputs of a prompt's nodes of these classes, by id."""
    return {node: entry["inputs"] for node, entry in prompt.items() if entry["class_type"] in kinds}


def check_names(graph: dict) -> None:
    """AssertionError for a node, an input, an output, a type, a choice or a number that the host does not have."""
    info = info_of(graph)
    for nodes, links in levels(graph):
        for node in nodes:
            if node["type"] in form.NOTES:
                continue
            assert node["type"] in info, f"there is no node {node['type']}"
            known = info[node["type"]]
            values = form.stored_values(node, known) if node["type"] in INFO else {}
            widgets = {widget.name: widget for widget in form.widgets_of(known, values)}
            sockets = {name: kind for name, kind, *_ in form.inputs_of(known)}
            names = [entry["name"] for entry in node["inputs"]]
            extra = {"upload"} if node["type"] == "LoadImage" else set()
            assert set(names) == sockets.keys() | widgets.keys() | extra, f"{node['type']}: {names}"
            stored = [entry["name"] for entry in node["inputs"] if "widget" in entry and entry["name"] not in extra]
            assert stored == list(widgets), f"{node['type']} stores its values in another order"
            assert len(node["outputs"]) == len(known["output"]), node["type"]
            for output, kind in zip(node["outputs"], known["output"], strict=True):
                assert kind in (output["type"], form.MATCH), node["type"]
            for name, value in values.items():
                check_value(node["type"], widgets[name], value)
        by_id = {node["id"]: node for node in nodes}
        for link, source, slot, target, inlet, kind in links:
            if form.ENTRY != source:
                assert info[by_id[source]["type"]]["output"][slot] in (kind, form.MATCH), f"link {link}"
            if form.EXIT != target:
                entry = by_id[target]["inputs"][inlet]
                assert kind in entry["type"].split(",") or entry["type"] == "*", f"link {link} to {entry['name']}"


def check_value(node_type: str, widget: form.Widget, value: object) -> None:
    where, settings = f"{node_type}.{widget.name} = {value!r}", widget.settings
    if widget.kind == "COMBO" and widget.name not in form.FILE_INPUTS:
        assert value in settings["options"], where
    elif widget.kind in ("INT", "FLOAT", "FLOAT,INT"):
        assert isinstance(value, int | float) and not isinstance(value, bool), where
        assert settings.get("min", value) <= value <= settings.get("max", value), where
    elif widget.kind in ("STRING", "BOOLEAN"):
        assert isinstance(value, str if widget.kind == "STRING" else bool), where


@every_workflow
def test_the_files_are_what_make_workflows_writes(name: str):
    graph = workflow_graphs.WORKFLOWS[name](name, INFO).save()
    assert graph == GRAPHS[name], "run: python tests/make_workflows.py"


@every_workflow
def test_the_api_format_twin_is_the_same_graph(name: str):
    twin = json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    assert twin == form.api_prompt(GRAPHS[name], INFO, titles=True), "run: python tests/make_workflows.py"
    for node in twin.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in twin


def test_every_workflow_has_a_description_a_twin_and_a_thumbnail_and_nothing_else_is_there():
    names = workflow_graphs.WORKFLOWS.keys()
    assert names == GRAPHS.keys()
    expected = {f"{name}.{end}" for name in names for end in ("json", "jpg")} | {"api"}
    assert {path.name for path in FOLDER.iterdir()} == expected
    assert {path.name for path in (FOLDER / "api").iterdir()} == {f"{name}.json" for name in names}


@every_workflow
def test_the_thumbnail_is_a_small_picture_that_is_not_empty(name: str):
    path = FOLDER / f"{name}.jpg"
    picture = cv2.imread(str(path))
    height, width = picture.shape[:2]
    assert path.stat().st_size < 60_000
    assert 400 <= width <= 800 and 0.4 < height / width < 1.1
    assert picture.std() > 15


@every_workflow
def test_nodes_inputs_outputs_and_choices_exist(name: str):
    check_names(GRAPHS[name])


@pytest.mark.parametrize(
    ("what", "node_type", "change"),
    [
        ("a node", "CFGGuider", lambda node: node.update(type="CFGGuiderOfYesterday")),
        ("an input of the host", "CFGGuider", lambda node: node["inputs"][3].update(name="scale")),
        ("an input of the pack", "NVFP4ModelLoader", lambda node: node["inputs"][1].update(name="mode")),
        ("a missing input", "LTXVEmptyLatentAudio", lambda node: node["inputs"].pop()),
        ("a choice", "NVFP4DistilledSettings", lambda node: node["widgets_values"].__setitem__(5, "three stages")),
        ("a number", "NVFP4DistilledSettings", lambda node: node["widgets_values"].__setitem__(4, 1000.0)),
        ("an output", "LTXVConditioning", lambda node: node["outputs"].pop()),
    ],
)
def test_the_check_of_names_notices(what: str, node_type: str, change):
    graph = copy.deepcopy(GRAPHS["4 LTX-2.3 small and quick"])
    change(next(node for node in all_nodes(graph) if node["type"] == node_type))
    with pytest.raises(AssertionError):
        check_names(graph)


@every_workflow
def test_ids_are_unique_and_the_counters_stand_at_the_last(name: str):
    graph = GRAPHS[name]
    nodes = [node["id"] for node in all_nodes(graph)]
    links = [link[0] for _, level in levels(graph) for link in level]
    assert graph["version"] == 0.4
    assert len(set(nodes)) == len(nodes) and graph["last_node_id"] == max(nodes)
    assert len(set(links)) == len(links) and graph["last_link_id"] == max(links)
    inner = graph["definitions"]["subgraphs"]
    for key, outer in (("reroutes", graph["extra"]), ("groups", graph)):
        found = [entry["id"] for kept in (outer, *inner) for entry in kept.get(key, [])]
        assert len(set(found)) == len(found)
    assert sorted(node["order"] for node in graph["nodes"]) == list(range(len(graph["nodes"])))


@every_workflow
def test_links_are_known_to_both_of_their_nodes_and_to_no_other(name: str):
    graph = GRAPHS[name]
    for nodes, links in levels(graph):
        by_id = {node["id"]: node for node in nodes}
        for link, source, slot, target, inlet, _ in links:
            if source != form.ENTRY:
                assert link in by_id[source]["outputs"][slot]["links"]
            if target != form.EXIT:
                assert by_id[target]["inputs"][inlet]["link"] == link
            if form.ENTRY != source and form.EXIT != target:
                assert by_id[source]["order"] < by_id[target]["order"]
        outgoing = [link for node in nodes for output in node["outputs"] for link in output["links"] or []]
        incoming = [entry["link"] for node in nodes for entry in node["inputs"] if entry["link"] is not None]
        assert sorted(outgoing) == sorted(link[0] for link in links if link[1] != form.ENTRY)
        assert sorted(incoming) == sorted(link[0] for link in links if link[3] != form.EXIT)


@every_workflow
def test_reroutes_belong_to_links_and_lead_to_their_start(name: str):
    extra = GRAPHS[name]["extra"]
    reroutes = {entry["id"]: entry for entry in extra.get("reroutes", [])}
    ends = {entry["id"]: entry["parentId"] for entry in extra.get("linkExtensions", [])}
    through: dict[int, set] = {number: set() for number in reroutes}
    for link, end in ends.items():
        while end is not None:
            through[end].add(link)
            end = reroutes[end].get("parentId")
    assert through == {number: set(entry["linkIds"]) for number, entry in reroutes.items()}


@every_workflow
def test_the_canvas_has_a_note_a_subgraph_with_all_choices_and_what_comes_out(name: str):
    graph = GRAPHS[name]
    inner = {definition["id"] for definition in graph["definitions"]["subgraphs"]}
    kinds = [node["type"] for node in graph["nodes"] if node["mode"] == form.ALWAYS]  # what is muted is a further step
    assert kinds.count("MarkdownNote") == 1 and len([kind for kind in kinds if kind in inner]) == 1
    shows = {"MarkdownNote", "LoadImage", "SaveVideo", "SaveImage", "PreviewImage", "PreviewAny"}
    assert set(kinds) - inner <= shows
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in graph["nodes"]) for axis in (0, 1))
    assert right <= CANVAS[0] and bottom <= CANVAS[1]


@every_clip
def test_one_node_decides_size_length_frame_rate_and_cfg(name: str):
    prompt = prompt_of(name)
    (settings,) = of_class(prompt, "NVFP4DistilledSettings")
    present = {entry["class_type"] for entry in prompt.values()}
    found = set()
    for entry in prompt.values():
        for key, value in entry["inputs"].items():
            wanted = SETTINGS.get((entry["class_type"], key))
            if wanted:
                assert value == [settings, OUTPUTS.index(wanted)], f"{entry['class_type']}.{key}"
                found.add((entry["class_type"], key))
    assert found == {key for key in SETTINGS if key[0] in present} and present & set(GUIDERS)


@every_clip
def test_each_sampler_gets_the_sigmas_of_its_stage(name: str):
    prompt = prompt_of(name)
    (settings,) = of_class(prompt, "NVFP4DistilledSettings").values()
    given = [inputs["sigmas"][1] for inputs in of_class(prompt, "SamplerCustomAdvanced").values()]
    stages = ["sigmas", "sigmas stage 2"][: 1 + (settings["stages"] == "two stages")]
    assert [OUTPUTS[slot] for slot in given] == stages


@every_clip
def test_the_settings_need_no_correction(name: str):
    (stored,) = of_class(prompt_of(name), "NVFP4DistilledSettings").values()
    found = distilled_settings(**stored)
    assert (found.final_width, found.final_height) == (stored["width"], stored["height"])
    assert found.frames == stored["frames"] == 121  # what 5 s at 24 fps come to
    assert [note.partition(":")[0] for note in found.notes if note.startswith(("size", "fps"))] == []
    assert found.version == ("2.5" if "LTX-2.5" in name else "2.3")


@every_clip
def test_the_guard_stands_between_the_loader_with_its_lora_and_the_sampler(name: str):
    prompt = prompt_of(name)
    (guider,) = of_class(prompt, *GUIDERS).values()
    way, inputs = [], guider
    while "model" in inputs:
        node = prompt[inputs["model"][0]]
        way.append(node["class_type"])
        inputs = node["inputs"]
    assert way[0] == "NVFP4LaunchGuard" and way[-1] == "NVFP4ModelLoader"
    assert way[1:-1] == (["LoraLoaderModelOnly"] if "-dev-" in inputs["model_name"] else [])


@every_clip
def test_an_undistilled_model_has_the_distilled_lora_at_a_half(name: str):
    prompt = prompt_of(name)
    (model,) = of_class(prompt, "NVFP4ModelLoader").values()
    loras = of_class(prompt, "LoraLoaderModelOnly").values()
    assert [lora["strength_model"] for lora in loras] == ([0.5] if "-dev-" in model["model_name"] else [])


@pytest.mark.parametrize("name", [name for name in GRAPHS if "FP8" in name])
def test_a_file_that_is_made_into_nvfp4_gives_every_part(name: str):
    prompt = prompt_of(name)
    names = [
        inputs[key]
        for inputs in of_class(prompt, "NVFP4ModelLoader", "NVFP4TextEncoderLoader", "NVFP4VAELoader").values()
        for key in ("model_name", "projection", "vae_name")
        if key in inputs
    ]
    assert len(names) >= 4 and len(set(names)) == 1
    assert any(inputs["make_nvfp4"] for inputs in of_class(prompt, "NVFP4ModelLoader").values())
    (note,) = [node["widgets_values"][0] for node in GRAPHS[name]["nodes"] if node["type"] == "MarkdownNote"]
    assert "**Every part but the text encoder comes from one" in note.partition("\n")[0]


def test_a_and_b_differ_in_the_format_of_the_model_and_in_nothing_else():
    prompt = prompt_of("8 FP8 against NVFP4")
    guiders = sorted(of_class(prompt, "CFGGuider"))
    first, second = (dict(prompt[node]["inputs"]) for node in guiders)
    models = [prompt[prompt[entry.pop("model")[0]]["inputs"]["model"][0]]["inputs"] for entry in (first, second)]
    assert first == second
    assert [model.pop("make_nvfp4") for model in models] == [False, True]
    assert models[0] == models[1]
    seeds = []
    for node in of_class(prompt, "NVFP4Compare"):
        place = node.rpartition(":")[0]
        inside = {key: inner for key, inner in prompt.items() if key.rpartition(":")[0] == place}
        samplers = list(of_class(inside, "SamplerCustomAdvanced").values())
        assert sorted(sampler.pop("guider")[0] for sampler in samplers) == guiders
        assert samplers[0] == samplers[1]
        seeds.append(prompt[samplers[0]["noise"][0]]["inputs"]["noise_seed"])
    assert len(set(seeds)) == 3
    assert len(of_class(prompt, "SaveVideo")) == len(of_class(prompt, "SaveImage")) == 3


@every_workflow
def test_no_preview_decoder_is_chosen_or_let_pass(name: str):
    loaders = of_type(GRAPHS[name], "NVFP4VAELoader")
    assert all("tae" not in settings["vae_name"] and not settings["allow_preview"] for settings in loaders)
    assert {node["type"] for node in all_nodes(GRAPHS[name])}.isdisjoint({"VAELoader", "LTXVAudioVAELoader"})


@every_workflow
def test_files_to_download_are_chosen_on_their_node_and_linked_in_the_note(name: str):
    graph = GRAPHS[name]
    (note,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    chosen = set()
    for node in all_nodes(graph):
        if node["type"] in form.NOTES or node["type"] not in INFO:
            continue
        values = form.stored_values(node, INFO[node["type"]])
        names = {value for value in values.values() if str(value).endswith(".safetensors")} - {CALIBRATION}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == names, f"{node['type']} offers no download for {names}"
        for model in models:
            assert model["directory"] in MODEL_FOLDERS
            assert (model["name"], model["url"], model["directory"]) in GIGABYTES
            assert model["url"].startswith("https://") and model["url"].endswith("/" + model["name"])
            assert f"[{model['name']}]({model['url']})" in note
        chosen |= names
    assert chosen
    for file in chosen:
        assert file in note, f"the note does not explain {file}"


@every_workflow
def test_the_note_has_a_title_numbered_steps_and_says_what_the_thumbnail_is(name: str):
    (note,) = [node for node in GRAPHS[name]["nodes"] if node["type"] == "MarkdownNote"]
    text = note["widgets_values"][0]
    assert note["title"].startswith("NVFP4 Video: ")
    assert "`" not in text, "the newer renderer of front end 1.49 draws code in blue on grey"
    assert "\n1. " in text and "\n2. " in text and "### Steps" in text
    assert "thumbnail is a picture of this graph" in text
    for level in GRAPHS[name]["definitions"]["subgraphs"]:
        groups = {group["title"].partition(".")[0] for group in level["groups"]}
        assert groups == {str(number) for number in range(1, len(groups) + 1)}


@every_workflow
def test_every_file_of_the_graph_is_chosen_on_the_canvas(name: str):
    assert {value for value in prompt_names(name) if value.endswith(".safetensors")} == chosen_outside(name)


def prompt_names(name: str) -> set[str]:
    """Every text that a node of the prompt gets."""
    return {value for entry in prompt_of(name).values() for value in entry["inputs"].values() if isinstance(value, str)}


def chosen_outside(name: str) -> set[str]:
    """The files on the widgets of the subgraph on the canvas."""
    inner = {definition["id"] for definition in GRAPHS[name]["definitions"]["subgraphs"]}
    (shown, *_) = [node for node in GRAPHS[name]["nodes"] if node["type"] in inner]
    return {value for value in shown["widgets_values"] if str(value).endswith(".safetensors")}


def test_the_calibrated_file_is_made_of_the_calibrated_source_and_judged_with_the_same_calibration():
    name = "9 Make a calibrated NVFP4 file"
    (watch,) = of_class(prompt_of(name), "NVFP4Calibrate").values()
    (made,), (judged,) = (of_type(GRAPHS[name], kind) for kind in ("NVFP4Quantize", "NVFP4Verify"))
    assert watch["file_name"] == made["file_name"] == judged["source"]
    assert made["calibration"] == judged["calibration"] == CALIBRATION and watch["name"] == ""
    assert made["quality"] == "calibrated" and made["lora"] == NO_LORA
