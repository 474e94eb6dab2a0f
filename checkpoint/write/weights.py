# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint that are still floating point, FP8 with its scale among them, as FP32 rows.

The quantiser and the verifier read through this module, so that both take the same numbers for the original: an FP8
weight is multiplied by its scale, one number or one a row or a block, in FP32, never used bare, and never rounded to
BF16 on the way. Scales of FP8 files multiply, whether they are called `weight_scale`, `weight_scale_inv` or, in older
files, `scale_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..file.header import Header, TensorInfo
from ..file.shards import Source
from ..identify.formats import FORMATS, FP8_FORMATS
from ..identify.layers import Layer
from ..identify.values import check_cast, expand, read_scale
from .lora import Delta

TILE = 128  # rows whose block scales are contiguous in the host's layout
# Elements handled at once, and what is kept between two passes: bytes as stored on a GPU, where with all temporaries
# they stay below 2 GiB, and FP32 elements on a CPU, where converting costs more than remembering.
_CHUNK = {"cpu": 2**22, "cuda": 2**25}
_RESIDENT_BYTES = 2**29
_SAMPLE = 2**16
_CPU_ELEMENTS = 2**26


@dataclass(frozen=True)
class FloatWeight:
    """One weight: its tensor, and how it is stored."""

    name: str
    info: TensorInfo
    stored: Layer

    @property
    def layer(self) -> str:
        """The layer's name in the checkpoint."""
        return self.stored.name

    @property
    def fp8(self) -> bool:
        """Whether it is stored in eight bits."""
        return self.info.dtype in FP8_FORMATS


def float_weight(header: Header, layer: Layer) -> FloatWeight | str:
    """Header, a layer of its plan -> FloatWeight, or why its values are not read here."""
    if not FORMATS[layer.kind].quantises:
        return f"stored as {layer.title}"
    if not layer.name:  # the tensors made of it would have no names either
        return "a tensor called `weight` alone, without the name of a layer"
    name = f"{layer.name}.{layer.weight}"
    return FloatWeight(name, header.tensors[name], layer)


class FloatRows:
    """A matrix in pieces: ``for start, rows in FloatRows(...)``, FP32 on ``device``, 128k rows but in the last.

    May be gone through several times; a weight of moderate size is brought to a GPU once. ``delta``: what LoRAs add.
    """

    def __init__(
        self,
        reader: Source,
        weight: FloatWeight,
        device: torch.device,
        view: memoryview | None = None,
        delta: Delta | None = None,
    ) -> None:
        self.weight, self.device, self.delta = weight, device, delta
        self.shape = weight.info.shape
        self._scale = self._read_scale(reader)
        self._view = reader.view(weight.name) if view is None else view
        if weight.stored.kind == "fp8_cast" and weight.info.nbytes:
            start = torch.frombuffer(bytearray(self._view[:_SAMPLE]), dtype=torch.uint8).view(weight.info.torch_dtype)
            check_cast(reader.checkpoint.header.path.name, weight.stored, start)
        self._row_bytes = weight.info.nbytes // max(self.shape[0], 1)
        self._resident = self._values = None
        if device.type != "cpu" and weight.info.nbytes <= _RESIDENT_BYTES:
            self._resident = self._stored(0, self.shape[0]).to(device)
        elif device.type == "cpu" and weight.info.numel <= _CPU_ELEMENTS:
            self._values = torch.empty(self.shape)
            for start in range(0, self.shape[0], self.step):
                self._values[start : start + self.step] = self._converted(start, min(start + self.step, self.shape[0]))

    @property
    def step(self) -> int:
        """Rows in a piece."""
        elements = _CHUNK["cpu" if self.device.type == "cpu" else "cuda"]
        return max(elements // max(self.shape[1], 1) // TILE, 1) * TILE

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.shape[0], self.step):
            yield start, self.rows(start, min(start + self.step, self.shape[0]))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` as they count: FP32, scaled, with what LoRAs add; not to be written to."""
        return self._converted(start, stop) if self._values is None else self._values[start:stop]

    def amax(self) -> torch.Tensor:
        """() fp32, the largest magnitude; NaN or infinity if there is one."""
        found = torch.zeros((), device=self.device)
        for _, rows in self:
            low, high = rows.aminmax()
            found = torch.maximum(found, torch.maximum(-low, high))  # NaN passes through all three
        return found

    def _converted(self, start: int, stop: int) -> torch.Tensor:
        values = self._read(start, stop)
        return values if self.delta is None else values + self.delta.rows(start, stop).view(values.shape)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(start, stop).to(self.device) if self._resident is None else self._resident[start:stop]
        one = self._scale is None or not self._scale.shape
        if self.weight.fp8 and one and self.device.type == "cpu":
            # One product for each of the 256 codes: the same numbers, in a third of the time.
            codes = torch.arange(256, dtype=torch.uint8).view(stored.dtype).float()
            table = codes if self._scale is None else codes * self._scale
            return torch.index_select(table, 0, stored.view(torch.uint8).view(-1).int()).view(stored.shape)
        values = stored.float()
        return values if self._scale is None else values * self._factor(start, stop)

    def _factor(self, start: int, stop: int) -> torch.Tensor:
        """The scale of rows ``start`` to ``stop``, of a shape that multiplies them."""
        if not self._scale.shape:
            return self._scale
        if self.weight.stored.block is None:
            return self._scale[start:stop]
        height, width = self.weight.stored.block
        rows = self._scale[torch.arange(start, stop, device=self._scale.device) // height]
        return rows.repeat_interleave(width, 1)[:, : self.shape[1]]

    def _stored(self, start: int, stop: int) -> torch.Tensor:
        """A copy of rows in their stored dtype: the file's mapping is read-only, and torch wants what it can write."""
        flat = torch.empty((stop - start) * self._row_bytes, dtype=torch.uint8)
        memoryview(flat.numpy())[:] = self._view[start * self._row_bytes : stop * self._row_bytes]
        return flat.view(self.weight.info.torch_dtype).view(stop - start, *self.shape[1:])

    def _read_scale(self, reader: Source) -> torch.Tensor | None:
        """None, () for one number, (N, 1) for one a row, as stored for blocks."""
        stored, file = self.weight.stored, reader.checkpoint.header.path.name
        if stored.scale is None:
            return None
        scale = read_scale(file, stored, lambda suffix: reader.tensor(f"{stored.name}.{suffix}"))
        return (scale if stored.block is not None else expand(scale, stored)).to(self.device)


def non_finite(
    reader: Source, weights: Mapping[str, FloatWeight], device: torch.device, on_layer: Callable[[], None]
) -> list[str]:
    """The keys of the weights that hold NaN or infinity; reads all of them, and calls ``on_layer`` before each."""
    found = []
    for key, weight in weights.items():
        on_layer()
        if not torch.isfinite(FloatRows(reader, weight, device).amax()):
            found.append(key)
    return found
