# SPDX-License-Identifier: Apache-2.0
"""Notices that the files a run reads are no longer what they were."""

from __future__ import annotations

import os
from pathlib import Path

from .header import CheckpointError
from .shards import Checkpoint


class SourceGuard:
    """Notices that a source file was replaced or written to: size, time of change, identity on its disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._known = {file.path: self._state(file.path) for file in checkpoint.files}
        for file in checkpoint.files:
            if self._known[file.path][0] != file.file_size:
                self._fail(file.path)

    def check(self) -> None:
        """Raises CheckpointError if a file is not what it was."""
        for path, state in self._known.items():
            if self._state(path) != state:
                self._fail(path)

    def describe(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file."""
        return [(path.name, state[0], state[1]) for path, state in self._known.items()]

    def _state(self, path: Path) -> tuple[int, ...]:
        try:
            found = os.stat(path)
        except OSError as error:
            self._fail(path, error)
        return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev

    def _fail(self, path: Path, error: OSError | None = None) -> None:
        remedy = "run it again once nothing writes to that file; what was made of the old one is thrown away"
        raise CheckpointError("the source changed while it was in use", where=path.name, remedy=remedy) from error
