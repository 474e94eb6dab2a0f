# SPDX-License-Identifier: Apache-2.0
"""How much of a file the system keeps in its page cache, and giving that back.

A model read through a memory map stays in the page cache after its weights were copied to the GPU. On a machine where
GPU and CPU share one memory the copy in the cache takes room from the GPU, and CUDA reports it as used.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import stat
import sys
from dataclasses import dataclass
from typing import BinaryIO

_WINDOW = 1 << 30  # bytes looked at in one go; a multiple of every page size


class PageCacheError(OSError):
    """This system or this file does not allow it; the message says why and what to do instead."""


@dataclass(frozen=True)
class Released:
    """Bytes of one file, and how many of them were cached before and after."""

    size: int
    before: int
    after: int

    @property
    def released(self) -> int:
        return self.before - self.after


def cached_bytes(path: str | os.PathLike) -> int:
    """Bytes of the file that are in the page cache, in whole pages. Reads none of it. Raises PageCacheError."""
    mincore = _mincore()
    with _opened(path) as file:
        size, owner = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_uid
        # To anybody else Linux answers that every page is cached.
        if owner != os.geteuid() and not os.access(path, os.W_OK):
            raise PageCacheError(
                f"{os.path.basename(path)}: Linux tells only its owner, or who may write it, which pages are cached; "
                "run the command as that user"
            )
        windows = range(0, size, _WINDOW)
        pages = sum(_count(mincore, file.fileno(), start, min(_WINDOW, size - start)) for start in windows)
    return min(pages * mmap.PAGESIZE, size)


def release(path: str | os.PathLike) -> Released:
    """Ask the system to drop the file's cached pages -> bytes cached before and after. Raises PageCacheError.

    Pages that a process has mapped stay, as do those of a file system that lives in memory.
    """
    before = cached_bytes(path)
    with _opened(path) as file:
        os.fsync(file.fileno())  # pages not yet written to the disk would stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(file.fileno()).st_size
    return Released(size, before, cached_bytes(path))


def offer(path: str | os.PathLike) -> str:
    """For the report of a load on unified memory: how much of the file is still cached and how to drop it, or ""."""
    try:
        cached = cached_bytes(path)
    except OSError:
        return ""  # where the cache cannot be asked there is nothing to offer
    if not cached:
        return ""
    name = os.path.basename(path)
    return f"{cached / 1e9:.2f} GB of {name} are still in the page cache; `doctor --release` drops them"


def _opened(path: str | os.PathLike) -> BinaryIO:
    """A plain file, opened for reading; anything else, a pipe for one, would keep the caller waiting."""
    name = os.path.basename(path)
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb")
    except OSError as error:
        found = f"{name} cannot be opened ({error.strerror})"
        raise PageCacheError(f"{found}; expected a file that this user may read; check its name and rights") from error
    raise PageCacheError(f"{name} is not a plain file: name the model's file")


def _count(mincore, descriptor: int, start: int, length: int) -> int:
    """Pages in memory among ``length`` bytes from ``start``."""
    resident = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    # A private mapping is the one whose address Python gives away; its pages are the file's until they are written to.
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=start) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        failed = mincore(ctypes.addressof(first), length, resident)
        del first  # a mapping with a pointer into it cannot be closed
    if failed:
        raise PageCacheError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in bytes(resident))


@functools.cache
def _mincore():
    if sys.platform != "linux" or not hasattr(os, "posix_fadvise"):
        raise PageCacheError(
            f"the page cache of {sys.platform} cannot be asked or emptied file by file; only Linux can. "
            "Restarting the machine, or a tool of the system, empties all of it"
        )
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function
