# SPDX-License-Identifier: Apache-2.0
"""Layers that are computed together, on modules built as the host builds LTX's: when they are, and for whom not."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from nvfp4_video.host.compute import fusions, linear, matmul, positions
from nvfp4_video.host.compute.modes import EIGHT_BITS, Compute
from nvfp4_video.kernels import dispatch, fp8, reference
from nvfp4_video.tests.support.lora_helpers import CPU, NVFP4

WIDTH, INNER, TOKENS = 32, 64, 300


class GELU_approx(torch.nn.Module):
    def __init__(self, operations):
        super().__init__()
        self.proj = operations.Linear(WIDTH, INNER)

    def forward(self, x):
        return torch.nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(torch.nn.Module):
    def __init__(self, operations):
        super().__init__()
        self.net = torch.nn.Sequential(GELU_approx(operations), torch.nn.Dropout(0.0), operations.Linear(INNER, WIDTH))

    def forward(self, x):
        return self.net(x)


class CrossAttention(torch.nn.Module):
    def __init__(self, operations):
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, operations.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)


class SomebodysAttention(CrossAttention):
    """Changes the tensor between the projections."""

    def forward(self, x):
        q = self.to_q(x)
        return torch.cat([q, self.to_k(x.mul_(2)), self.to_v(x)], -1)


class Bypass:
    """Core's bypass LoRA: it takes the place of a layer's forward and adds what it computes from the layer's input."""

    def __init__(self, layer):
        self.original, self.weight = layer.forward, torch.randn(WIDTH, layer.in_features).bfloat16()
        layer.forward = self.forward

    def forward(self, x, *args, **kwargs):
        return self.original(x, *args, **kwargs) + torch.nn.functional.linear(x, self.weight)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's module with LTX's classes; FP8 is allowed on the CPU."""
    module = types.ModuleType("comfy.ldm.lightricks.model")
    module.FeedForward, module.GELU_approx, module.CrossAttention = FeedForward, GELU_approx, CrossAttention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")


def build(
    kind: type, mode: str = "fp8", others: dict[str, str] | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same layers twice: as fused, and as the host built them."""
    compute = Compute(mode, others=others or {})
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=compute)
    pair = kind(operations), kind(operations)
    state = {}
    for name, module in pair[0].named_modules():
        if isinstance(module, operations.Linear):
            record = reference.quantize(torch.randn(module.out_features, module.in_features))
            bias = torch.randn(module.out_features).bfloat16()
            state |= {f"{name}.weight": matmul.wrap(record), f"{name}.comfy_quant": NVFP4, f"{name}.bias": bias}
    for module in pair:
        module.load_state_dict(dict(state))
    fusions.fuse(pair[0], operations.Linear)
    return pair


def run(module, x):
    with torch.no_grad():
        return module(x.clone())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH).bfloat16()


def far(found, wanted) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_a_feed_forward_hands_its_activation_to_the_linear_after_it(mode, x, monkeypatch):
    fused, plain = build(FeedForward, mode)
    assert type(fused).__name__ == "FusedFeedForward"
    seen = []
    forward = type(fused.net[2]).forward
    watched = lambda self, *given, **named: seen.append(named) or forward(self, *given, **named)  # noqa: E731
    monkeypatch.setattr(type(fused.net[2]), "forward", watched)
    assert far(run(fused, x), run(plain, x)) < 0.01
    assert {"activation": "gelu_tanh"} in seen


@pytest.mark.parametrize("where", [0, 2])
def test_who_replaced_a_layer_s_forward_gets_what_the_layer_would_get(where, x):
    fused, plain = build(FeedForward)
    inputs = []
    for module in (fused, plain):
        layer = module.net[where]

        def forward(x, original=layer.forward, **named):
            inputs.append(x.clone())
            return original(x, **named)

        layer.forward = forward
    assert torch.equal(run(fused, x), run(plain, x))
    assert torch.equal(*inputs)


def test_a_feed_forward_whose_source_is_not_known_is_the_host_s(monkeypatch, x):
    class Newer(FeedForward):
        def forward(self, x):
            return self.net(x) * 2

    monkeypatch.setattr(sys.modules["comfy.ldm.lightricks.model"], "FeedForward", Newer)
    fused, plain = build(Newer)
    assert type(fused) is Newer and torch.equal(run(fused, x), run(plain, x))


def test_an_activation_that_somebody_set_on_the_host_s_class_is_computed(monkeypatch, x):
    fused, plain = build(FeedForward)
    monkeypatch.setattr(GELU_approx, "forward", lambda self, x: self.proj(x).relu())
    assert type(fused).__name__ == "FusedFeedForward" and torch.equal(run(fused, x), run(plain, x))


