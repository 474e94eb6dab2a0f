# SPDX-License-Identifier: Apache-2.0
"""What a transformer of LTX's does between its products, in fewer passes over memory.

* ``norm_rows``   gated addition to the residual stream, RMS norm, modulation, rows in FP8
* ``gate_heads``  attention's output times the gates of its heads, rows in FP8
* ``norm_rope``   RMS norm of q and k over all heads, and their rotation

Plain torch here is the definition; the files of kernels/triton with the same names compute it in one kernel each. What
is BF16 in memory is rounded when it is written; nothing between is, except sums of modulations, as the host has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .backends import pick_backend, triton_module
from .format import FP8Rows
from .reference import quantize_rows

MOST_COLS = 8192


@dataclass(frozen=True, eq=False)
class Ada:
    """Modulations of a block: parameter i of row r of the stream is ``table[i] + steps[r // group, i]``.

    ``table`` (n, K), ``steps`` (R, n * K), each row without gaps, in the stream's dtype; the stream has R * group rows.
    """

    table: torch.Tensor
    steps: torch.Tensor
    group: int

    def of(self, index: int) -> torch.Tensor:
        """Number of a parameter -> (R * group, K)."""
        cols = self.table.shape[1]
        return (self.table[index] + self.steps[:, index * cols : (index + 1) * cols]).repeat_interleave(self.group, 0)


class Add(NamedTuple):
    """What is added to the stream: ``y`` of its shape, times parameter ``at`` of ``gate`` if there is one."""

    y: torch.Tensor
    gate: Ada | None = None
    at: int = 0


class Want(NamedTuple):
    """A tensor made of the stream's norm: times 1 + parameter ``scale``, plus ``shift``.

    ``quantize``: rows in FP8, with ``keep`` the BF16 tensor beside them.
    """

    ada: Ada | None = None
    scale: int = 0
    shift: int = 0
    quantize: bool = False
    keep: bool = False


def fits(x: torch.Tensor) -> bool:
    """Whether a stream can be given to these functions: BF16, without gaps, rows of 16 to ``MOST_COLS`` columns."""
    cols = x.shape[-1]
    in_range = cols % 16 == 0 and 0 < cols <= MOST_COLS and x.numel() > 0
    return in_range and x.dtype == torch.bfloat16 and x.is_contiguous()


def norm_rows(
    x: torch.Tensor, add: Add | None, wants: Sequence[Want], norm: bool = True, eps: float = 1e-6
) -> list[torch.Tensor | FP8Rows]:
    """(..., K) bf16 that ``fits``: ``add`` to it in place -> up to two tensors of its shape, as wanted of its norm.

    Without ``norm`` they are made of x itself.
    """
    if pick_backend(x.device)[0] == "triton":
        return triton_module("norm_rows").norm_rows(x, add, wants, norm, eps)
    rows = x.view(-1, x.shape[-1])
    if add is not None:
        y = add.y.reshape(rows.shape).float()
        rows.copy_(rows.float() + (y if add.gate is None else y * add.gate.of(add.at).float()))
    values = rows.float()
    if norm:
        values = values / (values.square().mean(-1, keepdim=True) + eps).sqrt()
    return [_as_wanted(values, want).view(x.shape) if not want.quantize else _in_fp8(values, want, x) for want in wants]


def _modulated(values: torch.Tensor, want: Want) -> torch.Tensor:
    return values if want.ada is None else values * (1 + want.ada.of(want.scale).float()) + want.ada.of(want.shift)


def _as_wanted(values: torch.Tensor, want: Want) -> torch.Tensor:
    return _modulated(values, want).to(torch.bfloat16)


def _in_fp8(values: torch.Tensor, want: Want, x: torch.Tensor) -> FP8Rows:
    kept = _as_wanted(values, want).view(x.shape) if want.keep else None
    return FP8Rows(*quantize_rows(_modulated(values, want)), x.shape, kept=kept)


def gate_heads(x: torch.Tensor, logits: torch.Tensor, quantize: bool) -> torch.Tensor | FP8Rows:
    """(..., H * D) bf16 times 2 sigmoid(``logits`` (..., H)) of each row's heads; ``quantize``: as rows in FP8."""
    if pick_backend(x.device)[0] == "triton":
        return triton_module("gate_heads").gate_heads(x, logits, quantize)
    heads = x.float().unflatten(-1, (logits.shape[-1], -1)) * (2 * logits.float().sigmoid()).unsqueeze(-1)
    rows = heads.reshape(-1, x.shape[-1])
    return FP8Rows(*quantize_rows(rows), x.shape) if quantize else rows.to(x.dtype).view(x.shape)


def norm_rope(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]], rotation: torch.Tensor | None, eps: float
) -> list[torch.Tensor]:
    """One or two of ((B, T, H * D) bf16, weight of its norm (H * D)) -> the same, normalised and rotated.

    ``rotation``: (1 or B, T, H, D / 2, 2, 2) bf16 without gaps; element i of a head's first half and element i of its
    second are multiplied by matrix i. The norm spans all heads. None: no rotation.
    """
    if pick_backend(tensors[0][0].device)[0] == "triton":
        return triton_module("norm_rope").norm_rope(tensors, rotation, eps)
    found = []
    for x, weight in tensors:
        values = x.float()
        values = values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()
        if rotation is not None:
            halves = values.unflatten(-1, (rotation.shape[2], 2, -1)).transpose(-1, -2).unsqueeze(-1)
            values = (rotation.float() @ halves).squeeze(-1).transpose(-1, -2).flatten(2)
        found.append(values.to(x.dtype))
    return found
