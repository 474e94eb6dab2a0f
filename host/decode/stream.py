# SPDX-License-Identifier: Apache-2.0
"""The layers of LTX's video decoder over a clip that comes in chunks of frames: what each computes and remembers.

Activations are (T, H, W, C), contiguous: one clip in channels_last_3d. They stay sums that nobody has computed yet
(``Frames``) until a convolution needs them, so that bias, residual, norm, SiLU and the copy into the convolution's
padded input are one pass over memory. A convolution over time needs its neighbours' frames: each keeps the last ones of
its input for the next chunk, repeats the first frame of a clip before it and, where it is not causal, the last one
after it. Its output lags behind, and what is added to it waits meanwhile. All of that is in a ``Clip``, one a decode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from .. import residency


@dataclass
class Frames:
    """``raw`` + ``bias`` + the ``residual`` parts, one after the other along the frames; a layer uses them up."""

    raw: torch.Tensor
    bias: torch.Tensor | None = None
    residual: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.raw.shape[0]

    @property
    def pending(self) -> bool:
        """Whether there is anything to add yet."""
        return self.bias is not None or bool(self.residual)

    def spend(self) -> None:
        """Let go of the memory."""
        self.raw, self.bias, self.residual = None, None, []

    def cut(self, first: int, end: int) -> Frames:
        """Frames ``first`` to ``end``, of the same memory."""
        return Frames(self.raw[first:end], self.bias, take(self.residual, first, end))


def take(parts: list[torch.Tensor], first: int, end: int) -> list[torch.Tensor]:
    """Frames ``first`` to ``end`` of tensors that follow one another, as views; no empty ones."""
    found, start = [], 0
    for part in parts:
        low, high = max(first - start, 0), min(end - start, len(part))
        if low < high:
            found.append(part[low:high])
        start += len(part)
    return found


@dataclass
class Clip:
    """One decode of one clip: how it is computed, what waits for the next chunk, whether this chunk is the last."""

    kernels: Kernels
    causal: bool
    memory: dict[Any, Any] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class Kernels:
    """The modules with the functions of kernels/video_reference.py, in Triton or plain torch."""

    norm_silu: ModuleType
    depth_to_space: ModuleType
    to_pixels: ModuleType

    def write(self, frames: Frames, out: torch.Tensor, hold: bool, **norm: Any) -> None:
        """The sum, or its norm and SiLU, into ``out``; ``hold``: the frames are their sum afterwards, else used up."""
        start, keep = 0, hold and frames.pending
        for part in frames.residual or [None]:
            end = start + (len(frames) if part is None else len(part))
            self.norm_silu.norm_silu(
                frames.raw[start:end], out[start:end], frames.bias, part, keep=keep, **norm
            )
            start = end
        if hold:
            frames.bias, frames.residual = None, []
        else:
            frames.spend()


@contextlib.contextmanager
def _brought(conv: torch.nn.Module, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of a convolution of the host on the device and in the dtype of x; brought its way if need be."""
    weight, bias = conv.weight, conv.bias
    lies = all(part is None or (part.device == x.device and part.dtype == x.dtype) for part in (weight, bias))
    if lies and not residency.patched(conv):
        yield weight, bias
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(conv, x, offloadable=True)
    try:  # the bias is added later, when the host may have used its place for something else
        yield weight, None if bias is None else bias.clone()
    finally:
        comfy.ops.uncast_bias_weight(conv, weight, bias, stream)


def convolve(clip: Clip, layer: torch.nn.Module, frames: Frames, hold: bool = False, **norm: Any) -> Frames | None:
    """A CausalConv3d of the host over ``Kernels.write`` of the frames; None while it waits for more of them."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    tail, before = clip.memory.get(layer), layer.time_kernel_size - 1
    lead = before // (1 if clip.causal else 2) if tail is None else len(tail)
    after = before // 2 if clip.last and not clip.causal else 0
    length = lead + len(frames) + after
    x = torch.empty((length, *frames.raw.shape[1:]), dtype=frames.raw.dtype, device=frames.raw.device)
    end = lead + len(frames)
    clip.kernels.write(frames, x[lead:end], hold, **norm)
    x[:lead] = x[lead : lead + 1] if tail is None else tail
    if after:
        x[end:] = x[end - 1 : end]
    clip.memory[layer] = None if clip.last else x[-before:].clone()
    if length <= before:
        return None
    x = x.permute(3, 0, 1, 2).unsqueeze(0)
    with _brought(layer.conv, x) as (weight, bias):
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        made = layer.conv._conv_forward(x, weight, None)
    return Frames(made.squeeze(0).permute(1, 2, 3, 0).contiguous(), bias)


def _added(clip: Clip, layer: torch.nn.Module, made: Frames | None, skipped: torch.Tensor) -> Frames | None:
    """What a layer made, plus what goes past it, which is ahead of it: the rest waits for the next chunk."""
    waiting = [*clip.memory.get(layer, ()), skipped]
    count = 0 if made is None else len(made)
    total = sum(map(len, waiting))
    clip.memory[layer] = [part.clone() for part in take(waiting, count, total)]
    if made is not None:
        made.residual = take(waiting, 0, count)
    return made


def residual_block(clip: Clip, block: torch.nn.Module, x: Frames, modulation: Any = None) -> Frames | None:
    """A ResnetBlock3D of the host without a shortcut: conv(silu(norm(conv(silu(norm(x)))))) + x.

    ``modulation``: ((shift, scale) of the first norm, those of the second) or None.
    """
    first, second = (None, None) if modulation is None else modulation
    made = convolve(clip, block.conv1, x, hold=True, eps=block.norm1.eps, modulation=first)
    if made is not None:
        made = convolve(clip, block.conv2, made, eps=block.norm2.eps, modulation=second)
    made = _added(clip, block, made, x.raw)
    x.spend()
    return made


def upsample(clip: Clip, block: torch.nn.Module, x: Frames) -> Frames | None:
    """A DepthToSpaceUpsample of the host: a convolution whose channels become frames, rows and columns."""
    made = convolve(clip, block.conv, x, hold=block.residual)
    doubled = block.stride[0] == 2
    spread = clip.kernels.depth_to_space.depth_to_space
    if made is not None:
        made = Frames(spread(made.raw, block.stride, made.bias))
        made = _without_first(clip, (block, "made"), made.raw) if doubled else made
    if not block.residual:
        return made
    skipped = spread(x.raw, block.stride).repeat(1, 1, 1, _repeats(block))
    x.spend()
    if doubled:
        skipped = _without_first(clip, (block, "skipped"), skipped).raw
    return _added(clip, block, made, skipped)


def _repeats(block: torch.nn.Module) -> int:
    p1, p2, p3 = block.stride
    return p1 * p2 * p3 // block.out_channels_reduction_factor


def _without_first(clip: Clip, key: Any, raw: torch.Tensor) -> Frames:
    """All but the clip's first frame, which a doubling of time makes twice."""
    drop = 0 if key in clip.memory else 1
    clip.memory[key] = True
    return Frames(raw[drop:])
