# SPDX-License-Identifier: Apache-2.0
"""What is looked up only where it is asked for, or all at once where much is asked, is the same either way."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import rules_clip
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.host.guard.files import FileFacts
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.host.guard.values.latents import BATCHED, LATENTS, Sound, Video
from nvfp4_video.samples import shapes
from nvfp4_video.tests.support.guard_prompts import VULNERABLE, clip, facts, ids, node

FACTS = VULNERABLE | facts(ltxav_needs_audio=True)


def prompts(seed: int) -> dict[str, Any]:
    """Two of the shapes, small, that share nodes, with some links and numbers changed."""
    rng = Random(seed)  # noqa: S311  (nothing secret)
    prompt: dict[str, Any] = {}
    for name in rng.sample(list(shapes.PROMPTS), 2):
        prompt |= shapes.PROMPTS[name](rng.choice((6, 15, 40)))
    names = list(prompt)
    for _ in range(rng.choice((0, 2, 5))):
        inputs = prompt[rng.choice(names)]["inputs"]
        for key in rng.sample(list(inputs), min(len(inputs), 1)):
            linked = isinstance(inputs[key], list)
            inputs[key] = [rng.choice(names), 0] if linked else rng.choice((24, 25, 120, "x"))
    return prompt


def found(prompt: dict[str, Any]) -> list[guard.Finding]:
    return guard.check(prompt, FACTS)


@pytest.mark.parametrize("seed", range(40))
def test_rates_looked_up_node_by_node_are_those_found_for_all_nodes_at_once(seed, stub_comfy, monkeypatch):
    prompt = prompts(seed)
    one_by_one = found(prompt)
    made = rules_clip._Needs.__init__

    def exhausted(self, *given: Any) -> None:
        made(self, *given)
        self._left = 0

    monkeypatch.setattr(rules_clip._Needs, "__init__", exhausted)
    assert found(prompt) == one_by_one


def test_films_with_sound_and_without_are_told_apart_however_many_there_are(stub_comfy):
    """More than are looked up one by one: every other film has the sound, and another rate than it."""
    prompt = clip(create={"fps": 24})
    for i in range(60):
        prompt[f"c{i}"] = node("LTXVConditioning", positive=["p", 0], frame_rate=24 + i % 2)
        latent = ["latent", 0] if i % 3 == 0 else ["video", 0]
        prompt[f"s{i}"] = node("KSampler", model=["model", 0], positive=[f"c{i}", 0], latent_image=latent)
        prompt[f"d{i}"] = node("VAEDecode", samples=[f"s{i}", 0], vae=["vae", 0])
        prompt[f"v{i}"] = node("CreateVideo", images=[f"d{i}", 0], fps=24 + i % 2)
    named = [finding.nodes for finding in found(prompt) if finding.id == "fps"]
    assert [nodes[-1] for nodes in named] == [f"v{i}" for i in (3, 9, 15, 21, 27, 33, 39, 45)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("known", [lambda name: True, lambda name: len(name) % 2, lambda name: False])
def test_few_loaders_and_many_give_the_same_answers(known, seed, stub_comfy, monkeypatch):
    def file_facts(name: str, _: tuple[str, ...]) -> FileFacts | None:
        return FileFacts(name, "LTX-Video", None, True, True, "its file name") if known(name) else None

    monkeypatch.setattr(guard_view, "file_facts", file_facts)
    prompt = prompts(seed)
    few = found(prompt)
    monkeypatch.setattr(guard_view, "_FEW_LOADERS", -1)
    assert found(prompt) == few


def test_nodes_that_are_not_needed_are_not_looked_at(stub_comfy):
    graph = PromptGraph(shapes.clip() | shapes.rates(300))
    assert "c0" not in graph.upstream(["create"])
    assert len(graph.parents) == len(graph.upstream(["create"])) < 20


def test_of_a_decided_switch_the_side_that_it_takes_is_needed_and_all_that_is_no_side():
    prompt = {
        "a": node("A"), "b": node("B"), "c": node("C"),
        "s": node("ComfySwitchNode", switch=True, on_true=["a", 0], on_false=["b", 0], other=["c", 0]),
        "open": node("ComfySwitchNode", switch=["c", 0], on_true=["a", 0], on_false=["b", 0]),
        "gone": node("ComfySwitchNode", switch=True, on_true=["nowhere", 0], on_false=["b", 0]),
    }  # fmt: skip
    graph = PromptGraph(prompt)
    assert {name: set(graph.parents[name]) for name in ("s", "open", "gone")} == {
        "s": {"a", "c"}, "open": {"a", "b", "c"}, "gone": set(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", LATENTS)
def test_a_latent_of_a_batch_size_is_made_only_by_the_nodes_that_are_listed(kind: str):
    inputs = {"width": 64, "height": 64, "length": 9, "frames_number": 9, "frame_rate": 24, "batch_size": 2}
    graph = PromptGraph({"1": node(kind, **inputs)})
    made = [graph.computed("2", "x") for graph in (_read(graph, slot) for slot in range(3))]
    batches = {latent.batch for latent in made if isinstance(latent, (Video, Sound))}
    assert (2 in batches) == (kind in BATCHED)


def _read(graph: PromptGraph, slot: int) -> PromptGraph:
    prompt = {node_.id: {"class_type": node_.kind, "inputs": node_.inputs} for node_ in graph.nodes.values()}
    return PromptGraph(prompt | {"2": node("A", x=["1", slot])})


@pytest.mark.parametrize("batch", [2, "2", {"__value__": 2}, ["two", 0]])
def test_batches_are_compared_however_a_size_is_given(batch: object, stub_comfy):
    two = node("PrimitiveInt", value=2)
    assert "batches" in ids(clip(video={"batch_size": batch}, two=two))
    assert "batches" not in ids(clip(video={"batch_size": batch}, audio={"batch_size": 2}, two=two))


def test_collecting_is_as_before_after_a_check(stub_comfy, monkeypatch):
    import gc

    seen = []
    monkeypatch.setattr(guard, "RULES", (lambda view: iter(seen.append(gc.isenabled()) or ()),))
    assert gc.isenabled()
    guard.check(clip(), FACTS)
    assert (seen, gc.isenabled()) == ([False], True)
