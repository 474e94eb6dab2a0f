# SPDX-License-Identifier: Apache-2.0
"""One token through a decoder's block: each kernel against plain torch, and that against what the host calls."""

from __future__ import annotations

import functools

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import one_token, reference

generator = pytest.fixture(harness.fresh_generator)
kernels = pytest.fixture(harness.guarded_kernels, params=harness.implementations())
BF16 = 2**-8 * 1.01  # half a unit in the last place


def made(kernels, function: str, *arguments):
    """By the implementation of the test -> (result, arguments), on its device."""
    module = one_token
    if kernels.name == "triton":
        module = pytest.importorskip("nvfp4_video.kernels.triton.one_token")
    run = getattr(module, function)
    kernels.guarded.clear()
    given = [_moved(one, kernels.device) for one in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_token, "pick_backend", lambda device: ("torch", ""))
        found = run(*given)
    if kernels.guarded:
        kernels.look_at_guards()
    return found, given


def _moved(value, device: str):
    if isinstance(value, tuple | list):
        return type(value)(_moved(one, device) for one in value)
    return harness.moved(value.clone() if isinstance(value, torch.Tensor) else value, device)


def normal(generator, *shape: int, gain: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * gain).bfloat16()


def host_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """ComfyUI's RMSNorm of Gemma: ``rms_norm(x, weight + 1.0, eps)``."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight=weight + 1.0, eps=eps)


def near(found: torch.Tensor, right: torch.Tensor, part: float = 0.01) -> None:
    """Equal but for a rounding that went the other way in a small part of the elements."""
    found, right = found.cpu(), right.cpu()
    assert found.shape == right.shape and found.dtype == right.dtype
    assert (found != right).float().mean() <= part
    assert torch.allclose(found.float(), right.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("rows", "cols"), [(1, 3840), (1, 256), (3, 48)])
@pytest.mark.parametrize("kind", ["norm", "both", "add"])
def test_a_branch_is_normed_and_added_and_the_sum_is_normed_as_by_the_host(rows, cols, kind, kernels, generator):
    x, y = normal(generator, 1, rows, cols, gain=8.0), normal(generator, 1, rows, cols)
    y_weight, weight = normal(generator, cols, gain=0.3), normal(generator, cols, gain=0.3)
    add = None if kind == "norm" else (y, y_weight)
    found, given = made(kernels, "add_norm", x, add, None if kind == "add" else weight, 1e-6)
    total = x if add is None else x + host_norm(y, y_weight, 1e-6)
    near(given[0], total)
    if kind == "add":
        assert found is None
    else:
        near(found, host_norm(given[0].cpu(), weight, 1e-6))


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 256), (2, 1, 16), (3, 3, 48)])
def test_q_and_k_are_normed_and_rotated_and_k_and_v_become_a_slot(heads, groups, width, kernels, generator):
    qkv = normal(generator, (heads + 2 * groups) * width)
    weights = tuple(normal(generator, width, gain=0.3) for _ in range(2))
    angle = torch.randn(width // 2, generator=generator)
    cosine, sine = angle.cos(), angle.sin()
    rotation = torch.stack((cosine, -sine, sine, cosine), -1).view(-1, 2, 2)
    cache = tuple(normal(generator, 5, groups, width) for _ in range(2))
    found, given = made(kernels, "place_token", qkv, weights, rotation, torch.tensor([3]), cache, 1e-6)
    q, k, v = qkv.view(-1, width).split((heads, groups, groups))
    turned = []
    for one, weight in zip((q, k), weights, strict=True):
        first, second = host_norm(one, weight, 1e-6).float().chunk(2, -1)
        turned.append(torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1))
    near(found, turned[0].bfloat16(), 0.02)
    near(given[4][0][3], turned[1].bfloat16(), 0.02)
    assert torch.equal(given[4][1][3].cpu(), v)
    for kept, before in zip(given[4], cache, strict=True):
        others = [0, 1, 2, 4]
        assert torch.equal(kept[others].cpu(), before[others])


@pytest.mark.parametrize(
    ("heads", "groups", "width", "slots", "position", "window", "programs"),
    [
        *[(4, 2, 256, 72, 69, None, None), (2, 2, 16, 40, 33, 1, None), (6, 2, 48, 8, 7, 5, None)],
        *[(2, 1, 16, 136, 130, None, 32), (2, 1, 16, 136, 130, 70, 32)],  # 17 programs, 9
        *[(2, 1, 16, 136, 64, None, 32), (3, 1, 16, 136, 7, 100, 32)],  # 9 of 17 have a slot, 1 of 13
        *[(4, 1, 16, 136, 135, None, 4), (4, 1, 16, 136, 90, 60, 4)],  # each takes several tiles
    ],
)
def test_attention_counts_the_slots_of_the_window_and_reads_no_other(
    heads, groups, width, slots, position, window, programs, kernels, generator
):
    query, key, value = (normal(generator, *shape) for shape in ((heads, width), *[(slots, groups, width)] * 2))
    keep = slice(max(0, position + 1 - window) if window else 0, position + 1)
    shared = [one[keep].transpose(0, 1).repeat_interleave(heads // groups, 0).double() for one in (key, value)]
    right = (query.double()[:, None] @ shared[0].transpose(1, 2) * width**-0.5).softmax(-1) @ shared[1]
    hidden = torch.ones(slots, dtype=torch.bool)
    hidden[keep] = False
    key[hidden] = value[hidden] = float("nan")  # what an earlier text has left
    given = [_moved(one, kernels.device) for one in (query, key, value, torch.tensor([position]))]
    if kernels.name == "triton":
        module = pytest.importorskip("nvfp4_video.kernels.triton.attend")
        options = {} if programs is None else {"config": (2, 4, programs, 8)}
        run = module.prepare(heads, tuple(key.shape), width**-0.5, window, given[0].device, **options)
    else:
        run = functools.partial(one_token.attend, scale=width**-0.5, window=window)
    if kernels.device == "cuda":
        torch.cuda.synchronize()  # a kernel that overlaps the one before it reads what that must not have written
    found, again = run(*given), run(*given)
    if kernels.name == "triton":
        kernels.look_at_guards()
    right = right.view(heads, width)
    assert ((found.cpu().double() - right).norm() / right.norm()) < BF16
    assert torch.equal(found, again)


GROUPS = [
    *[(((128, 256), (256, 256), (128, 256)), 1, False, None), (((128, 512), (128, 512)), 2, True, None)],
    *[(((48, 112), (16, 112), (130, 112)), 3, False, None), (((48, 112), (48, 112)), 9, True, None)],
    *[(((128, 384), (256, 384)), 1, False, (16, 3)), (((128, 384), (128, 384)), 1, True, (16, 3))],
]


@pytest.mark.parametrize(("shapes", "rows", "gated", "config"), GROUPS, ids=str)
def test_products_of_one_launch_are_those_of_each_weight(shapes, rows, gated, config, kernels, generator):
    weights = [reference.quantize(torch.randn(shape, generator=generator) / shape[1] ** 0.5) for shape in shapes]
    x = normal(generator, rows, shapes[0][1])
    right = one_token.gemv_group(x, weights, gated)
    if kernels.name == "reference":
        apart = [reference.gemv(x, weight) for weight in weights]
        wanted = torch.nn.functional.gelu(apart[0], approximate="tanh") * apart[1] if gated else torch.cat(apart, 1)
        assert torch.equal(right, wanted)
        return
    gemv = pytest.importorskip("nvfp4_video.kernels.triton.gemv")
    x = x.to(kernels.device)
    run = gemv.prepare_group(shapes, torch.bfloat16, x.device, gated, config)
    arguments = x, *(_moved(weight, kernels.device).parts for weight in weights)
    found, again = run(*arguments), run(*arguments)
    kernels.look_at_guards()
    near(found, right, 0.02)
    assert torch.equal(found, again)


def test_any_number_of_heads_can_share_one_of_the_cache():
    prepare = pytest.importorskip("nvfp4_video.kernels.triton.attend").prepare
    generator, cpu = torch.Generator().manual_seed(5), torch.device("cpu")
    query, key, value = (normal(generator, *shape) for shape in ((17, 16), (8, 1, 16), (8, 1, 16)))
    position = torch.tensor([6])
    if torch.cuda.is_available():
        pytest.skip("the other tests run there")
    found = prepare(17, (8, 1, 16), 0.25, None, cpu)(query, key, value, position)
    near(found, one_token.attend(query, key, value, position, 0.25), 0.05)


def test_weights_that_cannot_be_one_launch_are_refused():
    prepare_group = pytest.importorskip("nvfp4_video.kernels.triton.gemv").prepare_group
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="as many columns each"):
        prepare_group(((16, 32), (16, 48)), torch.bfloat16, cpu)
    with pytest.raises(ValueError, match="of the same shape"):
        prepare_group(((16, 32), (32, 32)), torch.bfloat16, cpu, True)


@pytest.mark.parametrize(("capability", "overlaps"), [((8, 9), False), ((9, 0), True), ((12, 1), True)])
def test_launches_overlap_from_hopper_on_where_triton_can(capability, overlaps, monkeypatch):
    launch = pytest.importorskip("nvfp4_video.kernels.triton.launch")
    gpu = torch.device("cuda", 0)
    assert launch.overlap(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert bool(launch.overlap(gpu)) == overlaps
    monkeypatch.setattr(launch, "gdc_wait", None)
    assert launch.overlap(gpu) == {}
