# SPDX-License-Identifier: Apache-2.0
"""The scale search: golden bytes, its definition in whole numbers, an exhaustive search, and what it is worth."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_harness import (
    CODES,
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
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import PackedWeight, unswizzle

kernels = pytest.fixture(guarded_kernels, params=implementations())
generator = pytest.fixture(fresh_generator)
STEPS = (*range(9, 16), *range(16, 34, 2))


def search(kernels: Kernels, weight: torch.Tensor, global_scale=None, column_weight=None) -> PackedWeight:
    """``quantize`` with the search, on the implementation's device; the record returns to the CPU."""
    return moved(kernels.call("quantize", weight, global_scale, "mse", column_weight), "cpu")


def values(record: PackedWeight) -> torch.Tensor:
    return reference.dequantize(record, torch.float32)


def scale_bytes(record: PackedWeight) -> list[int]:
    rows, cols = record.packed.shape
    return unswizzle(record.block_scale, rows, cols // 8).view(torch.uint8)[: record.shape[0]].flatten().tolist()


def squared_error(weight: torch.Tensor, search: str, column_weight: torch.Tensor | None = None) -> float:
    difference = (values(dispatch.quantize(weight, None, search, column_weight)) - weight.float()).double()
    return float((difference.square() * (1 if column_weight is None else column_weight.double())).sum())


def uneven(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Rows of magnitudes from 2**-36 to 2**4, a block of zeros, an outlier: every exponent a scale can have."""
    weight = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-36, 4, (shape[0], 1), generator=generator)
    weight[0, :16] = 0
    weight[-1, -1] = -3000
    return weight


def test_ten_to_forty_pack_without_error_under_the_scale_that_maps_forty_to_four(kernels: Kernels):
    weight = torch.tensor([[10.0, 20.0, -30.0, 40.0] + [0.0] * 12])
    record = search(kernels, weight, scalar(1.0))
    assert record.packed[0].tolist() == [0x24, 0xD6, 0, 0, 0, 0, 0, 0]
    assert record.block_scale.view(torch.uint8)[0, 0] == 0x52  # 1.25 * 2**3
    assert_same_bits(values(record), weight)
    assert values(kernels.quantize(weight, scalar(1.0))).tolist() != weight.tolist()


def test_of_scales_without_error_the_smallest_is_chosen(kernels: Kernels):
    # 12 is 6 * 2, 4 * 3 and 3 * 4, all E4M3 values and without error.
    record = search(kernels, torch.tensor([[12.0, -12.0] * 8]), scalar(1.0))
    assert scale_bytes(record) == [0x40] and record.packed[0].tolist() == [0x7F] * 8


def by_hand(block: np.ndarray, global_scale: np.float32, weights: list[int]) -> float:
    """The definition in reference.search_scale, in whole numbers and fractions -> the scale."""
    amax = np.abs(block).max()
    if amax == 0:
        return 0.0
    ratio = amax / global_scale
    if ratio >= 4096:
        return 448.0
    exponent = max(-7, min(11, int(np.floor(np.log2(float(ratio))))))
    factor = np.float32(2.0 ** (8 - exponent)) / global_scale
    places = [min(512, round(Fraction(float(np.float32(value) * factor)))) for value in np.abs(block)]
    halves = [int(2 * code) for code in CODES[:8]]
    found = []
    for step in STEPS:
        candidate = step * 2.0 ** (exponent - 6)
        if candidate in SCALES:
            errors = (min((place - 2 * step * half) ** 2 for half in halves) for place in places)
            found.append((sum(w * error for w, error in zip(weights, errors, strict=True)), candidate))
    return min(found)[1]


SCALES = set(e4m3(np.arange(0x7F, dtype=np.uint8)).tolist())


def test_the_scales_are_those_of_the_definition_in_whole_numbers(kernels: Kernels, generator):
    rows = 20 if kernels.name == "reference" else 4
    for global_scale in kernels.few((7e-3, 1.0, 0.01171875, 0.9), 2):
        weight = uneven((rows, 64), generator)
        columns = torch.randint(0, 144, (64,), generator=generator).float()
        columns[::16] = 143
        blocks = weight.numpy().reshape(rows, 4, 16)
        for column_weight in (None, columns):
            weights = np.ones(64) if column_weight is None else column_weight.numpy()
            weights = weights.astype(int).reshape(4, 16).tolist()
            expected = [[by_hand(row[c], np.float32(global_scale), weights[c]) for c in range(4)] for row in blocks]
            record = search(kernels, weight, scalar(global_scale), column_weight)
            assert unswizzle(record.block_scale, rows, 4).float().tolist() == expected


CASES = [  # shape, dtype, weighted, whether the global scale is so small that most blocks saturate
    *[((1, 16), torch.bfloat16, False, False), ((30, 100), torch.float16, True, True)],
    *[
        ((30, 100), torch.bfloat16, False, True),
        ((2, 1040), torch.float32, True, False),
    ],  # the last: two programs a row
]


@pytest.mark.parametrize(("shape", "dtype", "weighted", "small"), CASES, ids=str)
def test_every_implementation_gives_the_bytes_of_the_reference(
    kernels: Kernels, shape, dtype, weighted, small, generator
):
    weight = uneven(shape, generator).to(dtype)
    column_weight = 10.0 ** torch.randint(-4, 5, (shape[1],), generator=generator) if weighted else None
    if weighted:
        column_weight[:16] = 0
    global_scale = weight.abs().amax().float() / 1e6 if small else None
    expected = reference.quantize(weight, global_scale, "mse", column_weight)
    assert_same_record(search(kernels, weight, global_scale, column_weight), expected)


def test_the_codes_are_the_nearest_under_the_chosen_scale_with_ties_to_even(kernels: Kernels, generator):
    weight = torch.randn((16, 128), generator=generator)
    record = search(kernels, weight)
    scale = unswizzle(record.block_scale, 16, 8).float() * record.global_scale
    ratio = weight.unflatten(1, (8, 16)) / scale.unsqueeze(-1)
    codes = reference.round_to_e2m1(ratio.clamp(-6, 6)).flatten(1)
    assert torch.equal(record.packed, codes[:, 0::2] << 4 | codes[:, 1::2])


def test_no_e4m3_scale_beats_the_search_by_more_than_its_grid(generator):
    weight = torch.randn((128, 256), generator=generator)
    record = dispatch.quantize(weight, search="mse")
    blocks = weight.view(-1, 16).double()
    best = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
    for scale in sorted(SCALES - {0.0}):
        unit = scale * record.global_scale.double()
        ratio = blocks / unit
        nearest = torch.tensor(CODES[:8]).double()[reference.round_to_e2m1(ratio.abs().clamp(max=6).float()).long()]
        best = torch.minimum(best, (blocks.abs() - nearest * unit).square().sum(1))
    found = (values(record) - weight).double().view(-1, 16).square().sum(1)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.001 * best.sum()


def gaussian(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def laplace(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    first, second = (torch.empty(shape).exponential_(generator=generator) for _ in range(2))
    return first - second


def student_t(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    squares = torch.randn((5, *shape), generator=generator).square().sum(0)
    return torch.randn(shape, generator=generator) * (5 / squares).sqrt()


@pytest.mark.parametrize("distribution", [gaussian, laplace, student_t])
def test_squared_error_is_a_fifth_below_that_of_comfy_kitchen_s_scales(distribution, generator):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    weight = distribution((512, 4096), generator).to(torch.bfloat16)
    global_scale = reference.amax_global_scale(weight)
    packed, scale = kitchen.quantize_nvfp4(weight, global_scale, pad_16x=True)
    theirs = values(PackedWeight(packed, scale.view(torch.float8_e4m3fn), global_scale, tuple(weight.shape)))
    error = float((theirs - weight.float()).double().square().sum())
    assert squared_error(weight, "mse") < 0.8 * error


def test_by_default_the_global_scale_is_a_power_of_two_under_which_no_scale_saturates(kernels: Kernels):
    for largest in kernels.few((1793.0, 3e30, 3e-5, 40.0, 1792.0), 2):
        weight = torch.zeros(16, 32)
        weight[3, :4] = torch.tensor([0.25, 0.5, 0.75, 1.0]) * largest
        record = search(kernels, weight)
        mantissa, exponent = np.frexp(record.global_scale.item())
        assert mantissa == 0.5 and largest / 1792 <= record.global_scale < largest / 895
        assert values(record).amax() >= largest * 15 / 16
    assert_same_bits(search(kernels, torch.full((1, 16), 1792.0)).global_scale, scalar(1.0))


def test_decoded_values_are_exact_in_bf16_whatever_the_order_of_multiplication(kernels: Kernels, generator):
    record = search(kernels, torch.randn((16, 512), generator=generator))
    exact = values(record)
    assert torch.equal(exact.bfloat16().float(), exact)
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    theirs = kitchen.dequantize_nvfp4(record.packed, record.global_scale, record.block_scale, torch.bfloat16)
    assert torch.equal(theirs.float(), exact)


def test_what_was_decoded_once_keeps_its_values(kernels: Kernels, generator):
    weight = torch.randn((16, 256), generator=generator)
    for global_scale in kernels.few((2.0**-16, 2.0**-9), 1):
        once = values(kernels.quantize(weight, scalar(global_scale)))
        again = values(search(kernels, once, scalar(global_scale)))
        assert torch.equal(again, once)
        assert torch.equal(values(search(kernels, again.bfloat16(), scalar(global_scale))), once)


def test_scales_around_the_subnormals_of_e4m3_are_values_it_holds(kernels: Kernels):
    # 5 * 2**-9 is subnormal; the largest value is 4 of it, and 3 * 5 * 2**-9 tells it from its neighbours.
    unit = 5 * 2.0**-9
    tiny = [2.0**-9, 2.0**-10, 2.0**-12, 0.0] * 4
    weight = torch.tensor([[4.0 * unit, -3.0 * unit, 1.5 * unit, 0.5 * unit] + [0.0] * 12, tiny])
    record = search(kernels, weight, scalar(1.0))
    assert scale_bytes(record) == [5, 1]
    assert record.packed[:2, :2].tolist() == [[0x6D, 0x31], [0x21, 0x00]]


def test_a_block_too_large_for_the_global_scale_gets_the_largest_block_scale(kernels: Kernels):
    weight = torch.tensor([[largest, -largest, 2688.0] + [0.0] * 13 for largest in (4096.0, 1e6, 3e38)])
    record = search(kernels, weight, scalar(1.0))
    assert values(record)[:, :4].tolist() == [[2688.0, -2688.0, 2688.0, 0.0]] * 3


def test_zero_blocks_and_weights_of_zeros_stay_zero_bytes(kernels: Kernels, generator):
    assert not any(part.float().any() for part in search(kernels, torch.zeros(16, 32)).parts)
    weight = torch.randn((16, 64), generator=generator)
    weight[:, 16:32] = 0
    weight[3, 16:32] = -0.0
    record = search(kernels, weight)
    assert not record.packed[:, 8:16].any()
    assert not unswizzle(record.block_scale, 16, 4).float()[:, 1].any()
    given = search(kernels, torch.zeros(16, 32), scalar(0.0))
    assert not any(part.float().any() for part in given.parts)


def test_zero_keeps_its_sign_beside_other_values(kernels: Kernels):
    record = search(kernels, torch.tensor([[6.0, -0.0, 0.0, -0.1] + [0.0] * 12]), scalar(1.0))
    assert record.packed[0, :2].tolist() == [0x78, 0x08]


def test_subnormal_and_huge_weights_do_not_become_nan(kernels: Kernels):
    for size in kernels.few((1e-44, 3e38, 1e-38, 1e-30), 2):
        record = search(kernels, torch.full((1, 16), size))
        assert torch.isfinite(values(record)).all(), size
    assert torch.allclose(values(search(kernels, torch.full((1, 16), 1e-27))), torch.tensor(1e-27), rtol=0.05, atol=0)


# Column weights


def test_column_weights_lower_the_error_they_weigh(generator):
    weight = torch.randn((128, 512), generator=generator)
    column_weight = torch.randn(512, generator=generator).square() ** 3
    weighed = squared_error(weight, "mse", column_weight)
    difference = (values(dispatch.quantize(weight, search="mse")) - weight).double()
    assert weighed < 0.9 * float((difference.square() * column_weight).sum())


def test_a_block_in_which_one_column_counts_is_fitted_to_it(kernels: Kernels):
    weight = torch.tensor([[6.0, 5.0] + [0.0] * 14])
    column_weight = torch.zeros(16)
    column_weight[1] = 1e-9
    assert values(search(kernels, weight, scalar(1.0), column_weight))[0, 1] == 5.0
    assert values(search(kernels, weight, scalar(1.0)))[0, 1] != 5.0


def test_equal_column_weights_change_nothing(kernels: Kernels, generator):
    weight = torch.randn((16, 100), generator=generator)
    expected = search(kernels, weight)
    for factor in kernels.few((0.0, 1e-20, 1.0, 3e30), 2):
        assert_same_record(search(kernels, weight, None, torch.full((100,), factor)), expected)


def test_column_weights_become_143ths_of_the_largest_of_their_block():
    weights = torch.zeros(20)
    weights[:4] = torch.tensor([286.0, 1.0, 143.0, 1e-9])
    steps = reference.column_steps(weights)
    assert steps.shape == (2, 16)
    assert steps[0].tolist() == [143, 1, 72, 1] + [0] * 12
    assert steps[1].tolist() == [1] * 16


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("global_scale", [None, scalar(1e-3)], ids=["own scale", "given scale"])
def test_a_weight_that_is_not_finite_is_refused(kernels: Kernels, global_scale, bad: float):
    weight = torch.ones(16, 32)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        search(kernels, weight, global_scale)


@pytest.mark.parametrize("value", [-1.0, 1e-38, float("nan"), float("inf")])
def test_a_global_scale_no_search_can_use_is_refused(kernels: Kernels, value: float):
    with pytest.raises(ValueError, match="global scale is"):
        search(kernels, torch.ones(16, 32), scalar(value))


def test_an_unknown_search_is_refused(kernels: Kernels):
    with pytest.raises(ValueError, match="unknown search 'best'; expected amax or mse"):
        kernels.call("quantize", torch.ones(16, 32), None, "best")


@pytest.mark.parametrize(
    ("column_weight", "message"),
    [
        (torch.ones(16), r"shape \(16,\); expected \(32,\)"),
        (torch.ones(32, 1), r"shape \(32, 1\); expected \(32,\)"),
        (torch.full((32,), -1.0), "negative"),
        (torch.full((32,), float("nan")), "NaN"),
    ],
    ids=["short", "matrix", "negative", "nan"],
)
def test_column_weights_that_do_not_fit_are_refused(kernels: Kernels, column_weight: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        search(kernels, torch.ones(16, 32), None, column_weight)


def test_column_weights_without_a_search_are_refused(kernels: Kernels):
    with pytest.raises(ValueError, match="column weights have no effect on amax scales"):
        kernels.call("quantize", torch.ones(16, 32), None, "amax", torch.ones(32))
