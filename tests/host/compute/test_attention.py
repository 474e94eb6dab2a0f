# SPDX-License-Identifier: Apache-2.0
"""Attention by trial, with clocks that are set by hand; on a GPU also with real ones."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from nvfp4_video.host.compute import attention, graph_key
from nvfp4_video.host.compute.attention import AUTO, BY_COMPUTE, HOST, OVERRIDE, Attention

HEADS = 4


def test_a_call_is_timed_after_the_gpu_has_waited_for_the_cpu_to_queue_it(monkeypatch):
    queue: list = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda stream: queue.append("event")
            self.synchronize = lambda: queue.append("end")

        def elapsed_time(self, other):
            return 6.0

    seconds = iter((1.0, 1.002))
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("rest"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(cycles), raising=False)
    found = attention._milliseconds(lambda: queue.append("call"), 3, torch.device("cuda"))
    assert found == pytest.approx(6.0 / 3 + 0.2), "a tenth of 2 ms of the CPU's counts"
    cycles = queue[3]
    assert queue == ["rest", "call", "rest", cycles, "event", "call", "call", "call", "event", "end"]
    assert cycles >= 3 * 0.002 * 2e9


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds that a trial finds for each candidate, in the order in which they are tried; the CPU is a GPU."""
    found = {HOST: 9.0, "sdpa": 5.0, "sdpa_cudnn": 4.0, "sdpa_flash": 9.0, "sdpa_efficient": 18.0}
    kernels = attention._sdpa
    running: list[str] = []

    def named(kernel: str, *args, **kwargs):
        running[:] = [next(name for name, value in attention._TORCH.items() if value == kernel)]
        return kernels("", *args, **kwargs)

    def milliseconds(call: Callable, calls: int, device: torch.device) -> float:
        running[:] = [HOST]
        call()
        return found[running[0]]

    monkeypatch.setattr(attention, "_sdpa", named)
    monkeypatch.setattr(attention, "_milliseconds", milliseconds)
    monkeypatch.setattr(attention, "_is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(attention, "_trials", {})
    return found


def qkv(tokens: int = 6, keys: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, keys, keys)
    return [torch.randn(2, count, HEADS * 8, generator=generator, dtype=torch.bfloat16) for count in shapes]


def test_the_fastest_is_kept_for_a_shape_and_its_times_are_told(times, caplog):
    caplog.set_level(logging.INFO)
    override, given = Attention(AUTO), qkv()
    right = host_attention.attention_pytorch(*given, HEADS)
    torch.testing.assert_close(override(host_attention.attention_pytorch, *given, HEADS), right)
    (trial,) = attention.trials()
    assert trial.winner == "sdpa_cudnn"
    assert str(trial) == (
        "2 x 4 heads, 6 x 6 tokens of 8: sdpa_cudnn (sdpa_cudnn 4 ms, sdpa 5 ms, host 9 ms, sdpa_flash 9 ms, "
        "sdpa_efficient 18 ms)"
    )
    assert caplog.messages == [f"attention {trial}"]
    override(host_attention.attention_pytorch, *qkv(), HEADS)
    assert len(attention.trials()) == 1, "a shape is tried once"
    override(host_attention.attention_pytorch, *qkv(6, 3), HEADS)
    assert len(attention.trials()) == 2


def test_the_host_stays_where_the_gain_is_noise(times):
    times |= {HOST: 4.05}
    Attention(AUTO)(host_attention.attention_pytorch, *qkv(), HEADS)
    assert attention.trials()[0].winner == HOST


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_kernel_that_is_wrong_or_cannot_run_is_left_out_with_the_reason(fault, times, monkeypatch):
    good = attention._sdpa

    def bad(kernel: str, *args, **kwargs):
        out = good(kernel, *args, **kwargs)
        if kernel != "CUDNN_ATTENTION":
            return out
        if fault == "raises":
            raise RuntimeError("No available kernel. Aborting execution.\nand more")
        return out * (1.02 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(attention, "_sdpa", bad)
    out = Attention(AUTO)(host_attention.attention_pytorch, *qkv(), HEADS)
    assert torch.isfinite(out).all()
    (trial,) = attention.trials()
    reason = "No available kernel. Aborting execution." if fault == "raises" else "gives another result"
    assert trial.winner == "sdpa" and trial.rejected == {"sdpa_cudnn": reason}
    assert f"; not sdpa_cudnn: {reason}" in str(trial)


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6), (2, 4, 6, 6)])
def test_masks_of_all_of_the_hosts_shapes_mean_the_same(shape, times):
    mask = torch.zeros(shape, dtype=torch.bfloat16).masked_fill(torch.rand(shape) > 0.7, -1e4)
    given = qkv()
    heads = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in given]
    whole = mask if len(shape) != 3 else mask.unsqueeze(1)
    right = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=whole).transpose(1, 2).flatten(2)
    found = Attention("sdpa")(None, *given, HEADS, mask=mask)
    assert torch.equal(found, right)
    assert torch.equal(Attention("sdpa")(None, *heads, HEADS, mask, skip_reshape=True), right)


