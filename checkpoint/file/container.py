# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: reads headers of untrusted files, maps their tensors, writes new files atomically.

The layout of a file is in header.py. Nothing is unpickled, and nothing but the header is read before a tensor is asked
for, so a 50 GB file opens in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .dtypes import BITS, ITEM_BYTES
from .header import (
    MAX_HEADER_BYTES,
    METADATA_KEY,
    CheckpointError,
    Header,
    TensorInfo,
    is_size,
    open_regular,
    parse_header,
    quote,
)
from .place import give_name, hidden_name, keep_rights, name_unfinished, open_unnamed, put_in_place
from .torch_dtypes import DTYPE_NAMES, DTYPES

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: what the header will say, and the function that makes it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor | memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def planned(tensors: Mapping[str, torch.Tensor]) -> list[PlannedTensor]:
    """Tensors in memory, to be written as they are."""
    return [
        PlannedTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


class TensorReader:
    """A memory-mapped safetensors file: ``with TensorReader(path) as reader: reader.get(name)``.

    The mapping is private: what a caller writes into a tensor never reaches the file. Tensors stay valid after close();
    the mapping goes with the last of them. It relies on nobody making the file shorter while it is in use: the system
    ends a process that reads beyond the end. Writers read by Source (shards.py), which is spared that. A Header may be
    given instead of a path; a file that no longer has that header is refused. Raises CheckpointError.
    """

    def __init__(self, path_or_header: str | os.PathLike[str] | Header) -> None:
        known = path_or_header if isinstance(path_or_header, Header) else None
        path = known.path if known else Path(path_or_header)
        with open_regular(path) as file:
            self.header = parse_header(file, path)
            if known and known != self.header:
                raise CheckpointError("the file changed while it was in use", where=path.name, remedy="load it again")
            mapping, self._shared = _map_privately(file)
        # torch.frombuffer keeps the view alive, and the view the mapping: no mmap.close() under living tensors.
        self._view: memoryview | None = memoryview(mapping)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the mapping. Its memory is released with the last tensor or memoryview made from it."""
        self._view = None

    def get(self, name: str) -> torch.Tensor:
        """Tensor ``name`` on the CPU, in its stored dtype and shape, without a copy; to be treated as read-only.

        It is a copy only where sharing is unsafe: data not aligned to its element size, or no private mapping.
        """
        info, data = self._find(name)
        dtype = info.torch_dtype
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        if not self._shared or info.start % ITEM_BYTES[info.dtype]:
            data = bytearray(data)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(info.shape)

    def get_bytes(self, name: str) -> memoryview:
        """The bytes of tensor ``name`` as stored: a read-only view of the mapping."""
        return self._find(name)[1].toreadonly()

    def _find(self, name: str) -> tuple[TensorInfo, memoryview]:
        where = self.header.path.name
        if self._view is None:
            raise CheckpointError(f"tensor {quote(name)} was asked for after close()", where=where)
        info = self.header.tensors.get(name)
        if info is None:
            found = f"there is no tensor {quote(name)} among its {len(self.header.tensors):,}"
            raise CheckpointError(found, where=where, remedy="the file is incomplete or of another kind")
        return info, self._view[info.start : info.end]


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = True,
    before_naming: Callable[[], None] | None = None,
) -> None:
    """Write ``tensors`` in the order given, one in memory at a time; temporary name, fsync, rename to ``path``.

    Whatever is raised on the way, and whenever the process is killed, ``path`` is afterwards the old file, none, or
    the whole new one; a kill leaves a hidden ``.part`` file only where unnamed files do not exist (Windows, NFS).
    ``on_bytes(done, total)``, in bytes of tensor data, is called after every tensor and every 16 MiB within one, and
    may raise to interrupt; ``before_naming`` is called last, and may raise to have no file. Without ``overwrite`` a
    file that is there, or appears meanwhile, is not replaced; one that is replaced hands on its mode and owner.
    Tensors may be on any device and non-contiguous. Data follow each other without padding,
    as the format demands, so a tensor that comes after one of odd size is misaligned and readers have to copy it: put
    wide elements first, or even out the sizes.
    Raises CheckpointError for a plan that cannot be written, a tensor that differs from its plan, or a failing disk.
    """
    target = Path(os.path.realpath(path))  # a link stays a link, and the file it names is replaced
    header, total = build_header(target, tensors, metadata or {})
    check_target(target, len(header) + total)
    temporary = hidden_name(target)
    try:
        with _writing(target):
            file = open_unnamed(target.parent) or open(temporary, "xb", buffering=0)
        with file:
            _write_all(file, memoryview(header), target)
            done = 0
            for tensor in tensors:
                done = _write_tensor(file, tensor, target, done, total, on_bytes)
            with _writing(target):
                if overwrite:
                    keep_rights(file.fileno(), target)
                os.fsync(file.fileno())
                if before_naming is not None:
                    before_naming()
                if not temporary.exists():
                    give_name(file, temporary)
        with _writing(target):
            put_in_place(temporary, target, overwrite)
    except BaseException:
        _remove(temporary)
        raise
    sync_folder(target.parent)


def _map_privately(file: BinaryIO) -> tuple[mmap.mmap, bool]:
    """Map a whole file copy-on-write, or else read-only -> the mapping, and whether tensors may share its memory."""
    try:
        if sys.platform == "linux":
            # Without MAP_NORESERVE the kernel refuses a private mapping larger than memory and swap together.
            # Python names the flag since 3.13; the number is that of x86-64 and ARM64.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), True
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), True
    except OSError as error:
        # Windows charges the page file for the whole mapping. A read-only one costs nothing, but writing to a tensor
        # that shares it would end the process, so tensors are copied out of it.
        logger.info("%s cannot be mapped privately (%s); its tensors are copied.", file.name, error)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), False


def build_header(target: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """-> the bytes before the data, a multiple of 8 of them, and the number of data bytes."""

    def error(found: str, expected: str) -> CheckpointError:
        return CheckpointError(found, where=target.name, expected=expected, remedy="nothing was written")

    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise error(f"the metadata to write is {quote(dict(metadata))}", "a map from strings to strings")
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        expected = ""
        if not isinstance(tensor.name, str) or tensor.name in entries or tensor.name == METADATA_KEY:
            expected = f"names that are strings, each used once, none {METADATA_KEY}"
        elif tensor.dtype not in BITS:
            expected = f"a dtype among {', '.join(BITS)}"
        elif not all(map(is_size, tensor.shape)):
            expected = "a shape of non-negative integers"
        if expected:  # quoted only now: repr of thousands of good ones takes seconds
            plan = f"a tensor was planned as {quote(tensor.name)}, {quote(tensor.dtype)}, {quote(tensor.shape)}"
            raise error(plan, expected)
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as problem:
        raise error(f"a name or metadata is not valid Unicode ({problem.reason})", "text") from problem
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise error(f"the header would have {len(text):,} bytes", f"at most {MAX_HEADER_BYTES:,}")
    return len(text).to_bytes(8, "little") + text, end


def check_target(target: Path, needed: int) -> None:
    """Refuse a target that cannot be written before any work is spent on it; name what killed runs left beside it."""
    if not target.parent.is_dir():
        raise CheckpointError("its folder does not exist", where=target, remedy="create the folder or choose another")
    if target.is_dir():
        raise CheckpointError("this is a folder", where=target, expected="the name of a file")
    name_unfinished(target)
    with _writing(target):
        free = shutil.disk_usage(target.parent).free
    if free < needed:
        found = f"only {free:,} bytes ({free / 2**30:.1f} GiB) are free on its disk"
        expected = f"{needed:,} ({needed / 2**30:.1f} GiB)"
        raise CheckpointError(found, where=target.name, expected=expected, remedy="free space or choose another disk")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """OSError of an operation on the new file -> CheckpointError."""
    try:
        yield
    except OSError as error:
        remedy = "check free space, rights, and that no other program holds the file; nothing was changed"
        raise CheckpointError(f"it cannot be written ({error})", where=target.name, remedy=remedy) from error


def _write_all(file: BinaryIO, data: memoryview, target: Path) -> None:
    with _writing(target):
        while data:
            data = data[file.write(data) :]


def _write_tensor(
    file: BinaryIO,
    tensor: PlannedTensor,
    target: Path,
    done: int,
    total: int,
    on_bytes: Callable[[int, int], None] | None,
) -> int:
    """Produce one tensor and write it in chunks -> bytes of data written so far."""
    data = produce_bytes(tensor, target)
    for offset in range(0, len(data) or 1, CHUNK_BYTES):
        chunk = data[offset : offset + CHUNK_BYTES]
        _write_all(file, chunk, target)
        done += len(chunk)
        if on_bytes is not None:
            on_bytes(done, total)
    return done


def produce_bytes(tensor: PlannedTensor, target: Path) -> memoryview:
    """Produce a tensor, compare it with its plan, and return its bytes as one flat view on the CPU."""
    value = tensor.produce()
    plan = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    if isinstance(value, torch.Tensor):
        if value.dtype == DTYPES.get(tensor.dtype) and tuple(value.shape) == tuple(tensor.shape):
            value = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
            return memoryview(value.view(-1).view(torch.uint8).numpy())
        found = f"{value.dtype} of shape {tuple(value.shape)}"
    elif isinstance(value, memoryview):
        if value.nbytes == tensor.nbytes and value.c_contiguous:
            return value.cast("B") if value.nbytes else memoryview(b"")
        found = f"a memoryview of {value.nbytes:,} bytes"
        plan = f"{tensor.nbytes:,} contiguous bytes for {plan}"
    else:
        found, plan = f"a {type(value).__name__}", f"a tensor or memoryview for {plan}"
    found = f"tensor {quote(tensor.name)} was produced as {found}"
    raise CheckpointError(found, where=target.name, expected=plan, remedy="this is a bug in the producer, report it")


def _remove(temporary: Path) -> None:
    """Delete an unfinished file while an exception is on its way, which a second one must not replace."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("The unfinished file %s could not be removed (%s); delete it by hand.", temporary, error)


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network and FUSE file systems; the file is complete all the same
        text = "%s cannot be synchronised (%s): after a power cut, a new file in it may be missing."
        logger.info(text, folder, error)
