# SPDX-License-Identifier: Apache-2.0
"""What lies between the convolutions of a video VAE, in plain torch, FP32 arithmetic: the definition of right.

Activations are (T, H, W, C) and contiguous: one clip in channels_last_3d. So frames can be appended, and a position's
channels lie side by side.
"""

from __future__ import annotations

import torch


def norm_silu(
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float | None = None,
    keep: bool = False,
) -> None:
    """(T, H, W, C) x + bias (C,) + residual of x's shape -> ``out`` of x's shape and dtype.

    ``eps``: the sum is divided by the root of its mean square over the channels + eps, multiplied by 1 + scale and
    added to shift, where ``modulation`` = (shift, scale) of (C,) each is given, and goes through SiLU; None: the sum
    itself. ``keep``: x becomes the sum. Everything is rounded once, on its way out.
    """
    total = x.float()
    for part in (bias, residual):
        total = total if part is None else total + part.float()
    if keep:
        x.copy_(total)
    if eps is not None:
        total = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
        if modulation is not None:
            shift, scale = modulation
            total = total * (1 + scale.float()) + shift.float()
        total = torch.nn.functional.silu(total)
    out.copy_(total)


def depth_to_space(
    x: torch.Tensor, stride: tuple[int, int, int], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, H, W, C p1 p2 p3) + bias of as many -> (T p1, H p2, W p3, C), channels in the order (C, p1, p2, p3)."""
    total = x if bias is None else (x.float() + bias.float()).to(x.dtype)
    (frames, height, width), (p1, p2, p3) = x.shape[:3], stride
    parts = total.reshape(frames, height, width, -1, p1, p2, p3).permute(0, 4, 1, 5, 2, 6, 3)
    return parts.reshape(frames * p1, height * p2, width * p3, -1).contiguous()


def to_pixels(
    x: torch.Tensor,
    patch: int,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    finish: bool = False,
) -> torch.Tensor:
    """(T, H, W, C patch patch) + bias of as many -> (C, T, H patch, W patch) ``dtype``; channels in order (C, x, y).

    ``finish``: from -1..1 to 0..1, what lies outside cut off.
    """
    total = x.float() if bias is None else x.float() + bias.float()
    if finish:
        total = ((total + 1.0) / 2.0).clamp(0.0, 1.0)
    frames, height, width = x.shape[:3]
    parts = total.reshape(frames, height, width, -1, patch, patch).permute(3, 0, 1, 5, 2, 4)
    return parts.reshape(-1, frames, height * patch, width * patch).to(dtype)
