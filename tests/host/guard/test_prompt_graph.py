# SPDX-License-Identifier: Apache-2.0
"""A prompt's links are followed through whatever stands in between, and nothing in a prompt can stop that."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_video.host.guard.prompt_graph import Link, PromptGraph, as_link
from nvfp4_video.tests.support.guard_prompts import node


def test_a_literal_is_its_own_value_and_a_primitive_gives_its_own():
    graph = PromptGraph(
        {
            "1": node("EmptyLTXVLatentVideo", width=768, height=["2", 0], length=["12:34", 0]),
            "2": node("PrimitiveInt", value=["3", 0]),
            "3": node("PrimitiveInt", value=512),
            "12:34": node("ComfyMathExpression", expression="8*a+1"),
        }
    )
    assert graph.value("1", "width") == 768
    assert graph.value("1", "height") == 512
    assert graph.value("1", "length") is None  # computed by another node
    assert graph.value("1", "batch_size") is None
    assert graph.source("1", "length") == Link("12:34", 0)


def test_reroutes_and_decided_switches_are_transparent_and_undecided_switches_are_not():
    graph = PromptGraph(
        {
            "loader": node("UNETLoader"),
            "a": {"class_type": "Reroute", "inputs": {"": ["loader", 0]}},
            "on": node("ComfySwitchNode", switch=True, on_true=["a", 0], on_false=["nowhere", 0]),
            "off": node("ComfySwitchNode", switch=False, on_true=["nowhere", 0], on_false=["on", 0]),
            "maybe": node("ComfySwitchNode", switch=["x", 0], on_true=["a", 0], on_false=["a", 0]),
            "s": node("KSampler", model=["off", 0], other=["maybe", 0]),
        }
    )
    assert graph.source("s", "model") == Link("loader", 0)
    assert graph.source("s", "other") == Link("maybe", 0)


def test_a_chain_goes_along_one_input_to_its_end():
    graph = PromptGraph(
        {
            "m": node("UNETLoader"),
            "l1": node("LoraLoader", model=["m", 0], clip=["c", 0]),
            "r": {"class_type": "Reroute", "inputs": {"": ["l1", 0]}},
            "l2": node("LoraLoader", model=["r", 0]),
            "s": node("KSampler", model=["l2", 0]),
        }
    )
    assert [link.node for link in graph.chain("s", "model")] == ["l2", "l1", "m"]


def test_upstream_downstream_and_restriction_name_whole_branches():
    prompt = {
        "a": node("A"),
        "b": node("B", x=["a", 0]),
        "c": node("C", x=["b", 0], y=["a", 1]),
        "d": node("D", x=["a", 0]),
    }
    graph = PromptGraph(prompt)
    assert graph.upstream(["c"]) == {"a", "b", "c"}
    assert graph.downstream(["b"]) == {"b", "c"}
    assert set(graph.restricted_to(["d", "not there"]).nodes) == {"a", "d"}
    two = graph.two_values_of({"a": 24.0, "b": 25.0})
    assert two == {"a": {24.0}, "b": {24.0, 25.0}, "c": {24.0, 25.0}, "d": {24.0}}


def test_a_cycle_is_unknown_and_ends():
    graph = PromptGraph(
        {
            "r1": {"class_type": "Reroute", "inputs": {"": ["r2", 0]}},
            "r2": {"class_type": "Reroute", "inputs": {"": ["r1", 0]}},
            "k1": node("KSampler", model=["k2", 0], latent_image=["r1", 0]),
            "k2": node("KSampler", model=["k1", 0], value=["p", 0]),
            "p": node("PrimitiveInt", value=["p", 0]),
        }
    )
    assert graph.source("k1", "latent_image") is None
    assert {link.node for link in graph.chain("k1", "model")} == {"k1", "k2"}
    assert graph.value("k2", "value") is None
    assert graph.upstream(["k1"]) == {"k1", "k2", "r1", "r2", "p"}
    assert graph.two_values_of({"p": 1, "r1": 2, "gone": 3})["k1"] == {1, 2}


@pytest.mark.parametrize(
    "link", [["1"], ["1", 0, 0], [None, 0], [True, 0], ["1", "0"], ["1", True], [["1", 0], 0], {"1": 0}, "1", None, 1.5]
)
def test_what_is_no_link_is_a_value(link: object):
    assert as_link(link) is None


def test_ids_may_be_numbers_in_links():
    assert as_link([7, 0]) == Link("7", 0)


@pytest.mark.parametrize("prompt", [None, [], "text", 3, {"1": None}, {"1": []}, {"1": {}}, {"1": {"class_type": 3}}])
def test_what_is_no_prompt_is_an_empty_graph(prompt: object):
    assert PromptGraph(prompt).nodes == {}


def test_a_node_without_inputs_is_a_node():
    graph = PromptGraph({"1": {"class_type": "A"}, "2": {"class_type": "B", "inputs": [1, 2]}})
    assert graph.nodes.keys() == {"1", "2"}
    assert graph.value("1", "x") is None
    assert graph.source("3", "x") is None


@pytest.mark.parametrize(
    ("given_value", "number"),
    [(24, 24.0), (23.976, 23.976), ("25", 25.0), (True, None), ("x", None), (float("nan"), None), (10**400, None),
     ({"__value__": 8}, 8.0), ([1, 2], None)],
)  # fmt: skip
def test_a_number_is_what_the_host_would_take_for_one(given_value: object, number: float | None):
    assert PromptGraph({"1": node("A", x=given_value)}).number("1", "x") == number


IDS = st.sampled_from(string.ascii_lowercase[:8])
VALUES = st.one_of(
    st.integers(-5, 200), st.floats(), st.text(max_size=3), st.none(), st.booleans(),
    st.tuples(IDS, st.integers(-1, 3)).map(list), st.lists(st.integers(), max_size=3),
)  # fmt: skip
KINDS = st.sampled_from(
    ["Reroute", "ComfySwitchNode", "PrimitiveInt", "KSampler", "SamplerCustomAdvanced", "CFGGuider", "VAEDecodeTiled",
     "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "EmptyLTXVLatentVideo", "LTXVEmptyLatentAudio", "LTXVConditioning",
     "CreateVideo", "NVFP4LaunchGuard", "ManualSigmas", "VAELoader", "UNETLoader", "LoraLoaderModelOnly"]
)  # fmt: skip
NAMES = st.sampled_from(
    ["", "model", "guider", "latent_image", "samples", "vae", "video_latent", "audio_latent", "av_latent", "switch",
     "on_true", "on_false", "value", "width", "height", "length", "frame_rate", "frames_number", "fps", "images", "cfg",
     "sigmas", "policy", "vae_name", "unet_name", "positive"]
)  # fmt: skip
PROMPTS = st.dictionaries(
    IDS,
    st.fixed_dictionaries({"class_type": KINDS}, optional={"inputs": st.dictionaries(NAMES, VALUES, max_size=6)}),
    max_size=8,
)


@given(PROMPTS)
def test_no_walk_through_any_prompt_fails_or_hangs(prompt: dict):
    graph = PromptGraph(prompt)
    for name, entry in graph.nodes.items():
        for key in entry.inputs:
            graph.value(name, key)
            graph.number(name, key)
            link = graph.source(name, key)
            assert link is None or link.node in graph.nodes
            assert len(list(graph.chain(name, key))) <= len(graph.nodes) * 5
        assert name in graph.upstream([name]) & graph.downstream([name])
    assert all(len(found) <= 2 for found in graph.two_values_of({name: name for name in graph.nodes}).values())
