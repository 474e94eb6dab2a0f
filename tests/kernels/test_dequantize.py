# SPDX-License-Identifier: Apache-2.0
"""Decoding NVFP4 on tensors: the reference and Triton against numbers worked out by hand, numpy and each other."""

from __future__ import annotations

import dataclasses
import importlib
import types

import numpy as np
import pytest
import torch
from kernel_harness import (
    CODES,
    Kernels,
    assert_same_bits,
    assert_same_record,
    decode,
    fresh_generator,
    guarded_kernels,
    implementations,
    moved,
    random_record,
    scalar,
    unpack,
)
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import OUTPUT_DTYPES, PackedWeight, swizzle

kernels = pytest.fixture(guarded_kernels, params=implementations())
generator = pytest.fixture(fresh_generator)

EDGES = [(1, 1), (16, 100), (32, 120)]
SHAPES = [
    *[(1, 16), (129, 16), (30, 100), (5, 528), (3, 2064)],  # every tile at an edge
    *[(32, 128), (160, 128), (16, 256), (8, 512), (132, 1024), (2, 2048)],  # each tile that divides the matrix
    *[(32, 124), (16, 248), (2, 2040)],  # the padded matrix is divided, the logical one is not
    (31, 128),
]


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_the_sixteen_codes_decode_in_order_with_the_even_column_in_the_high_nibble(kernels: Kernels, dtype):
    packed = torch.zeros(16, 8, dtype=torch.uint8)
    packed[0] = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF])
    record = PackedWeight(packed, swizzle(torch.ones(16, 1).to(torch.float8_e4m3fn)), scalar(1.0), (1, 16))
    values = kernels.dequantize(record, dtype)
    assert_same_bits(values, torch.from_numpy(CODES)[None].to(dtype))
    assert values[0].signbit().tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("dtype", "global_scale"), [(torch.float32, 1.0), (torch.bfloat16, None), (torch.float16, None)], ids=str
)
def test_every_byte_under_every_scale_is_what_numpy_says(kernels: Kernels, dtype, global_scale, generator):
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32)
    packed = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    global_scale = random_record((1, 16), generator).global_scale if global_scale is None else scalar(global_scale)
    record = PackedWeight(packed, swizzle(scales).view(torch.float8_e4m3fn), global_scale, (256, 512))
    values = kernels.dequantize(record, dtype)
    assert_same_bits(values, decode(record, dtype))
    assert values.isnan().any(1).nonzero().flatten().tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_random_bytes_decode_as_numpy_decodes_them_in_every_dtype(kernels: Kernels, shape, dtype, generator):
    record = random_record(shape, generator)
    assert_same_bits(kernels.dequantize(record, dtype), decode(record, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_bytes_of_any_shape_decode_as_numpy_decodes_them(kernels: Kernels, shape, generator):
    record = random_record(shape, generator)
    dtype = OUTPUT_DTYPES[SHAPES.index(shape) % 3]
    assert_same_bits(kernels.dequantize(record, dtype), decode(record, dtype))


@pytest.mark.parametrize("global_scale", [2.0**-30, 1e-25, 3e20, 0.0])
def test_global_scales_far_from_one_round_as_the_format_says(kernels: Kernels, global_scale: float, generator):
    record = random_record((17, 48), generator, global_scale)
    for dtype in (torch.bfloat16, torch.float32):
        assert_same_bits(kernels.dequantize(record, dtype), decode(record, dtype))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000], ids=hex)
def test_a_nan_stays_a_nan_in_every_dtype(kernels: Kernels, bits: int, generator):
    # 0x7fffffff is the NaN that NVIDIA's multiplication returns.
    record = dataclasses.replace(
        random_record((16, 64), generator), global_scale=torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    )
    for dtype in OUTPUT_DTYPES:
        assert kernels.dequantize(record, dtype).isnan().all(), dtype


