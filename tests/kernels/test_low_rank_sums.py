# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors kept in 8 bits, and a packed weight plus a low-rank change in FP8, by reference and by Triton."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import FACTOR_BLOCK, OUTPUT_DTYPES

generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.tensor_core_kernels, params=harness.implementations())

# (N, K), R
FACTORS = [((1, 1), 1), ((3, 128), 17), ((130, 22), 130), ((2, 1100), 128)]


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


def random_case(shape, rank, generator):
    record = reference.quantize(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    up = torch.randn(shape[0], rank, generator=generator).bfloat16()
    down = (0.2 * torch.randn(rank, shape[1], generator=generator) / (rank * shape[1]) ** 0.5).bfloat16()
    return record, up, down


SUMS = [(16, 16), (1, 16), (1, 1), (129, 48), (30, 112), (3, 17000), (0, 32)]  # in one step and in two; nothing at all


@pytest.mark.parametrize("shape", SUMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sum_is_the_reference_s_bit_for_bit(shape, dtype, kernels, generator):
    record = harness.random_record(shape, generator)
    spread = torch.logspace(-9, 3, max(shape[0], 1))[: shape[0], None]
    change = (torch.randn(shape, generator=generator) * spread).to(dtype)
    found, scale = (part.cpu() for part in kernels.call("to_fp8_sum", record, change))
    right, right_scale = reference.to_fp8_sum(record, change)
    harness.assert_same_bits(found, right)
    harness.assert_same_bits(scale, right_scale)


def test_a_sum_is_rounded_to_e4m3_once_and_never_saturates(kernels, generator):
    record, up, down = random_case((144, 80), 24, generator)
    change = (up.float() @ down.float()).bfloat16()
    change[3] *= 1e4
    change[4] = -reference.dequantize(record)[4]
    found, scale = (part.cpu() for part in kernels.call("to_fp8_sum", record, change))
    right = reference.dequantize(record, torch.float32).double() + change.double()
    assert (scale.log2() == scale.log2().round()).all(), "powers of two"
    assert (right.abs() <= 448 * scale[:, None]).all() and (right.abs().amax(1) > 224 * scale).sum() >= 143
    room = right.abs() * 2**-4 + scale[:, None].double() * 2**-10
    assert ((found.double() * scale[:, None].double() - right).abs() <= room).all()


def test_a_change_of_zeros_loses_what_the_conversion_alone_does(kernels, generator):
    """Of a weight whose global scale is a power of two, or the same numbers lie elsewhere between E4M3's."""
    record = reference.quantize(torch.randn(16, 64, generator=generator), search="mse")
    found, scale = (part.cpu() for part in kernels.call("to_fp8_sum", record, torch.zeros(16, 64).bfloat16()))
    right, right_scale = reference.to_fp8(record)
    assert torch.equal(found.float() * scale[:, None], right.float() * right_scale[:, None])


def test_a_change_of_another_shape_is_refused(generator):
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton.to_fp8_sum import to_fp8_sum

    with pytest.raises(ValueError, match=r"found a change of \(4, 16\); the weight has \(4, 32\)"):
        to_fp8_sum(random_case((4, 32), 1, generator)[0], torch.zeros(4, 16))


def test_a_product_with_the_sum_is_that_of_merged_weights_up_to_fp8(generator):
    record, up, down = random_case((48, 80), 24, generator)
    x = torch.randn(2, 33, 80, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16()
    run = dispatch.prepare("linear_fp8_sum", (48, 80), torch.bfloat16, torch.device("cpu"))
    found = run(x, *record.parts, up, down, bias, "gelu_tanh").double()
    activated = torch.nn.functional.gelu(x.double(), approximate="tanh")
    merged = reference.dequantize(record, torch.float32).double() + up.double() @ down.double()
    right = torch.nn.functional.linear(activated, merged, bias.double())
    assert 1e-3 < (found - right).norm() / right.norm() < 0.05
