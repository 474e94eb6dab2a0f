# SPDX-License-Identifier: Apache-2.0
"""Few rows of input: the fused kernel against an FP64 product, with each way of dividing the work."""

from __future__ import annotations

import dataclasses

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import PackedWeight

CASES = [
    *[((128, 256), 1, torch.bfloat16), ((128, 256), 16, torch.float16)],  # no edge
    *[((129, 48), 9, torch.bfloat16), ((30, 112), 8, torch.float16), ((1, 16), 1, torch.bfloat16)],  # edges of rows
    *[((16, 1040), 16, torch.float16), ((16, 16), 16, torch.bfloat16)],  # of columns, over several steps and one
]
# (ROWS, SPLIT); the last shape has edges.
DIVISIONS = [
    *[((16, 1), (128, 512), 1, torch.bfloat16), ((16, 2), (128, 512), 11, torch.float16)],
    *[((64, 1), (128, 512), 1, torch.float16), ((32, 4), (128, 512), 11, torch.bfloat16)],
    *[((16, 3), (128, 384), 2, torch.bfloat16), ((32, 2), (30, 112), 3, torch.float16)],
]
# What is left when the exact sum is rounded once: at most half a unit in the last place.
TOLERANCE = {torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01, torch.float32: 1e-6}
generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.tensor_core_kernels, params=harness.implementations())


