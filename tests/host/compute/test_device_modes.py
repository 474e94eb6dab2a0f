# SPDX-License-Identifier: Apache-2.0
"""A model that ComfyUI loads on another device than the one it was read for computes as that device can."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import pytest
import torch
from nvfp4_video.host.compute import device_modes
from nvfp4_video.host.load.model import load_model
from nvfp4_video.kernels import fp8
from nvfp4_video.samples import synthetic

CPU, OLD = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model") / "model.safetensors"
    state, config = synthetic.small_ltx23()
    synthetic.write(found, "comfy_markers", state, config, synthetic.quantize_layers(state, config))
    return found


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device runs FP8, the second does not."""
    monkeypatch.setattr(fp8, "obstacle", lambda device: "" if device == CPU else "FP8 needs 8.9, it has 8.6")
    monkeypatch.setattr("nvfp4_video.host.compute.modes._fp4_obstacle", lambda device: "no FP4")


def modes(patcher) -> set[str]:
    return {mode for m in patcher.model.diffusion_model.modules() if (mode := m.__dict__.get("nvfp4_mode"))}


def test_auto_is_chosen_again_for_the_device_the_model_is_loaded_on(path, caplog):
    caplog.set_level("INFO")
    patcher, _ = load_model(str(path), "auto")
    model = patcher.model.diffusion_model
    assert modes(patcher) == {"fp8", "bf16"}
    before = {name: module.__dict__.get("nvfp4_mode") for name, module in model.named_modules()}
    device_modes.settle(model, CPU)
    assert "NVFP4 layers on" not in caplog.text
    device_modes.settle(model, OLD)
    assert modes(patcher) == {"bf16"}
    assert "NVFP4 layers on cuda:1: bf16 in " in caplog.text and "no fp8: FP8 needs 8.9, it has 8.6" in caplog.text
    device_modes.settle(model, CPU)
    assert {name: module.__dict__.get("nvfp4_mode") for name, module in model.named_modules()} == before


def test_a_mode_asked_for_by_name_that_the_device_cannot_run_is_an_error_that_says_so(path):
    patcher, _ = load_model(str(path), "fp8")
    with pytest.raises(ValueError, match="compute fp8 cannot run: FP8 needs 8.9, it has 8.6; choose bf16 or auto"):
        device_modes.settle(patcher.model.diffusion_model, OLD)
    assert "fp8" in modes(patcher), "nothing was changed"


def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own device does not run FP8, another does."""
    monkeypatch.setattr(fp8, "obstacle", lambda device: "" if device == OLD else f"FP8 needs 8.9, {device} has 8.6")
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda: [CPU, OLD], raising=False)


def test_a_mode_that_only_another_gpu_runs_is_planned_for_that_gpu_and_refused_on_the_first(path, monkeypatch):
    two_gpus(monkeypatch)
    patcher, report = load_model(str(path), "fp8")
    assert "fp8" in modes(patcher)
    found = "compute: fp8 (for cuda:1, where SelectModelDevice has to place the model; on cpu, compute fp8 cannot run"
    assert found in str(report)
    device_modes.settle(patcher.model.diffusion_model, OLD)
    with pytest.raises(ValueError, match="compute fp8 cannot run: FP8 needs 8.9, cpu has 8.6"):
        device_modes.settle(patcher.model.diffusion_model, CPU)


def test_the_report_says_that_another_gpu_has_modes_of_its_own(path, monkeypatch):
    assert "device: cpu, DynamicVRAM" in str(load_model(str(path))[1])
    two_gpus(monkeypatch)
    patcher, report = load_model(str(path), "auto")
    assert modes(patcher) == {"bf16"}
    assert "device: cpu (on another GPU modes are chosen again), DynamicVRAM" in str(report)
    device_modes.settle(patcher.model.diffusion_model, OLD)
    assert "fp8" in modes(patcher)


def test_a_mode_that_no_gpu_runs_is_refused_with_what_the_first_lacks(path, monkeypatch):
    two_gpus(monkeypatch)
    with pytest.raises(ValueError, match="compute fp4 cannot run: no FP4"):
        load_model(str(path), "fp4")
    with pytest.raises(ValueError, match="expected PART=MODE"):
        load_model(str(path), layer_compute="to_out")


def test_a_model_of_another_loader_is_left_alone():
    device_modes.settle(torch.nn.Linear(1, 1), OLD)
    device_modes.settle(None, OLD)
