# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: the records that describe it, and a reader that trusts nothing in it.

Layout of a file (https://github.com/huggingface/safetensors#format):

* 8 bytes: length n of the header, unsigned, little-endian, at most 100,000,000.
* n bytes: UTF-8 JSON ``{"<name>": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}``, optionally
  with ``"__metadata__": {"<key>": "<string>"}``; trailing spaces may pad it.
* the rest: the tensors, row-major and little-endian, in any order, covering every byte exactly once. Offsets count
  from byte 8 + n of the file.

container.py maps and writes the data.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ...kernels.errors import PackError, one_line
from .dtypes import BITS, ITEM_BYTES, bytes_of
from .mistaken import AGAIN, what_it_is

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
BACKUP_ENDING = ".header-backup"  # of the header that a repair in place replaced
METADATA_KEY = "__metadata__"
# The entry of the metadata that speaks of layers by name, ``{"layers": {...}}``: each shard has its own part of it.
HEADER_ENTRY = "_quantization_metadata"
# The tensor of a layer that holds the same declaration as JSON. Its few bytes are read with the header.
MARKER = "comfy_quant"
_MAX_MARKER_BYTES = 1 << 16

_INT64_MAX = 2**63 - 1
_MAX_DIMENSIONS = 64  # torch's own operators stop there
# What a header may hold beyond what its tensors need. A value of two bytes in JSON can take a hundred as an object.
_MOST_FURTHER, _MOST_UNUSUAL = 1_000_000, 200_000
_MOST_TENSORS = 100_000  # of one file; models of a million million parameters have fewer in each of theirs
_LONGEST_NAME = 1000  # characters of a tensor's name; longer ones are in no model, and no report has room for them
_MOST_SHAPES = 4096  # shared by the tensors that have them; a file with more has each its own
_CODES = {name: (name, size) for name, size in ITEM_BYTES.items()}  # with the one string that all tensors share

_CUT_SHORT = "the file is cut short: download it again"
_REWRITE = "the file is damaged or its writer is faulty: download or convert it again"

_short = reprlib.Repr()
_short.maxstring, _short.maxlist, _short.maxdict, _short.maxlevel, _short.maxlong = 200, 8, 4, 2, 40


class CheckpointError(PackError):
    """A file that cannot be used, in one line: ``where: found; expected ...; remedy``."""

    def __init__(self, found: str, *, where: str | os.PathLike[str] = "", expected: str = "", remedy: str = "") -> None:
        message = "; ".join(part for part in (found, expected and f"expected {expected}", remedy) if part)
        super().__init__(one_line(f"{os.fspath(where)}: {message}" if where else message))


class TensorInfo(NamedTuple):
    """Where one tensor lies: safetensors dtype name, shape, and absolute byte offsets [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the stored elements. CheckpointError where torch has none."""
        from .torch_dtypes import torch_dtype  # and with it torch, which a header does not need

        return torch_dtype(self.dtype)


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors cover the data without overlap; ``tensors`` keeps the header's order.

    ``markers``: name of a `comfy_quant` tensor -> its bytes. ``trailing``: bytes behind the last tensor.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    markers: Mapping[str, bytes] = field(default_factory=dict)
    trailing: int = 0

    def of(self, tensors: Iterable[str]) -> Header:
        """The header of a part of the file."""
        return replace(self, tensors={name: self.tensors[name] for name in tensors})

    def listed_layers(self) -> dict[str, Any]:
        """Content of HEADER_ENTRY: layer as named there -> what it says; {} without it. Raises CheckpointError."""
        try:
            layers = json.loads(self.metadata.get(HEADER_ENTRY, '{"layers": {}}'))["layers"]
            if not isinstance(layers, dict):
                raise TypeError(f"layers is {quote(layers)}")
            return layers
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.unreadable(HEADER_ENTRY, error, '{"layers": {...}}') from error

    def unreadable(self, key: str, error: Exception, expected: str) -> CheckpointError:
        """The error for an entry of the metadata that is not what it should be."""
        found = f"its header entry {key} cannot be read ({error})"
        return CheckpointError(found, where=self.path.name, expected=expected)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Header of a safetensors file. Raises CheckpointError, and nothing else, if the file is not a sound one."""
    path = Path(path)
    with open_regular(path) as file:
        return parse_header(file, path)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; OSError, here or in the body, becomes CheckpointError."""
    try:
        _check_regular(path, stat_of(path).st_mode)  # before open(), which may wind a tape, or wait for ever on a pipe
        with open(path, "rb", opener=_open_at_once) as file:
            _check_regular(path, os.fstat(file.fileno()).st_mode)  # what was opened, should it have changed meanwhile
            yield file
    except FileNotFoundError as error:
        found = "this is a link to a file that does not exist" if path.is_symlink() else "the file does not exist"
        raise CheckpointError(found, where=path, remedy="check the name, or refresh the list of models") from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})", where=path, remedy="check rights and disk") from error


