# SPDX-License-Identifier: Apache-2.0
"""host/compute/linear.py on the stubbed host: what the fast path takes and computes, and what it leaves to the host."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from nvfp4_video.host.compute import linear, matmul
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.format import OUTPUT_DTYPES

CPU = torch.device("cpu")
NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
FP8 = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


def random_record(rows: int, cols: int):
    return reference.quantize(torch.randn(rows, cols))


def build(record, bias: bool = True, compute_dtype=torch.bfloat16, backend: str = "auto", **tensors) -> torch.nn.Module:
    """A Linear with this weight, loaded as the host loads it; ``tensors``: further tensors of the layer."""
    rows, cols = record.shape
    operations = linear.weight_only_operations(compute_dtype, CPU, backend)
    layer = operations.Linear(cols, rows, bias=bias, dtype=compute_dtype)
    state = {"weight": matmul.wrap(record), "comfy_quant": NVFP4} | tensors
    if bias:
        state["bias"] = torch.randn(rows, dtype=compute_dtype)
    layer.load_state_dict(state)
    return layer


def expected(layer, record, x: torch.Tensor) -> torch.Tensor:
    """What the layer must give: the decoded weight and the bias in the input's dtype, one matmul."""
    weight = reference.dequantize(record, x.dtype)
    return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


@pytest.fixture
def layer_and_host_calls(monkeypatch: pytest.MonkeyPatch):
    """A 24x32 layer, its record, and a list that grows by the input of every call that goes to the host's forward."""
    record = random_record(24, 32)
    layer = build(record)
    calls = []
    host_linear = type(layer).__bases__[0]
    host_forward = host_linear.forward
    monkeypatch.setattr(host_linear, "forward", lambda self, x: calls.append(x) or host_forward(self, x))
    return layer, record, calls


