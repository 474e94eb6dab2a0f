# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that may be spread over several files: its merged header, and a reader that keeps one tensor in memory.

A checkpoint is named by its file, by its ``*.safetensors.index.json``, by any one of its shards
(``*-00001-of-00003.safetensors``, or whatever an index beside it calls them), or by a wildcard such as
``model-*.safetensors``. Files that an index names must lie beside it.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .header import (
    HEADER_ENTRY,
    CheckpointError,
    Header,
    layers_entry,
    open_regular,
    parse_header,
    quote,
    read_header,
    stat_of,
)

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"(?P<stem>.*?)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>(\.\w+)?\.safetensors)")
_INDEX_ENDING = ".safetensors.index.json"
# What a file of a sharded checkpoint has in its name beside that of the checkpoint.
_NOT_THE_NAME = re.compile(r"-\d{5}-of-\d{5}|\.(safetensors|sft)(\..*)?$|[*?\[\]]")
_MAX_INDEX_BYTES = 64 * 2**20
_READ_BYTES = 2**26  # at a time: systems limit one call to 2 GiB


@dataclass(frozen=True)
class Checkpoint:
    """``header``: all tensors and metadata together; ``homes``: tensor name -> header of the file that holds it."""

    header: Header
    homes: Mapping[str, Header]
    files: tuple[Header, ...]

    @property
    def sharded(self) -> bool:
        """Whether the tensors lie in more than one file."""
        return len(self.files) > 1


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """File, index, shard or wildcard -> Checkpoint; reads headers only. Raises CheckpointError."""
    path = Path(path)
    paths, promised = _files(path)
    files = [read_header(file) for file in paths]
    absent = promised.difference(*(header.tensors for header in files))
    if absent:
        found = f"{len(absent)} tensors that the index promises are in none of its files, {quote(min(absent))} for one"
        raise CheckpointError(found, where=path.name, remedy="index and files do not match: download them again")
    if len(files) == 1:
        return Checkpoint(files[0], dict.fromkeys(files[0].tensors, files[0]), tuple(files))
    homes: dict[str, Header] = {}
    for header in files:
        for name in header.tensors:
            if name in homes:
                found = f"tensor {quote(name)} is both in {homes[name].path.name} and in {header.path.name}"
                remedy = "these files are not parts of one checkpoint: name the right ones"
                raise CheckpointError(found, where=path.name, expected="each tensor in one file", remedy=remedy)
            homes[name] = header
    tensors = {name: header.tensors[name] for name, header in homes.items()}
    markers = {name: content for header in files for name, content in header.markers.items()}
    size = sum(header.file_size for header in files)
    trailing = sum(header.trailing for header in files)
    merged = Header(path, tensors, _merge_metadata(files), size, markers, trailing)
    return Checkpoint(merged, homes, tuple(files))


def plain_name(path: str | os.PathLike[str]) -> str:
    """Name of a file, index, shard or wildcard -> that of the checkpoint, without ending and folder; may be empty."""
    return _NOT_THE_NAME.sub("", os.path.basename(path)).strip("-_. ")


class Source:
    """Reads tensors of a Checkpoint; the memory of this process holds no more than those that the caller keeps.

    A context manager. Files are read, not mapped: a file that others make shorter meanwhile is a CheckpointError,
    where a mapping would end the process. A file whose header is no longer that of the Checkpoint is refused.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor lies, for sorting: reading in this order is sequential."""
        return str(self.checkpoint.homes[name].path), self.checkpoint.header.tensors[name].start

    def view(self, name: str) -> memoryview:
        """Bytes of a tensor, read-only, in memory of their own."""
        return memoryview(self._read(name).numpy()).toreadonly()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU in its stored dtype and shape, with memory of its own."""
        info = self.checkpoint.header.tensors[name]
        return self._read(name).view(info.torch_dtype).view(info.shape)

    def _read(self, name: str) -> torch.Tensor:
        """(nbytes,) uint8"""
        home, info = self.checkpoint.homes[name], self.checkpoint.header.tensors[name]
        import torch  # only whoever reads tensors needs it

        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        file, rest, position = self._file(home), memoryview(flat.numpy()), info.start
        try:
            while rest:
                count = _read_at(file, rest[:_READ_BYTES], position)
                if not count:
                    gone = f"{len(rest):,} bytes of {quote(name)} are gone"
                    found = f"the file became shorter while it was in use: {gone}"
                    raise CheckpointError(found, where=home.path.name, remedy="try again once nothing writes to it")
                rest, position = rest[count:], position + count
        except OSError as error:
            found = f"its tensor {quote(name)} cannot be read ({error})"
            raise CheckpointError(found, where=home.path.name, remedy="check the disk") from error
        return flat

    def _file(self, home: Header) -> BinaryIO:
        if home.path not in self._files:
            with open_regular(home.path) as file:
                try:
                    same = parse_header(file, home.path) == home
                except CheckpointError:  # it was one a moment ago
                    same = False
                if not same:
                    found = "the file changed while it was in use"
                    raise CheckpointError(found, where=home.path.name, remedy="try again")
                self._files[home.path] = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        return self._files[home.path]


def _read_at(file: BinaryIO, buffer: memoryview, position: int) -> int:
    """Read into ``buffer`` from a place in a file -> bytes read, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [buffer], position)
    file.seek(position)
    return file.readinto(buffer)