def exact(x: torch.Tensor, record: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """FP64 product with the decoded weight."""
    unscaled = dataclasses.replace(record, global_scale=torch.ones(()))
    weight = reference.dequantize(unscaled, torch.float32).double()
    out = x.double() @ (weight * record.global_scale.double()).t()
    return out if bias is None else out + bias.double()


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


def random_case(shape, rows, dtype, generator):
    record = reference.quantize(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    return record, x, torch.randn(shape[0], generator=generator).to(dtype)


@pytest.mark.parametrize(("shape", "rows", "dtype"), CASES, ids=str)
def test_the_result_is_the_exact_one_rounded_once(shape, rows, dtype, kernels, generator):
    record, x, bias = random_case(shape, rows, dtype, generator)
    found = kernels.call("gemv", x, record, bias).cpu()
    assert (found.dtype, found.shape) == (dtype, (rows, shape[0]))
    assert relative(found, exact(x, record, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("config", "shape", "rows", "dtype"), DIVISIONS, ids=str)
def test_every_division_of_the_work_gives_it_and_the_same_bits_twice(config, shape, rows, dtype, generator):
    triton_gemv = pytest.importorskip("nvfp4_video.kernels.triton.gemv")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record, x, _ = random_case(shape, rows, dtype, generator)
    run = triton_gemv.prepare(shape, dtype, device, config)
    arguments = [part.to(device) for part in (x, *record.parts)]
    found, again = run(*arguments).cpu(), run(*arguments).cpu()
    assert relative(found, exact(x, record, None)) < TOLERANCE[dtype]
    assert torch.equal(found, again)


def test_it_is_nearer_to_the_exact_product_than_a_matmul_with_rounded_weights(generator):
    record, x, _ = random_case((256, 512), 8, torch.bfloat16, generator)
    right = exact(x, record, None)
    weight = reference.dequantize(record)
    rounded = x.double() @ weight.double().t()
    assert relative(reference.gemv(x, record), right) < 2.5e-3
    assert relative(rounded.bfloat16(), right) > relative(reference.gemv(x, record), right)


def test_all_codes_and_scales_count_in_full(kernels):
    """One column at a time: each code of each place of a word, under subnormal and largest scales."""
    for value in (2.0**-9, 7 * 2.0**-9, 0.015625, 1.125, 3.25, 448.0):
        codes = torch.arange(16 * 16).remainder(16).view(16, 16) ^ torch.arange(16).unsqueeze(1)
        packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        scales = torch.zeros(128, 4)
        scales[:16, 0] = value
        record = PackedWeight(packed, reference.swizzle(scales.to(torch.float8_e4m3fn)), torch.tensor(1.0), (16, 16))
        found = kernels.call("gemv", torch.eye(16, dtype=torch.bfloat16), record, None).cpu()
        values = torch.tensor(harness.CODES)[codes] * value
        assert torch.equal(found.float(), values.t())


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
@pytest.mark.parametrize("block", [0, 5, 15])
def test_a_scale_that_is_nan_or_negative_shows_in_its_row_and_nowhere_else(byte, block, kernels, generator):
    if byte != 0x7F and kernels.name == "reference":
        pytest.skip("the reference counts a sign, which no scale of NVFP4 has")
    record, x, _ = random_case((128, 256), 3, torch.bfloat16, generator)
    record.block_scale.view(torch.uint8).view(-1)[block // 4 * 512 + 16 * 9 + block % 4] = byte  # row 9
    found = kernels.call("gemv", x, record, None).cpu()
    assert found.isnan().sum(0).tolist() == [0] * 9 + [3] + [0] * 118


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 4)], ids=str)
def test_leading_dimensions_are_kept(lead, kernels, generator):
    record, _, bias = random_case((48, 80), 1, torch.bfloat16, generator)
    x = torch.randn(*lead, 80, generator=generator).bfloat16()
    found = kernels.call("gemv", x, record, bias).cpu()
    assert found.shape == (*lead, 48)
    assert relative(found, exact(x, record, bias)) < TOLERANCE[torch.bfloat16]


def test_more_rows_and_other_dtypes_are_refused_by_the_kernel(generator):
    triton_gemv = pytest.importorskip("nvfp4_video.kernels.triton.gemv")
    record, x, _ = random_case((16, 32), 17, torch.bfloat16, generator)
    with pytest.raises(ValueError, match=r"found x \(17, 32\); expected at most 16 rows of 32"):
        triton_gemv.gemv(x, record)
    with pytest.raises(ValueError, match="found torch.float32"):
        triton_gemv.gemv(x[:1].float(), record)
    with pytest.raises(ValueError, match="do not belong to a weight of shape"):
        triton_gemv.gemv(x[:1, :16], dataclasses.replace(record, shape=(16, 16)))


def test_where_the_kernel_cannot_run_the_weight_is_dequantised(generator):
    record, x, bias = random_case((48, 80), 2, torch.bfloat16, generator)
    cpu = torch.device("cpu")
    assert dispatch.prepare("gemv", (48, 80), torch.bfloat16, cpu) is None
    right = reference.linear(x, record, bias)
    assert torch.equal(dispatch.gemv(x, record, bias), right)


@pytest.mark.parametrize(
    ("shape", "split"),
    [((16384, 4096), 4), ((4096, 16384), 16), ((4096, 4096), 8), ((15360, 3840), 3), ((3840, 15360), 12)],
)
def test_programs_multiply_by_any_divisor_until_the_gpu_is_full(shape, split):
    plan = pytest.importorskip("nvfp4_video.kernels.triton.gemv").plan
    assert plan(shape, 132 * 20) == (16, split)  # the fastest of all on an H200, which has 132 multiprocessors
    assert plan(shape, 132 * 15)[1] <= split and plan(shape, 1) == (16, 1)


def test_a_program_keeps_three_steps_at_least():
    plan = pytest.importorskip("nvfp4_video.kernels.triton.gemv").plan
    assert plan((2048, 3840), 10**6) == (16, 10) and plan((32, 16), 10**6) == (16, 1)


def test_a_fused_kernel_that_is_wrong_on_this_gpu_is_not_used(monkeypatch, caplog):
    wrong = lambda shape, dtype, device: lambda x, *_: x.new_ones(len(x), shape[0])  # noqa: E731
    right = lambda shape, dtype, device: lambda x, *p: dispatch.linear(x, PackedWeight(*p[:3], shape), p[3], "torch")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert not dispatch._sound(wrong, torch.bfloat16, torch.device("cpu"))
    assert "dequantized instead" in caplog.text
    assert dispatch._sound(right, torch.bfloat16, torch.device("cpu"))
