# SPDX-License-Identifier: Apache-2.0
"""The host's private names: a host without one of them is slower, says so, and computes right."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import namedtuple

import comfy.model_patcher
import pytest
import torch
from nvfp4_video.host import residency
from nvfp4_video.host.compute import linear, lora_patcher
from nvfp4_video.host.doctor import report as doctor
from nvfp4_video.tests.host.compute.test_lora_patcher import KEY, HostPatcher
from nvfp4_video.tests.support.lora_helpers import CPU, build, patches_of

DYNAMIC = {
    "comfy.ops": {"weight_function", "bias_function", "_lowvram_function", "_v", "_prefetch", "resident", "_v_weight",
                  "_v_bias"},
    "comfy.model_patcher": {"ModelPatcherDynamic", "_lowvram_function", "_v"},
}  # fmt: skip


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Pretend to a host with DynamicVRAM whose code does not use these words."""

    def pretend(*words: str) -> None:
        monkeypatch.setattr(residency, "_words", lambda module: frozenset(DYNAMIC[module] - set(words)))

    return pretend


def right(layer, x, weight, bias=None) -> bool:
    """Whether the layer's output is that of its weight, up to roundings, and of no LoRA."""
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x.float(), weight, (layer.bias if bias is None else bias).float())
        return bool((layer(x) - wanted).norm() < 0.01 * wanted.norm())


def counted_host(layer, monkeypatch) -> list:
    """Calls of the host's own forward from now on."""
    calls, host = [], type(layer).__bases__[0]
    forward = host.forward
    monkeypatch.setattr(host, "forward", lambda self, *given: calls.append(self) or forward(self, *given))
    return calls


def test_words_are_those_of_the_code_and_a_module_that_cannot_be_read_has_none():
    assert {"weight_function", "cast_bias_weight", "CastWeightBiasOp"} <= residency._words("comfy.ops")
    assert "mixed precision where" not in residency._words("comfy.ops")
    assert residency._words("comfy.no_such_module") == frozenset()


def test_a_host_with_every_name_is_trusted(without):
    assert residency.check() == residency.Books(True, True) and str(residency.check()) == "", "the stub"
    without()
    assert residency.check() == residency.Books(True, True)


@pytest.mark.parametrize("word", ["weight_function", "bias_function", "_lowvram_function"])
def test_without_a_name_of_patches_layers_and_loras_go_the_host_s_way_and_that_is_said(word, without, monkeypatch):
    without(word)
    books = residency.check()
    assert not books.patches and not books.places
    assert f"this ComfyUI has no {word}" in str(books) and "ComfyUI's own way" in str(books)
    layer, weight = build(24, 32)
    calls = counted_host(layer, monkeypatch)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert right(layer, x, weight)
    assert calls == [layer]
    patcher = HostPatcher(torch.nn.ModuleDict({"to_q": layer}))
    assert lora_patcher.use_branches(patcher) is patcher and type(patcher) is HostPatcher
    fact = namedtuple("Fact", "value text known")("triton", "triton", True)
    assert doctor._compute_verdict([layer], {"own_backend": fact}) == ("slow", str(books))


@pytest.mark.parametrize("word", ["_v", "_prefetch", "resident", "_v_weight", "_v_bias"])
def test_without_a_name_of_places_the_host_is_asked_for_each_weight_and_that_is_said(word, without, monkeypatch):
    without(word)
    books = residency.check()
    assert books.patches and not books.places and f"no {word} where" in str(books)
    layer, weight = build(24, 32)
    asked, cast = [], linear.comfy.ops.cast_bias_weight
    monkeypatch.setattr(linear.comfy.ops, "cast_bias_weight", lambda *a, **k: asked.append(a[0]) or cast(*a, **k))
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert right(layer, x, weight)
    assert asked == [layer]


def test_a_bias_that_is_not_where_the_weight_is_is_not_left_out():
    layer, weight = build(24, 32)
    layer.__dict__ |= {"_v": object(), "_v_weight": layer.weight, "_prefetch": {"resident": True}}
    assert residency.resident(layer.__dict__, CPU) is None
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert right(layer, x, weight)
    layer._v_bias = torch.randn(24, dtype=torch.bfloat16)
    assert right(layer, x, weight, layer._v_bias)


