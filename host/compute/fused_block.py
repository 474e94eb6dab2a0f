# SPDX-License-Identifier: Apache-2.0
"""LTX's joint audio and video block in fewer passes over its two streams.

``block_class`` derives from the host's class. Between two products the stream is read once: the product's gated result
is added, the sum normed, modulated and, where all layers that take it multiply FP8, handed on as FP8 rows. What the
block does, and in which order, is the host's; a call that is not as known is the host's too, and all are while
somebody's function has the place of one that is computed here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...kernels import fused
from ...kernels.format import FP8Rows
from ...kernels.fused import Ada, Add, Want
from .fused_attention import is_apart

_ARGUMENTS = frozenset((
    "v_context", "a_context", "attention_mask", "v_timestep", "a_timestep", "v_pe", "a_pe", "v_cross_pe", "a_cross_pe",
    "v_cross_scale_shift_timestep", "a_cross_scale_shift_timestep", "v_cross_gate_timestep", "a_cross_gate_timestep",
    "transformer_options", "self_attention_mask", "v_prompt_timestep", "a_prompt_timestep",
))  # fmt: skip

_METHODS = ("get_ada_values", "_apply_text_cross_attention", "get_av_ca_ada_values")


@functools.cache
def block_class(found: type, host: ModuleType) -> type:
    """The host's block and its module -> a class derived from it."""

    known = _replaceable(found, host)

    class FusedBlock(found):
        host_class, host_forward = found, found.forward

        def forward(self, x, *args, **given):
            apart = args or is_apart(self, given.get("transformer_options")) or _replaceable(found, host) != known
            call = None if apart else _read(self, host, x, given)
            return super().forward(x, *args, **given) if call is None else _run(self, call)

    return FusedBlock


def _replaceable(found: type, host: ModuleType) -> tuple:
    """The host's functions that ``_run`` stands for, as they are now."""
    places = *((found, name) for name in _METHODS), (host, "apply_cross_attention_adaln")
    norms = sys.modules.get("comfy.ldm.common_dit")
    return tuple(getattr(place, name, None) for place, name in (*places, (norms, "rms_norm")))


class _Side(NamedTuple):
    """What one stream meets in a block: its modulations, those of its text and its text, those of the other stream."""

    own: Ada
    prompt: Ada | None
    context: torch.Tensor
    cross: Ada | None
    cross_gate: Ada | None


class _Call(NamedTuple):
    """A call of a block; ``audio`` is None without sound, ``flags``: audio runs, audio to video, video to audio."""

    streams: tuple[torch.Tensor, torch.Tensor]
    video: _Side
    audio: _Side | None
    flags: tuple[bool, bool, bool]
    given: Mapping[str, Any]


def _read(block: Any, host: ModuleType, x: tuple, given: dict) -> _Call | None:
    """The block's arguments, or None if they are not as known."""
    if given.keys() != _ARGUMENTS or any(name in block.__dict__ for name in _METHODS):
        return None
    options, (vx, ax) = given["transformer_options"], x
    sound = ax.numel() > 0
    run_ax, run_a2v = options.get("run_ax", True) and sound, options.get("a2v_cross_attn", True) and sound
    run_v2a = run_ax and options.get("v2a_cross_attn", True)
    if not options.get("run_vx", True) or not fused.fits(vx) or sound and not fused.fits(ax):
        return None
    read = functools.partial(_side, block, host, given)
    video = read(vx, "v", "", "a2v_ca_video", run_a2v or run_v2a)
    audio = read(ax, "a", "audio_", "a2v_ca_audio", run_a2v or run_v2a) if sound else None
    if video is None or sound and audio is None:
        return None
    return _Call((vx, ax), video, audio, (bool(run_ax), bool(run_a2v), bool(run_v2a)), given)


def _side(block, host, given, x, letter: str, prefix: str, cross_table: str, meets: bool) -> _Side | None:
    """One stream's modulations and text, or None if one of them is not as known."""
    ada = functools.partial(_ada, host)
    own, prompt = ada(getattr(block, f"{prefix}scale_shift_table"), given[f"{letter}_timestep"], x), None
    cross = gate = None
    context = given[f"{letter}_context"]
    if own is None or not isinstance(context, torch.Tensor) or context.dtype != x.dtype or context.ndim != 3:
        return None
    if block.cross_attention_adaln:
        table = getattr(block, f"{prefix}prompt_scale_shift_table")
        context = context.contiguous()
        prompt = ada(table, given[f"{letter}_prompt_timestep"], context)
        if prompt is None or not fused.fits(context):
            return None
    if meets:
        table = getattr(block, f"scale_shift_table_{cross_table}")
        cross = ada(table[:4], given[f"{letter}_cross_scale_shift_timestep"], x)
        gate = ada(table[4:], given[f"{letter}_cross_gate_timestep"], x)
        if cross is None or gate is None:
            return None
    return _Side(own, prompt, context, cross, gate)


