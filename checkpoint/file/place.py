# SPDX-License-Identifier: Apache-2.0
"""Gives new files their names: nothing that somebody else put there is replaced, and what is replaced keeps its rights.

Temporary files have random names and are made exclusively, so that neither a link nor another program's file is ever
opened for writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from .header import CheckpointError

logger = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)
_COPIED_BYTES = 16 * 2**20
_HIDDEN = re.compile(r"\.[0-9a-f]{16}\.part")


def hidden_name(target: Path) -> Path:
    """A random name beside ``target`` for a file that is not finished."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.part")


def unfinished(target: Path) -> list[Path]:
    """Files that earlier runs for ``target`` left when they were killed, or that another run is writing."""
    start = f".{target.name[:40]}"
    try:
        names = os.listdir(target.parent)
    except OSError:
        return []
    return [target.with_name(n) for n in sorted(names) if n.startswith(start) and _HIDDEN.fullmatch(n[len(start) :])]


def name_unfinished(target: Path) -> None:
    """Say which hidden files a killed run has left; whether another run still writes them, only the user knows."""
    if found := unfinished(target):
        names = ", ".join(path.name for path in found)
        logger.warning("%s: unfinished files lie beside it: %s. If nothing writes it now, remove them.", target, names)


def keep_rights(descriptor: int, target: Path) -> None:
    """Give an open file the mode and owner of the file that it will replace, as far as the system allows."""
    try:
        old = os.stat(target)
    except OSError:
        return
    if not hasattr(os, "fchown"):
        return
    with contextlib.suppress(OSError):  # only root gives files away; a group that is ours can be set by anyone
        os.fchown(descriptor, -1, old.st_gid)
        os.fchown(descriptor, old.st_uid, -1)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def put_in_place(temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished file to its name; CheckpointError if one appeared there that may not be replaced. OSError."""
    try:
        if overwrite:
            os.replace(temporary, target)
        elif os.name == "nt":
            os.rename(temporary, target)  # which replaces nothing there
        else:
            _rename_new(temporary, target)
    except FileExistsError as error:
        remedy = "choose another name, or allow overwriting (`overwrite`)"
        found = "the target exists, it appeared during this run"
        raise CheckpointError(found, where=target.name, remedy=remedy) from error


def write_small(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a whole file or none, synchronised with the disk. CheckpointError if it may not be replaced; OSError."""
    name_unfinished(path)
    temporary = hidden_name(path)
    try:
        with open_unnamed(path.parent) or open(temporary, "xb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            if overwrite:
                keep_rights(file.fileno(), path)
            os.fsync(file.fileno())
            if not temporary.exists():
                give_name(file, temporary)
        put_in_place(temporary, path, overwrite)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def open_unnamed(folder: Path) -> BinaryIO | None:
    """A file in ``folder`` that has no name yet, so that a kill leaves nothing; None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb", buffering=0)
    except OSError:  # NFS, FAT, overlays of old kernels
        return None


def give_name(file: BinaryIO, name: Path) -> None:
    """Link an unnamed file into its folder."""
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        # With a folder given, os.link calls linkat, which alone follows the link in /proc to the file.
        os.link(f"/proc/self/fd/{file.fileno()}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: this file system cannot link an unnamed file (%s); it is copied.", name.parent, error)
        _copy(file, name)
    finally:
        os.close(folder)


def _copy(file: BinaryIO, name: Path) -> None:
    """A file without a name, written once more under a new one, with its rights, synchronised with the disk."""
    with open(f"/proc/self/fd/{file.fileno()}", "rb") as source, open(name, "xb") as twin:
        shutil.copyfileobj(source, twin, _COPIED_BYTES)
        os.fchmod(twin.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        twin.flush()
        os.fsync(twin.fileno())


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename where nothing has that name: in one step, or by a second link, or where neither exists after a look."""
    for way in (_renameat2, _link):
        try:
            return way(temporary, target)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    logger.warning("%s: this file system cannot rename without replacing; a file that appears now is lost.", target)
    os.replace(temporary, target)
    return None


def _renameat2(temporary: Path, target: Path) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _link(temporary: Path, target: Path) -> None:
    os.link(temporary, target, follow_symlinks=False)
    temporary.unlink()