@pytest.mark.parametrize("shape", [(16, 16), (1, 16), (129, 48), (4, 128), (30, 112)], ids=str)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_a_linear_equals_a_matmul_with_the_decoded_weight(shape, dtype):
    record = random_record(*shape)
    layer = build(record)
    x = torch.randn(5, shape[1], dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected(layer, record, x))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_inputs_of_any_rank_keep_their_leading_dimensions(lead, layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    x = torch.randn(*lead, 32, dtype=torch.bfloat16)
    found = layer(x)
    assert found.shape == (*lead, 24)
    assert torch.equal(found, expected(layer, record, x))
    assert calls == []


def test_a_non_contiguous_input_gives_what_its_copy_gives(layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    x = torch.randn(32, 7, dtype=torch.bfloat16).t()
    torch.testing.assert_close(layer(x), expected(layer, record, x.contiguous()), rtol=0.02, atol=0.02)
    assert calls == []


def test_a_layer_without_a_bias_adds_none():
    record = random_record(16, 32)
    layer = build(record, bias=False)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer.bias is None
    assert torch.equal(layer(x), expected(layer, record, x))


@pytest.mark.parametrize("stored", OUTPUT_DTYPES, ids=str)
def test_a_bias_of_another_dtype_is_cast_to_the_input_s(stored, layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    layer.bias = torch.nn.Parameter(torch.randn(24, dtype=stored), requires_grad=False)
    for dtype in OUTPUT_DTYPES:
        x = torch.randn(3, 32, dtype=dtype)
        assert torch.equal(layer(x), expected(layer, record, x))
    assert calls == []


def test_awq_smoothing_multiplies_the_input_first():
    record = random_record(16, 32)
    smoothing = torch.rand(32) + 0.5
    layer = build(record, pre_quant_scale=smoothing)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), expected(layer, record, x * smoothing.to(torch.bfloat16)))
    assert not torch.equal(layer(x), expected(layer, record, x))


def test_weight_functions_are_the_host_s_work_and_taking_them_off_restores_the_output(layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    plain = layer(x)
    layer.weight_function = [lambda weight: 2 * weight]
    doubled = layer(x)
    layer.weight_function = []
    assert torch.equal(layer(x), plain)
    assert len(calls) == 1
    bias = layer.bias.to(x.dtype)
    torch.testing.assert_close(doubled - bias, 2 * (plain - bias), rtol=0.02, atol=0.2)


def test_bias_functions_are_the_host_s_work(layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    layer.bias_function = [torch.zeros_like]
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    layer_without = expected(layer, record, x) - layer.bias
    torch.testing.assert_close(layer(x), layer_without, rtol=0.02, atol=0.2)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["weight_lowvram_function", "bias_lowvram_function"])
def test_a_patch_that_waits_for_the_offloaded_weight_is_the_host_s_work(name, layer_and_host_calls):
    layer, _, calls = layer_and_host_calls
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    setattr(layer, name, lambda value: value)
    layer(x)
    assert len(calls) == 1
    setattr(layer, name, None)
    layer(x)
    assert len(calls) == 1


def test_only_an_input_that_asks_for_gradients_goes_to_the_host(layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    x = torch.randn(3, 32, dtype=torch.float32, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 1
    weight = reference.dequantize(record, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 32), rtol=0.02, atol=0.02)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer(x.detach())
    assert len(calls) == 1


def test_inputs_of_other_dtypes_and_classes_go_to_the_host(layer_and_host_calls, monkeypatch: pytest.MonkeyPatch):
    layer, _, calls = layer_and_host_calls
    monkeypatch.setattr(type(layer).__bases__[0], "forward", lambda self, x: calls.append(x))
    layer(torch.zeros(3, 32, dtype=torch.float64))
    layer(torch.zeros(3, 32, dtype=torch.float8_e4m3fn))
    layer(torch.nn.Parameter(torch.zeros(3, 32), requires_grad=False))
    layer(QuantizedTensor.from_float(torch.randn(16, 32, dtype=torch.bfloat16), matmul.LAYOUT))
    assert len(calls) == 4


def test_layers_that_are_not_nvfp4_go_to_the_host(layer_and_host_calls):
    layer, _, calls = layer_and_host_calls
    operations = type(layer)
    weight = torch.randn(24, 32)
    plain, fp8 = operations(32, 24, bias=False), operations(32, 24, bias=False)
    plain.load_state_dict({"weight": weight})
    fp8.load_state_dict(
        {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5), "comfy_quant": FP8}
    )
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(plain(x), torch.nn.functional.linear(x, weight.bfloat16()))
    decoded = (weight.to(torch.float8_e4m3fn).float() * 0.5).bfloat16()
    torch.testing.assert_close(fp8(x), torch.nn.functional.linear(x, decoded), rtol=0.02, atol=0.05)
    assert len(calls) == 2


def test_a_weight_that_was_patched_into_a_plain_tensor_goes_to_the_host(layer_and_host_calls):
    layer, _, calls = layer_and_host_calls
    layer.weight = torch.nn.Parameter(torch.ones(24, 32, dtype=torch.bfloat16), requires_grad=False)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert len(calls) == 1


def test_a_managed_weight_is_asked_for_in_its_own_dtype_and_given_back(layer_and_host_calls, monkeypatch):
    layer, record, calls = layer_and_host_calls
    layer._v = object()  # what DynamicVRAM leaves in a layer that it owns
    cast, log = comfy.ops.cast_bias_weight, []

    def recorded(module, **options):
        log.append(options)
        return *cast(module, **options)[:2], "handle"

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", recorded)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *given: log.append(given[3]))
    x = torch.randn(3, 32, dtype=torch.float32)
    assert torch.equal(layer(x), expected(layer, record, x))
    options, given_back = log
    assert options["dtype"] == torch.bfloat16, "any other dtype makes the host dequantize"
    assert options["bias_dtype"] == torch.float32
    assert (options["device"], options["offloadable"]) == (CPU, True)
    assert given_back == "handle"
    assert calls == []


def test_a_managed_weight_that_comes_back_dequantised_is_used_as_it_is(layer_and_host_calls, monkeypatch):
    layer, record, calls = layer_and_host_calls
    layer._v = object()
    weight = reference.dequantize(record)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda module, **_: (weight, layer.bias, None))
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), expected(layer, record, x))
    assert calls == []


def test_a_managed_weight_is_given_back_even_if_the_matmul_fails(layer_and_host_calls, monkeypatch: pytest.MonkeyPatch):
    layer, _, _ = layer_and_host_calls
    layer._v = object()
    given_back = []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *given: given_back.append(given))
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 31, dtype=torch.bfloat16))
    assert len(given_back) == 1


