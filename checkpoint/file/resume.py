# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that is written in any order, survives ``kill -9`` at any moment, and is gone on with later.

Beside the target lie two files while it is made:

* ``<target>.part``: the new file at its full size, sparse where nothing was written yet. Every tensor has its final
  place from the start, since the header is known; only the header itself is written last. Until then a mark at its
  start says whose file it is: a part with neither that mark nor our journal is somebody else's and is never opened
  for writing, and neither is a link.
* ``<target>.part.journal``: one JSON line a fact. First ``{"identity": ...}``: the digest of everything that decides
  the bytes (header, source, settings); then ``{"unit": name, "sha256": ...}`` for each finished unit, a group of
  tensors that are made together; at last ``{"result": {...}}``.

The journal's first line also has its version and the part's size. Nothing is trusted that was not read back: whoever
goes on hashes the finished units as they are on disk and makes anew what differs, so neither a torn tail nor a lost
write can reach the target. The target's name is given by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .container import CHUNK_BYTES, PlannedTensor, build_header, check_target, sync_folder
from .header import CheckpointError, open_regular
from .place import keep_rights, put_in_place

logger = logging.getLogger(__name__)

PART, JOURNAL = ".part", ".part.journal"
_SYNC_BYTES = 2**30
_VERSION = 1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_MARK = b"NVFP4 Video"  # shorter than any header with its length before it
OnBytes = Callable[[int], None]  # bytes that were hashed or written since the last call


