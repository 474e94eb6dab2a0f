# SPDX-License-Identifier: Apache-2.0
"""The loader on what is not one plain file of a model: it loads what the whole file holds, or says what it is."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.signatures import Model
from nvfp4_video.host.load.model import _known_to_host, load_model
from nvfp4_video.tests.support import containers
from nvfp4_video.tests.support.files import save
from safetensors import safe_open


def outputs(path) -> list[torch.Tensor]:
    """Of each quantised layer, and every other parameter."""
    model = load_model(str(path))[0].model.diffusion_model
    found = []
    for _, module in sorted(model.named_modules()):
        if hasattr(module, "in_features"):
            x = torch.arange(module.in_features, dtype=torch.float32).cos().to(torch.bfloat16)
            found.append(module(x[None]))
    return found


@pytest.mark.parametrize("make", [containers.numbered, containers.indexed, containers.trailing])
def test_such_a_checkpoint_loads_as_its_whole_file(tmp_path, make):
    whole = containers.whole(tmp_path / "whole.safetensors")
    (tmp_path / "other").mkdir()
    for found, wanted in zip(outputs(make(whole, tmp_path / "other")), outputs(whole), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("prefix", ["net.", "model.", "transformer.", "my.own."])
def test_a_model_loads_whatever_its_names_begin_with(tmp_path, prefix):
    whole = containers.whole(tmp_path / "whole.safetensors")
    with safe_open(whole, "pt") as file:
        metadata, tensors = file.metadata(), {prefix + name: file.get_tensor(name) for name in file.keys()}
    for found, wanted in zip(outputs(save(tmp_path / "m.safetensors", tensors, metadata)), outputs(whole), strict=True):
        assert torch.equal(found, wanted)


def test_a_family_that_only_the_host_may_know_loses_the_prefix_that_the_host_strips(tmp_path):
    tensors = {f"net.novel_blocks.{number}.mixer.weight": torch.ones(4, 4) for number in range(6)}
    found = _known_to_host(Model(None, ""), read_header(save(tmp_path / "m.safetensors", tensors)))
    assert found == Model(None, "net.")


def test_a_shard_whose_sibling_is_missing_is_refused_by_the_name_of_what_is_missing(tmp_path):
    path = containers.numbered(containers.whole(tmp_path / "whole.safetensors"), tmp_path)
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 are missing, m-00001-of-00002"):
        load_model(str(path))


def test_a_model_with_the_names_of_diffusers_is_refused_by_that_word(tmp_path):
    layers = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", "x_embedder")
    path = save(tmp_path / "m.safetensors", {f"{layer}.weight": torch.ones(4, 4) for layer in layers})
    with pytest.raises(CheckpointError, match=r"diffusers names \(FLUX\).*Load Diffusion Model"):
        load_model(str(path))


def test_a_safetensors_file_of_another_ending_is_not_unpickled(tmp_path):
    whole = containers.whole(tmp_path / "whole.safetensors")
    (tmp_path / "model.ckpt").write_bytes(whole.read_bytes())
    for found, wanted in zip(outputs(tmp_path / "model.ckpt"), outputs(whole), strict=True):
        assert torch.equal(found, wanted)
