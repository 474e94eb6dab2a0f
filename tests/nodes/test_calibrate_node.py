# SPDX-License-Identifier: Apache-2.0
"""NVFP4Calibrate on the stubbed host: what it watches, what it writes when, and that NVFP4Quantize takes its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import server
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write.calibration import read_calibration
from nvfp4_video.host.compute.calibrate import KEY
from nvfp4_video.nodes.calibrate import NVFP4Calibrate
from nvfp4_video.nodes.quantize import WHOLE, NVFP4Quantize
from nvfp4_video.tests.support.quantize_sources import PREFIX, linears, save, tiny


class StoredLinear(torch.nn.Module):
    """As the host's Linear of stored FP8 and NVFP4: no torch.nn.Linear, with its shape under the same names."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Diffusion(torch.nn.Module):
    """The layers of ``tiny`` at their names; its forward calls two of them with one input."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], block: str = "transformer_blocks", linear: type = torch.nn.Linear
    ) -> None:
        super().__init__()
        for name in linears(tensors):
            at, names = self, name.removeprefix(PREFIX).replace("transformer_blocks", block).split(".")
            for part in names[:-1]:
                if part not in dict(at.named_children()):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            rows, columns = tensors[f"{name}.weight"].shape
            at.add_module(names[-1], linear(columns, rows, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = dict(self.named_modules())
        first = layers["transformer_blocks.1.attn1.to_q"](x)
        return first.sum() + layers["transformer_blocks.1.ff.net.0.proj"](x).sum()


@pytest.fixture
def full(stub_comfy, tmp_path: Path) -> Path:
    return save(tmp_path / "models" / "checkpoints" / "full.safetensors", tiny())


@pytest.fixture
def target(stub_comfy) -> Path:
    return Path(stub_comfy.get_output_directory()) / "checkpoints" / "full_calibration.safetensors"


def patcher_of(model: torch.nn.Module) -> ModelPatcher:
    holder = torch.nn.Module()
    holder.diffusion_model = model
    return ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))


def run(model, **changes):
    widgets = {"file_name": "full.safetensors", "memory_gb": 2.0, "name": "", "overwrite": False}
    return NVFP4Calibrate.execute(model, **(widgets | changes))


def sample(patcher: ModelPatcher, steps: int = 8) -> None:
    """A sampling as the host does it: the wrappers around each step, then the clean-up."""
    model = patcher.model.diffusion_model
    wrappers = patcher.wrappers[WrappersMP.DIFFUSION_MODEL][KEY]
    with torch.inference_mode():
        for _ in range(steps):
            WrapperExecutor.new_class_executor(model.forward, model, wrappers).execute(torch.randn(1, 40, 64))
    for callback in patcher.callbacks[CallbacksMP.ON_CLEANUP][KEY]:
        callback(patcher)


def test_a_sampling_that_reaches_no_layer_writes_nothing_and_says_so(full, target, caplog):
    patcher, _ = run(patcher_of(Diffusion(tiny()))).args
    patcher.model.diffusion_model.forward = lambda x: x.sum()  # what a compiled model does
    sample(patcher)
    assert not target.exists() and "no layer was reached, full_calibration.safetensors is not written" in caplog.text


def test_samplings_add_up_in_a_file_that_the_quantiser_takes(full, target, stub_comfy):
    patcher, text = run(patcher_of(Diffusion(tiny()))).args
    assert text.startswith("20 of 20 layers (recipe LTX-2.3), Gram matrices of blocks of 64 columns")
    assert not target.exists()
    for prompts in (1, 2):
        sample(patcher)
        found = read_calibration(target)
        assert (found.prompts, found.tokens) == (prompts, 320 * prompts)
    at = "transformer_blocks.1"
    assert found.layers == {f"{at}.attn1.to_q": f"{at}.attn1.to_q", f"{at}.ff.net.0.proj": f"{at}.attn1.to_q"}
    target.rename(full.parent / "inputs.safetensors")
    result = NVFP4Quantize.execute(
        "full.safetensors", WHOLE, "calibrated", False, False, False, "", False, calibration="inputs.safetensors"
    )
    assert "inputs.safetensors has 2 of 20 layers" in result.args[1]


def test_front_ends_are_told_of_a_new_file_once_and_not_when_it_grows(full, target):
    patcher = run(patcher_of(Diffusion(tiny()))).args[0]
    for _ in range(2):
        sample(patcher)
    assert target.is_file()
    assert [event for event, _ in server.PromptServer.instance.sent].count("nvfp4.files") == 1


def test_layers_that_the_host_keeps_in_fp8_count_too(full, target):
    patcher, text = run(patcher_of(Diffusion(tiny(), linear=StoredLinear))).args
    assert text.startswith("20 of 20 layers")
    sample(patcher)
    assert read_calibration(target).tokens == 320


def test_the_model_given_has_no_wrapper_and_no_hook_stays_after_a_sampling(full):
    given = patcher_of(Diffusion(tiny()))
    patcher = run(given).args[0]
    sample(patcher)
    assert not given.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(KEY)
    assert not any(module._forward_pre_hooks for module in patcher.model.modules())


def test_calls_between_two_steps_do_not_count(full, target):
    patcher = run(patcher_of(Diffusion(tiny()))).args[0]
    model, wrappers = patcher.model.diffusion_model, patcher.wrappers[WrappersMP.DIFFUSION_MODEL][KEY]
    for _ in range(4):
        WrapperExecutor.new_class_executor(model.forward, model, wrappers).execute(torch.randn(1, 40, 64))
        assert any(module._forward_pre_hooks for module in model.modules())
        model(torch.randn(1, 500, 64))
    sample(patcher, steps=0)
    assert read_calibration(target).tokens == 160


def test_a_clean_up_without_a_sampling_writes_nothing(full, target):
    patcher = run(patcher_of(Diffusion(tiny()))).args[0]
    sample(patcher, steps=0)
    assert not target.exists()


def test_other_files_are_never_replaced_and_calibration_files_only_when_told(full, target):
    sample(run(patcher_of(Diffusion(tiny()))).args[0])
    with pytest.raises(CheckpointError, match="the target exists; choose another name, or allow overwriting"):
        run(patcher_of(Diffusion(tiny())))
    run(patcher_of(Diffusion(tiny())), overwrite=True)
    save(target, tiny())
    with pytest.raises(CheckpointError, match="the target exists; choose another name$"):
        run(patcher_of(Diffusion(tiny())), overwrite=True)


def test_a_model_of_other_layers_and_a_budget_too_small_are_refused(full):
    with pytest.raises(CheckpointError, match="none of its 20 layers .*; choose the checkpoint that the model was"):
        run(patcher_of(Diffusion(tiny(), "blocks")))
    with pytest.raises(CheckpointError, match="a budget of 1,000 bytes; blocks of 16 columns need .*; allow more"):
        run(patcher_of(Diffusion(tiny())), memory_gb=1e-6)
