# SPDX-License-Identifier: Apache-2.0
"""GPTQ in NVFP4: each rounding error is made up for by the columns that follow, as far as the inputs are correlated.

A weight row w becomes q so that the layer's output on its inputs X changes least: (w - q) H (w - q)^T with the Gram
matrix H = X^T X. With H = R R^T, R upper triangular, that is the squared length of (w - q) R, and with e = w - q its
entry j is R_jj (t_j - q_j), where

    t_j = w_j + sum over i < j of e_i R_ij / R_jj.

So columns are rounded in order, each to the code nearest to its target t_j, which is what GPTQ (Frantar et al.,
https://arxiv.org/abs/2210.17323, equation 3) does with a Cholesky factor of the inverse of H; here no inverse is
taken. When a group of 16 columns is reached, its block scale is searched over the targets as they stand, each squared
error weighted by R_jj^2, which is what it will cost. The global scale is fixed before.

H is given as the diagonal blocks of width B (a multiple of 16) of the whole matrix, all of which are worked on at once;
one block of width K is the full matrix. Within a block, groups of 16 columns are taken in the order of their energy,
largest first, while most columns are left to make up for them. The damping adds a share of the mean diagonal to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import dispatch
from .format import BLOCK, E2M1_MAX, PackedWeight, round_up, swizzle, unswizzle
from .reference import round_to_e2m1

_EXACT_WIDTH = 4096  # up to here H is factored in FP64; beyond, the memory is worth more
_STRONGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Feedback:
    """What rounding needs to know of H, for all rows of a weight and all layers that share an input.

    ``order`` (G, B) int64: places of the columns in their block, as they are taken. ``carry`` (G, B, B) fp32: R_ij /
    R_jj in that order. ``cost`` (G, B) fp32: R_jj^2. ``damping``: what was added, as a share of the mean diagonal.
    """

    order: torch.Tensor
    carry: torch.Tensor
    cost: torch.Tensor
    damping: float


def feedback(gram: torch.Tensor, damping: float) -> Feedback:
    """(G, B, B) float Gram matrices of column blocks, damping -> Feedback on their device.

    Columns whose inputs were always zero have no say and none to make up for them: they are rounded to nearest. A
    matrix that is not positive definite is damped ten times as much, until it is. Raises ValueError if it never is,
    for NaN or infinity, and for another shape.
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.shape[1] % BLOCK or not gram.numel():
        raise ValueError(f"Gram matrices of shape {tuple(gram.shape)}; expected (G, B, B), B a multiple of {BLOCK}")
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrices hold NaN or infinity; expected sums of finite inputs")
    width = gram.shape[1]
    energy = gram.diagonal(dim1=1, dim2=2)
    groups = energy.unflatten(1, (-1, BLOCK)).sum(2).argsort(dim=1, descending=True, stable=True)
    order = (groups.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=gram.device)).flatten(1)
    mean = energy.double().mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        # From the last column to the first: the lower triangle of that order is the upper one of ours.
        backwards = order.flip(1)
        matrix = gram.gather(1, backwards.unsqueeze(2).expand(-1, -1, width))
        matrix = matrix.gather(2, backwards.unsqueeze(1).expand(-1, width, -1))
        matrix = matrix.double() if width <= _EXACT_WIDTH else matrix.float()
        matrix.diagonal(dim1=1, dim2=2).add_((damping * mean).to(matrix.dtype))
        lower, failed = torch.linalg.cholesky_ex(matrix)
        del matrix
        if not failed.any():
            break
        damping = max(10 * damping, 1e-3)
        if damping > _STRONGEST_DAMPING:
            raise ValueError("the Gram matrices are not positive definite, whatever the damping")
    root = lower.diagonal(dim1=1, dim2=2)
    cost = root.square().float().flip(1)
    carry = lower.div_(root.unsqueeze(1).clone()).float().flip(1, 2)
    return Feedback(order, carry, cost, damping)