class PartFile:
    """The unfinished file; a context manager that keeps it where it is, for another day.

    ``units``: name -> its tensors, which together are all of ``tensors``, the order in the file. ``identity``: a text
    that differs wherever the bytes would. ``finished``: the names of the units that are on disk, verified. A part of
    another identity is thrown away. ``overwrite``: whether ``publish`` may replace a file that is there then. Raises
    CheckpointError, also while another process works on it, and for a part or journal that is not ours.
    """

    def __init__(
        self,
        target: Path,
        tensors: Sequence[PlannedTensor],
        units: Mapping[str, Sequence[PlannedTensor]],
        metadata: Mapping[str, str],
        identity: str,
        on_bytes: OnBytes | None = None,
        overwrite: bool = False,
    ) -> None:
        self.target, self._overwrite = target, overwrite
        self.path, self._journal_path = (target.with_name(target.name + end) for end in (PART, JOURNAL))
        self._units, self._tensors = units, tensors
        self.on_bytes = on_bytes or (lambda _: None)
        header, total = build_header(target, tensors, metadata)
        self._data_start, self.nbytes = len(header), len(header) + total
        self._identity = hashlib.sha256(header + identity.encode()).hexdigest()
        self._offsets, position = {}, self._data_start
        for tensor in tensors:
            self._offsets[tensor.name], position = position, position + tensor.nbytes
        self._unsynced = 0
        digests = self._open()
        with self._closing_on_error():
            self.finished = {name for name, digest in digests.items() if self._holds(name, digest)}

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files as they are."""
        self._file.close()
        self._journal.close()

    def write(self, unit: str, data: Sequence[memoryview]) -> None:
        """Write the bytes of a unit's tensors, flat and in the unit's order, and note it as finished."""
        digest = hashlib.sha256()
        with self._writing():
            for tensor, view in zip(self._units[unit], data, strict=True):
                self._file.seek(self._offsets[tensor.name])
                for start in range(0, len(view), CHUNK_BYTES):
                    chunk = view[start : start + CHUNK_BYTES]
                    _write(self._file, chunk)
                    digest.update(chunk)
                    self._unsynced += len(chunk)
            if self._unsynced >= _SYNC_BYTES:  # bounds what waits in the page cache, and what a power cut costs
                os.fsync(self._file.fileno())
                self._unsynced = 0
            self._note({"unit": unit, "sha256": digest.hexdigest()})
        self.finished.add(unit)

    def publish(self, metadata: Mapping[str, str], result: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Write the header, read the file once for its sha256, note ``result(sha256)`` and give the file its name.

        ``metadata`` must be as long as the one given before. The journal stays: ``discard`` ends the matter.
        """
        header, _ = build_header(self.target, self._tensors, metadata)
        if len(header) != self._data_start or len(self.finished) != len(self._units):
            raise ValueError(f"{self.target.name}: not all units are written, or the header changed its length")
        with self._writing():
            self._file.seek(0)
            _write(self._file, memoryview(header))
            os.fsync(self._file.fileno())
            found = result(self._hash_file())
            if self._overwrite:
                keep_rights(self._file.fileno(), self.target)
            if not os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._file.fileno())):
                raise _not_ours(self.path, "another file took its place while it was written")
            self._note({"result": found})
            os.fsync(self._journal.fileno())
            self._file.close()
            put_in_place(self.path, self.target, self._overwrite)
        sync_folder(self.target.parent)
        return found

    def _open(self) -> dict[str, str]:
        """Open or make both files -> digests of the units that the journal calls finished."""
        with self._writing():  # its name, longer than the target's, may be one too long
            allocated = _allocated(self.path)
        check_target(self.target, max(self.nbytes - allocated, 0))
        _check_ours(self.target)
        with self._writing():
            self._journal = _open(self._journal_path)
            try:
                _lock(self._journal, self.target)
                lines = _read_journal(self._journal)
                goes_on = bool(lines) and lines[0].get("identity") == self._identity
                goes_on = goes_on and lines[0].get("version") == _VERSION
                if not goes_on:
                    if self._journal_path.stat().st_size or _exists(self.path):
                        why = "of another source, other settings or another version"
                        why = why if lines else "without a journal that can be read"
                        logger.warning("%s was %s and starts again from the beginning.", self.path.name, why)
                    self._journal.truncate(0)
                    self._journal.seek(0)
                    self._note({"identity": self._identity, "version": _VERSION, "nbytes": self.nbytes})
                    os.fsync(self._journal.fileno())
                    lines = []
                self._file = _open(self.path)
            except BaseException:
                self._journal.close()
                raise
            with self._closing_on_error():
                if not goes_on:
                    self._file.truncate(0)
                if os.fstat(self._file.fileno()).st_size == 0:
                    _write(self._file, memoryview(_MARK))
                self._file.truncate(self.nbytes)
        return {
            line["unit"]: line["sha256"]
            for line in lines[1:]
            if isinstance(line.get("unit"), str) and line["unit"] in self._units and isinstance(line.get("sha256"), str)
        }

    def _holds(self, unit: str, digest: str) -> bool:
        """Whether the bytes of a unit on disk are those that were written."""
        found = hashlib.sha256()
        for tensor in self._units[unit]:
            for chunk in self._chunks(self._offsets[tensor.name], tensor.nbytes):
                found.update(chunk)
        return found.hexdigest() == digest

    def _hash_file(self) -> str:
        found = hashlib.sha256()
        for chunk in self._chunks(0, self.nbytes):
            found.update(chunk)
        return found.hexdigest()

    def _chunks(self, start: int, length: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
        with self._writing():
            self._file.seek(start)
            while length:
                count = self._file.readinto(buffer[: min(len(buffer), length)])
                if not count:
                    raise CheckpointError("it became shorter while it was written", where=self.path.name)
                length -= count
                yield buffer[:count]
                self.on_bytes(count)

    def _note(self, line: Mapping[str, Any]) -> None:
        _write(self._journal, memoryview(json.dumps(line).encode() + b"\n"))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"what is finished stays in {self.path.name}: " if _exists(self.path) else ""
            remedy = f"{kept}free space or mend the cause, and run it again"
            raise CheckpointError(f"it cannot be written ({error})", where=self.target.name, remedy=remedy) from error

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.__exit__()
            raise


def left_behind(target: Path, request: str) -> dict[str, Any] | None:
    """The result that a process noted which died between naming the target and the end; None if there is none.

    Only a result of the same ``request``, and only if the target is what it speaks of, read to its last byte.
    """
    part, journal = (target.with_name(target.name + end) for end in (PART, JOURNAL))
    if not _is_plain(journal) or not target.is_file():
        return None
    if _exists(part):
        if not os.path.samestat(os.lstat(part), os.stat(target)):
            return None
        part.unlink()  # killed between giving the file its name and taking the other one away
    with open_regular(journal) as file:
        lines = _read_journal(file)
    result = lines[-1].get("result") if lines else None
    if not isinstance(result, dict) or result.get("request") != request:
        return None
    with open_regular(target) as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if result.get("sha256") == digest.hexdigest():
        return result
    logger.warning("%s is not the file that %s speaks of: its result is not used.", target.name, journal.name)
    return None


def discard(target: Path) -> None:
    """Remove the unfinished file and its journal, if they are ours."""
    part, journal = (target.with_name(target.name + end) for end in (PART, JOURNAL))
    if _exists(part) and _part_is_ours(part, _first_line(journal)):
        part.unlink()
    if "identity" in _first_line(journal):
        journal.unlink()


def _check_ours(target: Path) -> None:
    """CheckpointError for a part or a journal that somebody else made."""
    part, journal = (target.with_name(target.name + end) for end in (PART, JOURNAL))
    first, marked = _first_line(journal), False
    if _exists(part):
        if not _part_is_ours(part, first):
            raise _not_ours(part, "it is not an unfinished file of this pack")
        marked = True
    if _exists(journal):
        if not _is_plain(journal):
            raise _not_ours(journal, "it is a link, or no file")
        if journal.stat().st_size and "identity" not in first and not marked:
            raise _not_ours(journal, "it is not a journal of this pack")


def _part_is_ours(part: Path, first: Mapping[str, Any]) -> bool:
    """Whether a part is a plain file that has our mark, or the size that the first line of its journal states."""
    if not _is_plain(part):
        return False
    size = part.stat().st_size
    if "identity" in first and size in (0, first.get("nbytes")):
        return True
    with open_regular(part) as file:
        return file.read(len(_MARK)) == _MARK


def _first_line(journal: Path) -> dict[str, Any]:
    """What a journal begins with; an empty dict if it is not there or not to be understood."""
    if not _is_plain(journal):
        return {}
    with open_regular(journal) as file:
        lines = _parse_lines(file.read(4096))
    return lines[0][0] if lines else {}


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _is_plain(path: Path) -> bool:
    """Whether this is a regular file with one name: neither a link nor a second name of another file."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def _not_ours(path: Path, found: str) -> CheckpointError:
    remedy = "nothing was changed: move it away, or choose another name for the new file"
    return CheckpointError(f"a file of this name is needed for the work, but {found}", where=path.name, remedy=remedy)


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing without truncation, unbuffered; made if absent, never through a link."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    if not _exists(path):
        flags |= os.O_EXCL
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read_journal(file: BinaryIO) -> list[dict[str, Any]]:
    """The lines up to the first that is torn; the file is left at its end, where the next line goes."""
    lines = _parse_lines(file.read())
    position = lines[-1][1] if lines else 0
    file.seek(position)
    if file.writable() and lines:
        file.truncate(position)
    return [line for line, _ in lines]


def _parse_lines(text: bytes) -> list[tuple[dict[str, Any], int]]:
    """Text of a journal -> (line, where it ends), up to the first that is torn."""
    lines, position = [], 0
    for raw in text.splitlines(keepends=True):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            break
        position += len(raw)
        lines.append((line, position))
    return lines


def _allocated(path: Path) -> int:
    """Bytes that the part already occupies on its disk; where the system does not count them, no file is sparse."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def _lock(file: BinaryIO, target: Path) -> None:
    """Keep a second process away; the system lifts the lock when this one ends, however it does."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**40)  # a byte beyond the text, since Windows locks forbid reading
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            text = "%s: this file system has no locks (%s): see to it that no other process writes the same target."
            logger.warning(text, target, error)
            return
        found, remedy = "another process is writing it at this moment", "wait for it, or choose another name"
        raise CheckpointError(found, where=target.name, remedy=remedy) from error
