# SPDX-License-Identifier: Apache-2.0
"""GPTQ in NVFP4: against the textbook's inverse Hessian, in blocks and in pieces, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.kernels import gptq, reference
from nvfp4_video.kernels.format import PackedWeight, unswizzle


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def correlated(tokens: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs as layers see them: a few directions and loud channels carry most of the energy."""
    mixed = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    loud = torch.exp2(2 * torch.randn(columns, generator=generator))
    return (mixed + torch.randn(tokens, columns, generator=generator)) * loud


def gram(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """(T, K) -> (G, width, width), padded with zeros."""
    padded = torch.nn.functional.pad(inputs, (0, -inputs.shape[1] % width)).unflatten(1, (-1, width)).transpose(0, 1)
    return padded.transpose(1, 2) @ padded


def scale_of(weight: torch.Tensor) -> torch.Tensor:
    return reference.default_global_scale(weight.abs().amax(), "mse")


def values(record: PackedWeight) -> torch.Tensor:
    return reference.dequantize(record, torch.float32)


def packed_bytes(record: PackedWeight) -> bytes:
    return record.packed.numpy().tobytes() + record.block_scale.view(torch.uint8).numpy().tobytes()


def assert_nearest(record: PackedWeight, weight: torch.Tensor) -> None:
    """Every value is the nearest that its block scale allows."""
    rows, cols = weight.shape
    scale = unswizzle(record.block_scale, record.packed.shape[0], record.packed.shape[1] // 8)
    scale = (scale.float() * record.global_scale).repeat_interleave(16, 1)[:rows, :cols]
    codes = reference.round_to_e2m1(torch.where(scale > 0, weight / scale, 0.0).clamp(-6, 6))
    assert torch.equal(values(record), torch.tensor(reference.E2M1_VALUES)[codes.long()] * scale)


def squared(record: PackedWeight, weight: torch.Tensor) -> float:
    return float((values(record) - weight).square().sum())


def test_columns_without_correlation_are_rounded_to_nearest_and_no_worse_than_by_the_search(generator):
    weight = torch.randn(20, 64, generator=generator)
    record = gptq.quantize(weight, gptq.feedback(torch.eye(32).expand(2, 32, 32), 0.0), scale_of(weight))
    assert_nearest(record, weight)
    assert squared(record, weight) <= 1.001 * squared(reference.quantize(weight, search="mse"), weight)


def test_it_rounds_as_the_textbook_does_with_the_inverse_of_the_hessian(generator):
    weight = torch.randn(24, 48, generator=generator)
    hessian = gram(correlated(400, 48, generator), 48)
    told = gptq.feedback(hessian, 0.01)
    record = gptq.quantize(weight, told, scale_of(weight))
    scale = unswizzle(record.block_scale, 32, 3)[:24].float().repeat_interleave(16, 1) * record.global_scale
    order = told.order[0]
    assert order.tolist() != list(range(48))
    damped = hessian[0].double() + 0.01 * hessian[0].double().diagonal().mean() * torch.eye(48)
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, scale = weight.double()[:, order], scale.double()[:, order]
    wanted = torch.zeros_like(left)
    for column in range(48):
        ratio = (left[:, column] / scale[:, column]).float().clamp(-6, 6)
        level = torch.tensor(reference.E2M1_VALUES)[reference.round_to_e2m1(ratio).long()]
        wanted[:, column] = level * scale[:, column]
        error = (left[:, column] - wanted[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    assert torch.equal(values(record)[:, order], wanted.float())


@pytest.mark.parametrize("width", (16, 64, 128))
def test_the_outputs_on_other_inputs_are_nearer_than_with_the_search(width, generator):
    weight, inputs = torch.randn(64, 128, generator=generator), correlated(3000, 128, generator)
    record = gptq.quantize(weight, gptq.feedback(gram(inputs[:2000], width), 0.01), scale_of(weight))
    plain = reference.quantize(weight, search="mse")
    errors = [float(((values(found) - weight) @ inputs[2000:].t()).square().sum()) for found in (record, plain)]
    assert errors[0] < (0.9 if width == 16 else 0.75) * errors[1]
    assert (values(record) - weight).norm() > (values(plain) - weight).norm()


def test_blocks_are_packed_as_if_each_were_a_weight_of_its_own(generator):
    weight, hessian = torch.randn(16, 96, generator=generator), gram(correlated(500, 96, generator), 32)
    whole = values(gptq.quantize(weight, gptq.feedback(hessian, 0.05), scale_of(weight)))
    for place in range(3):
        columns = slice(32 * place, 32 * place + 32)
        told = gptq.feedback(hessian[place : place + 1], 0.05)
        assert torch.equal(whole[:, columns], values(gptq.quantize(weight[:, columns], told, scale_of(weight))))


@pytest.mark.parametrize(("cols", "width"), ((96, 32), (40, 48)))
def test_a_second_pass_changes_what_costs_less_and_makes_no_row_worse(cols, width, generator):
    weight, hessian = torch.randn(64, cols, generator=generator), gram(correlated(500, cols, generator), width)
    first = gptq.feedback(hessian, 0.02)
    damped = hessian.double()
    damped.diagonal(dim1=1, dim2=2).add_(0.02 * hessian.diagonal(dim1=1, dim2=2).double().mean(1, keepdim=True))
    passes = None, gptq.second_pass(hessian, first)
    records = [gptq.quantize(weight, first, scale_of(weight), again) for again in passes]
    before, after = ([float(gptq.output_error(row[None], damped)) for row in values(r) - weight] for r in records)
    assert all(new <= old * (1 + 1e-5) for old, new in zip(before, after, strict=True))
    assert sum(after) < 0.99 * sum(before)


def test_several_dampings_at_once_are_what_each_is_alone(generator):
    weight, hessian = torch.randn(32, 64, generator=generator), gram(correlated(500, 64, generator), 32)
    judge, dampings = gram(correlated(200, 64, generator), 32), (0.01, 0.3)
    both = gptq.feedback(hessian, *dampings)
    errors = gptq.trial(weight, both, scale_of(weight), judge)
    for number, damping in enumerate(dampings):
        alone = gptq.feedback(hessian, damping)
        assert both.of(number).dampings == alone.dampings == (damping,)
        assert torch.equal(both.of(number).order, alone.order)
        record = gptq.quantize(weight, alone, scale_of(weight))
        assert packed_bytes(record) == packed_bytes(gptq.quantize(weight, both.of(number), scale_of(weight)))
        torch.testing.assert_close(errors[number], gptq.output_error(values(record) - weight, judge))


def test_a_weight_in_pieces_and_a_second_time_gives_the_same_bytes(generator):
    weight = torch.randn(256, 64, generator=generator)
    told = gptq.feedback(gram(correlated(500, 64, generator), 64), 0.01)
    whole = gptq.quantize(weight, told, scale_of(weight))
    assert packed_bytes(whole) == packed_bytes(gptq.quantize(weight, told, scale_of(weight)))
    half = gptq.quantize(weight[128:], told, scale_of(weight))
    assert torch.equal(whole.packed[128:], half.packed)
    assert torch.equal(whole.block_scale[128:].view(torch.uint8), half.block_scale.view(torch.uint8))


@pytest.mark.parametrize(
    ("rows", "cols", "width"), ((1, 16, 16), (129, 40, 32), (17, 144, 128), (3, 20, 32), (1030, 16, 16), (1030, 32, 16))
)
def test_odd_shapes_have_the_layout_of_the_reference_and_zero_padding(rows, cols, width, generator):
    weight, hessian = torch.randn(rows, cols, generator=generator), gram(correlated(400, cols, generator), width)
    record, plain = gptq.quantize(weight, gptq.feedback(hessian, 0.1), scale_of(weight)), reference.quantize(weight)
    assert record.shape == plain.shape == (rows, cols)
    assert [part.shape for part in record.parts] == [part.shape for part in plain.parts]
    assert not (record.packed[rows:] & 0x77).any()
    assert float((values(record) - weight).norm() / weight.norm()) < 0.2


def test_channels_that_were_always_zero_are_rounded_to_nearest_and_disturb_nothing(generator):
    weight, inputs = torch.randn(16, 32, generator=generator), correlated(300, 32, generator)
    inputs[:, 16:] = 0
    record = gptq.quantize(weight, gptq.feedback(gram(inputs, 32), 0.01), scale_of(weight))
    alone = gptq.quantize(weight[:, :16], gptq.feedback(gram(inputs[:, :16], 16), 0.005), scale_of(weight))
    assert torch.equal(values(record)[:, :16], values(alone))
    nearest = gptq.quantize(weight[:, 16:], gptq.feedback(torch.eye(16)[None], 0.0), scale_of(weight))
    assert torch.equal(values(record)[:, 16:], values(nearest))
    dead = gptq.feedback(torch.zeros(1, 32, 32), 0.01)
    assert_nearest(gptq.quantize(weight, dead, scale_of(weight)), weight)
    again = gptq.quantize(weight, dead, scale_of(weight), gptq.second_pass(torch.zeros(1, 32, 32), dead))
    assert_nearest(again, weight)


def test_too_few_tokens_are_damped_until_the_matrix_can_be_factored(generator):
    hessian = gram(correlated(4, 64, generator), 64)
    told = gptq.feedback(hessian, 0.0, 0.05)
    assert told.dampings[0] >= 1e-3 and told.dampings[1] == 0.05
    with pytest.raises(ValueError, match="not positive definite, whatever the damping"):
        gptq.feedback(-torch.eye(16)[None], 0.01)


def test_what_cannot_be_used_is_refused_with_the_reason():
    bad = torch.eye(16)[None].clone()
    bad[0, 0, 0] = torch.nan
    for matrices, words in (
        (bad, "NaN or infinity"),
        (torch.eye(16), "shape \\(16, 16\\)"),
        (torch.eye(24)[None], "multiple of 16"),
    ):
        with pytest.raises(ValueError, match=words):
            gptq.feedback(matrices, 0.01)
    told = gptq.feedback(torch.eye(16).expand(2, 16, 16), 0.01)
    for cols in (16, 33):
        with pytest.raises(ValueError, match=f"a weight of {cols} columns, Gram matrices of 2 x 16"):
            gptq.quantize(torch.ones(2, cols), told, torch.ones(()))
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        gptq.quantize(torch.full((2, 32), torch.nan), told, torch.ones(()))


def test_a_weight_of_zeros_stays_zero():
    told = gptq.feedback(gram(torch.ones(4, 32), 32), 0.01)
    assert not values(gptq.quantize(torch.zeros(2, 32), told, torch.ones(()))).any()


def test_the_output_error_is_that_of_the_inputs_the_matrices_were_made_of(generator):
    difference, inputs = torch.randn(5, 40, generator=generator), correlated(100, 40, generator)
    full = gptq.output_error(difference, gram(inputs, 48))
    torch.testing.assert_close(full, (difference @ inputs.t()).square().sum().double(), rtol=1e-4, atol=0)
    parts = [(difference[:, part] @ inputs[:, part].t()).square().sum() for part in (slice(16), slice(16, 32))]
    parts += [(difference[:, 32:] @ inputs[:, 32:].t()).square().sum()]
    torch.testing.assert_close(gptq.output_error(difference, gram(inputs, 16)), sum(parts).double(), rtol=1e-4, atol=0)
