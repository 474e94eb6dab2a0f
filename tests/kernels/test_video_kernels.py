# SPDX-License-Identifier: Apache-2.0
"""What lies between the convolutions of a video VAE: norm and SiLU, depth to space, pixels; twin and Triton."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import video_reference

EPS = 1e-8
generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.guarded_kernels, params=harness.implementations())


def normed(kernels, x: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """-> what ``norm_silu`` writes and what it leaves in x, x being a copy."""
    kernels.guarded.clear()
    x, out = harness.moved(x.clone(), kernels.device), torch.empty(x.shape, dtype=x.dtype, device=kernels.device)
    for name, value in options.items():
        options[name] = value if name != "modulation" else tuple(part.to(kernels.device) for part in value)
        options[name] = harness.moved(options[name], kernels.device)
    kernels.function("norm_silu")(x, out, **options)
    kernels.look_at_guards()
    return out.cpu(), x.cpu()


def in_fp64(x, bias=None, residual=None, modulation=None):
    """SiLU of the modulated norm of the sum, and the sum, from the host's formulas."""
    total = x.double() + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    made = total / torch.sqrt(total.square().mean(-1, keepdim=True) + EPS)
    if modulation is not None:
        made = made * (1 + modulation[1].double()) + modulation[0].double()
    return made * torch.sigmoid(made), total


CASES = [
    *[((2, 3, 5, 128), torch.bfloat16, ("bias",)), ((1, 2, 2, 1024), torch.bfloat16, ("bias", "residual"))],
    *[((1, 1, 1, 48), torch.float32, ("residual",)), ((3, 1, 7, 24), torch.float16, ("bias", "modulation"))],
]


@pytest.mark.parametrize(("shape", "dtype", "parts"), CASES, ids=str)
def test_norm_and_silu_are_rounded_once(shape, dtype, parts, kernels, generator):
    def fresh(*size):
        return torch.randn(size, generator=generator).to(dtype)

    made = {"bias": fresh(shape[-1]), "residual": fresh(*shape), "modulation": (fresh(shape[-1]), fresh(shape[-1]))}
    options, x = {name: made[name] for name in parts}, fresh(*shape)
    right, total = in_fp64(x, **options)
    found, left = normed(kernels, x, eps=EPS, **options)
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
    torch.testing.assert_close(found.double(), right, rtol=step * 1.02, atol=1e-5)
    assert torch.equal(left, x), "x is left alone"
    found, left = normed(kernels, x, eps=EPS, keep=True, **options)
    torch.testing.assert_close(found.double(), right, rtol=step * 1.02, atol=1e-5)
    torch.testing.assert_close(left.double(), total, rtol=step, atol=1e-6)


def test_without_eps_it_is_the_sum(kernels, generator):
    x, residual = (torch.randn((2, 2, 3, 40), generator=generator).to(torch.bfloat16) for _ in range(2))
    found, _ = normed(kernels, x, residual=residual)
    assert torch.equal(found, (x.float() + residual.float()).to(torch.bfloat16))


def test_positions_of_zeros_stay_zeros_and_none_is_nothing(kernels):
    found, _ = normed(kernels, torch.zeros(1, 2, 2, 16), eps=EPS)
    assert torch.equal(found, torch.zeros(1, 2, 2, 16))
    assert normed(kernels, torch.zeros(0, 2, 2, 16), eps=EPS)[0].shape == (0, 2, 2, 16)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_channel_goes_to_its_frame_row_and_column(stride, dtype, kernels, generator):
    (p1, p2, p3), channels = stride, 6
    x = torch.randn((2, 3, 5, channels * p1 * p2 * p3), generator=generator).to(dtype)
    bias = torch.randn(x.shape[-1], generator=generator).to(dtype)
    plain = kernels.call("depth_to_space", x, stride).cpu()
    shifted = kernels.call("depth_to_space", x, stride, bias).cpu()
    assert plain.shape == (2 * p1, 3 * p2, 5 * p3, channels)
    for t, h, w, c in [(0, 0, 0, 0), (2 * p1 - 1, 3 * p2 - 1, 5 * p3 - 1, 5), (p1, 2 * p2, 3 * p3 + p3 - 1, 4)]:
        source = ((c * p1 + t % p1) * p2 + h % p2) * p3 + w % p3
        value = x[t // p1, h // p2, w // p3, source]
        assert plain[t, h, w, c] == value
        assert shifted[t, h, w, c] == (value.float() + bias[source].float()).to(dtype)
    harness.assert_same_bits(shifted, video_reference.depth_to_space(x, stride, bias))
    assert torch.equal(plain.flatten().sort().values, x.flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channels_become_pixels_from_zero_to_one(dtype, kernels, generator):
    x = (torch.randn((2, 3, 5, 48), generator=generator) * 2).to(torch.bfloat16)
    bias = torch.randn(48, generator=generator).to(torch.bfloat16)
    x[0, 0, 0, 0] = torch.nan
    plain, finished = (kernels.call("to_pixels", x, 4, bias, dtype, finish).cpu() for finish in (False, True))
    assert plain.shape == (3, 2, 12, 20)
    for c, t, y, z in [(0, 1, 0, 0), (2, 1, 11, 19), (1, 0, 6, 9)]:
        source = (c * 4 + z % 4) * 4 + y % 4
        value = x[t, y // 4, z // 4, source].float() + bias[source].float()
        assert plain[c, t, y, z] == value.to(dtype)
        assert finished[c, t, y, z] == ((value + 1) / 2).clamp(0, 1).to(dtype)
    harness.assert_same_bits(finished, video_reference.to_pixels(x, 4, bias, dtype, True))
    assert finished.isnan().sum() == 1 and finished.nan_to_num().min() >= 0 and finished.nan_to_num().max() <= 1


def test_tensors_of_another_shape_or_layout_are_refused():
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton.depth_to_space import depth_to_space
    from nvfp4_video.kernels.triton.norm_silu import norm_silu
    from nvfp4_video.kernels.triton.to_pixels import to_pixels

    x = torch.zeros(1, 2, 3, 24)
    with pytest.raises(ValueError, match=r"found \(1, 2, 3, 8\)"):
        norm_silu(x, torch.zeros(1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"found \(1, 2, 3, 24\), strides .*; expected"):
        norm_silu(x, torch.zeros(24, 3, 2, 1).permute(3, 2, 1, 0))
    with pytest.raises(ValueError, match=r"found \(1, 2, 3, 24\), factors \(2, 3, 1\); expected powers of two"):
        depth_to_space(x, (2, 3, 1))
    with pytest.raises(ValueError, match="expected a multiple of 16 channels"):
        to_pixels(x, 4)
