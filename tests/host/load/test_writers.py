# SPDX-License-Identifier: Apache-2.0
"""Files by other people's quantisers load to the weights that their own libraries read in them.

The recorded ones need no library (tests/record_writers.py says how they were made); where a library is installed, its
files are made anew.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.write.plan import QuantizeSettings, plan_quantization
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.checkpoint.write.repair import repair
from nvfp4_video.host.load.model import load_model
from nvfp4_video.tests import record_writers
from nvfp4_video.tests.host.load.test_mutants import (  # the fixtures come with their names
    differences,
    host,  # noqa: F401
    one_thread,  # noqa: F401
)
from nvfp4_video.tests.host.load.test_mutants_in_tools import read_to_quantise, tried
from nvfp4_video.tests.support import stored_files
from safetensors.torch import load_file

WRITERS = list(record_writers.WRITERS)
WITHOUT_NVFP4 = ("mxfp8", "fp8", "fp8_rows", "fp8_blocks", "int8", "int8_rows")
DIALECTS = {("compressed_tensors", "nvfp4"): "compressed_tensors", ("comfy_kitchen", "mxfp8"): "comfy"}
# ComfyUI has no format for FP8 in blocks, and its numbers are restored to BF16.
RESTORED = ("convert_to_quant", "fp8_blocks")


def model_of(path: Path, meant: dict[str, torch.Tensor]) -> stored_files.Meant:
    """The weights, and the file's own biases, which convert_to_quant corrects."""
    plain = {name: tensor for name, tensor in load_file(path).items() if name in record_writers.model()}
    weights = {layer: tensor.numpy() for layer, tensor in meant.items()}
    others = [name for name in plain if name.removesuffix(".weight") not in meant]
    return stored_files.Meant(weights, {name: plain[name].float().numpy() for name in others})


def check(path: Path, meant: dict[str, torch.Tensor], know, dialect: str) -> None:
    """The loader, inspect and repair read the file as its writer does; what the quantiser can take it reads so too."""
    wanted = model_of(path, meant)
    know(wanted)
    patcher, report = load_model(str(path))
    assert differences(patcher.model.diffusion_model, wanted) == []
    assert report.dialect == dialect
    assert (inspect_checkpoint(path).dialect or "none") == dialect
    plan = tried(plan_quantization, path, QuantizeSettings(options=Options(quantize=(".",))))
    if not isinstance(plan, ValueError):
        assert read_to_quantise(plan, wanted) == []


@pytest.mark.parametrize(("library", "name"), WRITERS)
def test_a_recorded_file_loads_to_its_writer_s_own_weights(library: str, name: str, host, tmp_path: Path):  # noqa: F811
    path = record_writers.DATA / f"{library}_{name}.safetensors"
    meant = load_file(path.with_suffix(".meant.safetensors"))
    dialect = DIALECTS.get((library, name), "none" if name in WITHOUT_NVFP4 else "comfy")
    check(path, meant, host, dialect)
    if (library, name) != RESTORED:
        found = repair(path, tmp_path / "repaired.safetensors")
        if found.method != "nothing":
            check(found.path, meant, host, "comfy" if dialect != "none" else "none")
            assert repair(found.path, tmp_path / "again.safetensors").method == "nothing"


@pytest.mark.parametrize(("library", "name"), WRITERS)
def test_a_file_made_now_loads_to_its_writer_s_own_weights(library: str, name: str, host, tmp_path: Path):  # noqa: F811
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library.replace('_', '-')} is not installed; its recorded file is tested above")
    path, meant = record_writers.WRITERS[library, name](tmp_path, name)
    recorded = load_file(record_writers.DATA / f"{library}_{name}.meant.safetensors")
    assert all(torch.allclose(meant[layer], recorded[layer], rtol=0.3, atol=0.02) for layer in recorded)
    before = {key: tensor.shape for key, tensor in load_file(record_writers.DATA / path.name).items()}
    assert {key: tensor.shape for key, tensor in load_file(path).items()} == before, "it writes other files now"
    check(path, meant, host, DIALECTS.get((library, name), inspect_checkpoint(path).dialect or "none"))
