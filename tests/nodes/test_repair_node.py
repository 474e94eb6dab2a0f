# SPDX-License-Identifier: Apache-2.0
"""NVFP4Repair on the stubbed host: a report first, then a file where loaders look, and nothing after a cancel."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.nodes.repair import ONLY_REPORT, WRITE, NVFP4Repair
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.node_runs import watch_bars, written

WIDGETS = {"file_name": "foreign.safetensors", "action": WRITE, "name": "", "overwrite": False}


@pytest.fixture(scope="module")
def model():
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config)


@pytest.fixture
def models(stub_comfy, tmp_path: Path, model) -> Path:
    """The folder of models, with a file of a foreign dialect among the diffusion models."""
    synthetic.write(tmp_path / "models" / "diffusion_models" / "foreign.safetensors", "compressed_tensors", *model)
    return tmp_path / "models"


@pytest.fixture
def output(stub_comfy) -> Path:
    return Path(stub_comfy.get_output_directory())


def run(**changes):
    return NVFP4Repair.execute(**(WIDGETS | changes))


def test_it_only_reports_unless_it_is_told_to_write(models, output, model):
    spec = NVFP4Repair.INPUT_TYPES()["required"]
    assert spec["action"][1]["default"] == ONLY_REPORT
    result = run(action=ONLY_REPORT)
    file, text = result.args
    assert file == "" and text.splitlines()[0].startswith("foreign.safetensors: can be repaired, ")
    assert "to cure: " in text and "compressed_tensors" in text and "stock ComfyUI stops with a KeyError" in text
    assert text.endswith("\nNothing was written.") and result.ui["text"] == (text,)
    assert written(output) == []


def test_the_new_file_is_of_comfyui_s_layout_and_the_old_one_stays(models, output, model):
    source = models / "diffusion_models" / "foreign.safetensors"
    before = source.read_bytes()
    result = run()
    file, text = result.args
    assert Path(file).as_posix() == "diffusion_models/foreign_repaired.safetensors"
    assert text.splitlines()[0] == f"foreign_repaired.safetensors: repaired, {len(model[2])} layers converted"
    assert written(output) == ["diffusion_models/foreign_repaired.safetensors"]
    found = inspect_checkpoint(output / file)
    assert found.dialect == "comfy" and found.formats["NVFP4"][0] == len(model[2])
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("folder", "like"),
    [("diffusion_models", "diffusion_models"), ("checkpoints", "checkpoints"), ("text_encoders", "clip")],
)
def test_the_new_file_goes_where_the_loaders_of_the_old_one_look(models, output, model, folder, like):
    (models / folder / "sub").mkdir()
    synthetic.write(models / folder / "sub" / "other.safetensors", "metadata_less", *model)
    assert Path(run(file_name="sub/other.safetensors").args[0]).as_posix() == f"{like}/other_repaired.safetensors"
    assert written(output) == [f"{like}/other_repaired.safetensors"]


def test_a_sound_file_is_left_alone(models, output, model):
    synthetic.write(models / "checkpoints" / "sound.safetensors", "comfy_markers", *model, full=True)
    for action in (ONLY_REPORT, WRITE):
        file, text = run(file_name="sound.safetensors", action=action).args
        assert (file, text) == ("", "sound.safetensors: nothing to repair\nNothing was written.")
    assert written(output) == []


def test_names_may_have_a_subfolder_but_not_lead_elsewhere_and_files_stay_unless_overwriting_is_allowed(models, output):
    target = output / run(name="own/name").args[0]
    assert target == output / "diffusion_models" / "own" / "name_repaired.safetensors"
    for name in ("../x", "/x", "a\\..\\..\\x"):
        for action in (ONLY_REPORT, WRITE):
            with pytest.raises(CheckpointError, match="leads out of the folder where loaders look"):
                run(name=name, action=action)
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="the target exists"):
        run(name="own/name")
    assert target.read_bytes() == b"mine"
    run(name="own/name", overwrite=True)
    assert target.stat().st_size > 1000


def test_an_open_dialect_is_asked_for_by_the_name_of_its_widget(models, output, model):
    state, config, packed = model
    target = models / "diffusion_models" / "open.safetensors"
    synthetic.write(target, "metadata_less", state, config | {"_class_name": "Unknown"}, packed)
    with pytest.raises(CheckpointError, match="set `dialect` .*`auto` cannot decide"):
        run(file_name="open.safetensors", action=ONLY_REPORT)
    assert "dialect: comfy, stated by the user" in run(file_name="open.safetensors", dialect="comfy").args[1]


def test_a_missing_file_is_told_with_the_folders_where_it_was_looked_for(models):
    with pytest.raises(FileNotFoundError, match="gone.safetensors is in none of models/diffusion_models, models/check"):
        run(file_name="gone.safetensors")


@pytest.mark.parametrize("share", [0, 0.4])
def test_a_cancel_leaves_nothing_whether_it_checks_or_writes(models, output, monkeypatch, share):
    bars = watch_bars(monkeypatch, {1: share}.get)
    with pytest.raises(management.InterruptProcessingException):
        run()
    assert share * bars[0].total <= bars[0].current < bars[0].total
    assert written(output) == []
    run()
    assert bars[1].current == bars[1].total > 0
    assert written(output) == ["diffusion_models/foreign_repaired.safetensors"]


def test_changes_of_the_file_and_of_options_are_noticed(models):
    first = NVFP4Repair.fingerprint_inputs(**WIDGETS)
    assert NVFP4Repair.fingerprint_inputs(**WIDGETS) == first
    assert NVFP4Repair.fingerprint_inputs(**(WIDGETS | {"action": ONLY_REPORT})) != first
    source = models / "diffusion_models" / "foreign.safetensors"
    source.write_bytes(source.read_bytes() + b" ")
    assert NVFP4Repair.fingerprint_inputs(**WIDGETS) != first
