# SPDX-License-Identifier: Apache-2.0
"""What a decoder's block does for one token, in few launches: each costs a token more than what it computes.

* ``gemv_group``  products with several weights that take the same input; GELU of one times the other
* ``add_norm``    a branch's norm added to the residual stream, and the norm of the sum
* ``place_token`` norm and rotation of q and k; k and v into their cache
* ``attend``      one query of each head to a cache

Plain torch here is the definition; kernels/triton computes each in one kernel. What is BF16 in the host's memory is
rounded here too; norms, rotations and sums are FP32 between, as the host's are. The weight of a norm is 1 + w, rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from . import dispatch, reference
from .backends import pick_backend, triton_module
from .format import PackedWeight

MOST_COLS, DTYPES = 8192, (torch.bfloat16,)  # of a token


def gemv_group(x: torch.Tensor, weights: Sequence[PackedWeight], gated: bool = False) -> torch.Tensor:
    """(..., K) times one to three weights (N, K), for few rows -> (..., sum N).

    ``gated``, for two weights of one shape: (..., N), GELU (its tanh form) of the first product times the second.
    """
    products = [reference.gemv(x, weight) for weight in weights]
    return reference.activate(products[0], "gelu_tanh") * products[1] if gated else torch.cat(products, -1)


def prepare_group(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device, backend: str, gated: bool = False
) -> Callable[..., torch.Tensor] | None:
    """-> function (x (M, K), parts of each weight in turn) -> as ``gemv_group``; None where no fused kernel runs."""
    if dispatch.prepare("gemv", shapes[0], dtype, device, backend) is None:
        return None
    return triton_module("gemv").prepare_group(shapes, dtype, device, gated)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    values = x.float()
    return (values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1.0).float()).to(x.dtype)


def add_norm(
    x: torch.Tensor, add: tuple[torch.Tensor, torch.Tensor] | None, weight: torch.Tensor | None, eps: float
) -> torch.Tensor | None:
    """(..., K) bf16, K up to ``MOST_COLS``; ``add``: (y of its shape, weight of its norm (K)), into x, in place.

    -> the norm of the sum with ``weight`` (K), None without one.
    """
    if pick_backend(x.device)[0] == "triton":
        return triton_module("one_token").add_norm(x, add, weight, eps)
    if add is not None:
        x.add_(_norm(*add, eps))
    return None if weight is None else _norm(x, weight, eps)


def place_token(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    rotation: torch.Tensor,
    position: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """q, k and v of one token in a line ((H + 2 G) * D), bf16 -> q (H, D), normed over D and rotated.

    k, likewise, and v become slot ``position`` (1,) int64 of ``cache``: two of (slots, G, D). ``weights`` (D) are those
    of q and k, ``rotation`` (D / 2, 2, 2) fp32: of element i of the first half with i of the second.
    """
    if pick_backend(qkv.device)[0] == "triton":
        return triton_module("one_token").place_token(qkv, weights, rotation, position, cache, eps)
    groups, width = cache[0].shape[1:]
    heads = qkv.view(-1, width).split((qkv.numel() // width - 2 * groups, groups, groups))
    cosine, sine, turned = rotation[:, 0, 0], rotation[:, 1, 0], []
    for head, weight in zip(heads, weights, strict=False):
        first, second = _norm(head, weight, eps).float().chunk(2, -1)
        turned.append(torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(qkv.dtype))
    for kept, new in zip(cache, (turned[1], heads[2]), strict=True):
        kept.index_copy_(0, position, new[None])
    return turned[0]


def prepare_attend(
    heads: int, cache: tuple[int, int, int], scale: float, window: int | None, device: torch.device
) -> Callable[..., torch.Tensor]:
    """Heads of the query, (slots, G, D) of the cache -> function (query, key, value, position) -> as ``attend``.

    It keeps a tensor on the device. Where launches overlap, the function may read ``position`` and all slots but that
    one before the kernel ahead of it has ended: that kernel must have written none of them.
    """
    if pick_backend(device)[0] == "triton":
        return triton_module("attend").prepare(heads, cache, scale, window, device)
    return functools.partial(attend, scale=scale, window=window)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """(H, D) bf16 to keys and values (slots, G, D), H / G neighbouring heads sharing one -> (H, D), rounded once.

    Slots up to ``position`` (1,) int64 count, of them the last ``window`` where that is given; the others are not read.
    """
    end = int(position) + 1
    seen = slice(max(0, end - window) if window else 0, end)
    grouped = query.view(key.shape[1], -1, query.shape[1]).float()
    weights = (grouped @ key[seen].permute(1, 2, 0).float() * scale).softmax(-1)
    return (weights @ value[seen].transpose(0, 1).float()).to(query.dtype).view(query.shape)
