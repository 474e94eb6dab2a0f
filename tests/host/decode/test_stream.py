# SPDX-License-Identifier: Apache-2.0
"""Layers over a clip in chunks against the same layers over the whole clip, by torch's own functions in FP64.

The modules here have what stream.py reads of the host's; that those compute the same is shown in tests/real.
"""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.kernels import video_reference
from torch.nn import functional

EPS = 1e-8
CUTS = [(7,), (1, 6), (2, 3, 2), (1, 1, 1, 1, 1, 1, 1)]


class Conv(torch.nn.Module):
    """The host's CausalConv3d: its attributes, and a convolution with seeded numbers."""

    time_kernel_size = 3

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.conv = torch.nn.Conv3d(inputs, outputs, 3, padding=(0, 1, 1), dtype=torch.float64).requires_grad_(False)
        self.conv.weight_function, self.conv.bias_function = [], []
        for parameter in self.conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 5)

    def whole(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        """(1, C, T, H, W) with its first frame repeated before it, and its last one after it."""
        ends = (2, 0) if causal else (1, 1)
        return self.conv(functional.pad(x, (0, 0, 0, 0, *ends), mode="replicate"))


class Block(torch.nn.Module):
    """The host's ResnetBlock3D with pixel norms."""

    def __init__(self, channels: int, generator: torch.Generator):
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels, generator), Conv(channels, channels, generator)
        self.norm1, self.norm2 = torch.nn.Identity(), torch.nn.Identity()
        self.norm1.eps = self.norm2.eps = EPS

    def whole(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        return x + self.conv2.whole(activated(self.conv1.whole(activated(x), causal)), causal)


class Upsample(torch.nn.Module):
    """The host's DepthToSpaceUpsample, all axes doubled."""

    stride, out_channels_reduction_factor = (2, 2, 2), 2

    def __init__(self, channels: int, residual: bool, generator: torch.Generator):
        super().__init__()
        self.conv, self.residual = Conv(channels, channels * 4, generator), residual

    def whole(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        made = spread(self.conv.whole(x, causal))[:, :, 1:]
        return made + spread(x)[:, :, 1:].repeat(1, 4, 1, 1, 1) if self.residual else made


def activated(x: torch.Tensor) -> torch.Tensor:
    return functional.silu(x / torch.sqrt(x.square().mean(1, keepdim=True) + EPS))


def spread(x: torch.Tensor) -> torch.Tensor:
    """(1, 8 C, T, H, W) -> (1, C, 2 T, 2 H, 2 W)."""
    _, channels, frames, height, width = x.shape
    parts = x.reshape(1, channels // 8, 2, 2, 2, frames, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parts.reshape(1, channels // 8, frames * 2, height * 2, width * 2)


@pytest.fixture
def stream(stub_comfy):
    """The module, on the stubbed host."""
    from nvfp4_video.host.decode import stream

    return stream


def chunked(stream, layer, x: torch.Tensor, cuts: tuple[int, ...], causal: bool, run) -> torch.Tensor:
    """(1, C, T, H, W) through ``run`` in chunks of so many frames -> the sum of all it gave, in one piece."""
    clip, made, start = stream.Clip(stream.Kernels(*[video_reference] * 3), causal), [], 0
    frames = x[0].permute(1, 2, 3, 0).contiguous().float()
    layer = layer.float()
    for length in cuts:
        clip.last = start + length == len(frames)
        found = run(clip, layer, stream.Frames(frames[start : start + length].clone()))
        start += length
        if found is not None:
            out = torch.empty_like(found.raw)
            clip.kernels.write(found, out, hold=False)
            made.append(out)
    return torch.cat(made).permute(3, 0, 1, 2)[None].double()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
def test_a_clip_in_chunks_is_convolved_and_added_as_a_whole_one(stream, generator, cuts, causal):
    x = torch.randn((1, 8, 7, 3, 4), generator=generator, dtype=torch.float64)
    for layer, run in (
        (Conv(8, 6, generator), stream.convolve),
        (Block(8, generator), stream.residual_block),
        (Upsample(8, False, generator), stream.upsample),
        (Upsample(8, True, generator), stream.upsample),
    ):
        right = layer.whole(x, causal)
        found = chunked(stream, layer, x, cuts, causal, run)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_sums_that_wait_are_cut_with_their_parts(stream):
    raw, parts = torch.arange(5.0).reshape(5, 1, 1, 1), [torch.ones(2, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)]
    frames = stream.Frames(raw, torch.tensor([10.0]), parts).cut(1, 4)
    out, kernels = torch.empty(3, 1, 1, 1), stream.Kernels(*[video_reference] * 3)
    kernels.write(frames, out, hold=True)
    assert out.flatten().tolist() == [12.0, 14.0, 15.0]
    assert frames.raw.flatten().tolist() == [12.0, 14.0, 15.0] and not frames.pending
    assert raw.flatten().tolist() == [0.0, 12.0, 14.0, 15.0, 4.0], "held in the same memory"
    kernels.write(frames, out, hold=False)
    assert frames.raw is None, "used up"


def test_nothing_of_a_chunk_is_kept_but_its_last_frames(stream, generator):
    conv, x = Conv(8, 6, generator).float(), torch.randn(5, 3, 4, 8, generator=generator)
    clip = stream.Clip(stream.Kernels(*[video_reference] * 3), causal=False)
    stream.convolve(clip, conv, stream.Frames(x))
    (kept,) = clip.memory.values()
    assert torch.equal(kept, x[-2:]) and kept.untyped_storage().nbytes() == 2 * 3 * 4 * 8 * 4
    clip.last = True
    stream.convolve(clip, conv, stream.Frames(x))
    assert [*clip.memory.values()] == [None]
