# SPDX-License-Identifier: Apache-2.0
"""The passes between products, in plain torch and in Triton, against the same in double precision."""

from __future__ import annotations

import kernel_harness as harness
import pytest
import torch
from nvfp4_video.kernels import fp8, fused
from nvfp4_video.kernels.format import FP8Rows
from nvfp4_video.kernels.fused import Ada, Add, Want

COUNT, EPS = 9, 1e-6
generator = pytest.fixture(harness.fresh_generator)


class Passes:
    """The functions of kernels/fused.py by one implementation; tensors go to its device and come back."""

    def __init__(self, kernels: harness.Kernels):
        self.kernels = kernels

    def __getattr__(self, name: str):
        return lambda *given, **named: self._call(name, given, named)

    def _call(self, name: str, given: tuple, named: dict):
        self.kernels.guarded.clear()
        run = getattr(fused, name) if self.kernels.name == "reference" else self.kernels.function(name)
        out = run(*(_moved(value, self.kernels.device) for value in given), **named)
        for buffer in self.kernels.guarded:
            edges = torch.cat((buffer[: harness._GUARD], buffer[-harness._GUARD :]))
            assert (edges == harness._poison(buffer.dtype)).all(), "stores outside an output"
        return _moved(out, "cpu")


def _moved(value, device: str):
    if isinstance(value, FP8Rows):
        kept = None if value.kept is None else value.kept.to(device)
        return FP8Rows(value.quantized.to(device), value.scale.to(device), value.shape, kept=kept)
    if isinstance(value, Ada):
        return Ada(value.table.to(device), value.steps.to(device), value.group)
    if isinstance(value, Add | Want):
        return type(value)(*(_moved(part, device) for part in value))
    if isinstance(value, list | tuple):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=harness.implementations())
def passes(request, monkeypatch) -> Passes:
    """Each implementation, over poisoned memory."""
    found = harness.guarded_kernels(request, monkeypatch)
    if found.device == "cuda" and fp8.obstacle(torch.device("cuda", 0)):
        pytest.skip(fp8.obstacle(torch.device("cuda", 0)))
    monkeypatch.setattr(fused, "pick_backend", lambda device: ("torch", "the reference"))
    return Passes(found)


def random(generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).bfloat16()


