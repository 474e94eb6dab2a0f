# SPDX-License-Identifier: Apache-2.0
"""Packing to NVFP4: golden bytes, comfy-kitchen's bytes, rounding at every tie, and what is refused."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from kernel_harness import (
    Kernels,
    assert_same_bits,
    assert_same_record,
    e4m3,
    fresh_generator,
    guarded_kernels,
    implementations,
    moved,
    scalar,
)
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.format import PackedWeight, unswizzle

kernels = pytest.fixture(guarded_kernels, params=implementations())
generator = pytest.fixture(fresh_generator)


def test_ties_go_to_the_even_code_and_zero_keeps_its_sign(kernels: Kernels):
    values = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]
    rounded = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    record = kernels.quantize(torch.tensor([values]), scalar(1.0))
    assert record.block_scale.view(torch.uint8)[0, 0] == 0x38  # 1.0
    assert record.packed[0].tolist() == [0x70, 0x22, 0x44, 0x66, 0x88, 0xAA, 0xCC, 0xEE]
    assert_same_bits(kernels.dequantize(record, torch.float32), torch.tensor([rounded]))


def test_a_hair_beside_a_tie_goes_to_the_nearer_code(kernels: Kernels):
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    below, above = (np.nextafter(ties, np.float32(side)) for side in (0, 9))
    rows = [np.concatenate(([6.0], side, -side, [0.0])).astype(np.float32) for side in (below, above)]
    values = kernels.dequantize(kernels.quantize(torch.from_numpy(np.stack(rows)), scalar(1.0)), torch.float32)
    expected = [[0, 0.5, 1, 1.5, 2, 3, 4], [0.5, 1, 1.5, 2, 3, 4, 6]]
    assert values[:, 1:8].tolist() == expected
    assert (-values[:, 8:15]).tolist() == expected


def test_six_and_one_pack_to_0x72_with_the_largest_scale(kernels: Kernels):
    weight = torch.zeros(30, 100)
    weight[0, :2] = torch.tensor([6.0, 1.0])
    record = kernels.quantize(weight)
    assert record.packed.shape == (32, 56) and record.block_scale.shape == (128, 8)
    assert record.packed[0, 0] == 0x72 and record.packed.count_nonzero() == 1
    assert record.block_scale.float()[0, 0] == 448 and record.block_scale.float().count_nonzero() == 1
    assert_same_bits(record.global_scale, scalar(6.0) / 2688)


def test_block_scales_round_to_the_nearest_e4m3_with_ties_to_even(kernels: Kernels):
    table = e4m3(np.arange(0x7F, dtype=np.uint8))
    ties = (table[1:] + table[:-1]) / 2  # exact
    amax = np.concatenate([ties, *(np.nextafter(ties, np.float32(side)) for side in (0, 999)), table, [449.0, 1e9]])
    weight = np.zeros((1, len(amax), 16), np.float32)
    weight[0, :, 3] = amax.astype(np.float32) * np.float32(6)
    wanted = weight[0, :, 3] / np.float32(6)
    nearest = np.argsort(np.abs(wanted.astype(float)[:, None] - table), axis=1, kind="stable")[:, :2]
    gaps = np.abs(wanted.astype(float)[:, None] - table[nearest])
    even = np.where(nearest[:, 0] % 2 == 0, nearest[:, 0], nearest[:, 1])
    expected = np.where(gaps[:, 0] == gaps[:, 1], even, nearest[:, 0])
    assert (gaps[:, 0] == gaps[:, 1]).sum() >= 126
    record = kernels.quantize(torch.from_numpy(weight).flatten(1), scalar(1.0))
    assert unswizzle(record.block_scale, 1, len(amax)).view(torch.uint8).flatten().tolist() == expected.tolist()


def outliers(weight: torch.Tensor) -> torch.Tensor:
    """A zero block, a huge value that drives other scales to subnormal and zero, and a row of them."""
    weight = weight.clone()
    weight[weight.shape[0] // 2] *= 1e-3
    weight[-1] *= 300
    weight[0, :16] = 0
    weight[0, -1] = -3000
    return weight


CASES = [
    *[((1, 16), torch.clone, torch.float32), ((30, 100), torch.clone, torch.float16)],
    *[((30, 100), outliers, torch.bfloat16), ((3, 1040), outliers, torch.float32)],  # the last: two programs a row
]


@pytest.mark.parametrize(("shape", "change", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_quantising_gives_the_bytes_of_comfy_kitchen(kernels: Kernels, shape, change, dtype, generator):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    weight = change(torch.randn(shape, generator=generator)).to(dtype)
    global_scale = reference.amax_global_scale(weight)
    packed, block_scale = kitchen.quantize_nvfp4(weight, global_scale, pad_16x=True)
    expected = PackedWeight(packed, block_scale.view(torch.float8_e4m3fn), global_scale, shape)
    assert_same_record(kernels.quantize(weight, global_scale), expected)
    assert_same_record(kernels.quantize(weight), expected)


def test_the_scales_of_a_second_tile_of_rows_lie_in_the_second_tile(kernels: Kernels, generator):
    weight = torch.randn((129, 16), generator=generator).to(torch.bfloat16)
    assert_same_record(kernels.quantize(weight), reference.quantize(weight))


def test_a_transposed_view_gives_the_bytes_of_its_copy(kernels: Kernels, generator):
    weight = torch.randn((72, 20), generator=generator)
    assert_same_record(kernels.quantize(weight.t()), reference.quantize(weight.t().contiguous()))


def test_saturating_blocks_clamp_to_six_instead_of_wrapping(kernels: Kernels):
    record = kernels.quantize(torch.tensor([[1e6, -1e6, 2688.0] + [0.0] * 13]), scalar(1.0))
    assert kernels.dequantize(record, torch.float32)[0, :4].tolist() == [2688.0, -2688.0, 2688.0, 0.0]


def test_a_weight_of_zeros_stays_zero(kernels: Kernels):
    record = kernels.quantize(torch.zeros(16, 32))
    assert not any(part.float().any() for part in record.parts)
    assert torch.equal(kernels.dequantize(record), torch.zeros(16, 32, dtype=torch.bfloat16))


def test_what_was_decoded_once_survives_a_second_trip(kernels: Kernels, generator):
    weight = torch.randn((16, 80), generator=generator)
    record = kernels.quantize(weight, scalar(2.0**-9))
    assert_same_record(kernels.quantize(kernels.dequantize(record), scalar(2.0**-9)), record)


def test_gaussian_weights_lose_nine_and_a_half_percent(kernels: Kernels, generator):
    weight = torch.randn((32, 2048), generator=generator)
    error = (kernels.dequantize(kernels.quantize(weight), torch.float32) - weight).norm() / weight.norm()
    assert 0.0935 < error < 0.0967


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("global_scale", [None, scalar(1e-3)], ids=["amax scale", "given scale"])
def test_a_weight_that_is_not_finite_is_refused(kernels: Kernels, global_scale, bad: float):
    weight = torch.ones(16, 32)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernels.function("quantize")(moved(weight, kernels.device), moved(global_scale, kernels.device))


@pytest.mark.parametrize("shape", [(16,), (2, 16, 16)], ids=str)
def test_only_matrices_are_quantised(kernels: Kernels, shape):
    with pytest.raises(ValueError, match=r"matrices; found shape \(" + str(shape[0])):
        kernels.function("quantize")(torch.ones(shape, device=kernels.device))


@pytest.mark.cuda
def test_a_weight_beyond_two_to_the_32_elements_is_addressed_to_its_end():
    rows, cols = 262_160, 16_400  # 2**32 is in row 261,888; packed crosses 2**31 bytes
    needed = 34 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    dequantize = importlib.import_module("nvfp4_video.kernels.triton.dequantize").dequantize
    quantize = importlib.import_module("nvfp4_video.kernels.triton.quantize").quantize
    weight = torch.empty((rows, cols), dtype=torch.bfloat16, device="cuda")
    for start in range(0, rows, 32_768):
        weight[start : start + 32_768].normal_()
    record = quantize(weight, scalar(6 / 2688).cuda())
    values = dequantize(record)
    for start in (0, 130_944, 131_072, 261_760, 261_888, 262_144):  # whole scale tiles, around 2**31, 2**32 and the end
        stop = min(start + 128, rows)
        tile = slice(start, stop)
        expected = reference.quantize(weight[tile], record.global_scale)
        assert torch.equal(record.packed[tile], expected.packed), start
        scales = record.block_scale[start : start + 128].view(torch.uint8)
        assert torch.equal(scales, expected.block_scale.view(torch.uint8)), start
        assert torch.equal(values[tile], reference.dequantize(expected)), start