def test_bf16_values_are_within_one_ulp_of_the_exact_product_rounded_once(kernels: Kernels, generator):
    record = random_record((24, 256), generator)
    codes, scales = unpack(record)
    mantissa, exponent = np.frexp(codes.astype(float) * scales * float(record.global_scale))  # 30 bits: exact in fp64
    rounded = np.ldexp(np.rint(mantissa * 256), exponent - 8)
    error = np.abs(kernels.dequantize(record).double().numpy() - rounded) / np.ldexp(1.0, exponent - 8)
    finite = ~np.isnan(rounded)
    assert error[finite].max() <= 1
    assert (error[finite] > 0).mean() < 0.01


def test_a_power_of_two_as_the_global_scale_makes_bf16_exact(kernels: Kernels, generator):
    record = random_record((16, 512), generator, 2.0**-12)
    codes, scales = unpack(record)
    exact = torch.from_numpy(codes.astype(float) * scales * 2.0**-12)
    assert torch.equal(kernels.dequantize(record).double().nan_to_num(7.0), exact.nan_to_num(7.0))


def test_scales_given_as_bytes_or_as_views_with_strides_decode_the_same(kernels: Kernels, generator):
    record = random_record((48, 96), generator)
    wider = torch.cat((record.packed, record.packed), 1)[:, : record.packed.shape[1]]
    assert not wider.is_contiguous()
    expected = decode(record, torch.bfloat16)
    assert_same_bits(kernels.dequantize(dataclasses.replace(record, packed=wider)), expected)
    assert_same_bits(
        kernels.dequantize(dataclasses.replace(record, block_scale=record.block_scale.view(torch.uint8))), expected
    )


def test_calls_are_repeatable_and_leave_their_inputs_alone(kernels: Kernels, generator):
    record = random_record((16, 256), generator)
    before = [part.clone() for part in record.parts]
    first = kernels.dequantize(record)
    assert_same_bits(kernels.dequantize(record), first)
    other = random_record((16, 256), generator)
    assert_same_bits(kernels.dequantize(other), decode(other, torch.bfloat16))
    assert_same_record(record, PackedWeight(*before, record.shape))


def test_a_prepared_dequantizer_serves_one_weight_after_another(kernels: Kernels, generator):
    device = torch.empty(0, device=kernels.device).device
    for shape in ((30, 100), (32, 128)):
        if kernels.name == "reference":
            run = dispatch.prepare("dequantize", shape, torch.bfloat16, device, "torch")
        else:
            triton_dequantize = importlib.import_module("nvfp4_video.kernels.triton.dequantize")
            run = triton_dequantize.prepare(shape, torch.bfloat16, device)
        for _ in range(3):
            record = random_record(shape, generator)
            assert_same_bits(run(*moved(record, kernels.device).parts).cpu(), decode(record, torch.bfloat16))
        with pytest.raises(ValueError, match="do not belong"):
            run(*moved(random_record((16, 48), generator), kernels.device).parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_linear_is_a_matmul_with_the_decoded_weight(device, dtype, generator):
    record = random_record((33, 96), generator)
    record.block_scale.view(torch.uint8).bitwise_and_(0x77)  # no NaN
    x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 3, 96), (33,)))
    for b in (bias, None):
        on_device = [moved(t, device) for t in (x, decode(record, dtype), b)]
        expected = torch.nn.functional.linear(*on_device).cpu()
        for linear in (reference.linear, dispatch.linear):
            assert_same_bits(linear(on_device[0], moved(record, device), on_device[2]).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_an_output_dtype_it_cannot_give_is_refused(kernels: Kernels, dtype, generator):
    with pytest.raises(ValueError, match=f"cannot dequantize NVFP4 to {dtype}; expected one of .*bfloat16"):
        kernels.dequantize(random_record((16, 32), generator), dtype)


@pytest.mark.parametrize("shape", [(33, 100), (30, 113), (30, 96), (16, 100), (300, 100)], ids=str)
def test_parts_that_do_not_belong_to_the_shape_are_refused(kernels: Kernels, shape, generator):
    record = dataclasses.replace(random_record((30, 100), generator), shape=shape)
    with pytest.raises(ValueError, match=r"\(32, 56\) and block_scale \(128, 8\) do not belong .*; expected \("):
        kernels.dequantize(record)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(37, 208), (96, 128)], ids=str)  # of no other test: launches are cached by shape
