# SPDX-License-Identifier: Apache-2.0
"""Are block scales row-major or tiled? Padding proves it; without, it shows in what rows and columns have in common.

The rows of a trained weight differ in size, and so do its columns. In the right order the logarithm of a block scale
is, to a part, a sum of what its row and what its column contribute; tiles read row by row, or rows read as tiles, mix
them. So the share of the variance that row and column means explain is compared between the two orders. Where rows and
columns are alike, as in random numbers, both shares are what chance gives, (N + C) / (N C), and nothing is decided.
The order of nibbles does not show: columns of a matrix have no order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from ...kernels.geometry import BLOCK, block_scale_shape
from ..file.header import Header
from .formats import Group, weight_suffix

TILED, ROW_MAJOR = "tiled", "row-major"
Read = Callable[[str], "torch.Tensor"]  # name in the file -> tensor

_LAYERS = 12
_SIGMAS = 12.0  # of the difference that chance gives; see tests/checkpoint/identify/test_scale_order.py
_SHARE = 0.02  # of the variance, at least, that one order explains and the other does not


@dataclass(frozen=True)
class Order:
    """``found``: the likelier order; ``tiled``, ``row_major``: shares of the variance explained, means over layers.

    ``sigmas``: the difference over what chance gives; ``agree``: of ``layers`` layers, those that say so.
    """

    found: str
    tiled: float
    row_major: float
    sigmas: float
    agree: int
    layers: int

    @property
    def decided(self) -> bool:
        """Whether the evidence is strong: far beyond chance, and all layers but one of ten agree."""
        clear = self.sigmas > _SIGMAS and abs(self.tiled - self.row_major) > _SHARE
        return clear and self.agree >= max(math.ceil(0.9 * self.layers), 2)

    def __str__(self) -> str:
        if not self.layers:
            return "no layer is large enough to measure the order of its block scales"
        strength = "" if self.decided else "too little to decide: "
        return (
            f"measured, {strength}rows and columns explain {self.tiled:.1%} of the block scales read as tiled, "
            f"{self.row_major:.1%} read as row-major ({self.agree} of {self.layers} layers, {self.sigmas:.0f} sigma)"
        )


def scale_shapes(shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {TILED: block_scale_shape(shape), ROW_MAJOR: (shape[0], shape[1] // BLOCK)}


def proven_layouts(packed: Mapping[str, Group]) -> dict[str, str]:
    """Layouts that padding proves, each with a layer that proves it."""
    proofs: dict[str, str] = {}
    for layer, group in packed.items():
        info = group[weight_suffix(group)]
        scale = group.get("weight_scale")
        if scale is None:
            continue
        shapes = scale_shapes((info.shape[0], info.shape[1] * 2))
        fitting = [layout for layout, shape in shapes.items() if shape == scale.shape]
        if len(fitting) == 1:
            proofs.setdefault(fitting[0], layer)
    return proofs


def measure(header: Header, packed: Mapping[str, Group], read: Read) -> Order:
    """Header, NVFP4 layers whose scales have the same shape in either order, reader -> Order, from a few of them."""
    import torch  # to read tensors; what the header decides needs none

    from ...kernels.format import unswizzle

    names = [layer for layer, members in packed.items() if _large(members)]
    chosen = names[:: max(len(names) // _LAYERS, 1)][:_LAYERS]
    shares, deviations = [], []
    for layer in chosen:
        scale = read(f"{layer}.weight_scale").view(torch.uint8)
        rows, cols = scale.shape
        as_rows = scale
        as_tiles = unswizzle(scale, rows, cols)
        shares.append((_explained(as_tiles), _explained(as_rows)))
        deviations.append(math.sqrt(4 * (rows + cols)) / (rows * cols))
    if not chosen:
        return Order(ROW_MAJOR, 0.0, 0.0, 0.0, 0, 0)
    gaps = [tiled - row_major for tiled, row_major in shares]
    mean = sum(gaps) / len(gaps)
    sigma = math.sqrt(sum(deviation**2 for deviation in deviations)) / len(gaps)
    agree = sum((gap > 0) == (mean > 0) for gap in gaps)
    tiled, row_major = (sum(side) / len(shares) for side in zip(*shares, strict=True))
    return Order(TILED if mean > 0 else ROW_MAJOR, tiled, row_major, abs(mean) / sigma, agree, len(chosen))


def _large(members: Group) -> bool:
    """At least two tiles either way: in fewer there is little to tell."""
    scale = members.get("weight_scale")
    return scale is not None and len(scale.shape) == 2 and scale.shape[0] >= 256 and scale.shape[1] >= 8


def _explained(scale: torch.Tensor) -> float:
    """Share of the variance of log2(scale) that the means of rows and columns explain; (N, C) bytes of E4M3."""
    import torch

    values = scale.view(torch.float8_e4m3fn).float().clamp_min(2.0**-10).log2()
    values = values - values.mean()
    total = values.square().mean().item()
    if total == 0:
        return 0.0
    return (values.mean(0).square().mean().item() + values.mean(1).square().mean().item()) / total


__all__ = ["ROW_MAJOR", "TILED", "Order", "Read", "measure", "proven_layouts", "scale_shapes"]
