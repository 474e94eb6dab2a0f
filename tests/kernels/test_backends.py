"""Which implementation computes and why, and the torch.library operators that torch.compile sees."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.kernels import backends, reference

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
OPS = torch.ops.nvfp4_video
SHAPE = (30, 100)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """monkeypatch, with no earlier choice remembered before or after the test."""
    backends.pick_backend.cache_clear()
    backends.implementation.cache_clear()
    yield monkeypatch
    backends.pick_backend.cache_clear()
    backends.implementation.cache_clear()


@pytest.fixture
def record():
    """A quantised (30, 100) weight."""
    return reference.quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def pretend_gpu(fresh: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    fresh.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    fresh.setattr(torch.version, "cuda", "12.8")


def without_triton(fresh: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton.language"):
        fresh.setitem(sys.modules, name, None)
    fresh.delitem(sys.modules, "nvfp4_video.kernels.triton.dequantize", raising=False)


def test_on_a_cpu_torch_computes_and_the_reason_names_the_device(fresh):
    assert backends.pick_backend(CPU) == ("torch", "Triton needs an NVIDIA or AMD GPU, the model is on cpu")
    assert backends.implementation(CPU) is reference


def test_torch_that_was_asked_for_is_taken_anywhere(fresh):
    assert backends.pick_backend(CPU, "torch") == ("torch", "asked for")
    assert backends.pick_backend(CUDA, "torch") == ("torch", "asked for")


def test_triton_asked_for_where_it_cannot_run_is_an_error_that_says_why_and_what_else(fresh, record):
    with pytest.raises(ValueError, match="triton backend cannot run: .* model is on cpu; choose backend auto or torch"):
        backends.pick_backend(CPU, "triton")
    with pytest.raises(ValueError, match="cannot run"):
        backends.dequantize(record.packed, record.block_scale, record.global_scale, SHAPE, backend="triton")


def test_an_unknown_backend_is_refused_with_the_known_ones(fresh):
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected auto, triton or torch"):
        backends.pick_backend(CPU, "cuda")


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (12, 1)], ids=str)
def test_triton_computes_from_compute_capability_7_5_on(fresh, capability):
    pytest.importorskip("triton")
    pretend_gpu(fresh, capability, "NVIDIA X")
    reason = f"Triton runs on NVIDIA X (compute capability {capability[0]}.{capability[1]})"
    assert backends.pick_backend(CUDA) == ("triton", reason)
    assert backends.pick_backend(CUDA, "triton") == ("triton", "asked for")
    assert backends.implementation(CUDA).__name__.endswith(".triton.dequantize")


def test_an_older_gpu_falls_back_to_torch_and_says_why(fresh):
    pretend_gpu(fresh, (7, 0), "Tesla V100")
    reason = "Triton needs compute capability 7.5, this is Tesla V100 (compute capability 7.0)"
    assert backends.pick_backend(CUDA) == ("torch", reason)
    with pytest.raises(ValueError, match="cannot run: Triton needs compute capability 7.5, this is Tesla V100"):
        backends.pick_backend(CUDA, "triton")


def test_without_triton_a_gpu_falls_back_to_torch_and_names_the_package_to_install(fresh):
    pretend_gpu(fresh, (9, 0), "NVIDIA X")
    without_triton(fresh)
    name, reason = backends.pick_backend(CUDA)
    assert name == "torch"
    assert "Triton is not installed" in reason and "install triton, on Windows triton-windows" in reason
    with pytest.raises(ValueError, match="cannot run: Triton is not installed"):
        backends.pick_backend(CUDA, "triton")


def test_a_choice_is_made_once_for_a_device(fresh):
    calls = []
    fresh.setattr(backends, "_triton_obstacle", lambda device: calls.append(device) or "no")
    for _ in range(3):
        assert backends.implementation(CPU) is reference
    assert calls == [CPU]


def test_importing_the_package_imports_no_triton_and_no_host(tmp_path: Path):
    code = (
        "import sys, conftest\n"
        "before = set(sys.modules)\n"
        "import nvfp4_video.kernels.backends\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not loaded & {'triton', 'comfy', 'comfy_kitchen', 'folder_paths', 'cv2'}, loaded\n"
        "assert 'nvfp4_video.kernels.triton.dequantize' not in sys.modules\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dequantize_gives_what_the_chosen_implementation_gives(record):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        result = backends.dequantize(record.packed, record.block_scale, record.global_scale, SHAPE, dtype)
        assert result.dtype == dtype
        expected = reference.dequantize(record.packed, record.block_scale, record.global_scale, SHAPE, dtype)
        assert torch.equal(result, expected)


def test_quantize_gives_what_the_chosen_implementation_gives():
    weight = torch.randn(SHAPE, dtype=torch.bfloat16)
    result, expected = backends.quantize(weight), reference.quantize(weight)
    assert torch.equal(result.packed, expected.packed) and result.shape == SHAPE
    assert torch.equal(result.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_is_the_matmul_of_the_decoded_weight_in_the_dtype_of_x(record, dtype, bias):
    x = torch.randn(2, 5, SHAPE[1]).to(dtype)
    b = torch.randn(SHAPE[0]).to(dtype) if bias else None
    result = backends.linear(x, record.packed, record.block_scale, record.global_scale, SHAPE, b)
    weight = reference.dequantize(record.packed, record.block_scale, record.global_scale, SHAPE, dtype)
    assert result.shape == (2, 5, SHAPE[0])
    assert torch.equal(result, torch.nn.functional.linear(x, weight, b))
    assert torch.equal(result, reference.linear(x, record.packed, record.block_scale, record.global_scale, SHAPE, b))


def test_linear_of_no_rows_has_no_rows(record):
    x = torch.empty(0, SHAPE[1])
    assert backends.linear(x, record.packed, record.block_scale, record.global_scale, SHAPE).shape == (0, SHAPE[0])


# The operators


def operator_arguments(record):
    # The schema test multiplies its inputs, which torch cannot do in FP8 on a CPU; scales as bytes are the same thing.
    scales = record.block_scale.view(torch.uint8)
    return record.packed, scales, record.global_scale, *SHAPE, torch.bfloat16, "auto"


def test_the_operators_pass_torch_s_own_checks(record):
    torch.library.opcheck(OPS.dequantize.default, operator_arguments(record))
    torch.library.opcheck(OPS.quantize.default, (torch.randn(SHAPE), record.global_scale, "auto"))


def test_the_operators_give_the_bits_of_the_functions(record):
    values = OPS.dequantize(record.packed, record.block_scale, record.global_scale, *SHAPE, torch.float32, "torch")
    expected = reference.dequantize(record.packed, record.block_scale, record.global_scale, SHAPE, torch.float32)
    assert torch.equal(values, expected)
    packed, scale = OPS.quantize(values, record.global_scale, "auto")
    again = reference.quantize(values, record.global_scale)
    assert torch.equal(packed, again.packed)
    assert torch.equal(scale.view(torch.uint8), again.block_scale.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 16), (30, 100), (129, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
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
        OPS.dequantize(record.packed, record.block_scale, record.global_scale, *SHAPE, torch.bfloat16, "triton")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break_linear_gives_the_bits_of_eager(record, dynamic):
    torch.compiler.reset()
    bias = torch.randn(SHAPE[0], dtype=torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = backends.linear(x, record.packed, record.block_scale, record.global_scale, SHAPE, bias)
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
        return backends.linear(x, record.packed, record.block_scale, record.global_scale, SHAPE)

    torch.compile(layer, fullgraph=True, backend=look)(torch.randn(4, SHAPE[1]))
    assert sum("nvfp4_video.dequantize" in target for target in targets) == 1
    assert len(targets) == 2 and "linear" in targets[1], targets


@pytest.mark.cuda
def test_on_a_gpu_triton_computes_and_gives_the_bits_of_the_reference(record):
    device = torch.device("cuda", torch.cuda.current_device())
    name, reason = backends.pick_backend(device)
    assert name == "triton" and torch.cuda.get_device_name(device) in reason
    assert backends.implementation(device) is importlib.import_module("nvfp4_video.kernels.triton.dequantize")
    moved = [part.to(device) for part in (record.packed, record.block_scale, record.global_scale)]
    results = [backends.dequantize(*moved, SHAPE, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*results)


@pytest.mark.cuda
def test_inductor_on_a_gpu_gives_the_bits_of_eager_without_a_graph_break(record):
    torch.compiler.reset()
    moved = [part.cuda() for part in (record.packed, record.block_scale, record.global_scale)]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return backends.linear(x, *moved, SHAPE)

    x = torch.randn(6, SHAPE[1], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
