# SPDX-License-Identifier: Apache-2.0
"""LTX graphs that people have published, reduced to node types, links and numbers: what is known, what is found.

File names in them stand for what the files are. A finding is recorded in `checked` with the reason for which it is
right, looked at by hand once; a finding that is not there, or one that is gone, is a change to look at.
"""

from __future__ import annotations

import json
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from nvfp4_video.checkpoint.identify.vae_signatures import AUDIO, LTX, VIDEO, Vae
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import kinds, prompt_graph
from nvfp4_video.host.guard import view as seen
from nvfp4_video.host.guard.files import FileFacts
from nvfp4_video.host.guard.loaders import MODEL_LOADERS, names_of
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.host.guard.values.pictures import Film, Picture
from nvfp4_video.host.guard.view import View
from nvfp4_video.tests.support.guard_prompts import HEALTHY

DATA = Path(__file__).resolve().parents[2] / "data" / "public_graphs.json"
VERSIONS = {"0.9": "0.9.5 to 0.9.8, or 2.0", "2.5": "2.5 (diffusion decoder)"}
FAMILIES = {"2.0": "LTX-2", "2.3": "LTX-2.3", "2.5": "LTX-2.3", "0.9": "LTX-Video"}


@cache
def graphs() -> list[dict[str, Any]]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def prompt_of(graph: dict[str, Any]) -> dict[str, dict]:
    """An API prompt of nodes that are numbered by their place."""

    def given(value: Any) -> Any:
        return [str(value[0]), value[1]] if isinstance(value, list) else value

    return {
        str(place): {"class_type": kind, "inputs": {name: given(value) for name, value in inputs.items()}}
        for place, (kind, inputs) in enumerate(graph["nodes"])
    }


def facts_of(name: str, _: tuple[str, ...]) -> FileFacts | None:
    """A stand-in's name, `ltx-<version>-<dev or distilled>`, -> what is in such a file, its VAEs too."""
    if not name.startswith("ltx-"):
        return None
    _, version, kind = name.rpartition(".")[0].split("-", 2)
    distilled = "its file name" if kind == "distilled" else None
    video = Vae(VIDEO, LTX, VERSIONS.get(version, version), 128, "vae.", {}, ())
    sound = Vae(AUDIO, LTX, version, 8, "", {}, ()) if version != "0.9" else None
    return FileFacts(name, FAMILIES.get(version), video, True, False, distilled, sound)


@pytest.fixture
def files(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "file_facts", facts_of)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures and films that the graphs load are there, as on the machine of who runs them."""
    readers = {
        "picture": lambda _: Picture(1536, 1024, 1),
        "film": lambda _: Film(Picture(1280, 720, 121), 24.0),
        "downscale": lambda _: 1.0,
    }
    monkeypatch.setattr(prompt_graph, "READERS", readers)


def known(graph: dict[str, Any]) -> dict[str, bool]:
    """Whether the model, the size and length, the rates of a graph are known, of all its samplers and films."""
    view = View(PromptGraph(prompt_of(graph)), HEALTHY)
    first = [sampler for sampler in view.samplers if _begins(view, sampler)]
    videos = [view.sampled(sampler) for sampler in first]
    rated = view.graph.of_kind(kinds.CONDITIONING, kinds.EMPTY_AUDIO, *kinds.FILMS)
    return {
        "model": all(
            (loader := view.model(sampler.guided_by).loader) is not None and names_of(loader.kind, MODEL_LOADERS)
            for sampler in view.samplers
        ),
        "size": bool(first) and all(video is not None and video.width and video.height for video in videos),
        "length": bool(first) and all(video is not None and video.length for video in videos),
        "rate": all(view.graph.number(node.id, kinds.FILMS.get(node.kind, "frame_rate")) is not None for node in rated),
    }


def _begins(view: View, sampler: seen.Sampler) -> bool:
    """Whether a sampler's video does not come from another sampler."""
    root = sampler.latent.root
    if sampler.latent.kind == kinds.JOINT and root is not None:
        root = view.latent(root, "video_latent").root
    return root is not None


def share(name: str) -> float:
    found = [known(graph)[name] for graph in graphs()]
    return sum(found) / len(found)


def test_there_are_enough_graphs_of_enough_people():
    assert len(graphs()) >= 60
    assert {graph["group"] for graph in graphs()} == {"ComfyUI templates", "Lightricks examples", "others"}


def test_of_most_graphs_the_prompt_alone_tells_model_size_length_and_rate(files):
    assert share("model") > 0.94
    assert share("size") > 0.63 and share("length") > 0.69 and share("rate") > 0.7


def test_with_their_pictures_and_films_nearly_all_are_known(files, inputs):
    assert share("size") > 0.82 and share("length") > 0.85 and share("rate") > 0.88


@pytest.mark.parametrize("place", range(len(graphs())))
def test_every_finding_on_a_public_graph_is_one_that_was_checked_by_hand(place: int, files):
    graph = graphs()[place]
    found = sorted([finding.id, finding.nodes[0]] for finding in guard.check(prompt_of(graph), HEALTHY))
    checked = sorted([kind, str(node)] for kind, node, _ in graph.get("checked", []))
    assert found == checked
