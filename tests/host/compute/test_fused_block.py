# SPDX-License-Identifier: Apache-2.0
"""A block in FP8 mode in fewer passes, against the same block as its host computes it; and for whom it is not."""

from __future__ import annotations

import sys
import types
from collections import Counter

import comfy.ops
import pytest
import torch
from nvfp4_video.host import residency
from nvfp4_video.host.compute import fused_block, fusions, graph_key, linear, lora, matmul, schedule
from nvfp4_video.host.compute.attention import AUTO, OVERRIDE, Attention
from nvfp4_video.kernels import fused, reference
from nvfp4_video.kernels.format import FP8Rows
from nvfp4_video.tests.support import small_block
from nvfp4_video.tests.support.lora_helpers import CPU, patches_of
from nvfp4_video.tests.support.small_block import arguments, build, run

ROUNDED = 0.02  # a few roundings to BF16
NEAR = 0.04  # a value rounded otherwise before it becomes E4M3 may become its neighbour
PASSES = ("norm_rows", "gate_heads", "norm_rope")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    small_block.install(monkeypatch)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each fused pass ran, and how many tensors came out as rows."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(fused, name) for name in PASSES}
    for name in PASSES:

        def call(*given, name=name, original=originals[name], **named):
            counts[name] += 1
            out = original(*given, **named)
            counts["rows"] += sum(isinstance(one, FP8Rows) for one in (out if isinstance(out, list) else [out]))
            return out

        monkeypatch.setattr(fused, name, call)
    return counts