def test_a_weight_that_the_prefetch_has_made_resident_is_used_as_it_is(layer_and_host_calls, monkeypatch):
    layer, _, calls = layer_and_host_calls
    resident = random_record(24, 32)
    layer._v, layer._v_weight = object(), matmul.wrap(resident)
    layer._v_bias = torch.randn(24, dtype=torch.bfloat16)
    layer._prefetch = {"signature": object(), "resident": True}
    cast = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *given, **options: cast.append(given))
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    weight = reference.dequantize(resident)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer._v_bias))
    assert calls == cast == []


@pytest.mark.parametrize("prefetch", [None, {"signature": None, "resident": False}, {}, ("another", "host's", "books")])
def test_a_prefetch_that_has_not_the_weight_yet_leaves_it_to_the_host_to_bring(prefetch, layer_and_host_calls):
    layer, record, calls = layer_and_host_calls
    layer._v, layer._v_weight = object(), matmul.wrap(random_record(24, 32))  # out of date
    layer._prefetch = prefetch
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), expected(layer, record, x))
    assert calls == []


def test_the_user_can_interrupt_while_weights_are_streamed(layer_and_host_calls):
    layer, _, calls = layer_and_host_calls
    layer._v = object()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        layer(torch.randn(3, 32, dtype=torch.bfloat16))
    assert calls == []


def test_the_backend_of_the_loader_reaches_the_kernel():
    record = random_record(16, 16)
    x = torch.randn(1, 16, dtype=torch.bfloat16)
    layer = build(record, backend="torch")
    assert torch.equal(layer(x), expected(layer, record, x))
    with pytest.raises(ValueError, match="triton backend cannot run: .* on cpu"):
        build(record, backend="triton")(x)


def test_a_host_with_fp4_arithmetic_is_told_to_leave_activations_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfy.model_management, "supports_nvfp4_compute", lambda device=None: True)
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    operations = linear.weight_only_operations(torch.bfloat16, CPU)
    assert set(operations._disabled) == {"nvfp4"}
    assert build(random_record(16, 16))._full_precision_mm


def test_wrapping_shows_the_logical_shape_and_copies_nothing():
    record = random_record(30, 112)
    wrapped = matmul.wrap(record)
    assert wrapped.shape == (30, 112)
    assert wrapped._qdata.data_ptr() == record.packed.data_ptr()
    assert wrapped._params.block_scale.data_ptr() == record.block_scale.data_ptr()


def test_loading_copies_nothing_and_saving_gives_back_the_same_bytes():
    record = random_record(30, 112)
    layer = build(record, input_scale=torch.tensor(0.25))
    assert layer.weight._qdata.data_ptr() == record.packed.data_ptr()
    saved = layer.state_dict()
    assert saved.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant", "bias"}
    assert torch.equal(saved["weight"], record.packed)
    assert torch.equal(saved["weight_scale"].view(torch.uint8), record.block_scale.view(torch.uint8))
    assert saved["weight_scale_2"] == record.global_scale
    assert bytes(saved["comfy_quant"].tolist()) == b'{"format": "nvfp4"}'


def test_a_weight_of_another_layer_s_size_is_refused_with_both_sizes():
    operations = linear.weight_only_operations(torch.bfloat16, CPU)
    model = torch.nn.ModuleDict({"to_q": operations.Linear(64, 24, bias=False)})
    state = {"to_q.weight": matmul.wrap(random_record(24, 32)), "to_q.comfy_quant": NVFP4}
    with pytest.raises(ValueError, match=r"layer to_q: .*\(32, 32\).*expect.*\(24, 64\)"):
        model.load_state_dict(state)


def test_what_the_host_reads_of_a_layer_is_probed(monkeypatch: pytest.MonkeyPatch):
    assert linear.supports("pre_quant_scale")
    older = QUANT_ALGOS["nvfp4"] | {"parameters": {"weight_scale", "weight_scale_2", "input_scale"}}
    monkeypatch.setitem(QUANT_ALGOS, "nvfp4", older)
    assert not linear.supports("pre_quant_scale")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_sees_one_graph_without_a_break(layer_and_host_calls):
    layer, record, _ = layer_and_host_calls
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected(layer, record, x))
