# SPDX-License-Identifier: Apache-2.0
"""When a block is replayed, captured or runs itself, and with which inputs, on fakes of CUDA's graphs."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.host.compute import block_graphs
from nvfp4_video.tests.support import graph_fakes
from nvfp4_video.tests.support.graph_fakes import (
    STEPS,
    Block,
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


def test_a_replayed_block_computes_what_the_block_does_on_every_step_s_own_inputs(gpu: Gpu):
    model = Model()
    for _ in range(6):
        step(gpu, model)
    assert gpu.captured == [0, 1, 2], "once a block: from the third step on"
    assert counts(model) == {"eager": 6, "captured": 3, "recaptured": 0, "replayed": 12}


def test_blocks_are_captured_only_after_the_gpu_was_seen_waiting(gpu: Gpu):
    model, gpu.waits = Model(), False
    for _ in range(4):
        step(gpu, model)
    gpu.waits = True
    step(gpu, model)
    assert gpu.captured == []
    step(gpu, model)
    assert gpu.captured == [0, 1, 2]


def test_one_hiccup_of_the_cpu_is_no_reason_to_capture(gpu: Gpu, monkeypatch):
    monkeypatch.setattr(block_graphs, "_WAITS", 2)
    model = Model()
    for gpu.waits in (True, True, False, True, False, True):  # the first pass loads kernels and does not count
        step(gpu, model)
    assert gpu.captured == []
    step(gpu, model)
    step(gpu, model)
    assert gpu.captured == [0, 1, 2]


def test_the_first_step_of_a_kind_decides_nothing_since_it_loads_and_compiles(gpu: Gpu):
    model = Model()
    for tokens in (6, 9, 6):
        step(gpu, model, tokens)
    assert gpu.captured == []
    step(gpu, model)
    assert gpu.captured == [0, 1, 2]


def test_a_lora_added_after_a_run_runs_once_before_it_is_captured(gpu: Gpu):
    model = Model()
    for _ in range(4):
        step(gpu, model)
    block_graphs.drop_graphs(patcher_of(model))
    gpu.captured.clear()
    show(model, [branch() for _ in model.layers()])
    before = counts(model)["eager"]
    step(gpu, model)
    assert gpu.captured == [] and counts(model)["eager"] == before + 3
    step(gpu, model)
    assert gpu.captured == [0, 1, 2]


def test_a_lora_of_another_rank_at_the_same_addresses_is_another_call(gpu: Gpu):
    model = Model()
    show(model, large := [branch(4) for _ in model.layers()])
    for _ in range(3):
        step(gpu, model)
    parts = [(one.down[:2], one.up.view(-1)[:8].view(4, 2), one.down_scale[:2]) for one in large]
    show(model, [type(large[0])(*tensors, None, large[0].peak[:2]) for tensors in parts])
    step(gpu, model)
    step(gpu, model)
    assert gpu.captured == [0, 1, 2] * 2


def test_another_strength_is_the_same_call_and_what_is_replayed_has_it(gpu: Gpu):
    model = Model()
    show(model, branches := [branch() for _ in model.layers()])
    for _ in range(4):
        step(gpu, model)
    before = counts(model)["eager"]
    for one in branches:
        one.set_strengths([(0.25, *one.terms[0][1:])])
    step(gpu, model)
    assert gpu.captured == [0, 1, 2] and counts(model)["eager"] == before


def test_two_conditionings_with_hooks_of_their_own_have_graphs_of_their_own_and_recapture_nothing(gpu: Gpu):
    model = Model()
    hooks = [[branch() for _ in model.layers()], [branch(3) for _ in model.layers()], None]
    for _ in range(10):
        for one in hooks[:2]:
            show(model, one)
            step(gpu, model)
    assert len(gpu.captured) == 6 and counts(model)["recaptured"] == 0
    show(model, hooks[2])
    step(gpu, model)
    step(gpu, model)
    assert len(gpu.captured) == 9


def test_hooks_whose_loras_are_new_in_every_step_are_never_captured(gpu: Gpu):
    model, kept = Model(), []
    for _ in range(8):
        kept.append([branch() for _ in model.layers()])
        show(model, kept[-1])
        step(gpu, model)
    assert gpu.captured == []


def test_more_loras_than_stay_on_the_gpu_run_without_graphs(gpu: Gpu):
    model = Model()
    hooks = [[branch() for _ in model.layers()] for _ in range(6)]
    for _ in range(5):
        for one in hooks:
            show(model, one)
            step(gpu, model)
    assert len(gpu.captured) == 3 * 4


def test_inputs_of_two_kinds_have_graphs_of_their_own_and_a_third_has_none(gpu: Gpu):
    model = Model()
    for tokens in (6, 9, 12) * 4:
        step(gpu, model, tokens)
    assert len(gpu.captured) == 6


def test_inputs_with_other_strides_are_another_kind(gpu: Gpu):
    model = gpu.model = Model()
    for _ in range(3):
        step(gpu, model)
    given = inputs()
    given["x"] = (torch.randn(1, 4, 6).transpose(1, 2), given["x"][1])
    assert all(map(torch.equal, run(model, given), run(model, given, wrapped=False)))
    assert gpu.captured == [0, 1, 2]


def test_what_an_option_changes_is_another_kind(gpu: Gpu):
    model = Model()
    for flag in (True, False) * 4:
        step(gpu, model, run_vx=flag)
    assert len(gpu.captured) == 6


def test_a_weight_or_a_scale_that_moved_is_captured_anew_and_one_elsewhere_runs_its_block(gpu: Gpu):
    model = Model()
    for _ in range(3):
        step(gpu, model)
    layer = model.layers()[1]
    layer.weight = torch.nn.Parameter(torch.randn(4, 4))
    step(gpu, model)
    assert gpu.captured == [0, 1, 2], "it runs itself once first"
    step(gpu, model)
    assert gpu.captured == [0, 1, 2, 1]
    layer.__dict__ |= {"_v": object(), "_prefetch": {"resident": False}}
    step(gpu, model)
    layer.__dict__ |= {"_prefetch": {"resident": True}, "_v_weight": layer.weight, "_v_bias": layer.bias}
    step(gpu, model)
    assert gpu.captured == [0, 1, 2, 1]


def test_weights_that_keep_moving_end_the_graphs_of_this_sampling_with_the_reason(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model, kept = Model(), []
    for round_ in range(12):
        if round_ % 2:
            kept.append(model.layers()[1].weight)
            model.layers()[1].weight = torch.nn.Parameter(torch.randn(4, 4))
        for _ in range(3):
            step(gpu, model)
    assert counts(model)["recaptured"] == 2
    assert caplog.text.count("the weights of block 1 keep moving in GPU memory") == 1
    before = len(gpu.captured)
    block_graphs.drop_graphs(patcher_of(model))
    step(gpu, model)
    step(gpu, model)
    assert len(gpu.captured) == before + 3, "the next sampling has its own chance"


def test_an_attention_override_that_appears_in_the_middle_of_a_sampling_is_obeyed(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = gpu.model = Model()
    asked = []

    def override(out):
        asked.append(out)
        return out * 3

    def later(executor, x, transformer_options, **rest):
        if current >= 3:
            transformer_options["optimized_attention_override"] = override
        return executor(x, transformer_options, **rest)

    for current in range(6):
        given = inputs()
        found, right = (run(model, given, wrapped, [later]) for wrapped in (True, False))
        assert all(map(torch.equal, found, right)), current
    assert gpu.captured == [0, 1, 2] and len(asked) == 2 * 3 * 3
    assert caplog.text.count("something else in the workflow changes blocks: optimized_attention_override") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimized_attention_override", lambda out: out),
        ("patches", {"attn1_patch": [print]}),
        ("patches_replace", {"attn1": {("middle", 0): print}}),
        ("something_new", 0),
    ],
)
def test_what_else_may_change_blocks_keeps_them_from_being_captured_and_is_named_once(name, value, gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = Model()
    for _ in range(4):
        step(gpu, model, **{name: value})
    assert gpu.captured == []
    assert caplog.text.count(f"something else in the workflow changes blocks: {name}") == 1


def test_other_replacements_of_blocks_are_left_in_their_place(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = Model()
    theirs = {("double_block", 1): lambda given, extra: extra["original_block"](given)}
    for _ in range(4):
        step(gpu, model, patches_replace={"dit": dict(theirs)})
    assert gpu.captured == [] and "changes blocks: patches_replace" in caplog.text


def test_a_wrapper_that_calls_the_model_twice_with_the_same_options_finds_them_as_they_were(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model, seen = Model(), []

    def twice(executor, x, transformer_options, **rest):
        executor([tensor.clone() for tensor in x], transformer_options, **rest)
        seen.append(transformer_options.get("patches_replace"))
        return executor(x, transformer_options, **rest)

    gpu.model = model
    for replaced in ({}, {"patches_replace": {"dit": {}}}):
        given = inputs()
        for _ in range(4):
            found, right = run(model, given, before=[twice], **replaced), run(model, given, wrapped=False)
            assert all(map(torch.equal, found, right))
        assert seen == [replaced.get("patches_replace")] * 4, "nothing keeps the model's blocks"
        seen.clear()
    assert gpu.captured == [0, 1, 2] and "changes blocks" not in caplog.text


def test_an_original_that_is_not_the_host_s_own_is_called(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = gpu.model = Model()
    calls = []

    def between(executor, x, transformer_options, **rest):
        ours = transformer_options["patches_replace"]["dit"]

        def other(given, extra, i):
            def original(given):
                calls.append(i)
                return extra["original_block"](given)

            original.__module__ = "somebody.s.pack"
            return ours["double_block", i](given, {"original_block": original})

        for i in range(3):
            transformer_options["patches_replace"]["dit"] = {
                **transformer_options["patches_replace"]["dit"],
                ("double_block", i): lambda given, extra, i=i: other(given, extra, i),
            }
        return executor(x, transformer_options, **rest)

    for _ in range(4):
        run(model, inputs(), wrappers=[between])
    assert gpu.captured == [] and len(calls) == 12
    assert "stands between ComfyUI and its blocks" in caplog.text


@pytest.mark.parametrize("change", ["forward", "hook", "function", "class", "child"])
def test_a_block_that_somebody_changed_runs_itself_from_then_on(change: str, gpu: Gpu):
    model = Model()
    for _ in range(3):
        step(gpu, model)
    block = model.transformer_blocks[1]
    if change == "forward":
        original = block.proj.forward
        block.proj.forward = lambda x, options: original(x, options) + 1
    elif change == "hook":
        block.proj.register_forward_hook(lambda _, given, out: out * 2)
    elif change == "function":
        block.proj.weight_function = [lambda w: w]
    elif change == "class":
        block.__class__ = type("Other", (Block,), {})
    else:
        put = type("OtherLayer", (type(block.proj),), {"forward": lambda self, x, options: x * self.weight.sum()})(4, 4)
        put.weight, put.bias = block.proj.weight, block.proj.bias
        block.proj = put
    before, eager = len(gpu.captured), counts(model)["eager"]
    step(gpu, model)
    assert len(gpu.captured) == before and counts(model)["eager"] == eager + 1


def test_capturing_stops_before_the_gpu_s_memory_runs_out(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model, gpu.free, gpu.taken = Model(blocks=6), 11 << 30, 2 << 30
    for _ in range(5):
        step(gpu, model)
    assert len(gpu.captured) == 3, "11, 9 and 7 GiB were free, then 5, of which another 2 * 2 must not be missing"
    assert caplog.text.count("after 3 blocks only 5.4 GB of GPU memory are free") == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ValueError("no kernel image\nmore"), KeyError()],
)
def test_a_failed_capture_ends_the_graphs_of_its_kind_for_this_sampling_and_says_what_failed(error, gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = Model()
    for _ in range(3):
        step(gpu, model, tokens=9)
    gpu.fails = error
    for _ in range(4):
        step(gpu, model)
    first = str(error).splitlines()[0] if str(error) else "KeyError"
    assert caplog.text.count(f"block 0 could not be captured: {first}") == 1
    assert "driver" not in caplog.text
    gpu.fails, before = None, len(gpu.captured)
    step(gpu, model)
    assert len(gpu.captured) == before, "not again in this sampling"
    replayed = counts(model)["replayed"]
    step(gpu, model, tokens=9)
    assert counts(model)["replayed"] == replayed + 3, "graphs of the other kind go on"
    block_graphs.drop_graphs(patcher_of(model))
    step(gpu, model)
    assert len(gpu.captured) == before + 3


def test_few_steps_are_not_worth_a_capture(gpu: Gpu):
    model = Model()
    for _ in range(4):
        step(gpu, model, sample_sigmas=STEPS[:4])
    assert gpu.captured == []


def test_an_argument_of_unknown_kind_is_the_block_s_own(gpu: Gpu):
    model = gpu.model = Model()
    for _ in range(4):
        given = inputs()
        given["timestep"] = type("Other", (), {"data": torch.ones(1, 6, 4)})()
        run(model, given)
    assert gpu.captured == []


@pytest.mark.cuda
def test_cuda_s_own_graphs_compute_what_the_blocks_do_and_their_memory_comes_back(monkeypatch):
    device = torch.device("cuda", 0)
    pretend_host(monkeypatch)
    model = Model(device)
    known = block_graphs.blocks_of(model)
    for current in range(6):
        given = inputs(device=device)
        assert all(map(torch.equal, run(model, given), run(model, given, wrapped=False)))
        if current == 1:  # what a slow GPU would hide
            known.waits_for_cpu.update(known._passes)
    (plan,) = known.plans.values()
    assert len(plan.graphs) == 3 and known.counts["captured"] == 3
    known.drop()
    assert not known.plans
