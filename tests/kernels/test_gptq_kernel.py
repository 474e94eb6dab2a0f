# SPDX-License-Identifier: Apache-2.0
"""GPTQ's kernel against the same in torch: codes, scales and what the outputs are off by, poison and guards around."""

from __future__ import annotations

import importlib

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import gptq, reference

generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.guarded_kernels, params=list(harness.implementations())[1::2])


def case(shape: tuple[int, int], width: int, generator: torch.Generator):
    """A weight, Gram matrices of inputs of which some directions are louder, both passes, a global scale."""
    rows, cols = shape
    inputs = torch.randn(300, 6, generator=generator) @ torch.randn(6, cols, generator=generator)
    inputs += torch.randn(300, cols, generator=generator)
    blocks = torch.nn.functional.pad(inputs, (0, -cols % width)).unflatten(1, (-1, width)).transpose(0, 1)
    gram, weight = blocks.transpose(1, 2) @ blocks, torch.randn(shape, generator=generator)
    told, scale = gptq.feedback(gram, 0.02), reference.default_global_scale(weight.abs().amax(), "mse")
    return weight, gram, (told, gptq.second_pass(gram, told)), scale


def on(told: gptq.Feedback, device: str) -> gptq.Feedback:
    return gptq.Feedback(*(part.to(device) for part in (told.order, told.carry, told.within, told.cost)), told.dampings)


@pytest.mark.parametrize(("shape", "width", "turns"), [((70, 80), 32, 2), ((5, 20), 32, 1), ((3, 64), 64, 2)], ids=str)
def test_the_kernel_rounds_as_torch_does(shape, width, turns, kernels, generator):
    weight, gram, passes, scale = case(shape, width, generator)
    wanted = gptq._quantize(weight, passes[:turns], scale)
    kernel = importlib.import_module("nvfp4_video.kernels.triton.gptq").quantize
    given = [on(told, kernels.device) for told in passes[:turns]]
    found = harness.moved(kernel(weight.to(kernels.device), given, scale.to(kernels.device)), "cpu")
    kernels.look_at_guards()
    assert [part.shape for part in found.parts] == [part.shape for part in wanted.parts]
    off = [reference.dequantize(record, torch.float32) - weight for record in (found, wanted)]
    errors = [float(gptq.output_error(difference, gram)) for difference in off]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3 if min(shape) > 60 else 0.05)
    assert float((found.packed == wanted.packed).float().mean()) > (0.98 if min(shape) > 60 else 0.8)


def test_a_weight_of_zeros_and_one_beyond_the_global_scale_end_in_zeros_and_in_the_largest_scale(kernels, generator):
    weight, _, passes, _ = case((4, 32), 32, generator)
    kernel = importlib.import_module("nvfp4_video.kernels.triton.gptq").quantize
    given, one = [on(told, kernels.device) for told in passes], torch.ones((), device=kernels.device)
    zeros = harness.moved(kernel(torch.zeros(4, 32, device=kernels.device), given, one), "cpu")
    assert not reference.dequantize(zeros, torch.float32).any()
    large = harness.moved(kernel(1e6 * weight.to(kernels.device), given, one), "cpu")
    assert float(reference.dequantize(large, torch.float32).abs().max()) == 6 * 448
