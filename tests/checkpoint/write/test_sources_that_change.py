# SPDX-License-Identifier: Apache-2.0
"""Sources and targets that others touch during a run: the writers refuse, and a repair in place can be undone."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.container import planned, write_checkpoint
from nvfp4_video.checkpoint.file.header import BACKUP_ENDING, CheckpointError, read_header
from nvfp4_video.checkpoint.file.shards import Source, open_checkpoint
from nvfp4_video.checkpoint.write import repair as repairing
from nvfp4_video.checkpoint.write.repair import repair, restore_header
from nvfp4_video.checkpoint.write.split import split
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.files import save

FITS = "base_model.model.transformer."  # a prefix that goes, so that the new header fits in the old one's place


@pytest.fixture(scope="module")
def model():
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config)


def write(path: Path, kind: str, model, **options) -> Path:
    synthetic.write(path, kind, *model, **options)
    return path


def run(writer: str, source: Path, target: Path, on_bytes=None, overwrite: bool = False) -> None:
    if writer == "split":
        split(source, {"video_vae": target}, on_bytes=on_bytes, overwrite=overwrite)
    else:
        repair(source, target, on_bytes=on_bytes, overwrite=overwrite)


@pytest.mark.parametrize("writer", ["split", "repair"])
@pytest.mark.parametrize("how", ["written", "replaced", "shortened"])
def test_a_source_that_changes_under_a_run_leaves_no_file(tmp_path, model, writer, how):
    source, target = write(tmp_path / "m.safetensors", "modelopt", model, full=True), tmp_path / "t.safetensors"

    def meddle(done: int, total: int) -> None:
        if how == "written":
            with source.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            os.utime(source, ns=(1, 1))
        elif how == "replaced":
            (tmp_path / "other").write_bytes(source.read_bytes())
            os.replace(tmp_path / "other", source)
        else:
            os.truncate(source, source.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*(changed while|became shorter)"):
        run(writer, source, target, meddle)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_cut_short_under_a_reader_is_an_error_and_not_the_end_of_the_process(tmp_path):
    path = save(tmp_path / "a.safetensors", {"a": torch.ones(2**16), "b": torch.ones(2**16)})
    with Source(open_checkpoint(path)) as source:
        source.view("a")
        os.truncate(path, 4096)
        for read in (source.view, source.tensor):
            with pytest.raises(CheckpointError, match=r"a\.safetensors: the file became shorter.*'b'"):
                read("b")


@pytest.mark.parametrize("writer", ["split", "repair"])
def test_a_target_that_appears_meanwhile_is_not_replaced_unasked(tmp_path, model, writer):
    source, target = write(tmp_path / "m.safetensors", "modelopt", model, full=True), tmp_path / "t.safetensors"

    def appear(done: int, total: int) -> None:
        target.write_bytes(b"somebody's")

    with pytest.raises(CheckpointError, match="appeared during this run"):
        run(writer, source, target, appear)
    assert target.read_bytes() == b"somebody's"
    run(writer, source, target, appear, overwrite=True)
    assert read_header(target).tensors
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "t.safetensors"}


@pytest.mark.parametrize("ways", [[], ["_renameat2"], ["_renameat2", "_link"]])
def test_without_the_system_s_help_a_target_is_still_not_replaced(tmp_path, monkeypatch, ways):
    def unsupported(temporary: Path, target: Path) -> None:
        raise OSError(95, "not supported")

    for way in ways:
        monkeypatch.setattr(f"nvfp4_video.checkpoint.file.place.{way}", unsupported)
    target = tmp_path / "t.safetensors"
    write_checkpoint(target, planned({"a": torch.ones(2)}), overwrite=False)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="the target exists"):
        write_checkpoint(target, planned({"b": torch.ones(2)}), overwrite=False)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_a_killed_run_left_is_named_by_the_next(tmp_path, caplog):
    (tmp_path / ".t.safetensors.0123456789abcdef.part").write_bytes(b"half")
    (tmp_path / ".t.safetensors.mine.part").write_bytes(b"other")
    write_checkpoint(tmp_path / "t.safetensors", planned({"a": torch.ones(2)}))
    assert ".t.safetensors.0123456789abcdef.part" in caplog.text and "mine" not in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.parametrize("hard", [False, True])
def test_a_link_to_the_source_is_the_source(tmp_path, model, hard):
    source, twin = write(tmp_path / "m.safetensors", "modelopt", model, full=True), tmp_path / "twin.safetensors"
    os.link(source, twin) if hard else twin.symlink_to(source)
    before = source.read_bytes()
    for writer in ("split", "repair"):
        with pytest.raises(CheckpointError, match="the source itself"):
            run(writer, source, twin, overwrite=True)
    assert source.read_bytes() == before


def test_two_targets_that_differ_by_case_are_one_file_on_some_disks(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "modelopt", model, full=True)
    with pytest.raises(CheckpointError, match="two components have this one target"):
        split(source, {"video_vae": "a.safetensors", "audio_vae": "A.safetensors"}, base=tmp_path)


def test_an_undo_never_touches_a_file_of_another_layout(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "metadata_less", model, prefix=FITS)
    backup = repair(source, in_place=True).backup
    repaired = source.read_bytes()
    length = int.from_bytes(repaired[:8], "little") + 8
    other = repaired[: length - 1] + b"\n" + repaired[length:]  # as long, and JSON too
    assert other != repaired
    source.write_bytes(other)
    with pytest.raises(CheckpointError, match="this is not the header"):
        restore_header(source)
    assert source.read_bytes() == other
    source.write_bytes(repaired)
    backup.write_bytes(backup.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="this is not the header"):
        restore_header(source)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 5])
def test_a_repair_in_place_that_is_cut_off_is_found_and_undone(tmp_path, model, monkeypatch, cut):
    source = write(tmp_path / "m.safetensors", "metadata_less", model, prefix=FITS)
    before, real, synced = source.read_bytes(), os.fsync, []

    def power_cut(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), os.stat(source)):
            synced.append(descriptor)
            if len(synced) == cut // 2 + 1:
                raise KeyboardInterrupt
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(KeyboardInterrupt):
            repair(source, in_place=True)
    if cut in (1, 3):  # only some bytes of the text reached the disk
        length = int.from_bytes(before[:8], "little") + 8
        chance = random.Random(cut)  # noqa: S311
        with source.open("r+b") as file:
            for _ in range(20):
                place = chance.randrange(8, length)
                file.seek(place)
                file.write(before[place : place + 1])
    if cut < 4:
        with pytest.raises(CheckpointError, match="repair in place was interrupted.*--undo"):
            read_header(source)
    restore_header(source)
    assert source.read_bytes() == before
    restore_header(source)
    assert source.read_bytes() == before


def test_a_conversion_in_place_makes_no_backup_that_nothing_could_use(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "modelopt", model)
    source.chmod(0o640)
    report = repair(source, in_place=True)
    assert (report.method, report.backup) == ("copy", None)
    assert not source.with_name(source.name + BACKUP_ENDING).exists()
    assert sys.platform == "win32" or source.stat().st_mode & 0o777 == 0o640
    assert repairing.BACKUP_ENDING == BACKUP_ENDING
