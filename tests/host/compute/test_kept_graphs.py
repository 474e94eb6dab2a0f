# SPDX-License-Identifier: Apache-2.0
"""What stays of a sampling's graphs for the next one, and what makes them go, on fakes of CUDA's graphs."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.host.compute import block_graphs, graph_plan
from nvfp4_video.tests.support import graph_fakes
from nvfp4_video.tests.support.graph_fakes import (
    CPU,
    Gpu,
    Model,
    branch,
    counts,
    inputs,
    patcher_of,
    pretend_host,
    run,
    show,
    step,
)

gpu = graph_fakes.gpu


def graphs_of(model) -> list:
    plans = block_graphs.blocks_of(model).plans.values()
    return [one.graph for plan in plans for known in plan.graphs.values() for one in known.values()]


def sampling(gpu: Gpu, model: Model, steps: int = 4, tokens: int = 6) -> None:
    for _ in range(steps):
        step(gpu, model, tokens)
    block_graphs.end_of_sampling(patcher_of(model))


def test_a_model_that_leaves_the_gpu_takes_its_graphs_and_their_memory_along(gpu: Gpu):
    model = Model()
    for _ in range(3):
        step(gpu, model)
    graphs = graphs_of(model)
    block_graphs.drop_graphs(patcher_of(model), False)
    assert graphs_of(model), "a patcher of the same model with other settings takes over"
    block_graphs.drop_graphs(patcher_of(model), True)
    assert len(graphs) == 3 and not any(graph.alive for graph in graphs) and not graphs_of(model)
    assert gpu.given_back == [CPU]
    step(gpu, model)
    assert gpu.captured == [0, 1, 2] * 2, "the next sampling begins with captured blocks"
    block_graphs.drop_graphs(patcher_of(Model()))


def test_a_model_that_is_no_more_leaves_no_graph(gpu: Gpu):
    model = Model()
    for _ in range(4):
        step(gpu, model, callbacks={"of": model})
    block_graphs.end_of_sampling(patcher_of(model))
    graphs = graphs_of(model)
    for graph in graphs:
        graph.options = graph.original = graph.layer = None  # the fake's own, CUDA's has none
    gpu.given_back.clear()
    gpu.model = model = None
    gc.collect()
    assert len(graphs) == 3 and not any(graph.alive for graph in graphs) and gpu.given_back == [CPU]


def test_the_next_sampling_replays_from_its_first_step_what_the_one_before_captured(gpu: Gpu):
    model = Model()
    sampling(gpu, model)
    assert gpu.given_back == [CPU] and len(graphs_of(model)) == 3
    before = counts(model)
    sampling(gpu, model, steps=1)
    block_graphs.end_of_sampling(patcher_of(model))
    assert gpu.captured == [0, 1, 2] and gpu.given_back == [CPU] * 2, "the host calls back twice at the end"
    assert counts(model) == {**before, "replayed": before["replayed"] + 3}


@pytest.mark.parametrize("reason", ["torch's own allocator keeps their memory", "their tensors are large"])
def test_graphs_end_with_their_sampling_where_keeping_them_would_take_memory_from_others(reason: str, gpu: Gpu):
    model = Model()
    if reason == "their tensors are large":
        sampling(gpu, model)
        held = sum(plan.nbytes for plan in block_graphs.blocks_of(model).plans.values())
        assert held == 4 * (6 * 4 * 4 + 2 * 4), "context, timestep, pe and video, audio; fp32"
        gpu.total = 64 * held - 1
    else:
        gpu.gives_back = False
    sampling(gpu, model)
    assert not graphs_of(model)


def test_a_model_that_hooks_on_its_own_blocks_refer_to_is_not_kept_by_what_is_known_of_them(gpu: Gpu):
    model = Model()
    sampling(gpu, model)
    for graph in graphs_of(model):
        graph.options = graph.original = graph.layer = None
    model.transformer_blocks[0].register_forward_hook(lambda *_, model=model: None)
    block_graphs.end_of_sampling(patcher_of(model))
    alive, gpu.model = weakref.ref(model), None
    del model
    gc.collect()
    assert alive() is None


def test_graphs_made_in_inference_mode_are_replayed_outside_of_it(gpu: Gpu):
    model = gpu.model = Model()
    with torch.inference_mode():
        sampling(gpu, model)
    before = counts(model)["eager"]
    sampling(gpu, model, steps=1)
    assert counts(model)["eager"] == before and gpu.captured == [0, 1, 2]
    with torch.inference_mode():
        step(gpu, model)
    assert counts(model)["eager"] == before


@pytest.mark.parametrize("change", ["a function", "a method", "a switch"])
def test_graphs_are_of_the_functions_and_switches_of_their_time(change: str, gpu: Gpu, monkeypatch):
    model = Model()
    sampling(gpu, model)
    graphs = graphs_of(model)
    if change == "a function":
        own = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *given: own(*given))
    elif change == "a method":
        forward = graph_fakes.Layer.forward
        monkeypatch.setattr(graph_fakes.Layer, "forward", lambda self, x, options: 2 * forward(self, x, options))
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    step(gpu, model)
    assert gpu.captured == [0, 1, 2] and not any(graph.alive for graph in graphs), "it runs itself once first"
    step(gpu, model)
    assert gpu.captured == [0, 1, 2] * 2


def test_kept_graphs_go_if_there_is_no_room_for_what_they_compute_in(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = Model()
    sampling(gpu, model)
    gpu.free = 1 << 30
    sampling(gpu, model)
    assert not graphs_of(model) and len(gpu.captured) == 3
    assert "only 1.1 GB of GPU memory are free" in caplog.text
    gpu.free = 30 << 30
    sampling(gpu, model)
    assert gpu.captured == [0, 1, 2] * 2


def test_graphs_of_a_lora_that_a_sampling_does_not_use_end_with_it(gpu: Gpu):
    model = Model()
    show(model, first := [branch() for _ in model.layers()])
    sampling(gpu, model)
    show(model, [branch(3) for _ in model.layers()])
    sampling(gpu, model)
    assert len(graphs_of(model)) == 3 and len(gpu.captured) == 6
    show(model, first)
    sampling(gpu, model)
    assert len(gpu.captured) == 9


def test_kinds_of_the_sampling_before_make_way_for_those_of_this_one(gpu: Gpu):
    model = Model()
    for tokens in (6, 9, 12):
        sampling(gpu, model, tokens=tokens)
    assert len(gpu.captured) == 9 and len(graphs_of(model)) == 6
    sampling(gpu, model, tokens=9)
    assert len(gpu.captured) == 9, "one of the last two"


def test_graphs_survive_that_the_host_brings_a_model_s_small_tensors_anew(gpu: Gpu):
    model = Model()
    originals = [(block, block.table.detach().clone()) for block in model.transformer_blocks]
    patcher = patcher_of(model)()
    patcher.is_dynamic, patcher.backup = (lambda: True), {"table": SimpleNamespace(weight=originals[0][1])}
    sampling(gpu, model)
    for block, table in originals:
        block.table = torch.nn.Parameter(table + 1, requires_grad=False)
    block_graphs.put_back(patcher, CPU, 0)
    before = counts(model)["eager"]
    sampling(gpu, model)
    assert gpu.captured == [0, 1, 2] and counts(model)["eager"] == before
    assert all(torch.equal(block.table, table + 1) for block, table in originals)


@pytest.mark.cuda
def test_kept_graphs_compute_what_the_blocks_do_after_their_memory_was_given_back(monkeypatch):
    device = torch.device("cuda", 0)
    pretend_host(monkeypatch)
    monkeypatch.setattr(graph_plan, "gives_memory_back", lambda: True)
    model = Model(device)
    known = block_graphs.blocks_of(model)
    for sampling in range(3):
        for current in range(6):
            given = inputs(device=device)
            assert all(map(torch.equal, run(model, given), run(model, given, wrapped=False))), (sampling, current)
            if current == 1:  # what a slow GPU would hide
                known.waits_for_cpu.update(known._passes)
        known.end()
    assert known.counts["captured"] == 3 and known.counts["replayed"] >= 3 * 14
    known.drop()
    assert not known.plans