def far(found: tuple, wanted: tuple) -> float:
    """The larger relative error of the two streams."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9)) for a, b in pairs)


def test_a_block_in_fp8_mode_does_what_its_host_does_in_fewer_passes(calls):
    block, plain, report = build()
    given = arguments()
    found, right = run(block, given), run(plain, given)
    assert report.startswith("norms, modulations, gates and rotations")
    assert 0 < far(found, right) < NEAR
    assert calls == {"norm_rows": 12, "gate_heads": 6, "norm_rope": 10, "rows": 18}
    assert far(found, given["x"]) > 0.3, "the block does something"


def test_a_block_in_fewer_passes_is_no_farther_from_exact_arithmetic():
    errors = []
    for _ in range(4):
        block, plain, _ = build()
        given = arguments()
        found, right = run(block, given), run(plain, given)
        for module in plain.modules():
            if "nvfp4_mode" in module.__dict__:
                linear.choose_mode(module, "bf16")
        exact = run(plain.float(), small_block.in_fp32(given))
        errors.append((far(found, exact), far(right, exact)))
    mine, host_s = (sum(column) for column in zip(*errors, strict=True))
    assert mine < 1.1 * host_s


@pytest.mark.parametrize(
    "options",
    [{"a2v_cross_attn": False}, {"v2a_cross_attn": False}, {"a2v_cross_attn": False, "v2a_cross_attn": False},
     {"run_ax": False}],
    ids=str,
)  # fmt: skip
def test_options_that_leave_parts_out(options, calls):
    block, plain, _ = build()
    given = arguments() | {"transformer_options": options}
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["norm_rows"] > 4


def test_a_clip_without_sound(calls):
    block, plain, _ = build()
    given = arguments()
    given["x"] = given["x"][0], torch.zeros(0)
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["norm_rows"] == 5, "self attention, text twice, feed-forward, the last sum"


def test_a_model_whose_text_is_not_modulated(calls):
    block, plain, _ = build(modulated_text=False)
    given = arguments(count=6)
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["norm_rows"] == 10


@pytest.mark.parametrize("frames", [1, small_block.FRAMES * small_block.PATCHES])
def test_timesteps_of_the_clip_and_of_each_token(frames, calls):
    block, plain, _ = build()
    given = arguments()
    given["v_timestep"] = torch.randn(1, frames, 9 * small_block.VIDEO).bfloat16() / 4
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["norm_rows"] == 12


def test_an_argument_or_a_timestep_that_is_not_known_is_the_host_s(calls):
    block, plain, _ = build()
    odd = arguments()
    odd["v_timestep"] = torch.randn(1, 2, 9 * small_block.VIDEO).bfloat16() / 4  # neither frames nor tokens
    for given in (arguments() | {"somebody_s": 1}, odd):
        assert far(run(block, given), run(plain, given)) < NEAR
        assert calls["norm_rows"] == 0


def test_a_forward_that_somebody_set_on_the_host_s_class_is_called(monkeypatch, calls):
    block, _, _ = build()
    monkeypatch.setattr(small_block.BasicAVTransformerBlock, "forward", lambda self, x, **given: "somebody's")
    assert run(block, arguments()) == "somebody's" and not calls


@pytest.mark.parametrize(
    ("place", "name"),
    [("class", "get_ada_values"), ("lightricks.av_model", "apply_cross_attention_adaln"), ("common_dit", "rms_norm")],
)
def test_a_function_of_the_host_s_that_somebody_exchanged_leaves_the_block_to_the_host(place, name, monkeypatch, calls):
    block, plain, _ = build()
    given, where = arguments(), small_block.BasicAVTransformerBlock
    if place != "class":
        where = sys.modules.setdefault(f"comfy.ldm.{place}", types.ModuleType(place))
        monkeypatch.setitem(sys.modules, f"comfy.ldm.{place}", where)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *_, **__: None, raising=False)
        assert far(run(block, given), run(plain, given)) < NEAR
        assert not calls["norm_rows"]
    run(block, given)
    assert calls["norm_rows"] == 12, "and it is computed here again once that is over"


def test_a_rotation_that_somebody_put_in_the_place_of_the_host_s_is_the_one_computed(monkeypatch, calls):
    block, _, _ = build()
    turned = []
    for name in ("apply_rotary_emb", "apply_rotary_emb_qk"):
        host_s = getattr(small_block, name)
        watched = lambda *given, host_s=host_s: turned.append(1) or host_s(*given)  # noqa: E731
        monkeypatch.setattr(sys.modules["comfy.ldm.lightricks.model"], name, watched)
    run(block, arguments())
    assert len(turned) == 2 + 2 * 2, "self attention of two streams, and q and k of two streams that meet"
    assert calls["norm_rows"] == 12 and not calls["norm_rope"]


@pytest.mark.parametrize(
    "name", ["attn1", "attn1.to_q", "attn1.to_gate_logits", "attn1.q_norm", "attn2.to_out", "attn2.to_out.0",
             "attn2.to_out.1", "ff", "ff.net.0", "ff.net.0.proj", "video_to_audio_attn.to_k"],
)  # fmt: skip
def test_a_hook_sees_a_tensor_as_it_would_in_the_host_s_own_block(name, calls):
    block, plain, _ = build()
    seen, given = [], arguments()
    for one in (block, plain):
        one.get_submodule(name).register_forward_pre_hook(lambda _, tensors: seen.append(tensors[0].clone()))
    assert far(run(block, given), run(plain, given)) < NEAR
    assert far(*((one,) for one in seen)) < 2 * NEAR  # what attention makes of a rounding
    gates = name.endswith("to_gate_logits")  # their tensor comes beside the rows
    assert gates == (calls["rows"] == 18 and calls["norm_rope"] == 10)


def test_gates_that_are_weight_only_get_the_tensor_beside_the_rows(calls):
    block, plain, _ = build()
    for one in (block, plain):
        for attention in (module for name, module in one.named_modules() if name.endswith("attn1")):
            linear.choose_mode(attention.to_gate_logits, "bf16")
    given = arguments()
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["rows"] == 18 and calls["norm_rows"] == 12


@pytest.mark.parametrize("name", ["attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj"])
def test_a_lora_is_computed_from_tensors(name, calls):
    block, plain, _ = build()
    given, before = arguments(), None
    for one in (block, plain):
        layer = one.get_submodule(name)
        before = before or lora.terms_of(patches_of("one", layer.out_features, layer.in_features))
        layer.__dict__["nvfp4_lora"] = lora.make_branch(layer, before, CPU)
    found, right = run(block, given), run(plain, given)
    assert far(found, right) < NEAR
    assert 0 < calls["rows"] < 18, "the others go on"


def test_a_lora_in_the_weight_takes_rows_too(monkeypatch, calls):
    monkeypatch.setattr(matmul, "_in_weight", lambda shape, rows: True)
    block, plain, _ = build()
    for name, layer in block.named_modules():
        if name.startswith(("attn1.to_", "ff.net")) and "nvfp4_mode" in layer.__dict__:
            terms = lora.terms_of(patches_of("one", layer.out_features, layer.in_features))
            terms = [(strength / 8, up, down) for strength, up, down in terms]  # a change, not another layer
            for one in (layer, plain.get_submodule(name)):
                one.__dict__["nvfp4_lora"] = lora.make_branch(one, terms, CPU)
    given = arguments()
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["rows"] == 18


def test_weights_that_the_host_brings_for_each_call_take_rows_too(monkeypatch, calls):
    monkeypatch.setattr(residency, "check", lambda: residency.Books(patches=True, places=False))
    brought, bring = [], comfy.ops.cast_bias_weight
    watched = lambda *given, **named: brought.append(1) or bring(*given, **named)  # noqa: E731
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", watched)
    block, plain, _ = build()
    given = arguments()
    assert far(run(block, given), run(plain, given)) < NEAR
    assert calls["rows"] == 18 and len(brought) == 2 * 34, "each Linear of both blocks"


def test_rows_that_meet_another_mode_after_all_are_a_tensor_again(monkeypatch):
    block, plain, _ = build()
    layer = block.attn1.to_q
    x = torch.randn(3, small_block.VIDEO).bfloat16()
    rows = FP8Rows(*reference.quantize_rows(x), x.shape)
    with torch.no_grad():
        linear.choose_mode(layer, "bf16")
        assert torch.equal(layer(rows), layer(rows.plain()))
        linear.choose_mode(layer, "fp8")
        monkeypatch.setattr(type(layer), "weight_function", [lambda weight: weight], raising=False)
        assert torch.equal(layer(rows), layer(rows.plain()))


def test_few_tokens_stay_tensors(monkeypatch, calls):
    block, plain, _ = build()
    least = small_block.FRAMES * small_block.PATCHES
    monkeypatch.setattr(matmul, "least_rows", lambda *_: least)
    given = arguments()
    run(block, given)
    assert 0 < calls["rows"] < 18


def test_a_step_that_a_schedule_has_in_bf16_is_the_host_s_bit_for_bit(calls):
    block, plain, _ = build()
    given = arguments() | {"transformer_options": {graph_key.SCHEDULED: "bf16"}}
    with schedule.computing_in("bf16", block), schedule.computing_in("bf16", plain):
        assert all(map(torch.equal, run(block, given), run(plain, given))) and not calls


def test_a_step_that_a_schedule_has_in_bf16_takes_fewer_passes_where_its_attention_is_not_the_host_s(calls):
    block, plain, _ = build()
    given = arguments() | {"transformer_options": {graph_key.SCHEDULED: "bf16", OVERRIDE: Attention(AUTO)}}
    with schedule.computing_in("bf16", block), schedule.computing_in("bf16", plain):
        assert 0 < far(run(block, given), run(plain, given)) < ROUNDED
    assert calls == {"norm_rows": 12, "gate_heads": 6, "norm_rope": 10, "rows": 0}


def test_a_model_in_bf16_mode_is_the_host_s_bit_for_bit(calls):
    block, plain, _ = build("bf16")
    given = arguments()
    assert all(map(torch.equal, run(block, given), run(plain, given))) and not calls


def test_a_model_in_bf16_mode_takes_fewer_passes_where_its_attention_is_not_the_host_s(calls):
    errors, given = [], arguments()
    for _ in range(4):
        block, plain, report = build("bf16")
        chosen = given | {"transformer_options": {OVERRIDE: Attention(AUTO)}}
        found, right = run(block, chosen), run(plain, chosen)
        assert 0 < far(found, right) < ROUNDED
        exact = run(plain.float(), small_block.in_fp32(given))
        errors.append((far(found, exact), far(right, exact)))
    assert report == "norms, modulations and rotations, where attention is not ComfyUI's own"
    assert calls == {"norm_rows": 48, "gate_heads": 24, "norm_rope": 40, "rows": 0}
    mine, host_s = (sum(column) for column in zip(*errors, strict=True))
    assert mine < 1.1 * host_s, "roundings are left out"


def test_a_model_with_layers_in_fp4_mode_keeps_the_host_s_classes():
    block, _, _ = build("bf16")
    block.attn1.to_q.__dict__["nvfp4_mode"] = "fp4"
    assert fusions.fuse(block, type(block.attn1.to_q)) == "" and type(block) is small_block.BasicAVTransformerBlock


def test_a_model_that_moves_to_a_gpu_without_fp8_is_the_host_s_again(calls):
    block, plain, _ = build()
    for module in (*block.modules(), *plain.modules()):
        if "nvfp4_mode" in module.__dict__:
            linear.choose_mode(module, "bf16")
    fusions.fuse(block, type(block.attn1.to_q))
    given = arguments()
    assert all(map(torch.equal, run(block, given), run(plain, given))) and not calls


def test_a_host_whose_source_is_not_known_keeps_its_classes(monkeypatch):
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        small_block.install(patch)
        patch.setattr(fusions, "_stands_down", STANDS_DOWN)
        block, _, report = build()
    assert type(block) is small_block.BasicAVTransformerBlock
    assert "cannot be read" in report or "not one that this pack knows" in report


STANDS_DOWN = fusions._stands_down


def test_a_fingerprint_is_that_of_the_code_not_of_its_comments():
    def one(x):
        """Says something."""
        return x + 1  # a comment

    first = fusions.fingerprint(one)

    def one(x):
        return x + 1

    assert fusions.fingerprint(one) == first

    def one(x):
        return x + 2

    assert fusions.fingerprint(one) != first


def test_a_graph_knows_the_pack_s_own_block(monkeypatch):
    block, plain, _ = build()
    monkeypatch.setattr(graph_key, "host_class", lambda name: getattr(small_block, name, None))
    keys = [graph_key.of_block(one, CPU) for one in (block, plain)]
    assert None not in keys and keys[0] != keys[1]


def test_a_product_of_another_shape_is_added_as_torch_adds_it():
    x = torch.randn(1, 4, 32).bfloat16()
    stream, right = fused_block._Stream(x.clone()), x + 1
    stream.add(torch.ones(1, 1, 32).bfloat16(), None)
    assert stream.waiting is None and torch.equal(stream.x, right)
