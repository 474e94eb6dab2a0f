# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged files, in every dialect: each loads to the weights it was made from, or is refused in words.

What the loader gives to the host is decoded by the host's own tensors (comfy-kitchen) and compared with what NumPy says
the file means (tests/support/stored_files.py); nothing of the pack takes part in either.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import comfy.model_detection
import numpy as np
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host.load.model import load_model
from nvfp4_video.tests.support import mutations, stored_files

EACH = 175  # mutants of each dialect
SEED = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def host(monkeypatch):
    """host(meant): from now on the host builds the model that ``meant`` is, whatever the file has."""

    def know(meant: stored_files.Meant) -> None:
        whole = {f"{layer}.weight": torch.empty(values.shape) for layer, values in meant.weights.items()}
        whole |= {name: torch.empty(values.shape, dtype=torch.bfloat16) for name, values in meant.plain.items()}

        def detected(state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None):
            stub = vars(comfy.model_detection)  # names that only the stub has
            config = stub["_Config"]({})
            config.quant_config = stub["utils"].detect_layer_quantization(state_dict, unet_key_prefix)
            config.get_model = lambda state_dict, prefix="", device=None: stub["_Model"](
                config, whole, "", config.custom_operations, device
            )
            return config

        monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", detected)

    return know


def decoded(module: torch.nn.Module) -> np.ndarray:
    """What a loaded layer multiplies its input by, (N, K)."""
    weight = module.weight
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    weight = weight.detach().float()[: module.out_features, : module.in_features]
    if hasattr(module, "svdquant_lora_a"):
        weight = weight + module.svdquant_lora_b.float() @ module.svdquant_lora_a.float()
    if hasattr(module, "pre_quant_scale"):
        weight = weight * module.pre_quant_scale.float()
    return weight.numpy()


def differences(model: torch.nn.Module, meant: stored_files.Meant) -> list[str]:
    """Names of what was loaded otherwise than meant: further than two roundings to BF16."""
    found = []
    for layer, values in meant.weights.items():
        module = model.get_submodule(layer)
        if not np.allclose(decoded(module), values, rtol=0.02, atol=1e-6):
            found.append(layer)
    parameters = dict(model.named_parameters())
    for name, values in meant.plain.items():
        if not np.array_equal(parameters[name].detach().float().numpy(), values):
            found.append(name)
    return found


@functools.cache
def chosen(name: str, count: int) -> tuple[list[mutations.Mutant], stored_files.Stored, stored_files.Meant]:
    stored, meant = stored_files.make(name)
    every = list(mutations.mutants(stored))
    return random.Random(SEED).sample(every, min(count, len(every))), stored, meant  # noqa: S311


@pytest.mark.parametrize("name", stored_files.DIALECTS)
def test_no_mutant_of_a_file_loads_to_other_weights(name: str, host, tmp_path: Path):
    some, stored, meant = chosen(name, EACH)
    host(meant)
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / "model.safetensors"
    assert differences(load_model(str(stored.write(path)))[0].model.diffusion_model, meant) == []
    loaded, silent, foreign = 0, [], []
    for what, mutant in some:
        try:
            model = load_model(str(mutant.write(path)))[0].model.diffusion_model
            wrong = differences(model, meant)
        except CheckpointError:
            continue
        except Exception as error:  # noqa: BLE001  every other kind is what this test looks for
            foreign.append(f"{what}: {type(error).__name__}: {error}")
            continue
        loaded += 1
        silent += [f"{what}: {', '.join(wrong)}"] if wrong else []
    assert (silent, foreign) == ([], [])
    assert 0 < loaded < len(some)


def test_there_are_two_thousand_mutants_and_more():
    assert sum(len(chosen(name, EACH)[0]) for name in stored_files.DIALECTS) >= 2000
