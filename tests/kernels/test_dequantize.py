"""Decoding NVFP4 on tensors: the reference and Triton against numbers worked out by hand, numpy and each other."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from kernel_harness import (
    CODES,
    DTYPES,
    Kernels,
    assert_same_bits,
    assert_same_record,
    decode,
    fresh_generator,
    guarded_kernels,
    implementations,
    parts,
    random_record,
    scalar,
    scale_offset,
    unpack,
)
from nvfp4_video.kernels.format import (
    PackedWeight,
    block_scale_shape,
    packed_shape,
    round_up,
    swap_nibbles,
    swizzle,
    unswizzle,
)

kernels = pytest.fixture(guarded_kernels, params=implementations())
generator = pytest.fixture(fresh_generator)

EDGES = [(1, 1), (16, 100), (32, 120)]
SHAPES = [
    *[(1, 16), (129, 16), (30, 100), (5, 528), (3, 2064)],  # every tile at an edge
    *[(32, 128), (160, 128), (16, 256), (8, 512), (132, 1024), (2, 2048)],  # each tile that divides the matrix
    *[(32, 124), (16, 248), (2, 2040)],  # the padded matrix is divided, the logical one is not
    (31, 128),
]

kernels = pytest.fixture(guarded_kernels, params=implementations())
generator = pytest.fixture(fresh_generator)

SHAPES = [
    *[(1, 16), (1, 1), (129, 16), (16, 100), (30, 100), (5, 528), (3, 2064)],  # every tile at an edge
    *[(32, 128), (160, 128), (16, 256), (8, 512), (132, 1024), (2, 2048)],  # each tile that divides the matrix
    *[(32, 120), (32, 124), (16, 248), (2, 2040)],  # the padded matrix is divided, the logical one is not
    (31, 128),
]


def test_the_tiled_offset_of_a_scale_is_the_one_worked_out_by_hand():
    scales = torch.arange(256 * 8, dtype=torch.int16).remainder(251).to(torch.uint8).view(256, 8)
    tiled = swizzle(scales).flatten()
    by_hand = {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 0): 496, (32, 0): 4, (64, 0): 8, (127, 3): 511, (0, 4): 512}
    by_hand |= {(33, 5): 533, (127, 7): 1023, (128, 0): 1024, (255, 7): 2047}
    for (row, block), offset in by_hand.items():
        assert scale_offset(row, block, 8) == offset
        assert tiled[offset] == scales[row, block], (row, block)


@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (129, 5), (30, 7), (256, 8), (300, 13)])
def test_tiling_puts_every_scale_where_the_formula_says_and_zeros_elsewhere(shape, generator):
    scales = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    expected = np.zeros((round_up(shape[0], 128), round_up(shape[1], 4)), np.uint8)
    row, block = np.indices(shape)
    expected.ravel()[scale_offset(row, block, shape[1])] = scales.numpy()
    tiled = swizzle(scales.view(torch.float8_e4m3fn))
    assert tiled.dtype == torch.float8_e4m3fn
    assert np.array_equal(tiled.view(torch.uint8).numpy(), expected)
    assert torch.equal(unswizzle(tiled, *shape).view(torch.uint8), scales)


def test_tiling_undoes_untiling(generator):
    tiled = torch.randint(256, (256, 12), generator=generator, dtype=torch.uint8)
    assert torch.equal(swizzle(unswizzle(tiled, 256, 12)), tiled)


def test_swapping_nibbles_exchanges_the_two_codes_of_each_byte():
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        swap_nibbles(packed), torch.tensor([16 * (byte % 16) + byte // 16 for byte in range(256)]).byte()
    )
    assert swap_nibbles(torch.tensor([0xBA], dtype=torch.uint8)).item() == 0xAB


def test_rows_and_columns_are_padded_to_16_and_scales_to_whole_tiles():
    assert (packed_shape((30, 100)), block_scale_shape((30, 100))) == ((32, 56), (128, 8))
    assert (packed_shape((1, 16)), block_scale_shape((1, 16))) == ((16, 8), (128, 4))
    assert (packed_shape((129, 1024)), block_scale_shape((129, 1024))) == ((144, 512), (256, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sixteen_codes_decode_in_order_with_the_even_column_in_the_high_nibble(kernels: Kernels, dtype):
    packed = torch.zeros(16, 8, dtype=torch.uint8)
    packed[0] = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF])
    record = PackedWeight(packed, swizzle(torch.ones(16, 1).to(torch.float8_e4m3fn)), scalar(1.0), (1, 16))
    values = kernels.dequantize(record, dtype)
    assert_same_bits(values, torch.from_numpy(CODES)[None].to(dtype))
    assert values[0].signbit().tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_under_every_scale_is_what_numpy_says(kernels: Kernels, dtype, generator):
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32)
    packed = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    for global_scale in (1.0, random_record((1, 16), generator).global_scale.item()):
        record = PackedWeight(packed, swizzle(scales).view(torch.float8_e4m3fn), scalar(global_scale), (256, 512))
        values = kernels.dequantize(record, dtype)
        assert_same_bits(values, decode(record, dtype))
        assert values.isnan().any(1).nonzero().flatten().tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_random_bytes_decode_as_numpy_decodes_them_in_every_dtype(kernels: Kernels, shape, dtype, generator):
    record = random_record(shape, generator)
    assert_same_bits(kernels.dequantize(record, dtype), decode(record, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_bytes_of_any_shape_decode_as_numpy_decodes_them(kernels: Kernels, shape, generator):
    record = random_record(shape, generator)
    dtype = DTYPES[SHAPES.index(shape) % 3]
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
    for dtype in DTYPES:
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
    before = [part.clone() for part in parts(record)]
    first = kernels.dequantize(record)
    assert_same_bits(kernels.dequantize(record), first)
    other = random_record((16, 256), generator)
    assert_same_bits(kernels.dequantize(other), decode(other, torch.bfloat16))
    assert_same_record(record, PackedWeight(*before, record.shape))


def test_a_prepared_dequantizer_serves_one_weight_after_another(kernels: Kernels, generator):
    def on_device(record: PackedWeight) -> list[torch.Tensor]:
        return [part.to(kernels.device) for part in parts(record)]

    for shape in ((30, 100), (32, 128)):
        run = kernels.module.dequantizer(shape, torch.bfloat16, torch.empty(0, device=kernels.device).device)
        for _ in range(3):
            record = random_record(shape, generator)
            assert_same_bits(run(*on_device(record)).cpu(), decode(record, torch.bfloat16))
        with pytest.raises(ValueError, match="do not belong"):
            run(*on_device(random_record((16, 48), generator)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_is_a_matmul_with_the_decoded_weight(kernels: Kernels, dtype, generator):
    record = random_record((33, 96), generator)
    record.block_scale.view(torch.uint8).bitwise_and_(0x77)  # no NaN
    x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 3, 96), (33,)))
    for b in (bias, None):
        result = kernels.call("linear", x, *parts(record), record.shape, b).cpu()
        on_device = [None if t is None else t.to(kernels.device) for t in (x, decode(record, dtype), b)]
        assert_same_bits(result, torch.nn.functional.linear(*on_device).cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_an_output_dtype_it_cannot_give_is_refused(kernels: Kernels, dtype, generator):
    with pytest.raises(ValueError, match=f"cannot dequantise NVFP4 to {dtype}; expected one of .*bfloat16"):
        kernels.dequantize(random_record((16, 32), generator), dtype)


@pytest.mark.parametrize("shape", [(33, 100), (30, 113), (30, 96), (16, 100), (300, 100)], ids=str)
def test_parts_that_do_not_belong_to_the_shape_are_refused(kernels: Kernels, shape, generator):
    record = dataclasses.replace(random_record((30, 100), generator), shape=shape)
    with pytest.raises(ValueError, match=r"\(32, 56\) and block_scale \(128, 8\) do not belong .*; expected \("):
        kernels.dequantize(record)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(37, 208), (96, 128)], ids=str)  # of no other test: launches are cached by shape
def test_before_compute_capability_8_bf16_is_rounded_in_integers_to_the_same_bits(shape, monkeypatch, generator):
    triton_nvfp4 = importlib.import_module("nvfp4_video.kernels.triton.dequantize")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    record = random_record(shape, generator)
    result = triton_nvfp4.dequantize(*(part.cuda() for part in parts(record)), shape)
    assert_same_bits(result.cpu(), decode(record, torch.bfloat16))


@pytest.mark.cuda
def test_parts_that_start_at_any_multiple_of_four_bytes_decode_the_same(generator):
    triton_nvfp4 = importlib.import_module("nvfp4_video.kernels.triton.dequantize")
    record = random_record((32, 128), generator)
    expected = decode(record, torch.bfloat16)
    for offset in (0, 4, 8, 0, 12):  # aligned first: what was compiled for it must not serve the others
        moved = []
        for part in parts(record)[:2]:
            room = torch.empty(part.nbytes + 16, dtype=torch.uint8, device="cuda")
            moved.append(room[offset : offset + part.nbytes].view(part.shape).copy_(part.view(torch.uint8)))
        result = triton_nvfp4.dequantize(*moved, record.global_scale.cuda(), record.shape)
        assert_same_bits(result.cpu(), expected)


@pytest.mark.cuda
def test_a_captured_cuda_graph_decodes_what_lies_there_when_it_is_replayed(generator):
    triton_nvfp4 = importlib.import_module("nvfp4_video.kernels.triton.dequantize")
    first, second = (random_record((64, 256), generator) for _ in range(2))
    inputs = [part.cuda() for part in parts(first)]
    triton_nvfp4.dequantize(*inputs, first.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = triton_nvfp4.dequantize(*inputs, first.shape)
    for record in (first, second):
        for target, part in zip(inputs, parts(record), strict=True):
            target.view(torch.uint8).copy_(part.view(torch.uint8)) if part.ndim else target.copy_(part)
        graph.replay()
        assert_same_bits(values.cpu(), decode(record, torch.bfloat16))
