"""A safetensors file that is written in any order, survives ``kill -9`` at any moment, and is gone on with later.

Beside the target lie two files while it is made:

* ``<target>.part``: the new file at its full size, sparse where nothing was written yet. Every tensor has its final
  place from the start, since the header is known; only the header itself is written last.
* ``<target>.part.journal``: one JSON line a fact. First ``{"identity": ...}``: the digest of everything that decides
  the bytes (header, source, settings); then ``{"unit": name, "sha256": ...}`` for each finished unit, a group of
  tensors that are made together; at last ``{"result": {...}}``.

Nothing is trusted that was not read back: whoever goes on hashes the finished units as they are on disk and makes anew
what differs, so neither a torn tail nor a lost write can reach the target. The target's name is given by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .container import CHUNK_BYTES, PlannedTensor, build_header, check_target, sync_folder
from .header import CheckpointError

logger = logging.getLogger(__name__)

PART, JOURNAL = ".part", ".part.journal"
_SYNC_BYTES = 2**30
OnBytes = Callable[[int], None]  # bytes that were hashed or written since the last call


class PartFile:
    """The unfinished file; a context manager that keeps it where it is, for another day.

    ``units``: name -> its tensors, which together are all of ``tensors``, the order in the file. ``identity``: a text
    that differs wherever the bytes would. ``finished``: the names of the units that are on disk, verified. A part of
    another identity is thrown away. Raises CheckpointError, also while another process works on it.
    """

    def __init__(
        self,
        target: Path,
        tensors: Sequence[PlannedTensor],
        units: Mapping[str, Sequence[PlannedTensor]],
        metadata: Mapping[str, str],
        identity: str,
        on_bytes: OnBytes | None = None,
    ) -> None:
        self.target = target
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
            self._note({"result": found})
            os.fsync(self._journal.fileno())
            self._file.close()
            os.replace(self.path, self.target)
        sync_folder(self.target.parent)
        return found

    def _open(self) -> dict[str, str]:
        """Open or make both files -> digests of the units that the journal calls finished."""
        allocated = _allocated(self.path)
        check_target(self.target, max(self.nbytes - allocated, 0))
        with self._writing():
            self._file = _open(self.path)
            self._journal = _open(self._journal_path)
            with self._closing_on_error():
                _lock(self._journal, self.target)
                lines = _read_journal(self._journal)
                found = lines[0].get("identity") if lines else None
                if found != self._identity:
                    if found is not None:
                        logger.warning("%s was of another source or other settings and is begun anew.", self.path.name)
                    self._file.truncate(0)
                    self._journal.truncate(0)
                    self._journal.seek(0)
                    self._note({"identity": self._identity})
                    lines = []
                self._file.truncate(self.nbytes)
        return {line["unit"]: line["sha256"] for line in lines[1:] if line.get("unit") in self._units}

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
            remedy = f"what is finished stays in {self.path.name}: free space or mend the cause, and run it again"
            raise CheckpointError(f"it cannot be written ({error})", where=self.target.name, remedy=remedy) from error

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.__exit__()
            raise


def left_behind(target: Path) -> dict[str, Any] | None:
    """The result that a process noted which died between naming the target and the end; None if there is none."""
    journal = target.with_name(target.name + JOURNAL)
    if target.with_name(target.name + PART).exists() or not journal.is_file() or not target.is_file():
        return None
    with open(journal, "rb") as file:
        lines = _read_journal(file)
    return lines[-1].get("result") if lines else None


def discard(target: Path) -> None:
    """Remove the unfinished file and its journal."""
    for end in (PART, JOURNAL):
        target.with_name(target.name + end).unlink(missing_ok=True)


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing without truncation, unbuffered; made if absent."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read_journal(file: BinaryIO) -> list[dict[str, Any]]:
    """The lines up to the first that is torn; the file is left at its end, where the next line goes."""
    lines, position = [], 0
    for raw in file.read().splitlines(keepends=True):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
        position += len(raw)
    file.seek(position)
    if file.writable():
        file.truncate(position)
    return lines


def _allocated(path: Path) -> int:
    """Bytes that a sparse file already occupies on its disk."""
    try:
        return getattr(os.stat(path), "st_blocks", 0) * 512
    except FileNotFoundError:
        return 0


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
        found, remedy = "another process is writing it at this moment", "wait for it, or choose another name"
        raise CheckpointError(found, where=target.name, remedy=remedy) from error
