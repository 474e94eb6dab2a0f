# SPDX-License-Identifier: Apache-2.0
"""The operations by the chosen backend, prepared ones, and the torch.library operators that torch.compile sees."""

from __future__ import annotations

import pytest
import torch
from kernel_harness import moved
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.kernels.format import OUTPUT_DTYPES

OPS = torch.ops.nvfp4_video
SHAPE = (30, 100)


@pytest.fixture
def record():
    """A quantised (30, 100) weight."""
    return reference.quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def test_dequantize_gives_what_the_chosen_implementation_gives(record):
    for dtype in OUTPUT_DTYPES:
        result = dispatch.dequantize(record, dtype)
        assert result.dtype == dtype
        expected = reference.dequantize(record, dtype)
        assert torch.equal(result, expected)


def test_quantize_gives_what_the_chosen_implementation_gives():
    weight = torch.randn(SHAPE, dtype=torch.bfloat16)
    result, expected = dispatch.quantize(weight), reference.quantize(weight)
    assert torch.equal(result.packed, expected.packed) and result.shape == SHAPE
    assert torch.equal(result.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_is_the_matmul_of_the_decoded_weight_in_the_dtype_of_x(record, dtype, bias):
    x = torch.randn(2, 5, SHAPE[1]).to(dtype)
    b = torch.randn(SHAPE[0]).to(dtype) if bias else None
    result = dispatch.linear(x, record, b)
    weight = reference.dequantize(record, dtype)
    assert result.shape == (2, 5, SHAPE[0])
    assert torch.equal(result, torch.nn.functional.linear(x, weight, b))
    assert torch.equal(result, reference.linear(x, record, b))


def test_linear_of_no_rows_has_no_rows(record):
    x = torch.empty(0, SHAPE[1])
    assert dispatch.linear(x, record).shape == (0, SHAPE[0])


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_prepared_functions_give_what_the_functions_give(record, dtype):
    def prepared(operation):
        return dispatch.prepare(operation, SHAPE, dtype, torch.device("cpu"))

    x, up, down = (torch.randn(size).to(dtype) for size in ((2, 5, SHAPE[1]), (SHAPE[0], 4), (4, SHAPE[1])))
    bias = torch.randn(SHAPE[0]).to(dtype)
    assert torch.equal(prepared("dequantize")(*record.parts), reference.dequantize(record, dtype))
    assert torch.equal(prepared("dequantize_sum")(*record.parts, up, down), dispatch.dequantize_sum(record, up, down))
    for activation in reference.ACTIVATIONS:
        found = prepared("linear_fp8")(x, *record.parts, bias, activation)
        assert torch.equal(found, reference.linear_fp8(x, record, bias, activation))
    assert prepared("gemv") is None


def operator_arguments(record):
    # The schema test multiplies its inputs, which torch cannot do in FP8 on a CPU; scales as bytes are the same thing.
    scales = record.block_scale.view(torch.uint8)
    return record.packed, scales, record.global_scale, *SHAPE, torch.bfloat16, "auto"


def test_the_operators_pass_torch_s_own_checks(record):
    torch.library.opcheck(OPS.dequantize.default, operator_arguments(record))
    torch.library.opcheck(OPS.quantize.default, (torch.randn(SHAPE), record.global_scale, "auto"))


def test_the_operators_give_the_bits_of_the_functions(record):
    values = OPS.dequantize(*record.parts, *SHAPE, torch.float32, "torch")
    expected = reference.dequantize(record, torch.float32)
    assert torch.equal(values, expected)
    packed, scale = OPS.quantize(values, record.global_scale, "auto")
    again = reference.quantize(values, record.global_scale)
    assert torch.equal(packed, again.packed)
    assert torch.equal(scale.view(torch.uint8), again.block_scale.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 16), (30, 100), (129, 1024)], ids=str)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES, ids=str)
def test_meta_tensors_get_the_shape_dtype_and_strides_of_real_ones(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    real = OPS.quantize(weight, torch.tensor(0.01), "torch")
    fake = OPS.quantize(weight.to("meta"), torch.tensor(0.01, device="meta"), "torch")
    real += (OPS.dequantize(*real, torch.tensor(0.01), *shape, dtype, "torch"),)
    fake += (OPS.dequantize(*fake, torch.tensor(0.01, device="meta"), *shape, dtype, "torch"),)
    for one, other in zip(real, fake, strict=True):
        assert other.is_meta
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_an_operator_forced_to_a_backend_that_cannot_run_says_why(record):
    with pytest.raises(ValueError, match="the triton backend cannot run"):
        OPS.dequantize(*record.parts, *SHAPE, torch.bfloat16, "triton")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break_linear_gives_the_bits_of_eager(record, dynamic):
    torch.compiler.reset()
    bias = torch.randn(SHAPE[0], dtype=torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = dispatch.linear(x, record, bias)
        return torch.nn.functional.gelu(y)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 3):
        x = torch.randn(2, rows, SHAPE[1], dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))


def test_the_compiled_graph_holds_one_dequantize_and_one_matmul(record):
    torch.compiler.reset()
    targets = []

    def look(graph: torch.fx.GraphModule, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(x: torch.Tensor) -> torch.Tensor:
        return dispatch.linear(x, record)

    torch.compile(layer, fullgraph=True, backend=look)(torch.randn(4, SHAPE[1]))
    assert sum("nvfp4_video.dequantize" in target for target in targets) == 1
    assert len(targets) == 2 and "linear" in targets[1], targets


@pytest.mark.cuda
def test_on_a_gpu_both_backends_give_the_same_bits(record):
    results = [dispatch.dequantize(moved(record, "cuda"), backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*results)


@pytest.mark.cuda
def test_inductor_on_a_gpu_gives_the_bits_of_eager_without_a_graph_break(record):
    torch.compiler.reset()
    weight = moved(record, "cuda")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return dispatch.linear(x, weight)

    x = torch.randn(6, SHAPE[1], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