def test_core_s_bypass_lora_on_the_second_linear_takes_the_activated_tensor(x):
    fused, plain = build(FeedForward)
    weights = [Bypass(module.net[2]) for module in (fused, plain)]
    weights[1].weight = weights[0].weight
    assert torch.equal(run(fused, x), run(plain, x))


@pytest.mark.parametrize("where", ["net", "net.0", "net.1", "net.2"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_what_it_would_see_in_the_host_s_own_feed_forward(where, register, x):
    fused, plain = build(FeedForward)
    seen = []
    for module in (fused, plain):
        getattr(module.get_submodule(where), register)(lambda _, *tensors: seen.append(tensors[0][0].clone()))
    assert torch.equal(run(fused, x), run(plain, x))
    assert torch.equal(*seen)


def test_a_hook_on_every_module_sees_them_all(x):
    fused, plain = build(FeedForward)
    seen: dict = {fused: 0, plain: 0}
    for module in seen:
        count = lambda *_, module=module: seen.__setitem__(module, seen[module] + 1)  # noqa: E731
        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        run(module, x)
        handle.remove()
    assert seen[fused] == seen[plain] > 4


@pytest.mark.parametrize("change", ["gelu", "dropout", "linear"])
def test_a_layer_that_somebody_put_in_is_used_as_it_is(change, x):
    fused, plain = build(FeedForward)
    for module in (fused, plain):
        place = ("gelu", "dropout", "linear").index(change)
        torch.manual_seed(1)
        put = [torch.nn.Linear(WIDTH, INNER), torch.nn.Tanh(), torch.nn.Linear(INNER, WIDTH)][place]
        module.net[place] = put.bfloat16()
    assert torch.equal(run(fused, x), run(plain, x))


def counted(monkeypatch) -> list:
    """Whether each FP8 product was given a shared quantisation."""
    shares, make = [], dispatch.prepare

    def prepare(operation, *arguments):
        call = make(operation, *arguments)
        if operation != "linear_fp8":
            return call
        return lambda *given: shares.append(given[-1] is not None) or call(*given)

    monkeypatch.setattr(dispatch, "prepare", prepare)
    return shares


def test_ltx_s_own_attention_quantises_its_input_once_and_no_other_class_does(x, monkeypatch):
    shares = counted(monkeypatch)
    fused, plain = build(CrossAttention)
    assert torch.equal(run(fused, x), run(plain, x))
    assert shares == [True] * 3 + [False] * 3
    shares.clear()
    fused, plain = build(SomebodysAttention)
    assert torch.equal(run(fused, x), run(plain, x))
    assert shares == [False] * 6


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
def test_projections_share_nothing_while_one_of_them_is_not_its_own_master(name, x, monkeypatch):
    shares = counted(monkeypatch)
    fused, plain = build(CrossAttention)
    handles = [getattr(module, name).register_forward_hook(lambda _, given, out: None) for module in (fused, plain)]
    assert torch.equal(run(fused, x), run(plain, x))
    assert not any(shares)
    handles[0].remove()
    shares.clear()
    run(fused, x)
    assert shares == [True] * 3


def test_projections_in_two_modes_share_no_rows(x):
    fused, plain = build(CrossAttention, others={"to_k": "int8"})
    assert not any("_nvfp4_shared" in layer.__dict__ for layer in fused.children())
    assert torch.equal(run(fused, x), run(plain, x))
    fused, plain = build(CrossAttention, "int8")
    assert all("_nvfp4_shared" in layer.__dict__ for layer in fused.children())
    assert torch.equal(run(fused, x), run(plain, x))


def test_what_was_prepared_for_another_device_s_modes_is_undone_and_nothing_else():
    attention, _ = build(CrossAttention)
    linears = attention.to_q, attention.to_k, attention.to_v
    timesteps = torch.nn.Module()
    timesteps.__class__ = kept = positions.embedding_class(torch.nn.Module)
    model = torch.nn.ModuleList((attention, build(FeedForward)[0], timesteps))
    for module in model.modules():
        if "nvfp4_mode" in module.__dict__:
            linear.choose_mode(module, "bf16")
    fusions.fuse(model, type(linears[0]))
    assert [type(module) for module in model] == [CrossAttention, FeedForward, kept]
    assert not any(name.startswith("_nvfp4_share") for layer in linears for name in layer.__dict__)
