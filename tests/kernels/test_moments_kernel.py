# SPDX-License-Identifier: Apache-2.0
"""Gram matrices by tensor cores: against FP64, whichever tokens are held out, in blocks of any width."""

from __future__ import annotations

import importlib

import kernel_harness as harness
import pytest
import torch

generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.tensor_core_kernels, params=list(harness.implementations())[1::2])


def exact(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """(T, K) -> (G, width, width) fp64."""
    padded = torch.nn.functional.pad(inputs.double(), (0, -inputs.shape[1] % width))
    blocks = padded.unflatten(1, (-1, width)).transpose(0, 1)
    return blocks.transpose(1, 2) @ blocks


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Each element to a 10,000th of what its two columns could have at most."""
    most = wanted.diagonal(dim1=1, dim2=2).sqrt()
    most = most.unsqueeze(2) * most.unsqueeze(1)
    assert ((found.cpu().double() - wanted).abs() <= 1e-4 * most).all()


@pytest.mark.parametrize(
    ("tokens", "cols", "width", "turn"),
    [(70, 144, 64, 0), (9, 40, 16, 1), (130, 200, 128, 3), (3, 100, 48, 0), (65, 592, 592, 2)],
)
def test_both_sums_are_those_of_fp64_and_are_added_to_what_was_there(tokens, cols, width, turn, kernels, generator):
    inputs = torch.randn(tokens, cols, generator=generator) * torch.randn(cols, generator=generator).exp2() + 0.5
    inputs = inputs.to(torch.bfloat16 if kernels.device == "cuda" else torch.float16)  # the interpreter has no BF16
    sums = [torch.zeros(-(-cols // width), width, width, device=kernels.device) for _ in range(2)]
    shape, given = tuple(sums[0].shape), inputs.to(kernels.device)
    prepare = importlib.import_module("nvfp4_video.kernels.triton.moments").prepare
    for _ in range(2):
        prepare(tokens, cols, shape, given.dtype, given.device)(given, *sums, turn)
    start, stop = tokens * turn // 4, tokens * (turn + 1) // 4
    assert_near(sums[0], 2 * exact(torch.cat((inputs[:start], inputs[stop:])), width))
    assert_near(sums[1], 2 * exact(inputs[start:stop], width))


@pytest.mark.cuda
def test_moments_of_a_clip_are_those_of_fp64(generator):
    from nvfp4_video.measure.moments import Moments

    inputs = torch.randn(14_080, 256, generator=generator).bfloat16().cuda() + 3
    found = Moments.zeros(256, 128, "cuda")
    found.add(inputs.view(2, -1, 256), 2)
    assert (found.tokens, found.held_tokens) == (10_560, 3_520)
    assert_near(found.held_out, exact(inputs[7_040:10_560].cpu(), 128))
    assert_near(found.gram + found.held_out, exact(inputs.cpu(), 128))
