# SPDX-License-Identifier: Apache-2.0
"""The head of a GGUF file: the names of its tensors and its texts, nothing of its data.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3), little-endian: `GGUF`, version
u32, number of tensors u64, number of entries u64; each entry a string (length u64, bytes), a type u32, a value; each
tensor a string, its number of sides u32, sides u64, type u32, offset u64.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from .header import CheckpointError, Header, TensorInfo, open_regular

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_ENTRIES, _MOST_TENSORS, _LONGEST, _MOST_SIDES = 10_000, 200_000, 1 << 20, 8
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the types of values, in bytes
_REMEDY = "the file is damaged or no GGUF: download it again"


def read_gguf(path: Path) -> Header:
    """GGUF file -> a header with its names and texts; of the tensors the sides are right, dtype and place are not told.

    Raises CheckpointError for what is no such file.
    """
    with open_regular(path) as file:
        try:
            return _read(path, file)
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise CheckpointError(str(error), where=path.name, expected="a GGUF head", remedy=_REMEDY) from error


def _read(path: Path, file: BinaryIO) -> Header:
    magic, version = file.read(4), _number(file, "<I")
    tensors, entries = _number(file, "<Q"), _number(file, "<Q")
    if magic != _MAGIC or version not in _VERSIONS or tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
        raise ValueError(f"it begins with {magic!r}, version {version}, {tensors} tensors, {entries} entries")
    texts = {}
    for _ in range(entries):
        key = _text(file)
        value = _value(file, _number(file, "<I"))
        if value is not None:
            texts[key] = value
    found = {}
    for _ in range(tensors):
        name, sides = _text(file), _number(file, "<I")
        if sides > _MOST_SIDES:
            raise ValueError(f"{name[:80]} has {sides} sides")
        shape = struct.unpack(f"<{sides}Q", file.read(8 * sides))
        file.seek(4 + 8, 1)
        found[name] = TensorInfo("U8", tuple(reversed(shape)), 0, 0)
    return Header(path, found, texts, path.stat().st_size)


def _number(file: BinaryIO, code: str) -> int:
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > _LONGEST:
        raise ValueError(f"a text of {length} bytes")
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it is cut short")
    return data.decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> str | None:
    """The next value if it is a text, None for all others, which are passed over."""
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        file.seek(_SIZES[_known(kind)], 1)
        return None
    inner, count = _number(file, "<I"), _number(file, "<Q")
    if count > _LONGEST:
        raise ValueError(f"a list of {count}")
    if inner != _STRING:
        file.seek(_SIZES[_known(inner)] * count, 1)
        return None
    for _ in range(count):
        _text(file)
    return None


def _known(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of type {kind}")
    return kind
