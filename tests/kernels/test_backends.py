# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.kernels import backends, dispatch, reference

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """monkeypatch, with no earlier choice remembered before or after the test."""
    for remembered in (backends.pick_backend, dispatch.prepare):
        remembered.cache_clear()
    yield monkeypatch
    for remembered in (backends.pick_backend, dispatch.prepare):
        remembered.cache_clear()


def pretend_gpu(fresh: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    fresh.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    fresh.setattr(torch.version, "cuda", "12.8")


def without_triton(fresh: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton.language"):
        fresh.setitem(sys.modules, name, None)
    fresh.delitem(sys.modules, "nvfp4_video.kernels.triton.launch", raising=False)


def test_on_a_cpu_torch_computes_and_the_reason_names_the_device(fresh):
    assert backends.pick_backend(CPU) == ("torch", "Triton needs an NVIDIA or AMD GPU, the model is on cpu")


def test_torch_that_was_asked_for_is_taken_anywhere(fresh):
    assert backends.pick_backend(CPU, "torch") == ("torch", "asked for")
    assert backends.pick_backend(CUDA, "torch") == ("torch", "asked for")


def test_triton_asked_for_where_it_cannot_run_is_an_error_that_says_why_and_what_else(fresh):
    with pytest.raises(ValueError, match="triton backend cannot run: .* model is on cpu; choose backend auto or torch"):
        backends.pick_backend(CPU, "triton")
    with pytest.raises(ValueError, match="cannot run"):
        dispatch.dequantize(reference.quantize(torch.ones(16, 32)), backend="triton")


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
        assert backends.pick_backend(CPU) == ("torch", "no")
    assert calls == [CPU]


def test_importing_the_package_imports_no_triton_and_no_host(tmp_path: Path):
    code = (
        "import sys, conftest\n"
        "before = set(sys.modules)\n"
        "import nvfp4_video.kernels.dispatch\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not loaded & {'triton', 'comfy', 'comfy_kitchen', 'folder_paths', 'cv2'}, loaded\n"
        "assert 'nvfp4_video.kernels.triton' not in sys.modules\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_on_a_gpu_triton_computes():
    device = torch.device("cuda", torch.cuda.current_device())
    name, reason = backends.pick_backend(device)
    assert name == "triton" and torch.cuda.get_device_name(device) in reason
