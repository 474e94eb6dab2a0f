# SPDX-License-Identifier: Apache-2.0
"""The loader's make_nvfp4 on the stubbed host: what is made, when it is found again, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import server
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.host.making import missing, nvfp4_of
from nvfp4_video.nodes.model import FOLDERS, NVFP4ModelLoader
from nvfp4_video.nodes.quantize import MODEL_ONLY, WHOLE, NVFP4Quantize
from nvfp4_video.tests.support.node_runs import watch_bars, written
from nvfp4_video.tests.support.quantize_sources import save, tiny

MADE = ["diffusion_models/full_nvfp4.md", "diffusion_models/full_nvfp4.safetensors"]
WIDGETS = {"quality": "best", "protect_audio": False, "protect_cross_attention": False, "estimate_only": False}


@pytest.fixture
def full(stub_comfy, tmp_path: Path) -> Path:
    return save(tmp_path / "models" / "checkpoints" / "full.safetensors", tiny())


@pytest.fixture
def output(stub_comfy) -> Path:
    return Path(stub_comfy.get_output_directory())


def made(name: str = "full.safetensors") -> str:
    return nvfp4_of(NVFP4ModelLoader, name, FOLDERS)


def quantize(**changes) -> None:
    widgets = WIDGETS | {"file_name": "full.safetensors", "contents": MODEL_ONLY, "name": "", "overwrite": False}
    NVFP4Quantize.execute(**(widgets | changes))


def test_the_file_is_made_once_with_progress_and_found_again(full: Path, output: Path, monkeypatch):
    bars = watch_bars(monkeypatch, lambda count: None)
    path = Path(made())
    assert written(output) == MADE and path == output / MADE[1]
    assert verify(path, full).ok
    assert len(bars) == 1 and bars[0].current == bars[0].total > 1
    assert [event for event, _ in server.PromptServer.instance.sent].count("nvfp4.files") == 1
    assert made() == str(path) and len(bars) == 1


def test_what_nvfp4_quantize_made_of_the_model_is_found(full: Path, output: Path, monkeypatch):
    quantize()
    bars = watch_bars(monkeypatch, lambda count: None)
    assert made() == str(output / MADE[1]) and bars == []


def test_a_file_that_is_nvfp4_already_is_its_own(full: Path, output: Path, stub_comfy):
    quantize(contents=WHOLE)
    target = Path(stub_comfy.folder_names_and_paths["checkpoints"][0][0]) / "own.safetensors"
    (output / "checkpoints" / "full_nvfp4.safetensors").rename(target)
    assert made("own.safetensors") == str(target)
    assert not (output / "diffusion_models").exists()


@pytest.mark.parametrize("said", ["no JSON", "[]", '{"source": 7}', '{"source": [7]}'])
def test_a_file_of_unknown_provenance_is_refused_like_any_other(full: Path, output: Path, said: str):
    target = output / MADE[1]
    target.parent.mkdir(parents=True)
    save(target, tiny(), {"nvfp4_video": said})
    with pytest.raises(CheckpointError, match="was not made from full.safetensors as that is now"):
        made()


@pytest.mark.parametrize("why", ["other settings", "another source", "a newer source"])
def test_another_file_under_the_name_is_neither_loaded_nor_replaced(full: Path, output: Path, why: str):
    if why == "another source":
        other = save(full.with_name("other.safetensors"), tiny())
        quantize(file_name=other.name, name="full")
    else:
        quantize(protect_audio=why == "other settings")
    if why == "a newer source":
        later = (output / MADE[1]).stat().st_mtime + 5
        os.utime(full, (later, later))
    before = (output / MADE[1]).read_bytes()
    with pytest.raises(CheckpointError, match="was not made from full.safetensors as that is now.*`make_nvfp4` off"):
        made()
    assert (output / MADE[1]).read_bytes() == before


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ("ltx-2.3-22b-distilled-fp8.safetensors", "ltx-2.3-22b-distilled_nvfp4.safetensors"),
        ("ltx-2.3-22b-distilled.safetensors", "sub/ltx-2.3-22b-distilled-nvfp4.safetensors"),
        ("ltx-2.3-22b-dev-bf16.safetensors", "ltx-2.3-22b-dev-nvfp4.safetensors"),
        ("sulphur_distil_fp8mixed.safetensors", "sulphur_distil_nvfp4.safetensors"),
        ("wan2.2_high_fp8_e4m3fn_scaled.safetensors", "wan2.2_high_nvfp4_mixed.safetensors"),
    ],
)
def test_a_missing_file_is_answered_with_what_it_can_be_made_from(stub_comfy, tmp_path: Path, there: str, wanted: str):
    save(tmp_path / "models" / "checkpoints" / there, tiny())
    text = NVFP4ModelLoader.validate_inputs(wanted)
    assert text == missing(wanted, FOLDERS)
    assert text.startswith(f"{wanted} is in none of models/diffusion_models, models/checkpoints, but {there} is")
    assert "`make_nvfp4` on" in text
    assert NVFP4ModelLoader.validate_inputs(there) is True


@pytest.mark.parametrize("there", ["ltx-2.3-22b-dev-fp8.safetensors", "ltx-2.3-22b-distilled_nvfp4_mixed.safetensors"])
def test_other_models_and_packed_files_are_not_offered(stub_comfy, tmp_path: Path, there: str):
    save(tmp_path / "models" / "checkpoints" / there, tiny())
    text = missing("ltx-2.3-22b-distilled-nvfp4.safetensors", FOLDERS)
    assert there not in text and text.endswith("put it into one of them, then press R")
