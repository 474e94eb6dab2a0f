# SPDX-License-Identifier: Apache-2.0
"""W4A8 in INT8: both operands as rows, what their rounding costs, the sums' scales and the Linear they make."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from kernel_harness import random_record, scalar
from nvfp4_video.kernels import backends, dispatch, int8, int8_reference, reference
from nvfp4_video.kernels.format import (
    OUTPUT_DTYPES,
    PackedWeight,
    block_scale_shape,
    packed_shape,
    swizzle,
    unswizzle,
)

SHAPES = [(16, 16), (1, 16), (1, 1), (129, 48), (30, 112), (48, 2064), (0, 32)]
generator = pytest.fixture(harness.fresh_generator)


@pytest.fixture(params=harness.implementations())
def kernels(request, monkeypatch):
    """Each implementation, over poisoned memory."""
    return harness.guarded_kernels(request, monkeypatch)


def test_the_codes_of_a_block_in_steps_of_a_127th_of_the_largest(kernels):
    packed, scales = torch.zeros(packed_shape((1, 16)), dtype=torch.uint8), torch.zeros(block_scale_shape((1, 16)))
    packed[0] = torch.tensor([code << 4 | code + 1 for code in range(0, 16, 2)], dtype=torch.uint8)
    scales[0, 0] = 1.75
    record = PackedWeight(packed, swizzle(scales.to(torch.float8_e4m3fn)), scalar(2.0), (1, 16))
    weight, scale = (t.cpu() for t in kernels.call("to_int8", record))
    # 127 / 6 times 0, 0.5, 1, 1.5, 2, 3, 4, 6 is 0, 10.6, 21.2, 31.75, 42.3, 63.5, 84.7, 127; the tie goes to 64.
    magnitudes = [0, 11, 21, 32, 42, 64, 85, 127]
    assert weight[0].tolist() == magnitudes + [-value for value in magnitudes]
    assert scale[0] == torch.tensor(2.0 * 6 * 1.75) / torch.tensor(127.0)
    assert (weight[1:] == 0).all() and (scale[1:] == 1).all(), "padding"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_int8_equals_the_reference_bit_for_bit(shape, kernels, generator):
    record = random_record(shape, generator)
    rows = packed_shape(shape)[0]
    bits = unswizzle(record.block_scale, rows, packed_shape(shape)[1] // 8).view(torch.uint8)
    bits[: rows // 2] &= 0x7E  # NaN in half of the rows, where scales are random
    record = PackedWeight(record.packed, swizzle(bits).view(torch.float8_e4m3fn), record.global_scale, shape)
    weight, scale = (t.cpu() for t in kernels.call("to_int8", record))
    right, right_scale = int8_reference.to_int8(record)
    harness.assert_same_bits(weight, right)
    harness.assert_same_bits(scale, right_scale)


def test_what_is_not_a_number_in_a_weight_reaches_the_result(generator):
    record = random_record((16, 32), generator)
    bits = swizzle(torch.where(torch.arange(16)[:, None] == 3, 0x7F, 0x38).to(torch.uint8).expand(16, 2))
    record = PackedWeight(record.packed, bits.view(torch.float8_e4m3fn), record.global_scale, record.shape)
    out = dispatch.linear_int8(torch.randn(20, 32, generator=generator), record)
    assert out[:, 3].isnan().all() and out[:, :3].isfinite().all()


@pytest.mark.parametrize(("search", "most"), [("amax", 0.01), ("mse", 0.025)])
def test_the_rounding_to_int8_is_a_hundredth_or_two_of_nvfp4_s_own_error(search, most, generator):
    rows = torch.randn(48, 4096, generator=generator)
    record = reference.quantize(rows, search=search)
    decoded = reference.dequantize(record, torch.float32)
    weight, scale = int8_reference.to_int8(record)
    added = (weight.float() * scale.unsqueeze(1) - decoded).square().sum()
    own = (decoded - rows).square().sum()
    assert 0.004 * own < added < most * own


ROWS = [
    *[((1, 16), torch.bfloat16), ((3, 17), torch.float16), ((3, 4096), torch.float32), ((1, 1), torch.float16)],
    *[((3, 17000), torch.bfloat16), ((0, 32), torch.float16), ((7, 0), torch.float32)],  # two steps; nothing at all
]


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_rows_are_quantised_as_the_reference_does_it(shape, dtype, kernels, generator):
    x = (torch.randn(shape, generator=generator) * torch.logspace(-9, 3, max(shape[0], 1))[: shape[0], None]).to(dtype)
    if shape[0] > 2 and shape[1] > 4:
        x[0] = 0
        x[1, 3], x[2, -1] = torch.nan, torch.inf
    found, scale = (t.cpu() for t in kernels.call("quantize_rows_int8", x))
    right, right_scale = int8_reference.quantize_rows_int8(x)
    harness.assert_same_bits(found, right)
    harness.assert_same_bits(scale, right_scale)
    assert found.shape[1] % 16 == 0
    if shape[0] > 2 and shape[1] > 4:
        assert scale[0] == 1 and scale[1].isnan() and scale[2].isinf(), "INT8 has no NaN, so the scale has it"


@pytest.mark.parametrize(("shape", "dtype"), [*ROWS[:3], ROWS[4]], ids=str)
def test_gelu_on_the_way_is_gelu_before_it_but_for_one_step_of_some(shape, dtype, kernels, generator):
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    found, scale = (t.cpu() for t in kernels.call("quantize_rows_int8", x, "gelu_tanh"))
    activated = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    right, right_scale = int8_reference.quantize_rows_int8(activated)
    torch.testing.assert_close(scale, right_scale, rtol=1e-5, atol=0)
    differ = (found.int() - right.int()).abs()
    assert differ.max() <= 1 and differ.float().mean() < 1e-3 or differ.sum() <= 1


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (5, 16), (3, 1100), (0, 16)], ids=str)
def test_sums_get_their_scales_in_one_rounding(tokens, rows, dtype, kernels, generator):
    sums = torch.randint(-(2**28), 2**28, (tokens, rows + 7), generator=generator, dtype=torch.int32)
    scale, weight_scale = torch.rand(tokens, 1, generator=generator) + 1e-3, torch.rand(rows + 7, generator=generator)
    bias = torch.randn(rows, generator=generator).to(dtype)
    found = kernels.call("scale_sums", sums, scale * 2**-14, weight_scale, None, rows, dtype).cpu()
    harness.assert_same_bits(found, int8_reference.scale_sums(sums, scale * 2**-14, weight_scale, None, rows, dtype))
    found = kernels.call("scale_sums", sums, scale * 2**-28, weight_scale, bias, rows, dtype).cpu()
    exact = sums.double()[:, :rows] * scale.double() * 2**-28 * weight_scale[:rows].double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=max(torch.finfo(dtype).eps, 5e-7), atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_linear_int8_is_the_product_of_the_rounded_operands(lead, dtype, generator):
    record = reference.quantize(torch.randn(40, 80, generator=generator))
    x, bias = torch.randn(*lead, 80, generator=generator).to(dtype), torch.randn(40, generator=generator)
    found = dispatch.linear_int8(x, record, bias)
    weight, weight_scale = int8_reference.to_int8(record)
    quantized, scale = int8_reference.quantize_rows_int8(x.reshape(-1, 80))
    right = (quantized.double() * scale) @ (weight.double() * weight_scale.unsqueeze(1)).t()
    right = (right[:, :40] + bias).reshape(*lead, 40)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=1e-3)


def errors(x: torch.Tensor, record: PackedWeight) -> dict[str, float]:
    """Relative error of a Linear against the decoded weight, by mode."""
    exact = x @ reference.dequantize(record, torch.float32).t()
    found = {"int8": dispatch.linear_int8(x, record), "fp8": dispatch.linear_fp8(x, record)}
    return {mode: float((out - exact).norm() / exact.norm()) for mode, out in found.items()}


def test_int8_is_nearer_than_fp8_without_outliers_and_farther_with_them(generator):
    record = reference.quantize(torch.randn(128, 2048, generator=generator), search="mse")
    x = torch.randn(33, 2048, generator=generator)
    plain = errors(x, record)
    assert plain["int8"] < 0.017 < 0.028 < plain["fp8"] < 0.04
    x[:, torch.randperm(2048, generator=generator)[:8]] *= 50
    outliers = errors(x, record)
    assert outliers["int8"] > 2 * outliers["fp8"] and 0.02 < outliers["fp8"] < 0.04


def test_a_low_rank_change_shares_the_rounding_of_the_weight(generator):
    record = reference.quantize(torch.randn(40, 80, generator=generator))
    up, down = torch.randn(40, 4, generator=generator), torch.randn(4, 80, generator=generator) / 4
    x, peak = torch.randn(33, 80, generator=generator), down.abs().amax(1)
    run = dispatch.prepare("linear_int8_sum", (40, 80), torch.float32, torch.device("cpu"))
    exact = x @ (reference.dequantize(record, torch.float32) + up @ down).t()
    assert (run(x, *record.parts, up, down, peak) - exact).norm() < 0.015 * exact.norm()


def test_each_refusal_names_its_reason(monkeypatch):
    def reason(capability: tuple[int, int], name: str = "NVIDIA X") -> str:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        int8.obstacle.cache_clear()
        return int8.obstacle(torch.device("cuda", 0))

    assert "the model is on cpu" in int8.obstacle(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "pick_backend", lambda *_: ("triton", "runs"))
    monkeypatch.setattr(int8, "_failure_of_a_trial", lambda device: "")
    assert reason((7, 0)) == "INT8 needs compute capability 7.5, NVIDIA X has 7.0"
    assert reason((7, 5), "NVIDIA GeForce GTX 1660 Ti") == "NVIDIA GeForce GTX 1660 Ti has no tensor cores"
    assert reason((7, 5), "Tesla T4") == reason((7, 5), "NVIDIA GeForce RTX 2080 Ti") == reason((8, 6)) == ""
    monkeypatch.setattr(backends, "pick_backend", lambda *_: ("torch", "Triton is not installed (x)"))
    assert reason((8, 6)) == "Triton is not installed (x)"
    monkeypatch.delattr(torch, "_int_mm")
    assert "has no torch._int_mm; update torch" in reason((8, 6))
    int8.obstacle.cache_clear()


def test_a_trial_product_is_right_where_torch_can_compute_it():
    reason = int8._failure_of_a_trial(torch.device("cpu"))
    assert reason == "" or "cannot multiply INT8" in reason


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (129, 48), (256, 4096), (32, 2064), (33, 100)], ids=str)
def test_the_gpu_s_linear_equals_the_product_of_the_rounded_operands(shape, dtype, generator, monkeypatch):
    if reason := int8.obstacle(torch.device("cuda", 0)):
        pytest.skip(reason)
    record = reference.quantize(torch.randn(shape, generator=generator))
    x, bias = torch.randn(2, 65, shape[1], generator=generator), torch.randn(shape[0], generator=generator)
    right = int8_reference.linear_int8(x.to(dtype).double(), record, bias)
    arguments = x.to(dtype).cuda(), harness.moved(record, "cuda"), bias.to(dtype).cuda()
    found = dispatch.linear_int8(*arguments)
    assert (found.cpu().double() - right).norm() / right.norm() < 4e-3
    monkeypatch.setattr(int8, "_MOST_BYTES", 1 << 14)
    parts = int8.prepare(shape, dtype, torch.device("cuda", 0))(arguments[0], *arguments[1].parts, arguments[2])
    harness.assert_same_bits(parts.cpu(), found.cpu())


@pytest.mark.cuda
def test_the_gpu_s_linear_with_a_low_rank_change_is_the_reference_s(generator):
    if reason := int8.obstacle(torch.device("cuda", 0)):
        pytest.skip(reason)
    record = reference.quantize(torch.randn(144, 1040, generator=generator))
    up, down = (torch.randn(size, generator=generator).bfloat16() for size in ((144, 24), (24, 1040)))
    x, peak = torch.randn(65, 1040, generator=generator).bfloat16(), down.abs().amax(1).float()
    right = int8_reference.linear_int8_sum(x, record, up, down, peak).double()
    run = dispatch.prepare("linear_int8_sum", record.shape, x.dtype, torch.device("cuda", 0))
    given = (one.cuda() for one in (x, *record.parts, up, down, peak))
    assert (run(*given).cpu().double() - right).norm() / right.norm() < 5e-3
