# SPDX-License-Identifier: Apache-2.0
"""kernels/cpu_quantize.py: the bytes of the reference from pieces and threads, and nothing left changed behind it."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_harness import assert_same_record, fresh_generator, scalar
from nvfp4_video.kernels import cpu_quantize, dispatch, reference
from nvfp4_video.kernels.format import OUTPUT_DTYPES

generator = pytest.fixture(fresh_generator)
SEARCHES = [("amax", False), ("mse", False), ("mse", True)]
SHAPES = [  # one piece; several, the last one short, with padding and without; pieces of one row
    *[((1, 16), torch.bfloat16), ((30, 100), torch.float16), ((257, 256), torch.bfloat16)],
    *[((129, 1040), torch.float32), ((16, 2048), torch.float16)],
]
_empty = torch.empty


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest):
    """torch's number of threads; the number before is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    """A few rows a piece, and memory from ``torch.empty`` full of NaN."""

    def poisoned(*arguments, **options) -> torch.Tensor:
        made = _empty(*arguments, **options)
        made.view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(cpu_quantize, "_PIECE", 1024)
    monkeypatch.setattr(torch, "empty", poisoned)


def uneven(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Rows of magnitudes from 2**-36 to 2**4, a block of zeros, negative zeros and an outlier."""
    weight = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-36, 4, (shape[0], 1), generator=generator)
    weight[0, :16] = 0
    weight[:, 3] = -0.0
    weight[-1, -1] = -3000
    return weight


@pytest.mark.parametrize(("search", "weighted"), SEARCHES, ids=["amax", "mse", "weighted"])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_the_bytes_are_those_of_the_reference(shape, dtype, search, weighted, threads, small_pieces, generator):
    weight = uneven(shape, generator).to(dtype)
    column_weight = 10.0 ** torch.randint(-4, 5, (shape[1],), generator=generator) if weighted else None
    amax = weight.abs().amax().float()
    for global_scale in (None, amax / 2688, amax / 1e6, amax / 100):
        expected = reference.quantize(weight, global_scale, search, column_weight)
        assert_same_record(cpu_quantize.quantize(weight, global_scale, search, column_weight), expected)


@pytest.mark.parametrize("search", reference.SEARCHES)
def test_pieces_of_the_real_size_give_the_bytes_of_the_reference(search: str, generator):
    weight = torch.randn((700, 1024), generator=generator).to(torch.bfloat16)
    assert_same_record(cpu_quantize.quantize(weight, None, search), reference.quantize(weight, None, search))


def test_every_finite_bf16_number_divided_by_a_scale_gets_the_code_of_the_reference():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    weight = torch.where(numbers.abs() < 1e30, numbers, 0.0).view(-1, 16)
    # Each number beside one of 6: the block scale is 1 for magnitudes up to 6, so ratios cover all ties.
    weight = torch.cat((weight, weight.new_full((len(weight), 16), 6.0)), 1).view(len(weight), 2, 16).transpose(1, 2)
    weight = weight.reshape(-1, 16)
    for global_scale in (1.0, 2.0**-9, 0.3):
        expected = reference.quantize(weight, scalar(global_scale))
        assert_same_record(cpu_quantize.quantize(weight, scalar(global_scale)), expected)


def test_views_are_read_as_what_they_show(generator):
    weight = torch.randn((72, 80), generator=generator)
    for view in (weight.t(), weight[::2], weight[3:40, 5:69], weight.flatten()[None].expand(16, -1)):
        assert_same_record(cpu_quantize.quantize(view, None, "mse"), reference.quantize(view.clone(), None, "mse"))
        copy = weight.clone()
        cpu_quantize.quantize(view)
        assert torch.equal(weight, copy)


def test_a_parameter_can_be_quantised_inside_and_outside_inference_mode(small_pieces, threads, generator):
    weight = torch.nn.Parameter(torch.randn((64, 128), generator=generator))
    columns = torch.rand(128, generator=generator)
    expected = reference.quantize(weight.detach(), None, "mse", columns)
    assert_same_record(cpu_quantize.quantize(weight, None, "mse", columns), expected)
    with torch.inference_mode():
        record = cpu_quantize.quantize(weight * 1, None, "mse", columns * 1)
    assert_same_record(record, expected)
    assert not any(part.is_inference() or part.requires_grad for part in record.parts)


def test_torch_s_number_of_threads_is_the_same_afterwards_even_after_an_error(small_pieces, threads):
    weight = torch.ones(64, 128)
    weight[50, 3] = torch.nan
    cpu_quantize.quantize(torch.ones(64, 128), scalar(1.0), "mse")
    with pytest.raises(ValueError, match="NaN or infinity"):
        cpu_quantize.quantize(weight, scalar(1.0), "mse")
    found = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [threads, threads]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("global_scale", [None, scalar(1e-3)], ids=["own scale", "given scale"])
@pytest.mark.parametrize("search", reference.SEARCHES)
def test_a_weight_that_is_not_finite_is_refused(search: str, global_scale, bad: float, small_pieces):
    weight = torch.ones(64, 128)
    weight[50, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        cpu_quantize.quantize(weight, global_scale, search)


def test_what_the_reference_refuses_is_refused():
    weight = torch.ones(16, 32)
    with pytest.raises(ValueError, match="matrices"):
        cpu_quantize.quantize(torch.ones(16))
    with pytest.raises(ValueError, match="unknown search"):
        cpu_quantize.quantize(weight, None, "best")
    with pytest.raises(ValueError, match="no effect on amax"):
        cpu_quantize.quantize(weight, None, "amax", torch.ones(32))
    with pytest.raises(ValueError, match="global scale is"):
        cpu_quantize.quantize(weight, scalar(-1.0), "mse")


def test_a_weight_of_zeros_stays_zero():
    for search in reference.SEARCHES:
        for global_scale in (None, scalar(0.0), scalar(1.0)):
            record = cpu_quantize.quantize(torch.zeros(30, 100), global_scale, search)
            assert not record.packed.any() and not record.block_scale.view(torch.uint8).any()


def test_the_dispatch_takes_the_fast_path_on_a_cpu_and_passes_every_argument_on(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(cpu_quantize, "quantize", lambda *arguments: seen.append(arguments))
    weight, global_scale, columns = torch.ones(16, 32), scalar(1.0), torch.ones(32)
    dispatch.quantize(weight, global_scale, search="mse", column_weight=columns, backend="torch")
    assert seen == [(weight, global_scale, "mse", columns)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_a_gpu_gives_the_bytes_of_the_cpu_for_a_layer_of_real_size(dtype, generator):
    weight = uneven((2048, 4096), generator).to(dtype)
    weight[:1024] = torch.randn((1024, 4096), generator=generator)
    columns = torch.rand(4096, generator=generator) ** 8
    for column_weight in (None, columns):
        for global_scale in (None, scalar(1e-3)):
            expected = cpu_quantize.quantize(weight, global_scale, "mse", column_weight)
            there, columns_there = (part if part is None else part.cuda() for part in (global_scale, column_weight))
            record = dispatch.quantize(weight.cuda(), there, "mse", columns_there, backend="triton")
            assert torch.equal(record.packed.cpu(), expected.packed)
            scales = record.block_scale.cpu().view(torch.uint8)
            assert torch.equal(scales, expected.block_scale.view(torch.uint8))
            assert torch.equal(record.global_scale.cpu(), expected.global_scale)
