# SPDX-License-Identifier: Apache-2.0
"""LoRA beside packed weights on the stubbed host: results against FP32, and what is refused with which reason."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.host.compute import lora
from nvfp4_video.kernels import fp8, int8
from nvfp4_video.kernels.format import OUTPUT_DTYPES
from nvfp4_video.tests.support.lora_helpers import CPU, SETS, Adapter, adapter, build, change, patches_of

# At most four roundings to BF16, the adapters' always among them, each of half a unit in the last place.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 6e-3, torch.float32: 4e-3}


def put(layer: torch.nn.Module, patches, packed: bool = False) -> lora.Branch:
    assert lora.obstacle(layer, patches) == ""
    branch = lora.make_branch(layer, lora.terms_of(patches), CPU, packed)
    layer.nvfp4_lora = branch
    return branch


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def exact(layer, weight, x, patches=()) -> torch.Tensor:
    weight = weight + change(patches) if patches else weight
    return torch.nn.functional.linear(x.float(), weight, layer.bias.float())


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("shape", [(16, 16), (1, 16), (129, 48), (30, 112), (64, 256)], ids=str)
@pytest.mark.parametrize("route", ["beside", "merged"])
def test_a_layer_with_loras_equals_the_sum_of_weights_in_fp32(shape, which, route, monkeypatch):
    layer, weight = build(*shape)
    patches = patches_of(which, *shape)
    put(layer, patches)
    added, add = [], lora.add
    monkeypatch.setattr(lora, "add", lambda *given: added.append(1) or add(*given))
    tokens = 7 if route == "beside" else 100
    x = torch.randn(tokens, shape[1]).bfloat16()
    # The few products of one row may cancel, and then roundings count for more.
    most = TOLERANCE[torch.bfloat16] * (2 if shape[0] == 1 else 1)
    assert error(layer(x), exact(layer, weight, x, patches)) < most
    assert added == ([1] if route == "beside" else [])


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 600])
def test_inputs_of_any_dtype_get_the_lora_in_theirs(dtype, tokens):
    layer, weight = build(48, 64)
    patches = patches_of("three", 48, 64)
    put(layer, patches)
    x = torch.randn(tokens, 64, dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert error(found, exact(layer, weight, x, patches)) < TOLERANCE[dtype]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3), (2, 100)], ids=str)
def test_leading_dimensions_stay(lead):
    layer, weight = build(24, 32)
    patches = patches_of("one", 24, 32)
    put(layer, patches)
    x = torch.randn(*lead, 32).bfloat16()
    found = layer(x)
    assert found.shape == (*lead, 24)
    if found.numel():
        assert error(found, exact(layer, weight, x, patches)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("shape", "mode"), [((64, 48), "fp8"), ((40, 64), "int8"), ((33, 64), "fp8")], ids=str)
def test_in_8_bits_the_lora_shares_the_rounding_of_the_weight(shape, mode, monkeypatch):
    monkeypatch.setattr({"fp8": fp8, "int8": int8}[mode], "obstacle", lambda device: "")
    layer, weight = build(*shape, mode=mode)
    x = torch.randn(256, shape[1]).bfloat16()
    plain = error(layer(x), exact(layer, weight, x))
    patches = patches_of("three", *shape)
    put(layer, patches)
    added = []
    monkeypatch.setattr(lora, "add", lambda *given: added.append(1))
    assert layer.nvfp4_mode == mode
    assert 0.005 < error(layer(x), exact(layer, weight, x, patches)) < 1.3 * plain + 0.01
    found = layer(x, activation="gelu_tanh")
    activated = torch.nn.functional.gelu(x.float(), approximate="tanh")
    assert error(found, exact(layer, weight, activated, patches)) < 0.06
    assert not added, "nothing goes beside the product"


def test_in_fp8_mode_few_rows_have_the_lora_in_the_layer_s_dtype(monkeypatch):
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")
    layer, weight = build(48, 64, mode="fp8")
    patches = patches_of("three", 48, 64)
    put(layer, patches)
    for tokens in (5, 17, 100):
        x = torch.randn(tokens, 64).bfloat16()
        assert error(layer(x), exact(layer, weight, x, patches)) < TOLERANCE[torch.bfloat16]
        activated = torch.nn.functional.gelu(x.float(), approximate="tanh")
        assert error(layer(x, activation="gelu_tanh"), exact(layer, weight, activated, patches)) < 0.012


@pytest.mark.parametrize("shape", [(64, 256), (129, 48)], ids=str)
@pytest.mark.parametrize("tokens", [5, 100])
def test_adapters_in_8_bits_are_off_by_1_percent_of_the_change(shape, tokens):
    layer, weight = build(*shape)
    patches = patches_of("three", *shape)
    branch = put(layer, patches, packed=True)
    assert branch.packed and branch.down.dtype == branch.up.dtype == torch.int8
    rank = sum(branch.ranks)
    assert branch.nbytes == lora.adapter_bytes(shape, branch.ranks, packed=True) < 1.5 * rank * sum(shape)
    x = torch.randn(tokens, shape[1]).bfloat16()
    wanted = exact(layer, weight, x, patches)
    change_only = x.float() @ change(patches).t()
    assert error(layer(x), wanted) < TOLERANCE[torch.bfloat16] + 0.016 * (change_only.norm() / wanted.norm()).item()


@pytest.mark.parametrize("packed", [False, True])
def test_another_strength_moves_no_factor_and_gives_what_a_new_branch_would(packed):
    layer, weight = build(48, 64)
    patches = patches_of("three", 48, 64)
    branch = put(layer, patches, packed)
    x = torch.randn(40, 64).bfloat16()
    places = [part.data_ptr() for part in branch.tensors]
    factors = branch.down.clone(), branch.up.clone()
    for strengths in ((0.5, 0.25, -3.0), (1e-3, 1.0, 2.0), (-0.7, 1.5, 1.0)):
        changed = [(strength, *patch[1:]) for strength, patch in zip(strengths, patches, strict=True)]
        terms = lora.terms_of(changed)
        assert branch.is_of(terms, CPU, packed)
        branch.set_strengths(terms)
        new = lora.make_branch(layer, terms, CPU, packed)
        assert all(torch.equal(one, other) for one, other in zip(branch.tensors, new.tensors, strict=True))
        assert error(layer(x), exact(layer, weight, x, changed)) < 0.03
    assert places == [part.data_ptr() for part in branch.tensors]
    assert torch.equal(branch.down, factors[0]) and torch.equal(branch.up, factors[1])


@pytest.mark.parametrize("packed", [False, True])
def test_the_peaks_bound_the_rows_that_are_multiplied(packed):
    layer, _ = build(48, 64)
    branch = put(layer, patches_of("three", 48, 64), packed)
    down, _ = lora.factors(branch, torch.zeros(1, 64).bfloat16())
    assert (down.float().abs().amax(1) <= branch.peak).all()
    assert (branch.peak <= 1.1 * down.float().abs().amax(1) + 1e-6).all()


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)], ids=str)
def test_a_rank_beyond_the_layer_s_rows_or_columns_is_narrowed_to_them(shape):
    layer, weight = build(*shape)
    patches = [(0.8, adapter(*shape, 24, 12.0), 1.0, None, None), (0.5, adapter(*shape, 3), 1.0, None, None)]
    branch = put(layer, patches)
    assert branch.ranks == (4, 3) and branch.nbytes == lora.adapter_bytes(shape, (24, 3))
    x = torch.randn(40, shape[1]).bfloat16()
    assert error(layer(x), exact(layer, weight, x, patches)) < TOLERANCE[torch.bfloat16]


def test_a_lora_on_a_layer_with_awq_smoothing_acts_on_the_input_before_it():
    smoothing = torch.rand(64) + 0.5
    layer, weight = build(48, 64, pre_quant_scale=smoothing)
    patches = patches_of("one", 48, 64)
    put(layer, patches)
    for tokens in (5, 600):
        x = torch.randn(tokens, 64).bfloat16()
        scaled = (x * smoothing.bfloat16()).float()
        wanted = torch.nn.functional.linear(scaled, weight, layer.bias.float()) + x.float() @ change(patches).t()
        assert error(layer(x), wanted) < 8e-3


def test_an_input_that_asks_for_gradients_goes_to_the_host_and_gets_those_of_the_lora_too():
    layer, weight = build(24, 32)
    patches = patches_of("three", 24, 32)
    put(layer, patches)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    assert error(x.grad, (weight + change(patches)).sum(0).expand(3, 32)) < 0.01


def test_without_a_branch_nothing_of_the_result_changes_and_with_none_left_it_comes_back():
    layer, _ = build(24, 32)
    x = torch.randn(40, 32).bfloat16()
    before = layer(x)
    put(layer, patches_of("one", 24, 32))
    assert not torch.equal(layer(x), before)
    del layer.nvfp4_lora
    assert torch.equal(layer(x), before)


def test_the_layer_s_own_tensors_and_the_input_stay_as_they_are():
    layer, _ = build(24, 32)
    x = torch.randn(600, 32).bfloat16()
    packed, given = layer.weight._qdata.clone(), x.clone()
    put(layer, patches_of("three", 24, 32))
    layer(x), layer(x[:3])
    assert torch.equal(layer.weight._qdata, packed) and torch.equal(x, given)
    assert layer.state_dict().keys() == {"weight", "weight_scale", "weight_scale_2", "comfy_quant", "bias"}


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (adapter(24, 32, 2, name="lokr"), {}, "it is a lokr"),
        (adapter(24, 32, 2, name="loha"), {}, "it is a loha"),
        (adapter(24, 32, 2, mid=torch.ones(2, 2, 1, 1)), {}, "LoCon"),
        (adapter(24, 32, 2, dora=torch.ones(24, 1)), {}, "DoRA"),
        (adapter(24, 32, 2, reshape=[48, 32]), {}, "changes the weight's shape"),
        (adapter(12, 32, 2), {}, "of another shape, 12 x 32"),
        (adapter(24, 16, 2), {}, "of another shape, 24 x 16"),
        (("diff", (torch.zeros(24, 32),)), {}, "of the kind diff"),
        (("set", (torch.zeros(24, 32),)), {}, "of the kind set"),
        ([(torch.zeros(24, 32), lambda weight, **_: weight)], {}, "of the kind weight"),
        (adapter(24, 32, 2), {"strength_model": 0.5}, "scales the weight"),
        (adapter(24, 32, 2), {"offset": (0, 0, 12)}, "a part of the weight"),
        (adapter(24, 32, 2), {"function": abs}, "a part of the weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_lora_is_refused_with_the_reason_also_beside_plain_ones(value, options, words):
    layer, _ = build(24, 32)
    given = {"strength_model": 1.0, "offset": None, "function": None} | options
    odd = (1.0, value, given["strength_model"], given["offset"], given["function"])
    plain = (1.0, adapter(24, 32, 2), 1.0, None, None)
    assert words in lora.obstacle(layer, [odd])
    assert words in lora.obstacle(layer, [plain, odd])
    assert lora.obstacle(layer, [plain]) == ""


def test_layers_in_fp4_mode_and_of_other_formats_are_refused_but_for_hooks():
    layer, _ = build(24, 32)
    patches = patches_of("one", 24, 32)
    for mode, words in (("fp4", "FP4"), (None, "not NVFP4")):
        layer.nvfp4_mode = mode
        assert words in lora.obstacle(layer, patches)
        assert lora.obstacle(layer, patches, hook=True) == ""


def test_no_rank_is_refused_for_the_memory_it_takes():
    layer, _ = build(16, 16)
    layer.in_features = layer.out_features = 4096
    shapes = (torch.empty(4096, 4000, device="meta"), torch.empty(4000, 4096, device="meta"))
    huge = (1.0, Adapter("lora", (*shapes, None, None, None, None)), 1.0, None, None)
    assert lora.obstacle(layer, [huge, huge]) == ""


def test_the_largest_adapters_are_packed_until_all_fit_the_budget():
    layers = {"small": ((64, 64), [8]), "large": ((256, 256), [32]), "middle": ((128, 128), [16, 16])}
    whole = {key: lora.adapter_bytes(*layer) for key, layer in layers.items()}
    eighth = {key: lora.adapter_bytes(*layer, packed=True) for key, layer in layers.items()}
    assert whole["large"] == 2 * 32 * 512 + 4 * 32 and eighth["large"] == 32 * 512 + 4 * (32 * 2 + 256)
    total = sum(whole.values())
    assert lora.to_pack(layers, total) == set()
    assert lora.to_pack(layers, total - 1) == {"large"}
    assert lora.to_pack(layers, total - whole["large"] + eighth["large"] - 1) == {"large", "middle"}
    assert lora.to_pack(layers, 0) == set(layers)
    assert lora.to_pack({"one": ((16, 16), [1])}, 0) == set(), "its scales would take more than they save"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tokens", [3, 300])
def test_torch_compile_sees_one_graph_without_a_break(tokens):
    layer, _ = build(24, 32)
    put(layer, patches_of("one", 24, 32))
    x = torch.randn(tokens, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_strength_needs_no_new_graph():
    layer, weight = build(24, 32)
    x = torch.randn(7, 32).bfloat16()
    seen = []
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=lambda graph, _: seen.append(1) or graph.forward, fullgraph=True)
        for strength in (1.0, -0.4):
            patches = [(strength, adapter(24, 32, 4), 1.0, None, None)]
            put(layer, patches)
            assert error(compiled(x), exact(layer, weight, x, patches)) < TOLERANCE[torch.bfloat16]
    assert seen == [1]
