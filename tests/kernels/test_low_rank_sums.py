# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors kept in 8 bits, and a packed weight plus a low-rank change in FP8, by reference and by Triton."""

from __future__ import annotations

import kernel_harness as harness
import numpy as np
import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import FACTOR_BLOCK, OUTPUT_DTYPES, FP8Rows, PackedWeight

generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.tensor_core_kernels, params=harness.implementations())

# (N, K), R
FACTORS = [((1, 1), 1), ((3, 128), 17), ((130, 22), 130), ((2, 1100), 128), ((16, 272), 144)]


def by_hand(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Column by column."""
    return torch.stack([values[:, j].float() * scale[:, j // 128] for j in range(values.shape[1])], 1).to(dtype)


@pytest.mark.parametrize(("shape", "rank"), FACTORS, ids=str)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_factors_are_their_bytes_times_their_scales_rounded_once(shape, rank, dtype, kernels, generator):
    given = []
    for rows, cols in ((rank, shape[1]), (shape[0], rank)):
        given.append(torch.randint(-127, 128, (rows, cols), generator=generator, dtype=torch.int8))
        given.append(torch.rand(rows, -(-cols // FACTOR_BLOCK), generator=generator) + 0.1)
    down, up = (part.cpu() for part in kernels.call("unpack_factors", *given, dtype))
    harness.assert_same_bits(down, by_hand(given[0], given[1], dtype))
    harness.assert_same_bits(up, by_hand(given[2], given[3], dtype))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=str)
def test_of_factors_that_are_not_packed_one_is_multiplied_by_a_scale_a_row(source, kernels, generator):
    down, up = torch.randn(5, 300, generator=generator).to(source), torch.randn(7, 5, generator=generator).to(source)
    scale = torch.rand(5, 1, generator=generator)
    found = [part.cpu() for part in kernels.call("unpack_factors", down, scale, up, None, source)]
    harness.assert_same_bits(found[0], (down.float() * scale).to(source))
    harness.assert_same_bits(found[1], up)


def test_scales_of_another_number_are_refused():
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton.unpack_factors import unpack_factors

    down, up = torch.zeros(4, 300, dtype=torch.int8), torch.zeros(9, 4, dtype=torch.int8)
    found = r"scales of \[\(4, 300\), \(4, 2\), \(9, 4\), \(9, 1\)\]; expected .* \(9, 300\)"
    with pytest.raises(ValueError, match=found):
        unpack_factors(down, torch.ones(4, 2), up, torch.ones(9, 1))


def test_a_row_that_dwarfs_others_and_one_of_zeros_are_packed_by_scales_of_their_own(generator):
    values = torch.randn(3, 300, generator=generator)
    values[0] *= 1e6
    values[1, 128:256] *= 1e-6
    values[2] = 0
    packed, scale = reference.pack_factor(values)
    assert packed.shape == (3, 300) and scale.shape == (3, 3) and packed.abs().amax() == 127
    one = torch.ones(1, 3, dtype=torch.int8), torch.ones(1, 1)
    wrong = (reference.unpack_factors(packed, scale, *one, torch.float32)[0] - values).abs()
    assert (wrong <= scale.repeat_interleave(128, 1)[:, :300] * 0.501).all() and not packed[2].any()


SUMS = [
    *[((128, 128), 192, torch.bfloat16), ((64, 128), 64, torch.float16)],  # no edge, in the large and the small tile
    *[((129, 48), 130, torch.bfloat16), ((30, 112), 17, torch.float16), ((1, 16), 1, torch.bfloat16)],
]


def random_case(shape, rank, dtype, generator):
    record = reference.quantize(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    up = torch.randn(shape[0], rank, generator=generator).to(dtype)
    down = (0.2 * torch.randn(rank, shape[1], generator=generator) / (rank * shape[1]) ** 0.5).to(dtype)
    return record, up, down, down.float().abs().amax(1)


def exact(record: PackedWeight, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return reference.dequantize(record, torch.float32).double() + up.double() @ down.double()


@pytest.mark.parametrize(("shape", "rank", "dtype"), SUMS, ids=str)
def test_the_sum_is_rounded_to_e4m3_once_and_never_saturates(shape, rank, dtype, kernels, generator):
    record, up, down, peak = random_case(shape, rank, dtype, generator)
    found, scale = (part.cpu() for part in kernels.call("to_fp8_sum", record, up, down, peak))
    rows, cols = shape
    assert found.shape == (-(-rows // 16) * 16, -(-cols // 16) * 16) and scale.shape == found.shape[:1]
    assert (found.view(torch.uint8)[rows:] == 0).all() and (found.view(torch.uint8)[:, cols:] == 0).all()
    assert (scale[rows:] == 1).all() and (scale.log2() == scale.log2().round()).all(), "powers of two"
    right, scale = exact(record, up, down), scale[:rows, None].double()
    # Half a step of three mantissa bits, or of a subnormal; sums in fp32 move a number over a tie now and then.
    room = right.abs() * (2**-4 + 1e-5) + scale * 2**-10 * 1.01
    assert (right.abs() <= 448 * scale).all()
    assert ((found[:rows, :cols].double() * scale - right).abs() <= room).all()


def test_the_row_scale_is_the_next_power_of_two_of_the_bound(kernels):
    """By hand: one block of code 6 and scale 1 is bounded by 360 / 32 = 11.25, the change by 2 * 3 + 1 * 0.5 = 6.5."""
    packed, block = torch.full((16, 8), 0x77, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    block[0, 0] = 0x38  # E4M3 1.0; the other blocks are zero
    record = PackedWeight(packed, block.view(torch.float8_e4m3fn), harness.scalar(1.0), (1, 16))
    up, down = torch.tensor([[-2.0, 1.0]]).bfloat16(), torch.zeros(2, 16).bfloat16()
    peak = torch.tensor([3.0, 0.5])
    found, scale = (part.cpu() for part in kernels.call("to_fp8_sum", record, up, down, peak))
    assert scale[0] == 2.0**-4, "17.75 / 448 is above 1/32"
    assert (found[0].float() == 6 * 16).all()


@pytest.mark.parametrize("cols", [16, 48, 80, 96])
def test_row_scales_are_the_references_whatever_lies_in_the_padding_of_the_block_scales(cols, kernels, generator):
    record, up, down, peak = random_case((130, cols), 20, torch.bfloat16, generator)
    scales = record.block_scale.view(torch.uint8).clone()
    padding = torch.full_like(scales, 0x7E)
    inside = torch.from_numpy(harness.scale_offset(*np.divmod(np.arange(130 * cols // 16), cols // 16), cols // 16))
    padding.view(-1)[inside] = scales.view(-1)[inside]
    full = PackedWeight(record.packed, padding.view(torch.float8_e4m3fn), record.global_scale, record.shape)
    right = reference.to_fp8_sum(record, up, down, peak)
    for part, expected in zip(kernels.call("to_fp8_sum", full, up, down, peak)[1:], right[1:], strict=True):
        assert torch.equal(part.cpu(), expected)


def test_a_product_with_the_sum_is_that_of_merged_weights_up_to_fp8(generator):
    record, up, down, peak = random_case((48, 80), 24, torch.bfloat16, generator)
    x = torch.randn(2, 33, 80, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16()
    run = dispatch.prepare("linear_fp8_sum", (48, 80), torch.bfloat16, torch.device("cpu"))
    found = run(x, *record.parts, up, down, peak, bias, "gelu_tanh").double()
    activated = torch.nn.functional.gelu(x.double(), approximate="tanh")
    right = torch.nn.functional.linear(activated, exact(record, up, down), bias.double())
    assert 1e-3 < (found - right).norm() / right.norm() < 0.05
    assert dispatch.prepare("linear_fp8_sum", (48, 80), torch.float32, torch.device("cpu")) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_rows_take_the_place_of_the_tensor_that_they_were_made_of(device, generator):
    record, up, down, peak = random_case((48, 80), 24, torch.bfloat16, generator)
    x = torch.randn(2, 33, 80, generator=generator).bfloat16()
    rows = FP8Rows(*(part.to(device) for part in reference.quantize_rows(x.flatten(0, 1))), x.shape)
    run = dispatch.prepare("linear_fp8_sum", (48, 80), torch.bfloat16, torch.device(device))
    parts = [part.to(device) for part in (*record.parts, up, down, peak)]
    found, right = run(rows, *parts), run(x.to(device), *parts)
    assert found.shape == (2, 33, 48) and torch.equal(found, right)
