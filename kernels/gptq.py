# SPDX-License-Identifier: Apache-2.0
"""GPTQ in NVFP4: each rounding error is made up for by the columns that follow, as far as the inputs are correlated.

A weight row w becomes q so that the layer's output on its inputs X changes least: e H e^T with the error e = w - q and
the Gram matrix H = X^T X. Columns are taken in groups of 16, which share a block scale. While a group g is chosen,
some columns are settled, errors and all (s), the others are free. With S the matrix H from which the free ones are
eliminated (its Schur complement), g would best become

    t = w_g + e_s C,   C = S_sg S_gg^-1,

and another q costs (t - q) S_gg (t - q)^T more. In the first pass, groups settle one after the other and all later ones
are free, as in GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323), whose equation 3 this is in other words: with
H = R R^T, R upper triangular, S_gg = R_gg R_gg^T and C = R_sg R_gg^-1. In the second pass all others are settled, so
that S = H, and a group changes if that costs less.

Within a group the same is done column by column, with R_gg: each is rounded to the code nearest to its target, and its
residual moves those after it; the cost is the sum of R_jj^2 times squared residuals. This is tried with each of the 10
E4M3 scales with which the largest target becomes 7.5 to 3.4, and the cheapest is taken, of equal ones the smallest: on
trained weights none beyond is ever best. The global scale is fixed before.

H is given as the diagonal blocks of width B (a multiple of 16) of the whole matrix, all of which are worked on at once;
one block of width K is the full matrix. Within a block, groups are taken in the order of their energy, largest first,
while most columns are left to make up for them. The damping adds a share of the mean diagonal to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import dispatch
from .backends import pick_backend, triton_module
from .cpu_quantize import in_threads
from .format import BLOCK, E2M1_MAX, E4M3_MAX, FP8, PackedWeight, round_up, swizzle
from .reference import check_finite, round_to_e2m1

EXACT_WIDTH = 4096  # up to here H is factored in FP64; beyond, the memory is worth more
LARGEST_LEVEL = 7.5  # that the largest target of a group becomes with the smallest scale that is tried
SCALES = 10  # neighbouring E4M3 values that are tried
_LARGEST_BITS = 126  # of E4M3: 448
_STRONGEST_DAMPING = 1.0
# Rows of one block of columns, and of all blocks together, that torch rounds at a time; each takes about 1 KB.
_PIECES = {"cpu": (2**10, 2**11), "gpu": (2**14, 2**18)}


@dataclass(frozen=True)
class Feedback:
    """What rounding needs to know of H in one pass, for all rows of a weight and all layers that share an input.

    ``order`` (G, B) int64: places of the columns in their block, as they are taken; everything else is in that order.
    ``carry`` (G, B, B) fp32: column group g of it is C, rows that are not settled do not count. ``within`` (G, B/16,
    16, 16) fp32: how much a column's residual moves those after it. ``cost`` (G, B) fp32: R_jj^2. ``dampings``: what
    was added, as a share of the mean diagonal; with D of them, G is D times the number of blocks.
    """

    order: torch.Tensor
    carry: torch.Tensor
    within: torch.Tensor
    cost: torch.Tensor
    dampings: tuple[float, ...]

    def of(self, number: int) -> Feedback:
        """That of one of the dampings."""
        many = len(self.order) // len(self.dampings)
        found = self.blocks(slice(number * many, (number + 1) * many))
        return replace(found, dampings=self.dampings[number : number + 1])

    def blocks(self, which: slice) -> Feedback:
        """That of some blocks of columns."""
        parts = (part[which] for part in (self.order, self.carry, self.within, self.cost))
        return Feedback(*parts, self.dampings)


def feedback(gram: torch.Tensor, *dampings: float) -> Feedback:
    """(G, B, B) float Gram matrices of column blocks, dampings -> Feedback of the first pass, on their device.

    Columns whose inputs were always zero have no say and none to make up for them: they are rounded to nearest. A
    matrix that is not positive definite is damped ten times as much, until it is. Raises ValueError if it never is,
    for NaN or infinity, and for another shape.
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.shape[1] % BLOCK or not gram.numel():
        raise ValueError(f"Gram matrices of shape {tuple(gram.shape)}; expected (G, B, B), B a multiple of {BLOCK}")
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrices hold NaN or infinity; expected sums of finite inputs")
    groups = gram.diagonal(dim1=1, dim2=2).unflatten(1, (-1, BLOCK)).sum(2).argsort(dim=1, descending=True, stable=True)
    order = (groups.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=gram.device)).flatten(1)
    tried = list(dampings)
    while True:
        # From the last column to the first: the lower triangle of that order is the upper one of ours.
        lower, failed = torch.linalg.cholesky_ex(_damped(gram, order.flip(1), tried))
        failed = failed.view(len(tried), -1).any(1).tolist()
        if not any(failed):
            break
        del lower
        tried = [max(10 * damping, 1e-3) if bad else damping for damping, bad in zip(tried, failed, strict=True)]
        if max(tried) > _STRONGEST_DAMPING:
            raise ValueError("the Gram matrices are not positive definite, whatever the damping")
    root = lower.flip(1, 2)
    del lower
    within, cost, inverse = _groups(_own(root).clone())
    for number, group in _slices(root.shape[1]):
        root[:, :, group] = root[:, :, group] @ inverse[:, number]
    return Feedback(order.repeat(len(tried), 1), root.float(), within, cost, tuple(tried))


