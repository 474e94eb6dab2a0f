# SPDX-License-Identifier: Apache-2.0
"""W4A8: the conversions of both operands and the Linear they make, by reference and by Triton."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from kernel_harness import random_record, scalar
from nvfp4_video.kernels import backends, dispatch, fp8, reference
from nvfp4_video.kernels.format import OUTPUT_DTYPES, PackedWeight, block_scale_shape, packed_shape, swizzle

SHAPES = [(16, 16), (1, 16), (1, 1), (129, 48), (30, 112), (48, 2064), (0, 32)]
generator = pytest.fixture(harness.fresh_generator)


@pytest.fixture(params=harness.implementations())
def kernels(request, monkeypatch):
    """Each implementation, over poisoned memory."""
    found = harness.guarded_kernels(request, monkeypatch)
    if (found.name, found.device) == ("triton", "cuda") and fp8.obstacle(torch.device("cuda", 0)):
        pytest.skip(fp8.obstacle(torch.device("cuda", 0)))
    return found


def one_block(codes: list[int], scale: float) -> PackedWeight:
    """A 1 x 16 matrix of these codes with one block scale and global scale 1."""
    packed = torch.zeros(packed_shape((1, 16)), dtype=torch.uint8)
    packed[0] = torch.tensor([codes[i] << 4 | codes[i + 1] for i in range(0, 16, 2)], dtype=torch.uint8)
    scales = torch.zeros(block_scale_shape((1, 16)))
    scales[0, 0] = scale
    return PackedWeight(packed, swizzle(scales.to(torch.float8_e4m3fn)), scalar(1.0), (1, 16))


def test_all_codes_under_a_power_of_two_scale_are_exact(kernels):
    weight, scale = (t.cpu() for t in kernels.call("to_fp8", one_block(list(range(16)), 2.0)))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert scale[0] == 2.0**-4, "6 * 2 becomes 192"
    assert torch.equal(weight[0].float(), values * 32)
    assert weight.view(torch.uint8)[0, 8] == 0x80, "the sign of -0.0 is kept"
    assert (weight.view(torch.uint8)[1:] == 0).all() and (scale[1:] == 1).all(), "padding"


def test_a_product_of_five_bits_is_rounded_to_the_nearest_even(kernels):
    weight, scale = (t.cpu() for t in kernels.call("to_fp8", one_block([3] * 8 + [7] * 8, 1.125)))
    # 1.5 * 1.125 = 1.6875 lies halfway between 1.625 and 1.75, whose last bit is even; 6.75 likewise.
    assert (weight[0].float() * scale[0]).unique().tolist() == [1.75, 7.0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_fp8_equals_the_reference_bit_for_bit(shape, kernels, generator):
    record = random_record(shape, generator)
    weight, scale = (t.cpu() for t in kernels.call("to_fp8", record))
    right, right_scale = reference.to_fp8(record)
    harness.assert_same_bits(weight, right)
    harness.assert_same_bits(scale, right_scale)


def test_the_rescale_adds_no_error_to_the_rounding_of_the_format(generator):
    rows = torch.logspace(-6, 6, 32).unsqueeze(1) * torch.randn(32, 256, generator=generator)
    record = reference.quantize(rows)
    exact = reference.dequantize(record, torch.float32)
    weight, scale = reference.to_fp8(record)
    assert weight.float().isfinite().all() and weight.float().abs().max() <= 360
    error = (weight.float() * scale.unsqueeze(1) - exact).abs()
    assert (error <= exact.abs() / 16 + exact.abs().amax(1, keepdim=True) * 2.0**-17).all()


ROWS = [
    *[((1, 16), torch.bfloat16), ((3, 17), torch.float16), ((3, 4096), torch.float32), ((1, 1), torch.float16)],
    *[((2, 17000), torch.bfloat16), ((0, 32), torch.float16), ((7, 0), torch.float32)],  # two steps; nothing at all
]


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_rows_are_quantised_as_the_reference_does_it(shape, dtype, kernels, generator):
    x = (torch.randn(shape, generator=generator) * torch.logspace(-9, 3, max(shape[0], 1))[: shape[0], None]).to(dtype)
    if shape[0] > 2 and shape[1] > 4:
        x[0] = 0
        x[1, 3], x[2, 4] = torch.nan, torch.inf
    found, scale = (t.cpu() for t in kernels.call("quantize_rows", x))
    right, right_scale = reference.quantize_rows(x)
    harness.assert_same_bits(found, right)
    harness.assert_same_bits(scale, right_scale)
    assert found.shape[1] % 16 == 0


@pytest.mark.parametrize(("shape", "dtype"), [*ROWS[:3], ROWS[4]], ids=str)
def test_gelu_on_the_way_is_gelu_before_it_but_for_the_last_bit_of_some(shape, dtype, kernels, generator):
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    found, scale = (t.cpu() for t in kernels.call("quantize_rows", x, "gelu_tanh"))
    right, right_scale = reference.quantize_rows(torch.nn.functional.gelu(x.double(), approximate="tanh").float())
    torch.testing.assert_close(scale, right_scale, rtol=1e-5, atol=0)
    differ = found.float() != right.float()
    assert differ.float().mean() < 1e-3 or differ.sum() <= 1
    torch.testing.assert_close(found.float(), right.float(), rtol=2**-3 * 1.01, atol=2**-9 * 1.01)


def test_an_activation_that_does_not_exist_is_refused(generator):
    x = torch.randn(2, 16, generator=generator)
    with pytest.raises(ValueError, match="unknown activation 'relu'; expected one of"):
        reference.quantize_rows(x, "relu")
    triton_rows = pytest.importorskip("nvfp4_video.kernels.triton.quantize_rows")
    with pytest.raises(ValueError, match="unknown activation 'relu'; expected one of"):
        triton_rows.quantize_rows(x, "relu")


def test_what_several_layers_take_is_quantised_once_a_pass(generator):
    shared, calls = fp8.SharedRows(), []

    def quantize(x):
        calls.append(x)
        return len(calls)

    x, context = torch.randn(2, 16, generator=generator), torch.randn(2, 16, generator=generator)
    first, middle, last = shared.FIRST, shared.MIDDLE, shared.LAST
    assert [shared.get(place, x, quantize) for place in (first, middle, last)] == [1, 1, 1], "self-attention"
    assert [shared.get(place, x, quantize) for place in (first, middle, last)] == [2, 2, 2], "the tensor may be new"
    assert [shared.get(p, t, quantize) for p, t in ((first, x), (middle, context), (last, context))] == [3, 4, 4]
    assert not hasattr(context, "_nvfp4_rows")
    other = fp8.SharedRows()
    shared.get(first, context, quantize)
    assert other.get(middle, context, quantize) == 6, "another attention's"


def test_the_largest_number_of_a_row_becomes_448_and_comes_back(generator):
    x = torch.randn(9, 40, generator=generator)
    quantized, scale = reference.quantize_rows(x)
    assert (quantized.float().abs().amax(1) == 448).all()
    torch.testing.assert_close((quantized.float() * scale)[:, :40], x, rtol=2**-4, atol=1e-3)
    assert (quantized.view(torch.uint8)[:, 40:] == 0).all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_linear_fp8_is_the_product_of_the_rounded_operands(lead, dtype, generator):
    record = reference.quantize(torch.randn(40, 80, generator=generator))
    x, bias = torch.randn(*lead, 80, generator=generator).to(dtype), torch.randn(40, generator=generator)
    found = dispatch.linear_fp8(x, record, bias)
    weight, weight_scale = reference.to_fp8(record)
    quantized, scale = reference.quantize_rows(x.reshape(-1, 80))
    right = (quantized.double() * scale) @ (weight.double() * weight_scale.unsqueeze(1)).t()
    right = (right[:, :40] + bias).reshape(*lead, 40)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=2e-2)


def test_linear_fp8_stays_near_the_weight_only_result(generator):
    record = reference.quantize(torch.randn(64, 512, generator=generator))
    x = torch.randn(33, 512, generator=generator)
    exact = reference.linear(x, record)
    error = (dispatch.linear_fp8(x, record) - exact).norm() / exact.norm()
    assert 0.005 < error < 0.05, "two roundings to four significand bits"


def test_scaled_mm_and_the_reference_agree(generator):
    record = reference.quantize(torch.randn(48, 64, generator=generator))
    x, bias = torch.randn(20, 64, generator=generator).bfloat16(), torch.randn(48, generator=generator).bfloat16()
    try:
        found = fp8.scaled_mm(*reference.quantize_rows(x), *reference.to_fp8(record), bias, fast=False)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"this torch cannot multiply FP8 row-wise on a CPU: {error}")
    right = reference.linear_fp8(x, record, bias)
    torch.testing.assert_close(found, right, rtol=2**-7, atol=2e-2)


def test_each_refusal_names_its_reason(monkeypatch):
    device = torch.device("cuda", 0)
    assert "the model is on cpu" in fp8.obstacle(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    fp8.obstacle.cache_clear()
    assert fp8.obstacle(device) == "FP8 needs compute capability 8.9, NVIDIA X has 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(backends, "pick_backend", lambda *_: ("torch", "Triton is not installed (x)"))
    fp8.obstacle.cache_clear()
    assert fp8.obstacle(device) == "Triton is not installed (x)"
    monkeypatch.setattr(backends, "pick_backend", lambda *_: ("triton", "runs"))
    monkeypatch.setattr(fp8, "_failure_of_a_trial", lambda device: "torch 2.4 cannot multiply FP8 row-wise here: x")
    fp8.obstacle.cache_clear()
    assert "cannot multiply FP8 row-wise" in fp8.obstacle(device)
    fp8.obstacle.cache_clear()


def test_a_trial_product_is_right_where_torch_can_compute_it():
    reason = fp8._failure_of_a_trial(torch.device("cpu"))
    assert reason == "" or "cannot multiply FP8 row-wise" in reason


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(16, 16), (129, 48), (256, 4096), (32, 2064)], ids=str)
def test_the_gpu_s_linear_equals_the_product_of_the_rounded_operands(shape, generator):
    if reason := fp8.obstacle(torch.device("cuda", 0)):
        pytest.skip(reason)
    record = reference.quantize(torch.randn(shape, generator=generator))
    x, bias = torch.randn(2, 65, shape[1], generator=generator).bfloat16(), torch.randn(shape[0], generator=generator)
    right = reference.linear_fp8(x.double(), record, bias)
    found = dispatch.linear_fp8(x.cuda(), harness.moved(record, "cuda"), bias.bfloat16().cuda()).cpu()
    assert (found.double() - right).norm() / right.norm() < 4e-3