def test_before_compute_capability_8_bf16_is_rounded_in_integers_to_the_same_bits(shape, monkeypatch, generator):
    dequantize = importlib.import_module("nvfp4_video.kernels.triton.dequantize").dequantize
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    record = random_record(shape, generator)
    result = dequantize(moved(record, "cuda"))
    assert_same_bits(result.cpu(), decode(record, torch.bfloat16))


@pytest.mark.cuda
def test_parts_that_start_at_any_multiple_of_four_bytes_decode_the_same(generator):
    dequantize = importlib.import_module("nvfp4_video.kernels.triton.dequantize").dequantize
    record = random_record((32, 128), generator)
    expected = decode(record, torch.bfloat16)
    for offset in (0, 4, 8, 0, 12):  # aligned first: what was compiled for it must not serve the others
        there = []
        for part in record.parts[:2]:
            room = torch.empty(part.nbytes + 16, dtype=torch.uint8, device="cuda")
            there.append(room[offset : offset + part.nbytes].view(part.shape).copy_(part.view(torch.uint8)))
        result = dequantize(PackedWeight(*there, record.global_scale.cuda(), record.shape))
        assert_same_bits(result.cpu(), expected)


@pytest.mark.cuda
def test_a_captured_cuda_graph_decodes_what_lies_there_when_it_is_replayed(generator):
    dequantize = importlib.import_module("nvfp4_video.kernels.triton.dequantize").dequantize
    first, second = (random_record((64, 256), generator) for _ in range(2))
    inputs = moved(first, "cuda")
    dequantize(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = dequantize(inputs)
    for record in (first, second):
        for target, part in zip(inputs.parts, record.parts, strict=True):
            target.view(torch.uint8).copy_(part.view(torch.uint8)) if part.ndim else target.copy_(part)
        graph.replay()
        assert_same_bits(values.cpu(), decode(record, torch.bfloat16))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_weight_on_the_second_gpu_is_decoded_whichever_is_the_current_one(generator):
    record = random_record((64, 256), generator)
    right = reference.dequantize(record, torch.bfloat16)
    for device in (torch.device("cuda", 1), torch.device("cuda", 0)):
        run = dispatch.prepare("dequantize", record.shape, torch.bfloat16, device, "triton")
        parts = [part.to(device) for part in record.parts]
        for current in (0, 1, 0):
            with torch.cuda.device(current):
                assert_same_bits(run(*parts).cpu(), right)


@pytest.mark.parametrize(
    ("megabytes", "past"), [(60, False), (96, False), (24, True), (72, False), (3, True), (0, False)]
)
def test_a_weight_goes_past_the_cache_of_a_card_that_does_not_hold_it(megabytes, past, monkeypatch):
    """4096 x 4096 in BF16, 33.6 MB: the L2 of an H200 (as it says), RTX 5090, GB10, RTX 4090, RTX 3060; one unknown."""
    pytest.importorskip("triton")
    from nvfp4_video.kernels.triton import launch

    found = types.SimpleNamespace(L2_cache_size=megabytes << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    launch.cached_bytes.cache_clear()
    try:
        device = torch.device("cuda", 0)
        assert launch.store_modifier((4096, 4096), torch.bfloat16, device) == (".cs" if past else "")
        assert launch.store_modifier((16384, 8192), torch.bfloat16, device) == ".cs"
    finally:
        launch.cached_bytes.cache_clear()
