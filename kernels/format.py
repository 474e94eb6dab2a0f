# SPDX-License-Identifier: Apache-2.0
"""NVFP4 constants, the packed-weight record, and the two byte orders that everything else relies on.

The layout is the host's own (ComfyUI's ``TensorCoreNVFP4Layout``), for a weight W of logical shape (N, K):

* ``packed``        (R16(N), R16(K) / 2) uint8: byte j of a row holds column 2j in the HIGH nibble, 2j + 1 in the
  low one.
* ``block_scale``   (R128(N), R4(R16(K) / 16)) float8_e4m3fn, one scale per 16 columns, stored in cuBLAS's 128x4 tiles
  ("swizzled"): the scale of (row r, block c) lies at flat offset
  ``(r // 128 * (C / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4`` where C = R4(R16(K) / 16).
* ``global_scale``  () float32, multiplies.

A value is ``e2m1(code) * (float32(block_scale) * global_scale)``: the bracket is rounded to FP32 once, the product
with the code once more, the result to the output dtype. That order is the one of comfy-kitchen's CUDA kernel, so
results agree bit for bit with stock ComfyUI on a GPU. Rn(x) rounds x up to a multiple of n.

Layout source: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .geometry import BLOCK as BLOCK
from .geometry import E2M1_MAX as E2M1_MAX
from .geometry import E4M3_MAX as E4M3_MAX
from .geometry import block_scale_shape as block_scale_shape
from .geometry import packed_shape as packed_shape
from .geometry import round_up as round_up

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP8 = torch.float8_e4m3fn
FACTOR_BLOCK = 128  # columns of a low-rank factor in 8 bits that share a scale
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)  # what the kernels that multiply take: not FP32


def check_output_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for an output dtype no kernel gives."""
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"cannot dequantize NVFP4 to {dtype}; expected one of {OUTPUT_DTYPES}")


def check_parts(packed: torch.Tensor, block_scale: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError for tensors that are not those of a weight of ``shape``."""
    if packed.shape != packed_shape(shape) or block_scale.shape != block_scale_shape(shape):
        raise ValueError(
            f"packed {tuple(packed.shape)} and block_scale {tuple(block_scale.shape)} do not belong to a weight of "
            f"shape {tuple(shape)}; expected {packed_shape(shape)} and {block_scale_shape(shape)}"
        )


@dataclass(frozen=True)
class PackedWeight:
    """One NVFP4 matrix in the host's layout; see the module docstring. ``shape`` is the logical (N, K)."""

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    shape: tuple[int, int]

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(packed, block_scale, global_scale), in the order in which prepared functions and operators take them."""
        return self.packed, self.block_scale, self.global_scale

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.packed.nbytes + self.block_scale.nbytes + self.global_scale.nbytes


@dataclass(frozen=True, eq=False)
class FP8Rows:
    """A tensor of ``shape`` (..., K) as E4M3 with a scale a row, for the products that take it so.

    ``quantized`` (M, K) e4m3, ``scale`` (M, 1) fp32; K is a multiple of 16, and M the product of the other sizes.
    ``kept``: the tensor itself, where somebody needs it too.
    """

    quantized: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype = torch.bfloat16
    kept: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Of both tensors."""
        return self.quantized.device

    def plain(self) -> torch.Tensor:
        """-> (..., K) of ``dtype``, for whoever cannot multiply E4M3."""
        if self.kept is not None:
            return self.kept
        return (self.quantized.float() * self.scale).to(self.dtype).view(self.shape)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Row-major block scales (N, C) -> tiled and zero-padded (R128(N), R4(C)), same dtype."""
    rows, cols = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -cols % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzle(scales: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Tiled block scales (R128(rows), R4(cols)) -> row-major (rows, cols), same dtype."""
    height, width = scales.shape
    tiles = scales.contiguous().view(torch.uint8).view(height // 128, width // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width)[:rows, :cols].contiguous().view(scales.dtype)


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 bytes with their two nibbles exchanged: low-nibble-first files <-> the host's order."""
    return (packed << 4) | (packed >> 4)