def _files(path: Path) -> tuple[list[Path], set[str]]:
    """-> the files, and the tensors that an index says they hold."""
    if path.name.endswith(_INDEX_ENDING):
        return _indexed(path)
    if _exists(path):
        index = _index_beside(path)
        if index is not None:
            return _indexed(index)
        shard = _SHARD.fullmatch(path.name)
        return (_siblings(path, shard) if shard else [path]), set()
    if glob.has_magic(path.name):
        # Not Path.glob, which takes `**` for folders within folders, or refuses it.
        beside = (entry for entry in path.parent.glob("*") if fnmatch.fnmatch(entry.name, path.name))
        matching = sorted(entry for entry in beside if entry.is_file())
        found = [entry for entry in matching if entry.suffix != ".json"]
        if not found:
            remedy = "check the name; a wildcard may stand in the file's name only"
            raise CheckpointError("no file matches this name", where=path, remedy=remedy)
        return found, set()
    return [path], set()


def _exists(path: Path) -> bool:
    """CheckpointError for a name that is too long, or none at all."""
    try:
        stat_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        found = f"there is no file of this name ({error.strerror})"
        raise CheckpointError(found, where=path, remedy="check the name") from error
    return True


def _index_beside(path: Path) -> Path | None:
    """The index in the same folder that names this file among others."""
    for index in sorted(path.parent.glob("*" + _INDEX_ENDING)):
        try:
            with open_regular(index) as file:
                names = set(json.loads(file.read(_MAX_INDEX_BYTES))["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # CheckpointError is a ValueError
            continue  # an index that nobody named and that cannot be read says nothing of this file
        if path.name in names and len(names) > 1:
            return index
    return None


def _siblings(path: Path, shard: re.Match) -> list[Path]:
    count = int(shard["count"])
    if not 1 <= int(shard["number"]) <= count:
        found = f"its name makes it part {int(shard['number'])} of {count}"
        raise CheckpointError(found, where=path.name, expected=f"a part from 1 to {count}", remedy="check its name")
    names = [f"{shard['stem']}{number:05}-of-{shard['count']}{shard['end']}" for number in range(1, count + 1)]
    missing = _not_beside(path, names)
    if missing:
        found = f"of its {count} parts {len(missing)} are missing, {missing[0]} for one"
        raise CheckpointError(found, where=path.name, expected="all parts in one folder", remedy="download the others")
    return [path.with_name(name) for name in names]


def _not_beside(path: Path, names: list[str]) -> list[str]:
    """Which of ``names`` are not in the folder of ``path``: by one listing, since a name can promise 99,999 parts."""
    present = set(os.listdir(path.parent))
    return [name for name in names if name not in present]


def _indexed(path: Path) -> tuple[list[Path], set[str]]:
    def error(found: str, remedy: str = "download it again") -> CheckpointError:
        return CheckpointError(found, where=path.name, expected='{"weight_map": {tensor: file}}', remedy=remedy)

    with open_regular(path) as file:
        text = file.read(_MAX_INDEX_BYTES + 1)
    if len(text) > _MAX_INDEX_BYTES:
        raise error(f"the index is larger than {_MAX_INDEX_BYTES:,} bytes")
    try:
        weight_map = json.loads(text)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise error(f"the index cannot be read ({problem})") from problem
    if not names:
        raise error("the index names no file")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise error(f"the index names the file {quote(name)}", "files must lie beside the index: do not use it")
    missing = _not_beside(path, names)
    if missing:
        found = f"of its {len(names)} files {len(missing)} are missing, {quote(missing[0])} for one"
        raise error(found, "download the others")
    return [path.with_name(name) for name in names], set(weight_map)


def _merge_metadata(files: list[Header]) -> dict[str, str]:
    """The first file to have an entry decides, but layers that are named in several are put together."""
    merged: dict[str, str] = {}
    for header in files:
        for key, text in header.metadata.items():
            merged.setdefault(key, text)
    layers: dict[str, object] = {}
    for header in files:
        layers |= header.listed_layers()
    if layers:
        merged[HEADER_ENTRY] = layers_entry(layers)
    return merged
