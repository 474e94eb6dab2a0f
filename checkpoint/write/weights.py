"""Weights of a checkpoint that are still floating point, FP8 with its scale among them, as FP32 rows.

The quantiser and the verifier read through this module, so that both take the same numbers for the original: an FP8
weight is multiplied by its scale in FP32, never used bare, and never rounded to BF16 on the way. Scales of FP8 files
multiply, whether they are called `weight_scale` or, in older files, `scale_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..file.header import CheckpointError, Header, TensorInfo
from ..file.shards import Source
from ..identify import dialects

FLOATS = ("F64", "F32", "F16", "BF16")
TILE = 128  # rows whose block scales are contiguous in the host's layout
FP8_SCALES = ("weight_scale", "scale_weight")
# Elements handled at once, and what is kept between two passes: bytes as stored on a GPU, where with all temporaries
# they stay below 2 GiB, and FP32 elements on a CPU, where converting costs more than remembering.
_CHUNK = {"cpu": 2**22, "cuda": 2**25}
_RESIDENT_BYTES = 2**29
_CPU_ELEMENTS = 2**26


@dataclass(frozen=True)
class FloatWeight:
    """One weight. ``name``: of its tensor; ``scale``: of the tensor that multiplies it, one number or one a row."""

    name: str
    info: TensorInfo
    scale: str | None

    @property
    def layer(self) -> str:
        """The layer's name in the checkpoint."""
        return self.name.rpartition(".")[0]

    @property
    def fp8(self) -> bool:
        """Whether it is stored in eight bits."""
        return self.info.dtype in dialects.FP8_FORMATS


def float_weight(header: Header, name: str) -> FloatWeight | str:
    """Header, name of a `.weight` -> FloatWeight, or why its values cannot be told."""
    info, layer = header.tensors[name], name.rpartition(".")[0]
    if info.dtype in FLOATS:
        return FloatWeight(name, info, None)
    if info.dtype not in dialects.FP8_FORMATS:
        return f"stored as {info.dtype}"
    scale = scale_of(header.tensors, layer)
    if scale is not None and not scale_fits(found := header.tensors[scale], info.shape):
        return f"FP8 with a scale of another kind, {found.dtype} of shape {found.shape}"
    return FloatWeight(name, info, scale)


def scale_of(tensors: Container[str], layer: str) -> str | None:
    """Name of the tensor that multiplies a layer's FP8 or INT8 weight; None if there is none."""
    return next((f"{layer}.{key}" for key in FP8_SCALES if f"{layer}.{key}" in tensors), None)


def scale_fits(scale: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a scale is floating point and one number, or one for each row of a weight of this shape."""
    rows = shape[0] if shape else 1
    by_row = scale.numel == rows and all(size in (1, rows) for size in scale.shape)
    return scale.dtype in FLOATS and (scale.numel == 1 or by_row)


class FloatRows:
    """A matrix in pieces: ``for start, rows in FloatRows(...)``, FP32 on ``device``, 128k rows but in the last.

    May be gone through several times; a weight of moderate size is brought to a GPU once.
    """

    def __init__(
        self, reader: Source, weight: FloatWeight, device: torch.device, view: memoryview | None = None
    ) -> None:
        self.weight, self.device = weight, device
        self.shape = weight.info.shape
        self._scale = None if weight.scale is None else self._read_scale(reader)
        self._view = reader.view(weight.name) if view is None else view
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
        """Rows ``start`` to ``stop`` as they count: FP32, multiplied by the scale; not to be written to."""
        return self._converted(start, stop) if self._values is None else self._values[start:stop]

    def amax(self) -> torch.Tensor:
        """() fp32, the largest magnitude; NaN or infinity if there is one."""
        found = torch.zeros((), device=self.device)
        for _, rows in self:
            low, high = rows.aminmax()
            found = torch.maximum(found, torch.maximum(-low, high))  # NaN passes through all three
        return found

    def _converted(self, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(start, stop).to(self.device) if self._resident is None else self._resident[start:stop]
        by_row = self._scale is not None and self._scale.numel() > 1
        if self.weight.fp8 and not by_row and self.device.type == "cpu":
            # One product for each of the 256 codes: the same numbers, in a third of the time.
            codes = torch.arange(256, dtype=torch.uint8).view(stored.dtype).float()
            table = codes if self._scale is None else codes * self._scale
            return torch.index_select(table, 0, stored.view(torch.uint8).view(-1).int()).view(stored.shape)
        values = stored.float()
        if self._scale is None:
            return values
        return values * (self._scale[start:stop, None] if by_row else self._scale)

    def _stored(self, start: int, stop: int) -> torch.Tensor:
        """A copy of rows in their stored dtype: the file's mapping is read-only, and torch wants what it can write."""
        flat = torch.empty((stop - start) * self._row_bytes, dtype=torch.uint8)
        memoryview(flat.numpy())[:] = self._view[start * self._row_bytes : stop * self._row_bytes]
        return flat.view(self.weight.info.torch_dtype).view(stop - start, *self.shape[1:])

    def _read_scale(self, reader: Source) -> torch.Tensor:
        scale = reader.tensor(self.weight.scale).float().reshape(-1)
        if not torch.isfinite(scale).all():
            where = f"{reader.checkpoint.header.path.name}, layer {self.weight.layer}"
            remedy = "the file is damaged: download or convert it again"
            raise CheckpointError("its scale is not finite", where=where, expected="finite numbers", remedy=remedy)
        return scale.to(self.device)


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