def stat_of(path: Path) -> os.stat_result:
    """os.stat; CheckpointError for what no file can be called."""
    try:
        return os.stat(path)
    except ValueError as error:  # NUL, or half of a surrogate pair
        found = f"this is not a file name ({error})"
        raise CheckpointError(found, where=quote(str(path)), remedy="check the name") from error


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = "this is a folder" if stat.S_ISDIR(mode) else "this is not a regular file"
        raise CheckpointError(found, where=path, expected="a plain file", remedy="choose the file itself")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # means nothing for a regular file


def parse_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header of a file opened at its start; ``path`` names it in errors."""
    where = path.name
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if not head:
        raise CheckpointError("the file is empty", where=where, expected="a safetensors file", remedy=AGAIN)
    if len(head) < 8 or length > MAX_HEADER_BYTES:
        raise _not_safetensors(head, where)
    if length == 0:
        found = "its first 8 bytes, the length of the header, are zero"
        remedy = "the download never finished: download it again"
        if path.with_name(path.name + BACKUP_ENDING).is_file():
            remedy = "a repair in place was interrupted: `repair --undo` on the command line puts the old header back"
        raise CheckpointError(found, where=where, remedy=remedy)
    if length > size - 8:
        found = f"its header should be {length:,} bytes long, but {length - (size - 8):,} of them are missing"
        raise CheckpointError(found, where=where, remedy=_CUT_SHORT)
    file.seek(8)
    with no_collection():
        return _parse(file, path, length, size)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which looks at all of a million new objects again and again, finding none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(file: BinaryIO, path: Path, length: int, size: int) -> Header:
    """The header from ``length`` bytes of JSON at the file's position."""
    where, data_start = path.name, 8 + length
    entries = _load_json(file, length, where)
    metadata = entries.pop(METADATA_KEY, None)
    if metadata is None:  # the reference reader, too, takes null for none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        found = f"its {METADATA_KEY} is {_short.repr(metadata)}"
        raise CheckpointError(found, where=where, expected="a map from strings to strings", remedy=_REWRITE)
    try:
        for text in itertools.chain(entries, metadata, metadata.values()):
            text.encode()
    except UnicodeEncodeError as error:
        found = f"a name or metadata in its header is not valid Unicode ({error.reason})"
        raise CheckpointError(found, where=where, remedy=_REWRITE) from error
    longest = max(entries, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        found, expected = f"the name of its tensor {quote(longest)} has {len(longest):,} characters", "at most 1,000"
        raise CheckpointError(found, where=where, expected=expected, remedy=_REWRITE)
    for name, entry in entries.items():
        if type(entry) is not TensorInfo:
            entries[name] = _tensor_info(name, entry, data_start, where)
    trailing = _check_layout(entries, data_start, size, where)
    return Header(path, entries, metadata, size, _read_markers(file, entries, where), trailing)


def _read_markers(file: BinaryIO, tensors: Mapping[str, TensorInfo], where: str) -> dict[str, bytes]:
    """Contents of the `comfy_quant` tensors, in the order in which they lie in the file."""
    markers = {}
    names = [name for name in tensors if name.endswith(MARKER) and tensors[name].nbytes <= _MAX_MARKER_BYTES]
    for name in sorted(names, key=lambda name: tensors[name].start):
        if name.rpartition(".")[2] == MARKER:
            file.seek(tensors[name].start)
            markers[name] = file.read(tensors[name].nbytes)
            if len(markers[name]) != tensors[name].nbytes:
                found, remedy = "the file became shorter while it was read", "try again once nothing writes to it"
                raise CheckpointError(found, where=where, remedy=remedy)
    return markers


def layers_entry(layers: Mapping[str, Any], separators: tuple[str, str] | None = None) -> str:
    """Layer -> what is to be said of it -> text of HEADER_ENTRY."""
    return json.dumps({"format_version": "1.0", "layers": layers}, separators=separators)


def quote(value: object) -> str:
    """repr() of untrusted content, cut to a readable length and depth."""
    return _short.repr(value)


def is_size(value: object) -> bool:
    """Whether ``value`` is an int, no bool, that torch can hold as a size or offset."""
    return type(value) is int and 0 <= value <= _INT64_MAX


def _not_safetensors(head: bytes, where: str) -> CheckpointError:
    found, expected, remedy = what_it_is(head, MAX_HEADER_BYTES)
    return CheckpointError(found, where=where, expected=expected, remedy=remedy)


def _load_json(file: BinaryIO, length: int, where: str) -> dict[str, Any]:
    """The header's JSON object, each key unique, entries of the usual form already as TensorInfo.

    A header may have a million entries: as dicts they would take gigabytes, so each becomes small as soon as it is
    read. An entry of any other form stays what it is, for ``_tensor_info`` to judge.
    """
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    data_start, unusual = 8 + length, 0

    def other(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal unusual
        unusual += 1
        if unusual > _MOST_UNUSUAL:
            raise ValueError(f"more than {_MOST_UNUSUAL:,} objects are no sound entries, {quote(dict(pairs))} for one")
        return _unique_keys(pairs)

    def read(pairs: list[tuple[str, Any]]) -> TensorInfo | dict[str, Any]:
        try:
            (a, dtype), (b, shape), (c, (begin, end)) = pairs
            dtype, nbytes = _CODES[dtype]
            empty = False
            for side in shape:
                if type(side) is not int or side < 0:
                    return other(pairs)
                if side:
                    nbytes *= side
                else:
                    empty = True
        except (TypeError, ValueError, KeyError):
            return other(pairs)
        if not (a == "dtype" and b == "shape" and c == "data_offsets" and type(shape) is list):
            return other(pairs)
        if nbytes > _INT64_MAX or len(shape) > _MAX_DIMENSIONS or type(begin) is not int or type(end) is not int:
            return other(pairs)
        if empty:
            nbytes = 0
        if begin < 0 or end > _INT64_MAX or end - begin != nbytes:
            return other(pairs)
        shape = tuple(shape)
        if len(shapes) < _MOST_SHAPES:
            shape = shapes.setdefault(shape, shape)
        start = data_start + begin
        return TensorInfo(dtype, shape, start, start + nbytes if nbytes else start)

    raw = file.read(length)
    tensors = raw.count(b'"data_offsets"')
    if tensors > _MOST_TENSORS:
        found, expected = f"its header lists {tensors:,} tensors", f"at most {_MOST_TENSORS:,}"
        raise CheckpointError(found, where=where, expected=expected, remedy=_REWRITE)
    if raw.count(b",") > _MOST_FURTHER + 70 * tensors or raw.count(b"[") > _MOST_FURTHER + 2 * tensors:
        found = f"its header of {length:,} bytes holds far more values than its {tensors:,} tensors need"
        raise CheckpointError(found, where=where, expected="entries of tensors, and some metadata", remedy=_REWRITE)
    try:
        text = raw.decode("utf-8")
        del raw
        header = json.loads(text, object_pairs_hook=read, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise CheckpointError("its header is nested too deeply", where=where, remedy=_REWRITE) from error
    except ValueError as error:
        raise CheckpointError(f"its header is not valid JSON ({error})", where=where, remedy=_REWRITE) from error
    if not isinstance(header, dict):
        found = f"its header is {quote(header)}"
        raise CheckpointError(found, where=where, expected="a JSON object", remedy=_REWRITE)
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, following in zip(keys, keys[1:], strict=False) if key == following)
        raise ValueError(f"the key {quote(twice)} occurs twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not part of JSON")


def _tensor_info(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    """Check one entry by itself: types, ranges, and that its bytes are dtype times shape."""

    def error(found: str, expected: str, remedy: str = _REWRITE) -> CheckpointError:
        return CheckpointError(f"tensor {quote(name)} {found}", where=where, expected=expected, remedy=remedy)

    if not isinstance(entry, dict):
        raise error(f"is {quote(entry)}", "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        remedy = "take a version of the model that uses these"
        raise error(f"has the unknown dtype {quote(dtype)}", f"one of {', '.join(BITS)}", remedy)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(is_size, shape)):
        raise error(f"has the shape {quote(shape)}", f"a list of at most {_MAX_DIMENSIONS} non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise error(f"has the data_offsets {quote(offsets)}", "two non-negative integers")
    begin, end = offsets
    # Zeros count as ones, because the strides of an empty tensor overflow in torch as those of a full one would.
    if math.prod(size or 1 for size in shape) * bits > 8 * _INT64_MAX:
        raise error(f"has the shape {quote(shape)}", "a size below 2**63 bytes")
    nbytes = bytes_of(dtype, shape)
    if nbytes is None:
        raise error(f"has the shape {quote(shape)}", f"one whose numbers of {bits} bits fill whole bytes")
    if end - begin != nbytes:
        raise error(f"spans bytes {begin} to {end}", f"a span of {nbytes:,} bytes for {dtype} of shape {quote(shape)}")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_layout(tensors: dict[str, TensorInfo], data_start: int, size: int, where: str) -> int:
    """The tensors must cover the file from ``data_start`` on -> bytes behind the last of them.

    The reference reader refuses such bytes, ComfyUI's own (DynamicVRAM) does not look at them.
    """
    end, before = data_start, None
    for name, info in sorted(tensors.items(), key=lambda named: named[1][2:]):
        if info.start != end:
            gap = info.start - end
            how = "overlaps" if gap < 0 else f"leaves {gap:,} unused bytes after"
            found = f"tensor {quote(name)} {how} {'the header' if before is None else quote(before)}"
            raise CheckpointError(found, where=where, expected="tensors without overlaps or holes", remedy=_REWRITE)
        end, before = info.end, name
    if end > size:
        raise CheckpointError(f"{end - size:,} of its {end:,} bytes are missing", where=where, remedy=_CUT_SHORT)
    return size - end