def make_ada(generator, rows: int, cols: int, group: int) -> Ada:
    """Modulations whose steps are a part of wider rows, as the host cuts them."""
    return Ada(random(generator, COUNT, cols), random(generator, rows // group, COUNT * cols), group)


def modulation(ada: Ada, at: int) -> torch.Tensor:
    """Parameter ``at`` of each row, in double precision, of the sum in BF16."""
    cols = ada.table.shape[1]
    rows = [ada.table[at] + ada.steps[row // ada.group, at * cols : (at + 1) * cols]
            for row in range(len(ada.steps) * ada.group)]  # fmt: skip
    return torch.stack(rows).double()


def normed(x: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()


def assert_near(found, right: torch.Tensor) -> None:
    """BF16 to one unit in its last place, rows in FP8 to half a step of E4M3 and a scale of the largest magnitude."""
    right = right.view(found.shape)
    if isinstance(found, FP8Rows):
        most = right.flatten(0, -2).abs().amax(-1, keepdim=True)
        torch.testing.assert_close(found.scale.double(), most / 448, rtol=1e-5, atol=0)
        error = (found.quantized.double() * found.scale.double() - right.flatten(0, -2)).abs()
        assert (error <= right.flatten(0, -2).abs() * 2**-4 * 1.01 + most * 2.0**-18).all()
    else:
        torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=2**-9)


def test_a_row_by_hand(passes):
    x = torch.full((1, 1, 16), 3.0).bfloat16()
    x[..., 8:] = -3
    table = torch.tensor([[0.5], [1.0]]).repeat(1, 16).bfloat16()  # shift, scale
    ada = Ada(table, torch.zeros(1, 32).bfloat16(), 1)
    plain, rows = passes.norm_rows(x, None, [Want(ada, 1, 0), Want(ada, 1, 0, True)], eps=0.0)
    assert plain[0, 0].tolist() == [2.5] * 8 + [-1.5] * 8, "3 becomes 1, times 1 + 1, plus 0.5"
    assert rows.scale.item() == pytest.approx(2.5 / 448)
    assert rows.quantized[0].float().tolist() == [448.0] * 8 + [-256.0] * 8, "-268.8 lies nearer to -256 than to -288"


@pytest.mark.parametrize("group", [6, 3, 1], ids=["by the clip", "by the frame", "by the token"])
@pytest.mark.parametrize("cols", [16, 80])
def test_an_addition_norm_and_two_modulations(cols, group, passes, generator):
    x, y = random(generator, 2, 6, cols), random(generator, 2, 6, cols)
    ada, other = make_ada(generator, 12, cols, group), make_ada(generator, 12, cols, 6)
    kept = x.clone()
    device_x = x.to(passes.kernels.device)
    first, second = passes.norm_rows(device_x, Add(y, ada, 2), [Want(ada, 1, 0, True), Want(other, 4, 8)])
    summed = device_x.cpu()
    right = kept.double() + y.double() * modulation(ada, 2).view_as(kept)
    torch.testing.assert_close(summed.double(), right, rtol=2**-8, atol=2**-12)
    values = normed(summed).flatten(0, 1)
    assert_near(first, values * (1 + modulation(ada, 1)) + modulation(ada, 0))
    assert_near(second, values * (1 + modulation(other, 4)) + modulation(other, 8))


@pytest.mark.parametrize("quantize", [False, True])
def test_what_is_not_asked_for_is_left_out(quantize, passes, generator):
    x, y = random(generator, 1, 5, 48), random(generator, 1, 5, 48)
    given = x.clone().to(passes.kernels.device)
    (found,) = passes.norm_rows(given, None, [Want(quantize=quantize)])
    assert_near(found, normed(x))
    assert torch.equal(given.cpu(), x), "nothing is added"
    ada = make_ada(generator, 5, 48, 1)
    (found,) = passes.norm_rows(given, None, [Want(ada, 1, 0, quantize)], norm=False)
    assert_near(found, x.double().view(5, 48) * (1 + modulation(ada, 1)) + modulation(ada, 0))
    assert passes.norm_rows(given, Add(y), [], norm=False) == []
    assert torch.equal(given.cpu(), (x.float() + y.float()).bfloat16())


@pytest.mark.parametrize("second", [False, True])
def test_a_tensor_is_kept_beside_its_rows(second, passes, generator):
    x = random(generator, 1, 6, 80)
    ada = make_ada(generator, 6, 80, 2)
    want = Want(ada, 1, 0, True, True)
    found = passes.norm_rows(x, None, [Want(ada, 2, 3, True), want] if second else [want])[-1]
    right = normed(x).flatten(0, 1) * (1 + modulation(ada, 1)) + modulation(ada, 0)
    assert_near(found, right)
    assert_near(found.kept, right)
    assert found.plain() is found.kept


def test_a_nan_spoils_its_own_row_only(passes, generator):
    x = random(generator, 1, 4, 32)
    x[0, 1, 5] = torch.nan
    (rows,) = passes.norm_rows(x, None, [Want(quantize=True)])
    spoiled = rows.plain().isnan().any(-1)[0]
    assert spoiled.tolist() == [False, True, False, False]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(2, 8), (5, 16), (3, 32)])
def test_gates_of_heads(heads, width, quantize, passes, generator):
    x, logits = random(generator, 2, 3, heads * width), random(generator, 2, 3, heads)
    gates = 2 / (1 + (-logits.double()).exp())
    assert_near(passes.gate_heads(x, logits, quantize), x.double() * gates.repeat_interleave(width, -1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "width"), [(2, 8), (3, 32)])
def test_norm_and_rotation_of_one_and_of_two(heads, width, batch, passes, generator):
    angle = torch.randn(batch, 5, heads, width // 2, generator=generator).double()
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).bfloat16()
    rotation = matrix.view(*angle.shape, 2, 2)
    turned = torch.complex(matrix[..., 0].double(), matrix[..., 2].double())
    pairs = [(random(generator, 2, 5, heads * width), random(generator, heads * width)) for _ in range(2)]
    both = passes.norm_rope(pairs, rotation, 1e-5)
    for (x, weight), found in zip(pairs, both, strict=True):
        low, high = (normed(x, 1e-5) * weight.double()).unflatten(-1, (heads, 2, -1)).unbind(-2)
        right = torch.complex(low, high) * turned
        right = torch.stack((right.real, right.imag), -2).flatten(2)
        torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=2**-6)
    (alone,) = passes.norm_rope(pairs[1:], rotation, 1e-5)
    assert torch.equal(alone, both[1])


@pytest.mark.parametrize("cols", [16, 96])
def test_norm_without_a_rotation(cols, passes, generator):
    pairs = [(random(generator, 2, 5, cols), random(generator, cols)) for _ in range(2)]
    both = passes.norm_rope(pairs, None, 1e-5)
    for (x, weight), found in zip(pairs, both, strict=True):
        torch.testing.assert_close(found.double(), normed(x, 1e-5) * weight.double(), rtol=2**-7, atol=2**-9)
    assert torch.equal(passes.norm_rope(pairs[1:], None, 1e-5)[0], both[1])


def test_a_stream_that_kernels_cannot_take_is_told():
    fits = torch.zeros(1, 2, 32).bfloat16()
    assert fused.fits(fits)
    assert not fused.fits(fits.float()) and not fused.fits(fits[..., :24]) and not fused.fits(fits[..., :16])
    assert not fused.fits(torch.zeros(1, 2, 2 * fused.MOST_COLS).bfloat16()) and not fused.fits(fits[:, :0])