def quantize(weight: torch.Tensor, told: Feedback, global_scale: torch.Tensor) -> PackedWeight:
    """(N, K) float, its Feedback, () fp32 -> PackedWeight in the layout of ``reference.quantize``.

    Rows do not depend on each other, so that a weight may be given in pieces. Takes five times the weight's FP32
    bytes. Raises ValueError for a weight that is not finite, or of another width than the Gram matrices.
    """
    (rows, cols), (count, width) = weight.shape, told.order.shape
    if not 0 <= count * width - round_up(cols, BLOCK) < width:
        raise ValueError(f"a weight of {cols} columns, Gram matrices of {count} x {width}")
    weight = torch.nn.functional.pad(weight.float(), (0, count * width - cols))
    columns = weight.t().reshape(count, width, rows)
    columns = columns.gather(1, told.order.unsqueeze(2).expand(-1, -1, rows))
    codes = torch.empty((count, width, rows), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((count, width // BLOCK, rows), dtype=torch.float8_e4m3fn, device=weight.device)
    errors = torch.empty_like(columns)
    for start in range(0, width, BLOCK):
        group = slice(start, start + BLOCK)
        target = columns[:, group].clone()
        if start:
            target.baddbmm_(told.carry[:, :start, group].transpose(1, 2), errors[:, :start])
        scale = _searched(target, global_scale, told.cost[:, group])
        scales[:, start // BLOCK] = scale
        levels = _round_group(
            columns[:, group], target, errors[:, group], scale.float() * global_scale, told.carry[:, group, group]
        )
        codes[:, group] = round_to_e2m1(levels)
    back = told.order.argsort(1)
    codes = codes.gather(1, back.unsqueeze(2).expand(-1, -1, rows)).flatten(0, 1).t()[:, : round_up(cols, BLOCK)]
    scales = scales.view(torch.uint8).gather(1, (back[:, ::BLOCK] // BLOCK).unsqueeze(2).expand(-1, -1, rows))
    scales = scales.flatten(0, 1).t()[:, : round_up(cols, BLOCK) // BLOCK]
    missing = (0, 0, 0, -rows % 16)
    packed = torch.nn.functional.pad((codes[:, 0::2] << 4) | codes[:, 1::2], missing)
    scales = torch.nn.functional.pad(scales, missing).view(torch.float8_e4m3fn)
    return PackedWeight(packed.contiguous(), swizzle(scales.contiguous()), global_scale, (rows, cols))


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(N, K) float difference of two weights, (G, B, B) Gram matrices -> () fp64: squared difference of the outputs.

    Summed over rows and over the inputs that the matrices were made of, as far as those see: the blocks' own part.
    """
    count, width, _ = gram.shape
    blocks = torch.nn.functional.pad(difference.float(), (0, count * width - difference.shape[1]))
    blocks = blocks.unflatten(1, (count, width)).transpose(0, 1)
    return ((blocks @ gram.float()) * blocks).sum(dtype=torch.float64)


def _searched(target: torch.Tensor, global_scale: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """(G, 16, N) fp32 targets, () fp32, (G, 16) costs -> (G, N) e4m3: the pack's own search, of any backend."""
    count, _, rows = target.shape
    flat = target.permute(2, 0, 1).reshape(rows, count * BLOCK)
    found = dispatch.quantize(flat, global_scale, "mse", cost.flatten()).block_scale
    return unswizzle(found.view(torch.float8_e4m3fn), rows, count).t()


def _round_group(columns, target, errors, scale, carry) -> torch.Tensor:
    """Columns, targets (overwritten) and errors (written) (G, 16, N), (G, N) scales, (G, 16, 16) -> levels, all fp32.

    A level is the value of a code, -6 to 6.
    """
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    levels = torch.empty_like(target)
    for place in range(BLOCK):
        level = _nearest_level(target[:, place] * inverse)
        levels[:, place] = level
        error = torch.sub(columns[:, place], level * scale)
        errors[:, place] = error
        if place + 1 < BLOCK:
            target[:, place + 1 :] += carry[:, place, place + 1 :].unsqueeze(2) * error.unsqueeze(1)
    return levels


def _nearest_level(values: torch.Tensor) -> torch.Tensor:
    """fp32 -> the nearest value of E2M1, ties to the even code, fp32; with p the power of two below, steps are p / 2.

    Adding p * 1.5 * 2**22 leaves room for just such steps.
    """
    size = values.abs().clamp_(max=E2M1_MAX)
    shift = (size.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000).view(torch.float32) * (1.5 * 2**22)
    return torch.copysign((size + shift) - shift, values)
