# SPDX-License-Identifier: Apache-2.0
"""How far an NVFP4 layer is from its original, beside how far plain block maxima would be; streamed in pieces.

Where the second moments of the layer's inputs are known, also how far its outputs are, of both. Where LoRAs were folded
in, how much of them is there: what the file adds to the source, projected on what they add; 1 is all of it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...kernels import dispatch, gptq
from ...kernels.format import BLOCK, E2M1_MAX, E4M3_MAX, PackedWeight, block_scale_shape, round_up, unswizzle
from ..file.header import CheckpointError
from ..write.weights import TILE, FloatRows

MARGIN = 1.25  # times the error of plain block maxima
CALIBRATED_MARGIN = 2.0  # for GPTQ, which lets weights go where the outputs gain: 1.6 was seen on trained layers
JUDGED_MARGIN = 3.0  # for a layer judged by its outputs: below what reading it in a wrong way gives
FLOOR = 0.02  # allowed to any layer, also to one that block maxima represent exactly


class LayerError(NamedTuple):
    """``error``, ``allowed``: relative Frobenius norms; shares of ``saturated`` and of ``lost`` blocks; ``bad`` values.

    ``output``, ``output_plain``: relative error of the outputs, that of plain block maxima. ``lora``: share of the
    LoRAs that is there; ``lora_plain``: that of block maxima, less than 1 where the source lies on a coarse grid itself
    and rounding undoes small changes; ``noise``: the standard deviation by which rounding blurs either.
    """

    error: float
    allowed: float
    saturated: float
    lost: float
    bad: int
    output: float | None = None
    output_plain: float | None = None
    lora: float | None = None
    lora_plain: float = 1.0
    noise: float = 0.0


def layer_error(
    rows: FloatRows,
    record: PackedWeight,
    smooth: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    margin: float = MARGIN,
    gram: torch.Tensor | None = None,
) -> LayerError:
    """Original, layer -> LayerError.

    ``smooth``: what the layer's input is multiplied by; ``low_rank``: (r, K) and (N, r), whose product is added;
    ``margin``: what is allowed, in errors of plain block maxima. ``gram``: (G, B, B), of the inputs.
    """
    device = rows.device
    off = plain = size = torch.zeros((), dtype=torch.float64, device=device)
    outputs = torch.zeros(3, dtype=torch.float64, device=device)
    along = torch.zeros(2, dtype=torch.float64, device=device)
    added = torch.zeros((), dtype=torch.float64, device=device)
    saturated = lost = bad = torch.zeros((), dtype=torch.int64, device=device)
    amax = rows.amax()
    if not torch.isfinite(amax):
        raise CheckpointError(
            "its source has NaN or infinity there", where=rows.weight.layer, remedy="nothing to compare"
        )
    top = amax if amax > 0 else torch.ones_like(amax)
    for start, values in rows:
        height, width = values.shape
        packed = record.packed[start : start + round_up(height, 16)].to(device)
        scale = record.block_scale[start : start + round_up(height, TILE)].to(device)
        global_scale = record.global_scale.to(device)
        decoded = decode(PackedWeight(packed, scale, global_scale, (height, width)))
        again = decode(dispatch.quantize(values, top / (E2M1_MAX * E4M3_MAX)))
        bad = bad + (~torch.isfinite(decoded)).sum()
        if low_rank is not None:
            decoded = decoded + low_rank[1][start : start + height] @ low_rank[0]
        if smooth is not None:
            decoded = decoded * smooth
        size, off, plain = size + energy(values), off + energy(decoded - values), plain + energy(again - values)
        if gram is not None:
            parts = decoded - values, again - values, values
            outputs += torch.stack([gptq.output_error(part, gram) for part in parts])
        if rows.delta is not None:
            change = rows.delta.rows(start, start + height)
            along += torch.stack([((v - values) * change).sum(dtype=torch.float64) for v in (decoded, again)])
            added = added + energy(change)
        blocks = torch.nn.functional.pad(values, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK)).abs().amax(-1)
        zero = torch.nn.functional.pad(decoded, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK)).abs().amax(-1) == 0
        saturated = saturated + (blocks > 1.01 * E2M1_MAX * E4M3_MAX * global_scale).sum()
        lost = lost + (zero & (blocks > 0)).sum()
    count = max(rows.shape[0] * -(-rows.shape[1] // BLOCK), 1)
    error = ratio(off, size)
    allowed = max(margin * ratio(plain, size), FLOOR)
    found = LayerError(error, allowed, saturated.item() / count, lost.item() / count, bad.item())
    if gram is not None:
        found = found._replace(output=ratio(outputs[0], outputs[2]), output_plain=ratio(outputs[1], outputs[2]))
    if added.item() > 0 and torch.isfinite(along).all():
        shares = (1 + along / added).tolist()
        noise = ratio(off, added) / math.sqrt(rows.shape[0] * rows.shape[1])
        found = found._replace(lora=shares[0], lora_plain=shares[1], noise=noise)
    return found


def decode(weight: PackedWeight) -> torch.Tensor:
    """PackedWeight -> (N, K) fp32, the numbers of ``dispatch.dequantize``; on a CPU byte by byte from a table."""
    packed, scale, global_scale = weight.packed, weight.block_scale, weight.global_scale
    if packed.device.type != "cpu":
        return dispatch.dequantize(weight, torch.float32)
    blocks = packed.shape[1] * 2 // BLOCK
    factor = unswizzle(scale.view(torch.float8_e4m3fn), packed.shape[0], blocks).float() * global_scale.float()
    values = torch.index_select(_values_of_bytes(), 0, packed.reshape(-1).int()).view(packed.shape[0], blocks, BLOCK)
    return values.mul_(factor.unsqueeze(-1)).flatten(1)[: weight.shape[0], : weight.shape[1]]


@functools.cache
def _values_of_bytes() -> torch.Tensor:
    """(256, 2) fp32: the two numbers of every byte, as ``dispatch.dequantize`` reads them."""
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ones = torch.ones(block_scale_shape((16, 32))).to(torch.float8_e4m3fn)
    weight = PackedWeight(packed, ones, torch.ones(()), (16, 32))
    return dispatch.dequantize(weight, torch.float32).reshape(256, 2)


def energy(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares, () fp64; squared in FP64, since in FP32 all below 1e-23 would have none."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def ratio(off: torch.Tensor, size: torch.Tensor) -> float:
    """Square root of a ratio of energies; infinite where nothing became something, or NaN came in."""
    if size.item() == 0:
        return 0.0 if off.item() == 0 else math.inf
    found = math.sqrt(off.item() / size.item()) if math.isfinite(off.item()) else math.inf
    return found
