# SPDX-License-Identifier: Apache-2.0
"""NVFP4Quantize on the stubbed host: where it writes, what it shows, what a cancel leaves, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import pytest
import server
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.calibration import model_identity, write_calibration
from nvfp4_video.checkpoint.write.recipes import FAMILIES
from nvfp4_video.host import files, show
from nvfp4_video.measure.moments import Moments
from nvfp4_video.nodes.quantize import MODEL_ONLY, WHOLE, NVFP4Quantize
from nvfp4_video.tests.support.files import metadata
from nvfp4_video.tests.support.node_runs import watch_bars, written
from nvfp4_video.tests.support.quantize_sources import save, tiny

WIDGETS = {
    "file_name": "full.safetensors",
    "contents": WHOLE,
    "quality": "fast",
    "protect_audio": False,
    "protect_cross_attention": False,
    "estimate_only": False,
    "name": "",
    "overwrite": False,
}


@pytest.fixture
def full(stub_comfy, tmp_path: Path) -> Path:
    return save(tmp_path / "models" / "checkpoints" / "full.safetensors", tiny())


@pytest.fixture
def output(stub_comfy) -> Path:
    return Path(stub_comfy.get_output_directory())


def run(**changes):
    return NVFP4Quantize.execute(**(WIDGETS | changes))


def test_whole_checkpoints_and_models_go_where_the_host_s_loaders_look_each_with_its_card(full, output):
    whole, model = run(), run(contents=MODEL_ONLY)
    assert [Path(result.args[0]).as_posix() for result in (whole, model)] == [
        "checkpoints/full_nvfp4.safetensors", "diffusion_models/full_nvfp4.safetensors",
    ]  # fmt: skip
    assert written(output) == [
        "checkpoints/full_nvfp4.md", "checkpoints/full_nvfp4.safetensors",
        "diffusion_models/full_nvfp4.md", "diffusion_models/full_nvfp4.safetensors",
    ]  # fmt: skip
    for result in (whole, model):
        found = inspect_checkpoint(output / result.args[0])
        assert found.formats["NVFP4"][0] == 20 and found.dialect == "comfy"
        assert verify(output / result.args[0], full).ok
        assert "20 in NVFP4" in result.args[1]
        assert result.ui["text"] == (result.args[1],)


def test_protections_patterns_and_names_are_passed_on(full, output):
    result = run(protect_audio=True, keep="attn2\n1\\.ff", name="ltx/own", keep_first_last=0, recipe="LTX-2.3")
    assert Path(result.args[0]).as_posix() == "checkpoints/ltx/own_nvfp4.safetensors"
    assert "7 in NVFP4" in result.args[1]  # 4 attn1.to_q and 3 of the 4 ff
    assert '"quality"' not in metadata(output / result.args[0])["nvfp4_video"]
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        run(name="../x")


def test_an_estimate_tells_size_and_time_and_writes_nothing(full, output):
    text = run(estimate_only=True).args[1]
    assert "time: about" in text and "less than the source" in text and "20 in NVFP4" in text
    assert written(output) == []


def test_a_cancel_stops_it_and_queueing_it_again_goes_on(full, output, monkeypatch):
    bars = watch_bars(monkeypatch, {1: 0.4}.get)
    with pytest.raises(management.InterruptProcessingException):
        run()
    assert written(output) == [f"checkpoints/full_nvfp4.safetensors.part{end}" for end in ("", ".journal")]
    run()
    assert bars[1].current == bars[1].total > 0
    assert written(output) == ["checkpoints/full_nvfp4.md", "checkpoints/full_nvfp4.safetensors"]


def test_how_far_and_how_fast_is_written_on_the_node(full, output, monkeypatch):
    class Running(NVFP4Quantize):
        hidden = type("Hidden", (), {"unique_id": "7"})

    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(show, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    result = Running.execute(**WIDGETS)
    sent = [text for text, node in server.PromptServer.instance.sent if node == "7"]
    assert len(sent) > 10
    assert all("/s, " in text and text.endswith(" s left") for text in sent), "the report comes with the output"
    assert "sha256" in result.ui["text"][0]


def test_an_existing_file_stays_unless_overwriting_is_allowed(full, output):
    target = output / run().args[0]
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="the target exists"):
        run()
    run(overwrite=True)
    assert target.stat().st_size > 1000


def test_its_inputs_offer_the_recipes_and_changes_are_noticed(full):
    spec = NVFP4Quantize.INPUT_TYPES()
    assert spec["optional"]["recipe"][1]["options"] == list(FAMILIES)
    assert spec["required"]["file_name"][1]["options"] == ["full.safetensors"]
    first = NVFP4Quantize.fingerprint_inputs(**WIDGETS)
    assert NVFP4Quantize.fingerprint_inputs(**WIDGETS) == first
    assert NVFP4Quantize.fingerprint_inputs(**(WIDGETS | {"protect_audio": True})) != first
    full.write_bytes(full.read_bytes() + b" ")
    assert NVFP4Quantize.fingerprint_inputs(**WIDGETS) != first


def test_calibrated_quality_takes_a_calibration_file_of_the_model_folders(full, output, stub_comfy):
    with pytest.raises(CheckpointError, match="needs a calibration file"):
        run(quality="calibrated")
    layer, sums = "transformer_blocks.0.attn1.to_q", Moments.zeros(64, 64)
    for call, inputs in enumerate(torch.randn(4, 200, 64, generator=torch.Generator().manual_seed(0)).cumsum(2)):
        sums.add(inputs, call)
    write_calibration(
        full.parent / "inputs.safetensors", {layer: sums}, {layer: layer},
        model=model_identity(open_checkpoint(full)), recipe="LTX-2.3", prompts=1,
    )  # fmt: skip
    result = run(quality="calibrated", calibration="inputs.safetensors")
    assert "1 layers took GPTQ, 19 kept the plain search for lack of tokens" in result.args[1]
    assert verify(output / result.args[0], full).ok


def lora_file(stub_comfy, tmp_path: Path, name: str) -> Path:
    layer = "diffusion_model.transformer_blocks.1.attn1.to_q"
    keys = {f"{layer}.lora_A.weight": torch.randn(2, 64), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    return save(tmp_path / "models" / "loras" / name, keys, {})


def test_loras_are_folded_in_each_at_its_strength_and_verify_finds_them_by_name(stub_comfy, full, output, tmp_path):
    for name in ("style.safetensors", "sub/other.safetensors"):
        (tmp_path / "models" / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        lora_file(stub_comfy, tmp_path, name)
    given = {"lora": "style.safetensors", "lora_strength": 0.8, "more_loras": "\nsub/other.safetensors = -0.5\n"}
    text = run(**given).args[1]
    assert "LoRA folded in: style.safetensors at strength 0.8, which changes 1 tensors" in text
    assert "LoRA folded in: other.safetensors at strength -0.5" in text
    made = output / "checkpoints" / "full_nvfp4.safetensors"
    found = files.folded_loras(str(made))
    assert [(Path(path).name, at) for path, at in found] == [("style.safetensors", 0.8), ("other.safetensors", -0.5)]
    assert verify(made, full, loras=found).ok
    prints = {
        NVFP4Quantize.fingerprint_inputs(**(WIDGETS | given | {"lora_strength": strength})) for strength in (0.8, 1)
    }
    assert len(prints) == 2


@pytest.mark.parametrize("line", ("style.safetensors", "style.safetensors = strong"))
def test_a_line_without_a_strength_is_refused(line, full):
    with pytest.raises(CheckpointError, match="it has no strength; expected one a line"):
        run(more_loras=line)


def test_a_lora_that_is_in_no_folder_is_named(full):
    with pytest.raises(FileNotFoundError, match="gone.safetensors is in none of models/loras"):
        run(more_loras="gone.safetensors = 1")
