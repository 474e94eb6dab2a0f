# SPDX-License-Identifier: Apache-2.0
"""What lies beside a target and is not ours is left as it is; what is ours, however damaged, does not stop a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file import container, place
from nvfp4_video.checkpoint.file.container import planned, write_checkpoint
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.resume import JOURNAL, PART
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.tests.support.quantize_sources import save, tiny

FAST = QuantizeSettings(search=AMAX)
posix = pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")


class Stop(Exception):
    pass


def interrupt(source: Path, target: Path, calls: int = 40) -> None:
    left = iter(range(calls))

    def step(done: int, total: int) -> None:
        if next(left, None) is None:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, target, FAST, on_step=step)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_source_named_like_the_part_of_its_target_stays_whole(tmp_path):
    source = save(tmp_path / "model.safetensors.part", tiny())
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.part: a file of this name is needed"):
        quantize_checkpoint(source, tmp_path / "model.safetensors", FAST)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("journal", [None, b"", b"notes\n", b"\0" * 50, b'{"identity": "x", "nbytes": 5}\n'])
@pytest.mark.parametrize("part", [b"", b"a download that goes on", b"\0" * 3000])
def test_a_part_without_our_journal_or_mark_is_left_alone(source, tmp_path, part, journal):
    if part == b"" and journal and journal.startswith(b"{"):
        pytest.skip("that is how a run killed at its start looks")
    (tmp_path / f"t.safetensors{PART}").write_bytes(part)
    if journal is not None:
        (tmp_path / f"t.safetensors{JOURNAL}").write_bytes(journal)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="not(hing)? .*(of ours|changed)"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST, overwrite=True)
    assert contents(tmp_path) == before


@posix
@pytest.mark.parametrize("ending", [PART, JOURNAL])
@pytest.mark.parametrize("hard", [False, True])
def test_a_link_in_the_place_of_a_part_or_journal_is_not_followed(source, tmp_path, ending, hard):
    (other := tmp_path / "precious").write_bytes(b'{"identity": "x", "version": 1, "nbytes": 5}\n')
    link = tmp_path / f"t.safetensors{ending}"
    os.link(other, link) if hard else link.symlink_to(other)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="a file of this name is needed"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("harm", ["garbage", "nul", "empty", "deep", "version", "types", "gone"])
def test_a_damaged_journal_of_ours_is_begun_anew_with_a_word(source, tmp_path, caplog, harm):
    target = tmp_path / "t.safetensors"
    interrupt(source, target)
    journal = tmp_path / f"t.safetensors{JOURNAL}"
    first, *lines = journal.read_text().splitlines(keepends=True)
    if harm == "version":
        journal.write_text(json.dumps(json.loads(first) | {"version": 99}) + "\n" + "".join(lines))
    elif harm == "types":
        lines = [json.dumps({"unit": [], "sha256": 1}) + "\n", '{"unit": "x"}\n']
        journal.write_text(first + "".join(lines))
    elif harm == "gone":
        journal.unlink()
    else:
        bad = {"garbage": b"\xff\xfe\n" * 9, "nul": b"\0" * 99, "empty": b"", "deep": b"[" * 9**5 + b"\n"}
        journal.write_bytes(bad[harm])
    assert quantize_checkpoint(source, target, FAST)["resumed"] == 0
    assert "starts again" in caplog.text or harm == "types"
    assert not list(tmp_path.glob("*.part*"))


def test_a_noted_result_is_not_believed_of_a_file_that_was_changed(source, tmp_path, monkeypatch):
    from nvfp4_video.checkpoint.write import quantize as module

    target = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda path, record: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            quantize_checkpoint(source, target, FAST)
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(CheckpointError, match="the target exists"):
        quantize_checkpoint(source, target, FAST)
    record = quantize_checkpoint(source, target, FAST, overwrite=True)
    assert record["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()


def test_a_target_that_appears_during_quantising_is_not_replaced(source, tmp_path):
    target = tmp_path / "t.safetensors"

    def step(done: int, total: int) -> None:
        target.write_bytes(b"somebody's")

    with pytest.raises(CheckpointError, match="appeared during this run"):
        quantize_checkpoint(source, target, FAST, on_step=step)
    assert target.read_bytes() == b"somebody's"
    assert quantize_checkpoint(source, target, FAST, overwrite=True)["resumed"] > 10
    assert not list(tmp_path.glob("*.part*"))


@posix
def test_a_replaced_file_keeps_its_mode(source, tmp_path):
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"old")
    target.chmod(0o640)
    quantize_checkpoint(source, target, FAST, overwrite=True)
    assert target.stat().st_mode & 0o7777 == 0o640


@pytest.mark.parametrize("blocks", [True, False])
def test_going_on_asks_the_disk_only_for_what_is_not_yet_there(source, tmp_path, monkeypatch, blocks):
    target, part = tmp_path / "t.safetensors", tmp_path / f"t.safetensors{PART}"
    interrupt(source, target)
    real_stat, usage = os.lstat, shutil.disk_usage(tmp_path)

    class Windows:
        def __init__(self, found: os.stat_result) -> None:
            self.st_mode, self.st_size, self.st_nlink = found.st_mode, found.st_size, found.st_nlink
            self.st_dev, self.st_ino = found.st_dev, found.st_ino

    if blocks:
        allocated = real_stat(part).st_blocks * 512
        assert allocated, "this file system does not count"
    else:
        allocated = part.stat().st_size
        monkeypatch.setattr("nvfp4_video.checkpoint.file.resume.os.lstat", lambda path: Windows(real_stat(path)))
    free = max(part.stat().st_size - allocated, 0)
    monkeypatch.setattr(container.shutil, "disk_usage", lambda _: usage._replace(free=free))
    quantize_checkpoint(source, target, FAST)


def test_a_finished_file_is_on_the_disk_before_it_gets_its_name(source, tmp_path, monkeypatch):
    events, fsync, put = [], os.fsync, place.put_in_place

    def named(temporary: Path, target: Path, overwrite: bool) -> None:
        events.append(("name", os.stat(temporary).st_ino))
        put(temporary, target, overwrite)

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.fstat(fd).st_ino)), fsync(fd))[1])
    for module in ("container", "resume", "place"):
        monkeypatch.setattr(f"nvfp4_video.checkpoint.file.{module}.put_in_place", named)
    counts = []
    for write in (
        lambda: write_checkpoint(tmp_path / "u.safetensors", planned(tiny())),
        lambda: quantize_checkpoint(source, tmp_path / "t.safetensors", FAST),
    ):
        events.clear()  # numbers of files that are gone are used again
        write()
        names = [place for place, (kind, _) in enumerate(events) if kind == "name"]
        counts.append(len(names))
        for at in names:
            assert ("sync", events[at][1]) in events[:at]
    assert counts == [1, 2]  # with the card


def test_a_text_beside_the_target_that_is_not_our_card_stays(source, tmp_path):
    target = tmp_path / "t.safetensors"
    target.with_suffix(".md").write_text("my notes")
    first = quantize_checkpoint(source, target, FAST)
    assert target.with_suffix(".md").read_text() == "my notes"
    assert Path(first["card"]).name == "t.2.md"
    second = quantize_checkpoint(source, target, FAST, overwrite=True)
    assert second["card"] == first["card"]
    with open(first["card"], "a") as card:
        card.write("and what I found\n")
    assert Path(quantize_checkpoint(source, target, FAST, overwrite=True)["card"]).name == "t.3.md"
    assert Path(first["card"]).read_text().endswith("and what I found\n")