def _ada(host: ModuleType, table: torch.Tensor, timestep: Any, x: torch.Tensor) -> Ada | None:
    """A table (n, C) and the embedding of a timestep (B, one, frames or T, n * C), for x (B, T, C)."""
    data = timestep.data if type(timestep) is host.CompressedTimestep else timestep
    if not isinstance(data, torch.Tensor) or data.ndim != 3 or data.dtype != x.dtype or data.device != x.device:
        return None
    (batch, tokens, cols), (count, width), frames = x.shape, table.shape, data.shape[1]
    per_frame = timestep.patches_per_frame if data is not timestep else 1
    if data.shape[0] != batch or data.shape[2] != count * cols or width != cols or frames == 0:
        return None
    if frames * per_frame != tokens and frames != 1:
        return None
    table = table.to(device=x.device, dtype=x.dtype)
    return Ada(table, data.reshape(batch * frames, count * cols), tokens // frames)


class _Stream:
    """One of the two residual streams, and what is still to be added to it."""

    def __init__(self, x: torch.Tensor):
        self.x, self.waiting, self.rows = x, None, x.numel() // x.shape[-1]

    def add(self, y: torch.Tensor, gate: Ada | None, at: int = 0) -> None:
        """``y``, gated, with the next pass."""
        if y.dtype == self.x.dtype and y.shape == self.x.shape:
            self.waiting = Add(y, gate, at)
        else:
            self.x.add_(y if gate is None else y * gate.of(at).view(self.x.shape))

    def make(self, *wants: Want) -> list[torch.Tensor | FP8Rows]:
        """Add what is waiting; what is ``wants``-ed of the norm."""
        add, self.waiting = self.waiting, None
        return fused.norm_rows(self.x, add, wants, norm=bool(wants)) if wants or add is not None else []


def _accepts(attn: Any, rows: int, others: int, device: torch.device) -> tuple[bool, bool, bool]:
    return attn.accepts(rows, others, device) if hasattr(attn, "accepts") else (False, False, False)


def _run(block: Any, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The host's ``forward``: self attention, text, the streams' attention to each other, feed-forward."""
    given, options = call.given, call.given["transformer_options"]
    run_ax, run_a2v, run_v2a = call.flags
    v, a = _Stream(call.streams[0]), _Stream(call.streams[1]) if call.audio else None
    video, audio = call.video, call.audio

    _attend(v, block.attn1, video, block.attn2, given["attention_mask"], options,
            {"pe": given["v_pe"], "mask": given["self_attention_mask"]})  # fmt: skip
    if run_ax:
        _attend(a, block.audio_attn1, audio, block.audio_attn2, given["attention_mask"], options,
                {"pe": given["a_pe"]})  # fmt: skip

    to_video, to_audio, hidden = block.audio_to_video_attn, block.video_to_audio_attn, None
    device, wants = v.x.device, []
    if run_a2v:
        *rows, others = _accepts(to_video, v.rows, a.rows, device)
        wants.append(Want(audio.cross, 0, 1, others))
    if run_v2a:
        *sound_rows, picture_rows = _accepts(to_audio, a.rows, v.rows, device)
        wants.append(Want(audio.cross, 2, 3, *sound_rows))
    sound = a.make(*wants) if wants else []
    if run_a2v:
        (picture,) = v.make(Want(video.cross, 0, 1, *rows))
        out = to_video(picture, context=sound[0], pe=given["v_cross_pe"], k_pe=given["a_cross_pe"],
                       transformer_options=options)  # fmt: skip
        v.add(out, video.cross_gate)
        del picture, out
    if run_v2a:
        picture, hidden = v.make(Want(video.cross, 2, 3, picture_rows), _before(block.ff, v, video))
        out = to_audio(sound[-1], context=picture, pe=given["a_cross_pe"], k_pe=given["v_cross_pe"],
                       transformer_options=options)  # fmt: skip
        a.add(out, audio.cross_gate)
        del picture, out
    sound.clear()

    hidden = hidden if hidden is not None else v.make(_before(block.ff, v, video))[0]
    v.add(block.ff(hidden), video.own, 5)
    v.make()
    if run_ax:
        (hidden,) = a.make(_before(block.audio_ff, a, audio))
        a.add(block.audio_ff(hidden), audio.own, 5)
        a.make()
    return call.streams


def _attend(
    stream: _Stream, attn: Any, side: _Side, text_attn: Any, text_mask: Any, options: dict, named: dict
) -> None:
    """Self attention, then attention to the text, which is modulated too in newer models."""
    device = stream.x.device
    takes_x, keep, takes_too = _accepts(attn, stream.rows, stream.rows, device)
    (normed,) = stream.make(Want(side.own, 1, 0, takes_x and takes_too, keep))
    out = attn(normed, transformer_options=options, **named)
    stream.add(out, side.own, 2)
    del normed, out
    context, gate = side.context, None
    takes_x, keep, takes_text = _accepts(text_attn, stream.rows, context.shape[0] * context.shape[1], device)
    if side.prompt is None:
        (normed,) = stream.make(Want(quantize=takes_x, keep=keep))
    else:
        (normed,), gate = stream.make(Want(side.own, 7, 6, takes_x, keep)), side.own
        (context,) = fused.norm_rows(context, None, [Want(side.prompt, 1, 0, takes_text)], norm=False)
    out = text_attn(normed, context=context, mask=text_mask, transformer_options=options)
    stream.add(out, gate, 8)


def _before(feed_forward: Any, stream: _Stream, side: _Side) -> Want:
    """What a feed-forward takes."""
    rows = hasattr(feed_forward, "accepts") and feed_forward.accepts(stream.rows, stream.x.device)
    return Want(side.own, 4, 3, rows)