def second_pass(gram: torch.Tensor, first: Feedback) -> Feedback:
    """The Gram matrices, their Feedback of one damping -> that of the pass in which all other groups are settled."""
    matrix = _damped(gram, first.order, first.dampings)
    within, cost, inverse = _groups(torch.linalg.cholesky(_own(matrix).flip(2, 3)).flip(2, 3))
    inverse = inverse.transpose(2, 3) @ inverse
    for number, group in _slices(matrix.shape[1]):
        matrix[:, :, group] = matrix[:, :, group] @ inverse[:, number]
    _own(matrix).zero_()
    return replace(first, carry=matrix.float(), within=within, cost=cost)


def quantize(
    weight: torch.Tensor, told: Feedback, global_scale: torch.Tensor, again: Feedback | None = None
) -> PackedWeight:
    """(N, K) float, its Feedback, () fp32, that of a second pass -> PackedWeight in ``reference.quantize``'s layout.

    Rows do not depend on each other, so that a weight may be given in pieces. Takes twice the weight's FP32 bytes on a
    GPU with Triton. Raises ValueError for a weight that is not finite, or of another width than the Gram matrices.
    """
    cols, (count, width) = weight.shape[1], told.order.shape
    if not 0 <= count * width - round_up(cols, BLOCK) < width:
        raise ValueError(f"a weight of {cols} columns, Gram matrices of {count} x {width}")
    check_finite(weight.abs().amax())
    passes = (told,) if again is None else (told, again)
    if pick_backend(weight.device)[0] == "triton":
        return triton_module("gptq").quantize(weight, passes, global_scale)
    return _quantize(weight, passes, global_scale)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(N, K) float difference of two weights, (G, B, B) Gram matrices -> () fp64: squared difference of the outputs.

    Summed over rows and over the inputs that the matrices were made of, as far as those see: the blocks' own part.
    """
    return _block_errors(difference, gram).sum()


def trial(weight: torch.Tensor, told: Feedback, global_scale: torch.Tensor, judge: torch.Tensor) -> torch.Tensor:
    """(N, K) float, Feedback of D dampings, () fp32, (G, B, B) Gram matrices -> (D,) fp64: with each, the squared error
    of the outputs of those matrices' inputs after the first pass."""
    count, width, _ = judge.shape
    many = len(told.dampings)
    weight = torch.nn.functional.pad(weight.float(), (0, count * width - weight.shape[1])).repeat(1, many)
    difference = dispatch.dequantize(quantize(weight, told, global_scale), torch.float32).sub_(weight)
    return _block_errors(difference, judge.repeat(many, 1, 1) if many > 1 else judge).view(many, -1).sum(1)


