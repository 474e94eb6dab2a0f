# SPDX-License-Identifier: Apache-2.0
"""NVFP4Verify on the stubbed host: its verdict, what it shows, when it stops the job, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import comfy.model_management as management
import pytest
import server
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.host import files, show
from nvfp4_video.nodes.verify import REPORT, STOP, NVFP4Verify
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.node_runs import watch_bars
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny

WIDGETS = {"file_name": "full_nvfp4.safetensors", "source": "full.safetensors", "on_finding": REPORT}
LAYER = f"{PREFIX}transformer_blocks.1.ff.net.0.proj"


@pytest.fixture
def folder(stub_comfy, tmp_path: Path) -> Path:
    """The folder of checkpoints, with a source and what was made of it."""
    path = tmp_path / "models" / "checkpoints"
    source = save(path / "full.safetensors", tiny())
    quantize_checkpoint(source, path / "full_nvfp4.safetensors", QuantizeSettings(search=AMAX))
    return path


def spoil(folder: Path) -> None:
    """Zero one layer's scales, and leave out and alter others' tensors, in ``spoilt.safetensors``."""
    good = folder / "full_nvfp4.safetensors"
    tensors = load(good)
    tensors[f"{LAYER}.weight_scale"] = torch.zeros_like(tensors[f"{LAYER}.weight_scale"])
    del tensors[f"{PREFIX}scale_shift_table"]
    for block in range(4):
        tensors[f"{PREFIX}transformer_blocks.{block}.attn1.to_q.bias"] += 1
    save(folder / "spoilt.safetensors", tensors, metadata(good))


def run(**changes):
    return NVFP4Verify.execute(**(WIDGETS | changes))


def test_a_good_file_is_said_to_be_good_with_its_worst_layers_as_a_table(folder):
    ok, text, picture = (result := run()).args
    first, *lines = text.splitlines()
    assert ok is True
    assert first == "full_nvfp4.safetensors against full.safetensors: as good as its format allows"
    assert "20 quantized layers" in text and "0 worse than allowed" in text
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["error", "allowed", "worst", "layers"] and len(table) == 1 + 10
    assert all(0.08 < float(line.split()[0]) < float(line.split()[1]) < 0.14 for line in table[1:])
    assert result.ui["text"] == (text,)
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and picture.dtype == torch.float32
    assert "filename=" in result.ui[show.PICTURE][0] and "images" not in result.ui


def test_a_spoilt_file_is_reported_name_by_name_and_the_job_goes_on(folder):
    spoil(folder)
    ok, text, _ = run(file_name="spoilt.safetensors").args
    assert ok is False
    assert text.splitlines()[0] == "spoilt.safetensors against full.safetensors: NOT in order"
    assert "  scale_shift_table: the source has it, the file does not" in text
    assert text.count("it should be a copy and is not") == 4
    assert "1.ff.net.0.proj: its error is 1.000, the format allows 0.1" in text
    assert "100 % of its blocks decode to zero, in the source they are not" in text


def test_a_finding_stops_the_job_where_that_is_asked_for_and_a_good_file_does_not(folder):
    spoil(folder)
    with pytest.raises(CheckpointError, match="NOT in order(.|\n)*scale_shift_table: the source has it"):
        run(file_name="spoilt.safetensors", on_finding=STOP)
    assert run(on_finding=STOP).args[0] is True


def test_a_report_of_a_thousand_faults_is_short(folder):
    tensors = load(folder / "full_nvfp4.safetensors") | {f"extra.{n}": torch.zeros(1) for n in range(1000)}
    save(folder / "spoilt.safetensors", tensors, metadata(folder / "full_nvfp4.safetensors"))
    text = run(file_name="spoilt.safetensors").args[1]
    assert "  ... 990 more" in text and len(text.splitlines()) < 40


def test_wrong_pairs_are_refused_by_what_is_wrong_with_them(folder, tmp_path):
    with pytest.raises(CheckpointError, match="full_nvfp4.*: it is both the file and its source"):
        run(source="full_nvfp4.safetensors")
    with pytest.raises(CheckpointError, match="quantized itself .20 NVFP4 layers.*BF16, FP16, FP32 or FP8"):
        run(file_name="full.safetensors", source="full_nvfp4.safetensors")
    save(folder / "other.safetensors", tiny())
    with pytest.raises(CheckpointError, match="it has no NVFP4 layer; choose the quantized file, and as source"):
        run(file_name="other.safetensors")
    for widget in ("file_name", "source"):
        with pytest.raises(FileNotFoundError, match="gone.safetensors is in none of models/diffusion_models,"):
            run(**{widget: "gone.safetensors"})


def test_progress_is_told_and_a_cancel_stops_it(folder, monkeypatch):
    class Running(NVFP4Verify):
        hidden = type("Hidden", (), {"unique_id": "7"})

    clock = iter(range(0, 100_000, 2))
    monkeypatch.setattr(show, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    bars = watch_bars(monkeypatch, {2: 0.4}.get)
    Running.execute(**WIDGETS)
    assert bars[0].current == bars[0].total > 0
    sent = [text for text, node in server.PromptServer.instance.sent if node == "7"]
    assert len(sent) > 10 and all("/s, " in text and text.endswith(" s left") for text in sent)
    with pytest.raises(management.InterruptProcessingException):
        Running.execute(**WIDGETS)
    assert 0 < bars[1].current < bars[1].total


def test_its_inputs_list_models_and_checkpoints_and_changes_are_noticed(folder, tmp_path):
    save(tmp_path / "models" / "diffusion_models" / "alone.safetensors", tiny())
    save(tmp_path / "models" / "vae" / "vae.safetensors", tiny())
    spec = NVFP4Verify.INPUT_TYPES()["required"]
    wanted = ["alone.safetensors", "full.safetensors", "full_nvfp4.safetensors"]
    assert spec["file_name"][1]["options"] == spec["source"][1]["options"] == wanted
    first = NVFP4Verify.fingerprint_inputs(**WIDGETS)
    assert NVFP4Verify.fingerprint_inputs(**WIDGETS) == first
    assert NVFP4Verify.fingerprint_inputs(**(WIDGETS | {"on_finding": STOP})) != first
    source = folder / "full.safetensors"
    source.write_bytes(source.read_bytes() + b" ")
    assert NVFP4Verify.fingerprint_inputs(**WIDGETS) != first


def test_a_file_that_another_node_has_just_written_takes_the_place_of_the_chosen_one(folder):
    output = Path(files.output_folder())
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "full_nvfp4.safetensors", output / "checkpoints" / "made.safetensors")
    ok, text, _ = run(file_name="full.safetensors", written="checkpoints/made.safetensors").args
    assert ok is True and text.startswith("made.safetensors against full.safetensors: as good as its format allows")
    with pytest.raises(FileNotFoundError, match=r"checkpoints/other.safetensors is not below ComfyUI's output folder"):
        run(written="checkpoints/other.safetensors")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        run(written="../models/checkpoints/full_nvfp4.safetensors")
