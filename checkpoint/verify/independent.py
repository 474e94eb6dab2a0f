# SPDX-License-Identifier: Apache-2.0
"""A second reading that shares nothing with the pack's readers: safetensors' own, and plain struct and numpy.

``structure_faults`` lets safetensors list the tensors; ``sample`` decodes the first rows of a few layers by the
definition of each dialect, written out here once more, so that an error of checkpoint/ or kernels/ cannot hide itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from ...kernels.format import PackedWeight, round_up
from ..file.header import open_regular
from ..file.shards import Checkpoint
from ..identify.layers import Layer
from .weight_error import decode

if TYPE_CHECKING:
    from .compare import Layers

_ROWS = 128
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_HIGH_NIBBLE_FIRST, _ROW_MAJOR = ("comfy",), ("modelopt", "compressed_tensors")


def structure_faults(checkpoint: Checkpoint) -> list[str]:
    """What safetensors says of the file's names and shapes, where it is not what the pack has read."""
    found = []
    for header in checkpoint.files:
        try:
            with open_regular(header.path), safe_open(header.path, framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            found.append(f"{header.path.name}: safetensors cannot open it ({error})")
            continue
        if shapes != {name: info.shape for name, info in header.tensors.items()}:
            found.append(f"{header.path.name}: safetensors lists other tensors than the pack has read")
    return found


def sample(layers: Layers, pairs: Sequence[tuple[Layer, Layer]]) -> tuple[int, list[str]]:
    """First, middle and last pair of how file and source store a layer -> how many were read, what differs."""
    ours, theirs = PlainFile(layers.ours.checkpoint), PlainFile(layers.theirs.checkpoint)
    read, faults = 0, []
    for at in sorted({0, len(pairs) // 2, len(pairs) - 1} if pairs else ()):
        mine, other = pairs[at]
        weight = layers.theirs.weight(layers.ours.layer(mine.name))
        if len(mine.shape) != 2 or weight is None:
            continue
        record = layers.record(mine.name)[0]
        height = min(_ROWS, weight.info.shape[0], record.shape[0])
        packed, scale = record.packed[: round_up(height, 16)], record.block_scale[:_ROWS]
        first = decode(PackedWeight(packed, scale, record.global_scale, (height, mine.shape[1])))
        wrong = not _alike(first.numpy(), ours.nvfp4(mine.name, layers.dialect)[:height])
        plain = theirs.rows(f"{other.name}.{other.weight}", height) if other.kind == "float" else None
        if plain is not None:
            wrong |= not _alike(layers.original_rows(weight, height).numpy(), plain)
        read += 1
        if wrong:
            faults.append(f"{layers.ours.layer(mine.name)}: read a second time, in plain numpy, its numbers are others")
    return read, faults


class PlainFile:
    """Tensors of a checkpoint's files by nothing but the format's definition: a length, JSON, and bytes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._at: dict[str, tuple[Path, int, dict]] = {}
        for path in (header.path for header in checkpoint.files):
            with open_regular(path) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                entries = json.loads(file.read(length))
            self._at |= {name: (path, 8 + length, info) for name, info in entries.items() if name != "__metadata__"}

    def rows(self, name: str, count: int | None = None) -> np.ndarray | None:
        """The first ``count`` rows, or all, as fp32 or uint8; None for a dtype that is not read here."""
        path, base, info = self._at[name]
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "F8_E4M3": "u1"}
        if info["dtype"] not in kinds:
            return None
        kind, shape = np.dtype(kinds[info["dtype"]]), list(info["shape"])
        if count is not None:
            shape[0] = min(shape[0], count)
        with open_regular(path) as file:
            file.seek(base + info["data_offsets"][0])
            values = np.frombuffer(file.read(int(np.prod(shape, dtype=np.int64)) * kind.itemsize), kind).reshape(shape)
        if info["dtype"] == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        if info["dtype"] == "F8_E4M3":
            return _e4m3(values)
        return values if info["dtype"] == "U8" else values.astype(np.float32)

    def nvfp4(self, layer: str, dialect: str) -> np.ndarray:
        """The first 128 rows of an NVFP4 layer as stored, (<= 128, K) fp32, by the definition of its dialect."""
        name = f"{layer}.weight_packed" if f"{layer}.weight_packed" in self._at else f"{layer}.weight"
        packed = self.rows(name, _ROWS)
        nibbles = (packed >> 4, packed & 15) if dialect in _HIGH_NIBBLE_FIRST else (packed & 15, packed >> 4)
        codes = np.stack(nibbles, -1).reshape(len(packed), -1)
        scales = self.rows(f"{layer}.weight_scale", _ROWS)
        if scales.dtype == np.uint8:  # the same bytes under another name
            scales = _e4m3(scales)
        row, block = np.arange(len(packed))[:, None], np.arange(codes.shape[1] // 16)[None]
        if dialect in _ROW_MAJOR:
            scales = scales[row, block]
        else:  # tiles of 128 rows and 4 blocks; in one, 32 groups of 4 rows by 4 blocks
            scales = scales.reshape(-1)[block // 4 * 512 + row % 32 * 16 + row // 32 * 4 + block % 4]
        with np.errstate(all="ignore"):  # infinity is a finding, told with the layer's name
            return _E2M1[codes] * np.repeat(scales * self._factor(layer), 16, 1)

    def _factor(self, layer: str) -> np.float32:
        def number(suffix: str) -> np.float32:
            return np.float32(self.rows(f"{layer}.{suffix}").reshape(()))

        if f"{layer}.weight_scale_2" in self._at:
            return number("weight_scale_2")
        if f"{layer}.alpha" in self._at and f"{layer}.input_global_scale" in self._at:
            return number("alpha") * number("input_global_scale")
        return np.float32(1) / number("weight_global_scale")


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """E4M3 bytes -> fp32: a sign, four bits of exponent with bias 7, three of mantissa; 0x7F is NaN."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    values = np.where((codes & 0x7F) == 0x7F, np.nan, values)
    return np.where(codes & 0x80, -values, values).astype(np.float32)


def _alike(ours: np.ndarray, plain: np.ndarray) -> bool:
    """Equal but for the order in which two scales are multiplied; NaN equals NaN."""
    return bool(np.allclose(ours, plain[:, : ours.shape[1]], rtol=1e-5, atol=0, equal_nan=True))
