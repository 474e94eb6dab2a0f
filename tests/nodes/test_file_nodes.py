# SPDX-License-Identifier: Apache-2.0
"""NVFP4Inspect and NVFP4Split on the stubbed host: what they show, write, refuse, and leave behind when cancelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import comfy.model_management as management
import pytest
import torch
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.components import COMPONENTS, REST
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.write import split as split_module
from nvfp4_video.host.files import OUTPUT_FOLDERS, SAME_FILE, file_names, output_targets
from nvfp4_video.nodes.checkpoint import NVFP4Inspect, NVFP4Split
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.node_runs import watch_bars, written

WIDGETS = {"file_name": "full.safetensors", "name": "", "dtype": "keep", "overwrite": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "full.safetensors"
    synthetic.write(path, "comfy_markers", *synthetic.small_ltx23(), full=True)
    return path


@pytest.fixture
def full(stub_comfy, tmp_path: Path, file: Path) -> Path:
    return Path(shutil.copy(file, tmp_path / "models" / "checkpoints" / "full.safetensors"))


@pytest.fixture
def output(stub_comfy) -> Path:
    return Path(stub_comfy.get_output_directory())


def split(*parts: str, **changes):
    chosen = {part: part in parts for part in COMPONENTS}
    return NVFP4Split.execute(**(WIDGETS | chosen | changes))


def test_inspect_gives_the_text_and_the_picture_and_shows_both(full):
    result = NVFP4Inspect.execute("full.safetensors")
    text, picture = result.args
    assert text == str(inspect_checkpoint(full))
    assert picture.shape[0] == 1 and picture.shape[-1] == 3
    assert 0.0 <= float(picture.min()) < float(picture.max()) <= 1.0
    assert picture.dtype == torch.float32
    assert result.ui["text"] == (text,)
    (shown,) = result.ui["images"]
    assert shown["size"][1] == 620


def test_inspect_reads_a_packed_file_as_the_stated_dialect(stub_comfy, tmp_path):
    path = tmp_path / "models" / "diffusion_models" / "bare.safetensors"
    synthetic.write(path, "metadata_less", *synthetic.small_ltx23())
    assert "dialect: comfy (stated by the user)" in NVFP4Inspect.execute("bare.safetensors", "comfy").args[0]


def test_every_component_goes_where_the_host_s_loaders_look(full, output):
    parts = [part for part in COMPONENTS if part != REST]
    result = split(*parts)
    assert [Path(name).as_posix() for name in result.args[0].splitlines()] == [
        f"{OUTPUT_FOLDERS[part]}/full_{part}.safetensors" for part in parts
    ]
    assert written(output) == sorted(Path(name).as_posix() for name in result.args[0].splitlines())
    assert {"vae", "checkpoints", "diffusion_models"} == {path.name for path in output.iterdir()}
    with TensorReader(full) as whole, TensorReader(output / "vae" / "full_video_vae.safetensors") as part:
        names = [name for name in whole.header.tensors if name.startswith("vae.")]
        assert part.header.tensors.keys() == {name.removeprefix("vae.") for name in names}
        assert all(torch.equal(part.get(name.removeprefix("vae.")), whole.get(name)) for name in names)
    assert "video VAE: full_video_vae.safetensors" in result.ui["text"][0]


def test_only_the_video_vae_is_written_unless_more_is_asked_for(full, output):
    spec = NVFP4Split.INPUT_TYPES()["required"]
    defaults = {name: options["default"] for name, (_, options) in spec.items() if name != "file_name"}
    NVFP4Split.execute(file_name="full.safetensors", **defaults)
    assert written(output) == ["vae/full_video_vae.safetensors"]


def test_the_name_may_have_a_subfolder_but_not_lead_elsewhere(full, output):
    assert split("video_vae", name="ltx/own").args[0].replace("\\", "/") == "vae/ltx/own_video_vae.safetensors"
    for name in ("../x", "a/../../x", "/x", "a\\..\\..\\x", "x/", ".."):
        with pytest.raises(CheckpointError, match="leads out of the folder where loaders look.*plain name"):
            split("video_vae", name=name)
    assert written(output) == ["vae/ltx/own_video_vae.safetensors"]


def test_a_folder_of_the_output_folder_may_be_a_link_to_another_disk_but_a_file_may_not(full, output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    try:
        (output / "vae").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system allows no links")
    split("video_vae")
    (made,) = (tmp_path / "elsewhere").iterdir()
    assert made.name == "full_video_vae.safetensors" and made.stat().st_size > 4
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    (tmp_path / "elsewhere" / "own_video_vae.safetensors").symlink_to(mine)
    with pytest.raises(CheckpointError, match="outside the output folder"):
        split("video_vae", name="own", overwrite=True)
    assert mine.read_bytes() == b"mine"


def test_an_existing_file_stays_unless_overwriting_is_allowed_and_nothing_else_is_written(full, output):
    split("video_vae")
    target = output / "vae" / "full_video_vae.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="the target exists"):
        split("text_projection", "video_vae")
    assert (target.read_bytes(), written(output)) == (b"mine", ["vae/full_video_vae.safetensors"])
    split("video_vae", overwrite=True)
    assert target.stat().st_size > 4


def test_no_component_and_a_missing_one_are_errors_in_words(full, stub_comfy, tmp_path):
    with pytest.raises(CheckpointError, match="no component was asked for"):
        split()
    with pytest.raises(CheckpointError, match="it has nothing else.*leave this component out"):
        split("video_vae", REST)
    synthetic.write(tmp_path / "models" / "checkpoints" / "dit.safetensors", "comfy_markers", *synthetic.small_ltx23())
    with pytest.raises(CheckpointError, match="there is no video VAE in it; choose a full checkpoint"):
        split("video_vae", file_name="dit.safetensors")


def test_cancelling_leaves_no_file_and_the_progress_reaches_the_end_otherwise(full, output, monkeypatch):
    bars = watch_bars(monkeypatch, {1: 0.3}.get)
    with pytest.raises(management.InterruptProcessingException):
        split("video_vae", "diffusion_model")
    assert 0.3 * bars[0].total <= bars[0].current < bars[0].total
    assert not any(name.startswith("diffusion_models/") or ".tmp" in name for name in written(output))
    split("diffusion_model")
    assert bars[1].current == bars[1].total > 0


def test_a_full_disk_is_told_before_anything_is_written(full, output, monkeypatch):
    (output / "vae").mkdir()
    usage = shutil.disk_usage(output)
    monkeypatch.setattr(split_module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="free on the disk"):
        split("video_vae")
    assert written(output) == []


def test_a_lent_config_goes_into_the_new_file(full, output, stub_comfy, tmp_path):
    lender = tmp_path / "models" / "diffusion_models" / "lender.safetensors"
    state, config = synthetic.small_ltx23()
    synthetic.write(lender, "comfy_markers", state, config | {"marked": "lent"})
    split("text_projection", config_from="lender.safetensors")
    with TensorReader(output / "checkpoints" / "full_text_projection.safetensors") as reader:
        assert json.loads(reader.header.metadata["config"])["transformer"]["marked"] == "lent"


def test_inputs_are_listed_from_all_model_folders_and_changes_are_noticed(full):
    spec = NVFP4Split.INPUT_TYPES()
    assert spec["required"]["file_name"][1]["options"] == ["full.safetensors"]
    assert spec["optional"]["config_from"][1]["options"] == [SAME_FILE, "full.safetensors"]
    widgets = dict(WIDGETS, video_vae=True)
    first = NVFP4Split.fingerprint_inputs(**widgets)
    assert NVFP4Split.fingerprint_inputs(**widgets) == first
    assert NVFP4Split.fingerprint_inputs(**(widgets | {"overwrite": True})) != first
    before = NVFP4Inspect.fingerprint_inputs("full.safetensors")
    full.write_bytes(full.read_bytes() + b" ")
    assert NVFP4Inspect.fingerprint_inputs("full.safetensors") != before
    assert NVFP4Split.fingerprint_inputs(**widgets) != first


def test_only_safetensors_files_are_offered(full, tmp_path):
    (tmp_path / "models" / "vae" / "old.ckpt").write_bytes(b"")
    assert file_names(["vae", "checkpoints"]) == ["full.safetensors"]


def test_an_empty_name_is_that_of_the_checkpoint_without_its_folder():
    targets = output_targets("ltx/model.v2.safetensors", "  ", ["video_vae"])
    assert Path(targets["video_vae"]).as_posix() == "vae/model.v2_video_vae.safetensors"


@pytest.mark.parametrize("source", ["ltx/model.v2-00001-of-00003.safetensors", "model.v2.safetensors.index.json"])
def test_an_empty_name_of_a_file_in_shards_has_no_number_of_a_shard(source):
    assert Path(output_targets(source, "", ["video_vae"])["video_vae"]).name == "model.v2_video_vae.safetensors"
