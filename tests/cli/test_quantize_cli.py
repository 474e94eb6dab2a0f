# SPDX-License-Identifier: Apache-2.0
"""The `quantize` and `verify` commands: what they take, what they refuse, and what stays of a run that cannot end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.resume import PartFile
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.tests.support.quantize_sources import save, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("commands") / "source.safetensors", tiny())


@pytest.fixture(scope="module")
def made(source) -> Path:
    target = source.with_name("made.safetensors")
    quantize_checkpoint(source, target, QuantizeSettings(search=AMAX))
    return target


def test_patterns_of_one_option_or_of_several_are_all_kept(source, capsys):
    kept = []
    for words in (["--keep", "attn1", "attn2"], ["--keep", "attn1", "--keep", "attn2"]):
        assert main(["quantize", str(source), "t.safetensors", *words, "--estimate", "--json"]) == 0
        kept.append(json.loads(capsys.readouterr().out)["kept_layers"])
    assert kept[0] == kept[1]
    assert kept[0]["transformer_blocks.0.attn1.to_q"] == kept[0]["transformer_blocks.0.attn2.to_k"]


def test_what_is_advised_is_called_as_on_the_command_line(source, made, capsys):
    assert main(["quantize", str(source), "t.safetensors", "--estimate"]) == 0
    assert "--keep-first-last 2, 2.2 GB more" in " ".join(capsys.readouterr().out.split())
    assert main(["quantize", str(source), "t.safetensors", "--keep", "."]) == 2
    assert "or keep less; on the command line --quantize names layers all the same" in capsys.readouterr().err
    assert main(["quantize", str(source), "t.safetensors", "--budget", "balanced"]) == 2
    assert "name one in --calibration: it tells" in capsys.readouterr().err
    assert main(["quantize", str(source), str(made)]) == 2
    assert "the target exists; choose another name, or allow overwriting (--overwrite)" in capsys.readouterr().err


def test_components_of_several_options_are_all_split_off(source, tmp_path, capsys):
    words = ["--only", "video_vae", "--only", "audio_vae", "--json"]
    assert main(["split", str(source), str(tmp_path), *words]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [part["component"] for part in files] == ["video_vae", "audio_vae"]


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "gpu", "cuda:999"])
def test_a_device_on_which_nothing_was_tried_or_that_is_not_there_is_refused(source, made, capsys, device):
    assert main(["verify", str(made), str(source), "--device", device]) == 2
    said = capsys.readouterr().err
    assert f"--device: found '{device}', " in said and "internal error" not in said


def test_what_verify_found_is_said_though_its_card_cannot_be_written(source, made, tmp_path, capsys, monkeypatch):
    def full(path, data, overwrite):
        raise OSError(28, "No space left on device", f".{path.name}.part")

    monkeypatch.setattr("nvfp4_video.checkpoint.file.place.write_small", full)
    card = tmp_path / "card.md"
    assert main(["verify", str(made), str(source), "--device", "cpu", "--card", str(card)]) == 2
    said = capsys.readouterr()
    assert "as good as its format allows" in said.out
    assert f"error: {card} cannot be written (No space left on device); check free space and rights" in said.err


def test_where_not_even_a_beginning_could_be_made_none_is_promised(source, tmp_path, monkeypatch):
    def refuse(path, *rest):
        raise OSError(30, "Read-only file system", path)

    target = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError) as caught:
            PartFile(target, (), {}, {}, "")
    assert "Read-only file system" in str(caught.value) and "stays in" not in str(caught.value)


def test_a_calibration_file_is_taken_for_no_model(source, tmp_path, capsys):
    from nvfp4_video.checkpoint.file.shards import open_checkpoint
    from nvfp4_video.checkpoint.write.calibration import model_identity, write_calibration
    from nvfp4_video.measure.moments import Moments

    name, file = "transformer_blocks.1.attn1.to_q", tmp_path / "c.safetensors"
    model = model_identity(open_checkpoint(source))
    write_calibration(file, {name: Moments.zeros(64, 32)}, {name: name}, model=model, recipe="", prompts=1)
    main(["inspect", str(file)])
    said = capsys.readouterr().out
    assert "this is a calibration file" in said and "diffusion model" not in said
    assert main(["plan", str(file), "--gpu", "GB10"]) == 2
    assert main(["quantize", str(file), str(tmp_path / "t.safetensors")]) == 2
    assert "name it as the --calibration of `quantize`" in capsys.readouterr().err


def test_split_into_a_file_and_undo_without_a_kept_header_say_what_they_need(made, tmp_path, capsys):
    assert main(["split", str(made), str(made)]) == 2
    assert f"{made} is a file; name a folder" in capsys.readouterr().err
    assert main(["repair", str(made), "--undo"]) == 2
    said = capsys.readouterr().err
    assert "no header was kept; expected made.safetensors.header-backup; a repair in place keeps it only" in said