def test_a_patch_that_the_host_keeps_under_another_name_is_not_counted_twice(monkeypatch, caplog):
    monkeypatch.setattr(comfy.model_patcher, "LazyCastingQuantizedParam", object, raising=False)
    layer, weight = build(24, 32)
    patcher = lora_patcher.use_branches(HostPatcher(torch.nn.ModuleDict({"to_q": layer})))
    patcher.dynamic, patcher.patches = True, {KEY: patches_of("three", 24, 32)}
    load = HostPatcher.load

    def renamed(self, device_to=None):
        load(self, device_to)
        patch = layer.weight_lowvram_function
        layer.weight_lowvram_function, layer.weight_patch = None, patch

    monkeypatch.setattr(HostPatcher, "load", renamed)
    caplog.set_level("INFO")
    patcher.load(CPU)
    assert "nvfp4_lora" not in layer.__dict__
    assert layer.nvfp4_lora_refused == "it keeps a patch of its own as weight_patch, which this pack does not know"
    assert "weight_patch" in caplog.text
    calls = counted_host(layer, monkeypatch)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert right(layer, x, weight), "the stub's host knows no patch of that name"
    assert calls == [layer], "the one who knows the patch computes"


def test_only_the_patch_of_that_weight_is_taken():
    layer, _ = build(24, 32)
    patch = types.SimpleNamespace(key="a.weight", patches={})
    other = types.SimpleNamespace(key="b.weight", patches={})
    layer.weight_function, layer.weight_lowvram_function = [patch, abs, other], patch
    assert residency.patched(layer) and residency.while_brought(layer) and residency.in_every_step(layer)
    assert residency.take_patch(layer, "a.weight") == ""
    assert layer.weight_function == [abs, other] and not residency.while_brought(layer)


def test_a_layer_s_addresses_hold_its_packed_data_both_scales_and_the_bias_and_need_all_of_them_there():
    layer, _ = build(24, 32)
    found: list = []
    assert residency.addresses(layer.__dict__, CPU, found)
    params = layer.weight._params
    for tensor in (layer.weight._qdata, params.block_scale, params.scale, layer.bias):
        assert tensor.data_ptr() in found
    for name in ("block_scale", "scale"):  # each alone makes another key
        moved, kept = [], getattr(params, name)
        object.__setattr__(params, name, kept.clone())
        assert residency.addresses(layer.__dict__, CPU, moved) and moved != found
        object.__setattr__(params, name, kept)
    assert not residency.addresses(layer.__dict__, torch.device("meta"), [])
    layer._v = object()
    assert not residency.addresses(layer.__dict__, CPU, [])
    layer.__dict__ |= {"_prefetch": {"resident": True}, "_v_weight": layer.weight}
    assert not residency.addresses(layer.__dict__, CPU, []), "no bias"
    layer.__dict__["_v_bias"] = layer.bias
    again: list = []
    assert residency.addresses(layer.__dict__, CPU, again) and sorted(map(str, again)) == sorted(map(str, found))


def test_allocations_are_kept_from_the_host_s_recording_where_it_records(monkeypatch):
    with residency.outside_host_graph(synchronize=True):
        assert not residency.has_block_prefetch(), "the stub has none"
    asked = []

    @contextlib.contextmanager
    def pause(sync=False):
        asked.append(sync)
        yield

    module = types.ModuleType("comfy.model_prefetch")
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    with residency.outside_host_graph():
        assert residency.has_block_prefetch() and asked == [], "an older one"
    module.pause_malloc_graph = pause
    with residency.outside_host_graph(), residency.outside_host_graph(synchronize=True):
        assert asked == [False], "one inside another would end the outer one too early"
    with pytest.raises(ValueError), residency.outside_host_graph(synchronize=True):
        raise ValueError
    with residency.outside_host_graph():
        assert asked == [False, True, False]


def test_a_module_is_taken_over_by_another_forward_or_a_hook():
    for change in (
        lambda module: setattr(module, "forward", lambda x: x),
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
    ):
        module = torch.nn.Linear(2, 2)
        assert not residency.taken_over(module.__dict__)
        change(module)
        assert residency.taken_over(module.__dict__)
    module = torch.nn.Linear(2, 2)
    kept, module.forward = module.forward, lambda x: x
    assert residency.taken_over(module.__dict__)
    module.forward = kept
    assert not residency.taken_over(module.__dict__), "as core's bypass LoRA leaves it behind"
    module.forward = torch.nn.Linear(2, 2).forward
    assert residency.taken_over(module.__dict__)
