# SPDX-License-Identifier: Apache-2.0
"""The model card: the traps first, then what the file is, where it comes from, and what was kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write.card import PROVENANCE, model_card, provenance, text_of, tool_version, write_card
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.tests.support.files import metadata
from nvfp4_video.tests.support.quantize_sources import save, tiny


def make(tmp_path, **settings) -> tuple[dict, str]:
    source = save(tmp_path / "source.safetensors", tiny())
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", QuantizeSettings(search=AMAX, **settings))
    return record, (tmp_path / "t.md").read_text(encoding="utf-8")


def test_the_traps_come_before_the_file(tmp_path):
    record, text = make(tmp_path)
    traps = text.index("## Before you judge it")
    assert text.startswith("# t.safetensors") and traps < text.index("## The file")
    for trap in ("full VAE", "taeltx2_3", "8 steps at cfg 1.0", "0.421875, 0.0`", "8k + 1", "multiples of 32"):
        assert traps < text.index(trap) < text.index("## The file"), trap
    assert "It is in this file" in text
    assert text == model_card(record)


def test_the_tool_is_named_with_the_version_in_pyproject_toml():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]
    assert tool_version() == f"NVFP4 Video {version}"


def test_it_names_hashes_source_recipe_licence_and_the_layers_that_were_kept(tmp_path):
    record, text = make(tmp_path, options=Options(protect_audio=True, keep_first_last=1))
    assert record["sha256"] in text and record["sources"]["source.safetensors"] in text
    assert f"{tool_version()}, recipe LTX-2.3" in text
    assert "| licence | community |" in text
    assert "protect audio: True; keep first last: 1" in text
    for reason, count in record["kept"].items():
        assert f"| {reason} | {count} |" in text
    assert str(tmp_path) not in text


def test_an_option_of_zero_is_told_too_and_others_that_were_not_given_are_not(tmp_path):
    record, text = make(tmp_path, options=Options(keep_first_last=0))
    assert record["options"] == {"keep_first_last": 0} and "| options | keep first last: 0 |" in text


def test_a_file_that_is_larger_than_its_source_is_called_so(tmp_path):
    record, _ = make(tmp_path)
    larger = record | {"source_bytes": record["nbytes"] // 2}
    assert ", 100.0 % more than the source" in model_card(larger) and "100.0 % more than" in text_of(larger)


def test_a_card_that_cannot_be_written_is_named_and_the_file_is_not_made_again(tmp_path, monkeypatch):
    def full(path, data, overwrite):
        raise OSError(28, "No space left on device")

    source, target = save(tmp_path / "source.safetensors", tiny()), tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_video.checkpoint.write.card.write_small", full)
        said = r"t\.md: the card cannot be written \(No space left on device\); t.safetensors is complete"
        with pytest.raises(CheckpointError, match=said):
            quantize_checkpoint(source, target)
    before = target.stat().st_ino
    record = quantize_checkpoint(source, target)
    assert record["sha256"] in (tmp_path / "t.md").read_text(encoding="utf-8") and target.stat().st_ino == before


def test_without_a_vae_or_a_licence_it_says_where_to_get_them(tmp_path):
    record, text = make(tmp_path, only_model=True)
    assert "It is not in this file: take it from the original checkpoint" in text
    assert "its header names none" in model_card(record | {"licence": None})


def test_other_families_get_the_advice_that_holds_for_all(tmp_path):
    record, _ = make(tmp_path)
    text = model_card(record | {"family": "Wan", "warnings": ["look twice"]})
    assert "8 steps" not in text and "own full VAE" in text and "Warning: look twice." in text


def test_the_provenance_has_one_length_whatever_the_hashes_are(tmp_path):
    record, _ = make(tmp_path)
    hashes = {"source.safetensors": "f" * 64}
    assert len(provenance(record)) == len(provenance(record, hashes))
    told = json.loads(metadata(tmp_path / "t.safetensors")[PROVENANCE])
    assert told["source"][0]["sha256"] == record["sources"]["source.safetensors"] != "0" * 64


def test_a_card_is_replaced_as_a_whole_and_leaves_nothing_else(tmp_path):
    record, _ = make(tmp_path)
    path = write_card(tmp_path / "t.safetensors", record | {"licence": "another"})
    assert "| licence | another |" in path.read_text(encoding="utf-8")
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".safetensors", ".md"}


def test_the_report_for_people_has_size_time_and_reasons(tmp_path):
    record, _ = make(tmp_path)
    text = text_of(record)
    assert record["sha256"] in text and "less than the source" in text and "kept: " in text
