# SPDX-License-Identifier: Apache-2.0
"""File systems without locks, hard links, unnamed files or folders that can be synchronised: the work is done all the
same, and what is lost is named."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file import container, place
from nvfp4_video.checkpoint.file import header as headers
from nvfp4_video.checkpoint.file.container import planned, write_checkpoint
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.file.place import write_small
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write import quantize as quantizing
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.tests.support.quantize_sources import save, tiny

FAST = QuantizeSettings(search=AMAX)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="flock and folders of POSIX")


def raising(number: int):
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog, number):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", raising(number))
    source = save(tmp_path / "s.safetensors", tiny())
    quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert "this file system has no locks" in caplog.text
    assert read_header(tmp_path / "t.safetensors").tensors


def test_a_lock_that_somebody_has_is_still_an_error(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", raising(errno.EWOULDBLOCK))
    source = save(tmp_path / "s.safetensors", tiny())
    with pytest.raises(CheckpointError, match="another process is writing it"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no unnamed files")
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_without_hard_links_a_new_file_is_copied_and_keeps_its_rights(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(os, "link", raising(number))
    target = tmp_path / "t.safetensors"
    write_checkpoint(target, planned({"a": torch.ones(2)}), overwrite=False)
    target.chmod(0o640)
    write_checkpoint(target, planned({"a": torch.zeros(2)}))
    write_small(tmp_path / "note.txt", b"note", overwrite=False)
    assert "it is copied" in caplog.text
    assert read_header(target).tensors and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert (tmp_path / "note.txt").read_bytes() == b"note"
    assert {path.name for path in tmp_path.iterdir()} == {"t.safetensors", "note.txt"}
    with pytest.raises(CheckpointError, match="the target exists"):
        write_checkpoint(target, planned({"a": torch.ones(2)}), overwrite=False)


def test_without_unnamed_files_a_named_one_is_used(tmp_path, monkeypatch):
    for module in (container, place):
        monkeypatch.setattr(module, "open_unnamed", lambda folder: None)
    write_checkpoint(tmp_path / "t.safetensors", planned({"a": torch.ones(2)}), overwrite=False)
    write_small(tmp_path / "note.txt", b"note", overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"t.safetensors", "note.txt"}


def test_a_folder_that_cannot_be_synchronised_is_named(tmp_path, monkeypatch, caplog):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no folders")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.INFO):
        write_checkpoint(tmp_path / "t.safetensors", planned({"a": torch.ones(2)}))
    assert "after a power cut" in caplog.text and read_header(tmp_path / "t.safetensors").tensors


@pytest.mark.parametrize("how", ["folder", "pipe", "gone"])
def test_a_source_that_is_no_file_any_more_is_one_clear_error_and_not_waited_for(tmp_path, how):
    path = save(tmp_path / "s.safetensors", tiny())
    header = read_header(path)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="s.safetensors"):
        quantizing._hash_of_header(header)


def test_a_marker_that_is_cut_off_while_the_header_is_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    path = save(tmp_path / "m.safetensors", {"a": torch.zeros(2**16), "q.comfy_quant": marker}, {})
    real = headers._check_layout

    def cut(*arguments: object) -> int:
        found = real(*arguments)
        os.truncate(path, path.stat().st_size - 5)
        return found

    monkeypatch.setattr(headers, "_check_layout", cut)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_header(path)


@pytest.mark.parametrize("which", [0, 1])
def test_verify_refuses_when_either_file_changes_meanwhile(tmp_path, which):
    source, target = save(tmp_path / "s.safetensors", tiny()), tmp_path / "t.safetensors"
    quantize_checkpoint(source, target, FAST)
    path: Path = (target, source)[which]

    def step(done: int, total: int) -> None:
        if done == total:
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match=f"{path.name}: .*changed while"):
        verify(target, source, on_step=step)
