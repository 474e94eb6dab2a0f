# SPDX-License-Identifier: Apache-2.0
"""host/compute/token_block.py on stand-ins, by the torch that defines its kernels: when it computes, and when not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.host.compute import linear, matmul, rows, token_block, token_graphs
from nvfp4_video.kernels import one_token, reference
from nvfp4_video.tests.support import token_loops, token_twins
from nvfp4_video.tests.support.lora_helpers import CPU, NVFP4

PROMPT = [5, 9, 60, 2, 33, 8]


@pytest.fixture(params=["lists", "matrix"])
def llama(monkeypatch, request):
    for cached in (token_graphs._classes, token_graphs.disagreement):
        cached.cache_clear()
    monkeypatch.setattr(token_graphs, "_obstacle", lambda device: "")
    yield token_loops.install(monkeypatch, request.param)
    for cached in (token_graphs._classes, token_graphs.disagreement):
        cached.cache_clear()


def build(llama) -> SimpleNamespace:
    """A text encoder with packed weights, each block with an allocation of its own."""
    operations = linear.weight_only_operations(torch.float32, CPU)
    ops = SimpleNamespace(Linear=operations.Linear)
    model = llama.Llama2_(llama.Gemma3_12B_Config(), ops=ops)
    generator, state = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state[name] = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, operations.Linear):
            weight = torch.randn(module.out_features, module.in_features, generator=generator)
            state[f"{name}.weight"] = matmul.wrap(reference.quantize(weight * module.in_features**-0.5))
            state[f"{name}.comfy_quant"] = NVFP4
    model.load_state_dict(state)
    for layer in model.layers:
        layer._v_block = object()
    encoder = SimpleNamespace(gemma3_12b=SimpleNamespace(transformer=SimpleNamespace(model=model)))
    return SimpleNamespace(
        cond_stage_model=encoder, patcher=SimpleNamespace(load_device=CPU, is_dynamic=lambda: True), model=model
    )


@pytest.fixture
@torch.no_grad()
def wanted(llama) -> list[int]:
    clip = build(llama)
    token_graphs.use_graphs(clip)
    return token_loops.generate(clip.model, PROMPT, 20)


def generated(clip, runs: list) -> tuple[list[int], list[int]]:
    """-> tokens, and which layers computed them in few launches."""
    runs.clear()
    tokens = token_loops.generate(clip.model, PROMPT, 20)
    return tokens, [number for number, layer in enumerate(clip.model.layers) if any(layer is one for one in runs)]


@torch.no_grad()
def test_tokens_are_those_of_the_host_s_blocks(llama, wanted):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        assert token_graphs.use_graphs(clip) == "a CUDA graph a block, where the block stays on the GPU"
        assert generated(clip, runs) == (wanted, [0, 1, 2])
        assert len(runs) == 19 * 3
    assert len(set(wanted)) > 3


def hooked(layer):
    layer.self_attn.v_proj.register_forward_hook(lambda *_: None)


def replaced(layer):
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: original(x)


def patched(layer):
    layer.mlp.down_proj.weight_function = [lambda weight: weight]


def derived(layer):
    layer.q_class = type("Other", (type(layer.self_attn.q_norm),), {})
    layer.self_attn.q_norm.__class__ = layer.q_class


def plain(layer):
    own = layer.self_attn.o_proj
    weight = torch.nn.Linear(own.in_features, own.out_features, bias=False)
    layer.self_attn.o_proj = weight
    with torch.no_grad():
        weight.weight.copy_(reference.dequantize(_record(own), torch.float32))


def _record(own):
    params = own.weight._params
    return reference.PackedWeight(own.weight._qdata, params.block_scale, params.scale, tuple(params.orig_shape))


@pytest.mark.parametrize("meddle", [hooked, replaced, patched, derived, plain])
@torch.no_grad()
def test_a_block_with_a_module_in_other_hands_is_the_host_s(llama, wanted, meddle):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        token_graphs.use_graphs(clip)
        meddle(clip.model.layers[1])
        assert generated(clip, runs) == (wanted, [0, 2])


@torch.no_grad()
def test_whoever_replaces_a_function_of_the_host_s_module_is_heard(llama, monkeypatch):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        token_graphs.use_graphs(clip)
        forward = token_loops.RMSNorm.forward
        monkeypatch.setattr(token_loops.RMSNorm, "forward", lambda self, x: forward(self, x) * 1.5)
        assert generated(clip, runs)[1] == []
        monkeypatch.undo()


@torch.no_grad()
def test_attention_of_another_class_is_the_host_s(llama, wanted):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        token_graphs.use_graphs(clip)
        attention = clip.model.layers[2].self_attn
        attention.__class__ = type("Somebody", (type(attention),), {})
        assert generated(clip, runs) == (wanted, [0, 1])


@pytest.mark.parametrize("state", [{"nvfp4_lora": 1}, {"nvfp4_mode": "fp4"}, {"nvfp4_mode": None}], ids=str)
def test_a_layer_with_a_lora_or_in_another_mode_is_no_packed_weight(llama, state):
    layer = build(llama).model.layers[0].mlp.up_proj
    assert rows.packed_weight(layer, CPU) is layer.weight
    layer.__dict__.update(state)
    assert rows.packed_weight(layer, CPU) is None


def test_gradients_are_the_host_s(llama):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        token_graphs.use_graphs(clip)
        token_loops.generate(clip.model.requires_grad_(False), PROMPT, 4)
        assert runs == []


@torch.no_grad()
def test_another_length_of_the_cache_is_prepared_anew(llama):
    with token_twins.in_plain_torch(token_block):
        clip = build(llama)
        token_graphs.use_graphs(clip)
        token_loops.generate(clip.model, PROMPT, 4)
        first = clip.model.layers[0].__dict__["_nvfp4_token"]
        token_loops.generate(clip.model, PROMPT, 4)
        assert clip.model.layers[0].__dict__["_nvfp4_token"] is first
        token_loops.generate(clip.model, PROMPT, 40)
        assert clip.model.layers[0].__dict__["_nvfp4_token"] is not first


@torch.no_grad()
def test_a_gpu_without_the_kernel_leaves_the_blocks_to_the_host(llama, wanted, monkeypatch):
    with token_twins.in_plain_torch(token_block) as runs:
        clip = build(llama)
        token_graphs.use_graphs(clip)
        monkeypatch.setattr(one_token, "prepare_group", lambda *_, **__: None)
        assert generated(clip, runs) == (wanted, [])


def test_a_block_that_is_not_known_and_a_gpu_that_has_no_kernel_are_named(llama, monkeypatch):
    config = llama.Gemma3_12B_Config()
    assert "not one that this pack knows" in token_block.obstacle(llama, config, "auto", CPU)
    parts = token_loops.TransformerBlockGemma2.forward, llama.MLP.forward, llama.RMSNorm.forward, token_loops.rms_norm
    monkeypatch.setattr(token_block, "_BLOCKS", frozenset((token_block.fingerprint(*parts),)))
    assert token_block.obstacle(llama, config, "auto", CPU) == "nothing here multiplies packed weights by one row"
    monkeypatch.setattr(token_block, "pick_backend", lambda *_: ("triton", ""))
    assert token_block.obstacle(llama, config, "auto", CPU) == ""
    config.rms_norm_add = False
    assert "not one that this pack knows" in token_block.obstacle(llama, config, "auto", CPU)
