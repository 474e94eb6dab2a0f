# SPDX-License-Identifier: Apache-2.0
"""The last convolution's channels to pixels, with its bias, the cut to 0..1 and the conversion, in one pass."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from .launch import bf16_as_bits
from .tiles import to_output

_TILE = 1024


@triton.jit(do_not_specialize=["frames", "height", "width", "numbers"])
def _to_pixels_kernel(
    x_ptr,
    out_ptr,
    bias_ptr,
    frames,
    height,
    width,
    numbers,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    TILE: tl.constexpr,
    BIAS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """Each program makes TILE numbers of the output in a row; that a source is read by several is the cache's work."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < numbers
    x, line = at % (width * PATCH), at // (width * PATCH)
    y, image = line % (height * PATCH), line // (height * PATCH)
    frame, channel = image % frames, image // frames
    source = (channel * PATCH + x % PATCH) * PATCH + y % PATCH
    place = (frame * height + y // PATCH) * width + x // PATCH
    value = tl.load(x_ptr + place * (CHANNELS * PATCH * PATCH) + source, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if FINISH:
        value = (value + 1.0) * 0.5
        value = tl.where(value != value, value, tl.minimum(tl.maximum(value, 0.0), 1.0))
    tl.store(out_ptr + at, to_output(value, out_ptr.dtype.element_ty), mask=inside)


def to_pixels(
    x: torch.Tensor,
    patch: int,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    finish: bool = False,
) -> torch.Tensor:
    """As in kernels/video_reference.py. Raises ValueError for channels that are no such product."""
    frames, height, width, total = x.shape
    if total % patch**2 or not x.is_contiguous():
        raise ValueError(f"found {tuple(x.shape)} and patches of {patch}; expected a multiple of {patch**2} channels")
    channels = total // patch**2
    out = torch.empty((channels, frames, height * patch, width * patch), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    target = out.view(torch.int16) if bf16_as_bits(dtype, x.device) else out
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        _to_pixels_kernel[(triton.cdiv(out.numel(), _TILE),)](
            x, target, x if bias is None else bias, frames, height, width, out.numel(),
            channels, patch, _TILE, bias is not None, finish, num_warps=4,
        )  # fmt: skip
    return out
