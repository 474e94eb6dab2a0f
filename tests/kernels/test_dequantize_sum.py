# SPDX-License-Identifier: Apache-2.0
"""A decoded weight plus a low-rank change, made in one pass, by reference and by Triton."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import PackedWeight

CASES = [
    *[((128, 256), 64, torch.bfloat16), ((64, 128), 128, torch.float16)],  # no edge: one step of the rank, and two
    *[((256, 128), 72, torch.bfloat16), ((64, 128), 1, torch.float16)],  # edges of the rank only
    *[((129, 48), 130, torch.bfloat16), ((30, 112), 16, torch.float16), ((1, 16), 64, torch.bfloat16)],  # of the tile
]
generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.tensor_core_kernels, params=harness.implementations())


def random_case(shape, rank, dtype, generator):
    record = reference.quantize(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    up = torch.randn(shape[0], rank, generator=generator).to(dtype)
    down = (torch.randn(rank, shape[1], generator=generator) / (rank * shape[1]) ** 0.5).to(dtype)
    return record, up, down


@pytest.mark.parametrize(("shape", "rank", "dtype"), CASES, ids=str)
def test_the_sum_is_the_exact_one_rounded_once(shape, rank, dtype, kernels, generator):
    record, up, down = random_case(shape, rank, dtype, generator)
    found = kernels.call("dequantize_sum", record, up, down).cpu()
    right = reference.dequantize(record, torch.float32).double() + up.double() @ down.double()
    assert (found.dtype, found.shape) == (dtype, shape)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(found.double(), right, rtol=step * 1.01, atol=1e-6)


def test_factors_of_zeros_leave_the_decoded_weight_bit_for_bit(kernels, generator):
    record, up, down = random_case((144, 80), 8, torch.bfloat16, generator)
    found = kernels.call("dequantize_sum", record, up * 0, down).cpu()
    assert torch.equal(found, reference.dequantize(record))


def test_every_scale_decodes_as_it_does_alone_negative_ones_and_nan_included(kernels, generator):
    record, up, down = random_case((128, 256), 16, torch.bfloat16, generator)
    every = torch.arange(256).repeat(8).to(torch.uint8)[torch.randperm(2048, generator=generator)]
    scales = every.view(record.block_scale.shape).view(torch.float8_e4m3fn)
    record = PackedWeight(record.packed, scales, harness.scalar(0.37), record.shape)
    found = kernels.call("dequantize_sum", record, up * 0, down).cpu()
    right = reference.dequantize(record)
    assert right.isnan().any() and not right.isnan().all()
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)


def test_bytes_and_scales_at_an_odd_address_are_read_from_a_copy():
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton.launch import part_reader

    parts = [torch.arange(count).to(torch.uint8) for count in (128, 512)]
    parts = parts[0].view(16, 8), parts[1].view(128, 4), torch.ones(())
    odd = [torch.cat((part.flatten()[:1], part.flatten()))[1:].view(part.shape) for part in parts[:2]]
    assert all(part.data_ptr() % 4 for part in odd)
    found = part_reader((16, 16), torch.device("cpu"))(*odd, parts[2])
    assert not any(part.data_ptr() % 4 for part in found[:2])
    assert torch.equal(found[0], parts[0]) and torch.equal(found[1], parts[1])


def test_factors_of_another_shape_or_dtype_are_refused(generator):
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton.dequantize_sum import dequantize_sum

    record, up, down = random_case((16, 32), 4, torch.float16, generator)
    with pytest.raises(ValueError, match=r"found up \(16, 4\) torch.float16, down \(4, 16\)"):
        dequantize_sum(record, up, down[:, :16])
    with pytest.raises(ValueError, match="down .* torch.float32; expected"):
        dequantize_sum(record, up, down.float())


def test_without_triton_it_takes_two_passes_and_one_more_rounding(generator):
    record, up, down = random_case((48, 80), 8, torch.bfloat16, generator)
    found = dispatch.dequantize_sum(record, up, down)
    right = reference.dequantize(record).addmm(up, down)
    assert torch.equal(found, right)
    exact = reference.dequantize_sum(record, up, down).float()
    assert 0 < (found.float() - exact).norm() < 4e-3 * exact.norm()
