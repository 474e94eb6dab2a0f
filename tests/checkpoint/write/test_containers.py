# SPDX-License-Identifier: Apache-2.0
"""Shards and bytes behind the last tensor: shown by ``inspect``, mended by ``repair``, no hindrance to ``quantize``."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.write.plan import QuantizeSettings, plan_quantization
from nvfp4_video.checkpoint.write.repair import repair
from nvfp4_video.tests.support import containers
from nvfp4_video.tests.support.files import load, metadata

KINDS = {
    "numbered": (containers.numbered, "it is in 2 files, which NVFP4 Repair joins", "lacks the tensors of the others"),
    "indexed": (containers.indexed, "it is in 2 files, which NVFP4 Repair joins", "lacks the tensors of the others"),
    "trailing": (containers.trailing, "6 bytes follow the last tensor", "reads it where DynamicVRAM is on"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {kind: containers.whole(folder / f"{kind}.safetensors", kind) for kind in ("comfy_markers", "bf16")}


def in_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_shows_the_container_and_what_stock_does_with_it(tmp_path, sources, kind):
    make, text, stock = KINDS[kind]
    found = inspect_checkpoint(make(sources["comfy_markers"], tmp_path))
    assert text in str(found)
    assert stock in found.stock["diffusion_model"]
    assert "NVFP4 Repair" in found.stock["diffusion_model"]
    assert found.formats == inspect_checkpoint(sources["comfy_markers"]).formats


@pytest.mark.parametrize("kind", KINDS)
def test_repair_makes_one_plain_file_of_the_same_tensors(tmp_path, sources, kind):
    path = KINDS[kind][0](sources["comfy_markers"], tmp_path)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "one.safetensors"
    assert [fault.code for fault in repair(path, target).cured] == ["trailing" if kind == "trailing" else "shards"]
    wanted, found = load(sources["comfy_markers"]), load(target)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(in_bytes(found[name]), in_bytes(wanted[name])) for name in wanted)
    assert metadata(target)["config"] == metadata(sources["comfy_markers"])["config"]
    assert read_header(target).trailing == 0
    assert repair(target, tmp_path / "out" / "two.safetensors").method == "nothing"


def test_trailing_bytes_are_cut_off_in_place(tmp_path, sources):
    path = containers.trailing(sources["comfy_markers"], tmp_path)
    assert repair(path, in_place=True).method == "copy"
    assert read_header(path).trailing == 0


def test_shards_cannot_be_repaired_in_place(tmp_path, sources):
    with pytest.raises(CheckpointError, match="several files"):
        repair(containers.indexed(sources["comfy_markers"], tmp_path), in_place=True)


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_takes_all_tensors_of_such_a_source(tmp_path, sources, kind):
    path = KINDS[kind][0](sources["bf16"], tmp_path)
    found = plan_quantization(path, QuantizeSettings())
    assert found.jobs.keys() == plan_quantization(sources["bf16"], QuantizeSettings()).jobs.keys()