def test_a_named_kernel_that_cannot_run_leaves_that_shape_to_the_host(times, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def fails(kernel: str, *args, **kwargs):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(attention, "_sdpa", fails)
    override = Attention("sdpa_cudnn")
    before = override.key()
    for _ in range(2):
        override(host_attention.attention_pytorch, *qkv(), HEADS)
    told = "attention 2 x 4 heads, 6 x 6 tokens of 8: ComfyUI's own instead of sdpa_cudnn: No available kernel."
    assert caplog.messages == [told]
    assert override.key() != before, "a graph with the failed kernel is no longer valid"


def test_calls_that_must_not_be_rounded_are_the_hosts(times, monkeypatch):
    rounds = lambda *args, **kwargs: pytest.fail("a rounding function was asked")  # noqa: E731
    monkeypatch.setitem(host_attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", rounds)
    given = qkv()
    found = Attention("sage")(host_attention.attention_pytorch, *given, HEADS, low_precision_attention=False)
    assert torch.equal(found, host_attention.attention_pytorch(*given, HEADS))


class Container:
    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def test_containers_are_emptied(times):
    given = [Container(tensor) for tensor in qkv()]
    found = Attention(AUTO).container_function(*given, HEADS)
    assert torch.equal(found, host_attention.attention_pytorch(*qkv(), HEADS))
    assert all(container.tensor is None for container in given)


def patcher() -> ModelPatcher:
    device = torch.device("cpu")
    return ModelPatcher(torch.nn.Module(), device, device)


def test_the_choice_follows_the_promise_of_the_compute_mode(times):
    exact, fast = patcher(), patcher()
    assert attention.use_attention(exact, BY_COMPUTE, "bf16") == "ComfyUI's own"
    assert OVERRIDE not in exact.model_options.get("transformer_options", {})
    told = attention.use_attention(fast, BY_COMPUTE, "fp8")
    assert told == "the fastest of torch's kernels, by trial in the first step"
    assert fast.model_options["transformer_options"][OVERRIDE].choice == AUTO


def test_a_choice_made_when_comfyui_was_started_is_left(times, monkeypatch):
    monkeypatch.setattr(host_attention, "optimized_attention", print)
    model = patcher()
    assert "chosen when ComfyUI was started" in attention.use_attention(model, AUTO)
    assert OVERRIDE not in model.model_options.get("transformer_options", {})


def test_a_file_that_asks_for_its_own_attention_gets_it(times):
    model = patcher()
    model.model.comfy_attention = torch.nn.Module()
    model.model.comfy_attention.function = print
    assert "the model's file asks for an attention of its own" in attention.use_attention(model, AUTO)


def test_whoever_is_before_in_the_workflow_is_left_and_who_comes_after_is_named(times, caplog):
    caplog.set_level(logging.INFO)
    model = patcher()
    model.model_options["transformer_options"] = {OVERRIDE: pytest.fail}
    assert "before this one in the workflow" in attention.use_attention(model, AUTO)
    assert model.model_options["transformer_options"][OVERRIDE] is pytest.fail
    model = patcher()
    attention.use_attention(model, AUTO)
    (look,) = model.callbacks[CallbacksMP.ON_PRE_RUN][attention.KEY]
    look(model)
    assert not caplog.messages
    model.model_options["transformer_options"][OVERRIDE] = pytest.fail
    for _ in range(2):
        look(model)
    assert caplog.messages == [f"attention auto is not used: {pytest.fail.__module__} has put its own there"]


@pytest.mark.parametrize("obstacle", ["", "chosen when ComfyUI was started"])
def test_a_later_choice_takes_the_place_of_this_pack_s_own_before_it(obstacle, times, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    loaded = patcher()
    attention.use_attention(loaded, "sdpa_cudnn")
    model, own = loaded.clone(), loaded.model_options["transformer_options"][OVERRIDE]
    if obstacle:
        monkeypatch.setattr(host_attention, "optimized_attention", print)
    assert attention.use_attention(model, AUTO if obstacle else HOST).startswith("ComfyUI's own")
    assert OVERRIDE not in model.model_options["transformer_options"]
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_is_gpu", lambda device: True)
    assert attention.use_attention(model, "sdpa").startswith("sdpa, and ComfyUI's own")
    (look,) = model.callbacks[CallbacksMP.ON_PRE_RUN][attention.KEY]
    look(model)
    assert not caplog.messages, "nobody else's choice is in the way"
    assert loaded.model_options["transformer_options"][OVERRIDE] is own and not own.replaced


def test_a_name_that_is_not_to_be_had_is_an_error_that_names_those_there_are(times):
    with pytest.raises(ValueError, match="no 'flash4' here; there are by compute mode, host, auto, sdpa"):
        attention.use_attention(patcher(), "flash4")


def test_on_the_cpu_attention_is_the_hosts():
    model = patcher()
    assert attention.use_attention(model, AUTO) == "ComfyUI's own: auto is for GPUs"
    given = qkv()
    assert torch.equal(Attention(AUTO)(host_attention.attention_pytorch, *given, HEADS), Attention("sdpa")(
        host_attention.attention_pytorch, *given, HEADS))  # fmt: skip
    assert not attention.trials()


def test_captured_blocks_depend_on_the_choice(times):
    mine, other = ({OVERRIDE: Attention(AUTO)} for _ in range(2))
    assert graph_key.strange(mine) == [] and graph_key.strange({OVERRIDE: print}) == [OVERRIDE]
    keys = [graph_key._attention(options) for options in (mine, mine, other, {})]
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.cuda
def test_on_a_gpu_the_winner_is_accurate_and_not_slower_than_what_it_was_tried_against():
    attention._trials.clear()
    generator = torch.Generator("cuda").manual_seed(1)
    given = [torch.randn(1, 4096, 32 * 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in "qkv"]
    found = Attention(AUTO)(host_attention.attention_pytorch, *given, 32)
    heads = [tensor.float().unflatten(-1, (32, -1)).transpose(1, 2) for tensor in given]
    right = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert (found - right).norm() / right.norm() < 2**-7
    (trial,) = attention.trials()
    assert trial.milliseconds[trial.winner] == min(trial.milliseconds.values()) or trial.winner == HOST