def _block_errors(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    count, width, _ = gram.shape
    blocks = torch.nn.functional.pad(difference.float(), (0, count * width - difference.shape[1]))
    blocks = blocks.unflatten(1, (count, width)).transpose(0, 1)
    return ((blocks @ gram.float()) * blocks).sum((1, 2), dtype=torch.float64)


def _damped(gram: torch.Tensor, order: torch.Tensor, dampings: list[float] | tuple[float, ...]) -> torch.Tensor:
    """(G, B, B), (G, B), D dampings -> (D * G, B, B) fp64, or fp32 where they are wide: in that order and damped."""
    count, width, _ = gram.shape
    matrix = gram.gather(1, order.unsqueeze(2).expand(-1, -1, width))
    matrix = matrix.gather(2, order.unsqueeze(1).expand(-1, width, -1))
    matrix = matrix.to(torch.float64 if width <= EXACT_WIDTH else torch.float32)
    mean = gram.diagonal(dim1=1, dim2=2).double().mean(1)
    mean = torch.where(mean > 0, mean, 1.0)
    matrix = matrix.repeat(len(dampings), 1, 1) if len(dampings) > 1 else matrix
    added = torch.cat([damping * mean for damping in dampings]).to(matrix.dtype)
    matrix.diagonal(dim1=1, dim2=2).add_(added.unsqueeze(1))
    return matrix


def _own(matrix: torch.Tensor) -> torch.Tensor:
    """(G, B, B) -> a view of its diagonal blocks of 16, (G, B/16, 16, 16)."""
    parts = matrix.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _slices(width: int):
    return enumerate(slice(start, start + BLOCK) for start in range(0, width, BLOCK))


def _groups(root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(G, B/16, 16, 16) upper triangular factors R_gg -> within, cost, their inverses."""
    inverse = torch.linalg.solve_triangular(root, torch.eye(BLOCK, dtype=root.dtype, device=root.device), upper=True)
    diagonal = root.diagonal(dim1=2, dim2=3)
    within = (-diagonal.unsqueeze(3) * inverse).triu(1)
    return within.float().contiguous(), diagonal.square().float().flatten(1), inverse


@torch.inference_mode(False)
def _quantize(weight: torch.Tensor, passes: tuple[Feedback, ...], global_scale: torch.Tensor) -> PackedWeight:
    """``quantize`` in torch, some blocks of columns of some rows at a time: on a CPU, each piece in a thread."""
    (rows, cols), (count, width) = weight.shape, passes[0].order.shape
    weight = torch.nn.functional.pad(weight.detach().float(), (0, count * width - cols))
    codes = torch.zeros((round_up(rows, 16), count, width), dtype=torch.uint8, device=weight.device)
    scales = torch.zeros((len(codes), count, width // BLOCK), dtype=FP8, device=weight.device)
    on_cpu = weight.device.type == "cpu"
    most, together = _PIECES["cpu" if on_cpu else "gpu"]
    # At least two pieces: torch's own threads, which a single one would get, meet after every operation.
    height = max(min(-(-rows // 2) if on_cpu and count == 1 else rows, most), 1)
    step = max(min(together // height, -(-count // max(torch.get_num_threads(), 2)) if on_cpu else count), 1)

    def work(piece: tuple[int, int]) -> None:
        row, block = (slice(start, start + size) for start, size in zip(piece, (height, step), strict=True))
        order = passes[0].order[block].unsqueeze(2)
        columns = weight[row].unflatten(1, (count, width))[:, block].permute(1, 2, 0)
        columns = columns.gather(1, order.expand_as(columns))
        found, scale = _round_blocks(columns, [told.blocks(block) for told in passes], global_scale)
        back = order.argsort(1).expand_as(columns)
        codes[row, block] = found.gather(1, back).permute(2, 0, 1)
        groups = back[:, ::BLOCK] // BLOCK
        scales.view(torch.uint8)[row, block] = scale.view(torch.uint8).gather(1, groups).permute(2, 0, 1)

    pieces = [(row, block) for row in range(0, rows, height) for block in range(0, count, step)]
    if on_cpu:
        in_threads(work, pieces)
    else:
        for piece in pieces:
            work(piece)
    codes, scales = codes.flatten(1)[:, : round_up(cols, BLOCK)], scales.flatten(1)[:, : round_up(cols, BLOCK) // BLOCK]
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    return PackedWeight(packed, swizzle(scales.contiguous()), global_scale, (rows, cols))


def _round_blocks(
    columns: torch.Tensor, passes: list[Feedback], global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, B, R) fp32 columns in their order, Feedback of these blocks -> (G, B, R) codes, (G, B/16, R) e4m3 scales."""
    errors, levels = torch.zeros_like(columns), torch.empty_like(columns)
    scales = torch.empty_like(columns[:, ::BLOCK], dtype=torch.uint8).contiguous()
    for turn, told in enumerate(passes):
        for number, group in _slices(columns.shape[1]):
            settled = slice(columns.shape[1] if turn else group.start)
            pushed = torch.bmm(told.carry[:, settled, group].transpose(1, 2), errors[:, settled])
            target = (columns[:, group] + pushed).transpose(0, 1).contiguous()
            rules = told.within[:, number].permute(1, 2, 0).unsqueeze(3).contiguous(), told.cost.t()[group].unsqueeze(2)
            scale = _best_scale(target, rules, global_scale)
            decode, level = scale.float() * global_scale, torch.empty_like(target)
            cost = _cost(target, rules, decode.unsqueeze(0), level)
            error, level = columns[:, group] - (level * decode).transpose(0, 1), level.transpose(0, 1)
            scale = scale.view(torch.uint8)
            if turn:
                better = cost < _cost((errors[:, group] + pushed).transpose(0, 1), rules)
                scale = torch.where(better[0], scale, scales[:, number])
                level = torch.where(better.transpose(0, 1), level, levels[:, group])
                error = torch.where(better.transpose(0, 1), error, errors[:, group])
            scales[:, number], levels[:, group], errors[:, group] = scale, level, error
    return round_to_e2m1(levels), scales.view(FP8)


def _best_scale(target: torch.Tensor, rules: tuple, global_scale: torch.Tensor) -> torch.Tensor:
    """(16, G, R) fp32 targets -> (G, R) e4m3, the scale that costs least."""
    most = (target.abs().amax(0) / LARGEST_LEVEL / global_scale).clamp(max=E4M3_MAX).nan_to_num(0.0)
    more = torch.arange(SCALES, dtype=torch.uint8, device=most.device).view(-1, 1, 1)
    candidates = (most.to(FP8).view(torch.uint8) + more).clamp(max=_LARGEST_BITS)
    choice = _cost(target, rules, candidates.view(FP8).float() * global_scale).argmin(0, keepdim=True)
    return candidates.gather(0, choice)[0].view(FP8)


def _cost(
    target: torch.Tensor, rules: tuple, scale: torch.Tensor | None = None, levels: torch.Tensor | None = None
) -> torch.Tensor:
    """(16, G, R) fp32 targets, (within, cost), (S, G, R) decoded scales -> (S, G, R) fp32: what rounding costs.

    ``levels`` (16, G, R), for one scale: gets the values of the codes, -6 to 6. Without scales, the targets are
    residuals of what is there already. A level is the nearest value of E2M1, ties to the even code: with p the power
    of two below it, at least 1, steps are p / 2, and adding p * 1.5 * 2**22 leaves room for just such.
    """
    within, price = rules
    left = target.unsqueeze(1).repeat(1, 1 if scale is None else len(scale), 1, 1)
    total, level, power = (torch.zeros_like(left[0]) for _ in range(3))
    bits, exponent = power.view(torch.int32), torch.tensor(0x7F800000, dtype=torch.int32, device=left.device)
    inverse = None if scale is None else torch.where(scale > 0, 1.0 / scale, 0.0)
    for place in range(BLOCK):
        residual = left[place]
        if inverse is not None:
            torch.mul(residual, inverse, out=level).clamp_(-E2M1_MAX, E2M1_MAX)
            torch.bitwise_and(level.view(torch.int32), exponent, out=bits).clamp_(min=0x3F800000)
            power.mul_(1.5 * 2**22)
            level.add_(power).sub_(power)
            residual.addcmul_(level, scale, value=-1)
            if levels is not None:
                levels[place] = level[0]
        total.addcmul_(torch.mul(residual, price[place], out=power), residual)
        if place + 1 < BLOCK:
            left[place + 1 :].addcmul_(within[place, place + 1 :].unsqueeze(1), residual)
    return total
