# SPDX-License-Identifier: Apache-2.0
"""A small block with the names and the arithmetic of LTX's joint audio and video block, in as few lines as it takes.

The modules that ``install`` puts in the place of the host's make the fusions find it. tests/real has the host's own.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from nvfp4_video.host.compute import fusions, linear, matmul
from nvfp4_video.host.compute.modes import Compute
from nvfp4_video.kernels import fp8, reference
from nvfp4_video.tests.support.lora_helpers import CPU, NVFP4

VIDEO, AUDIO, FRAMES, PATCHES, SOUNDS, WORDS, HEADS = 64, 32, 3, 4, 5, 7, 2
SIDES = {"": VIDEO, "audio_": AUDIO}


class GuideAttentionMask:
    """Never given here."""


class CompressedTimestep:
    """One embedding a frame."""

    def __init__(self, data: torch.Tensor):
        self.data, self.patches_per_frame, self.num_frames = data, PATCHES, data.shape[1]


class GELU_approx(torch.nn.Module):
    def __init__(self, operations: Any, cols: int):
        super().__init__()
        self.proj = operations.Linear(cols, 2 * cols)

    def forward(self, x):
        return torch.nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(torch.nn.Module):
    def __init__(self, operations: Any, cols: int):
        super().__init__()
        parts = GELU_approx(operations, cols), torch.nn.Dropout(0.0), operations.Linear(2 * cols, cols)
        self.net = torch.nn.Sequential(*parts)

    def forward(self, x):
        return self.net(x)


def apply_rotary_emb(x: torch.Tensor, pe: tuple) -> torch.Tensor:
    halves = x.unflatten(-1, (HEADS, 2, -1)).transpose(-1, -2).unsqueeze(-1)
    return (pe[0] @ halves).squeeze(-1).transpose(-1, -2).flatten(2)


def apply_rotary_emb_qk(q: torch.Tensor, k: torch.Tensor, pe: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    return apply_rotary_emb(q, pe), apply_rotary_emb(k, pe)


class CrossAttention(torch.nn.Module):
    def __init__(self, operations: Any, cols: int, other: int, inner: int):
        super().__init__()
        self.heads, self.dim_head, self.attn_precision = HEADS, inner // HEADS, None
        self.q_norm, self.k_norm = torch.nn.RMSNorm(inner, eps=1e-5), torch.nn.RMSNorm(inner, eps=1e-5)
        self.to_q, self.to_gate_logits = operations.Linear(cols, inner), operations.Linear(cols, HEADS)
        self.to_k, self.to_v = operations.Linear(other, inner), operations.Linear(other, inner)
        self.to_out = torch.nn.Sequential(operations.Linear(inner, cols), torch.nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):  # noqa: B006
        other = x if context is None else context
        q, k, v = self.q_norm(self.to_q(x)), self.k_norm(self.to_k(other)), self.to_v(other)
        if pe is not None:
            q, k = apply_rotary_emb(q, pe), apply_rotary_emb(k, pe if k_pe is None else k_pe)
        out = host_attention.optimized_attention(q, k, v, self.heads, mask=mask)
        gates = 2 * torch.sigmoid(self.to_gate_logits(x))
        return self.to_out((out.unflatten(-1, (HEADS, -1)) * gates.unsqueeze(-1)).flatten(2))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


def _values(table: torch.Tensor, timestep: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    data = timestep.data if isinstance(timestep, CompressedTimestep) else timestep
    each = table + data.unflatten(-1, (len(table), -1))
    return each.repeat_interleave(x.shape[1] // data.shape[1], 1).unbind(2)


class BasicAVTransformerBlock(torch.nn.Module):
    def __init__(self, operations: Any, modulated_text: bool = True):
        super().__init__()
        self.cross_attention_adaln, count = modulated_text, 9 if modulated_text else 6
        for prefix, cols in SIDES.items():
            setattr(self, f"{prefix}attn1", CrossAttention(operations, cols, cols, cols))
            setattr(self, f"{prefix}attn2", CrossAttention(operations, cols, cols, cols))
            setattr(self, f"{prefix}ff", FeedForward(operations, cols))
            tables = {f"{prefix}scale_shift_table": count, f"{prefix}prompt_scale_shift_table": 2}
            tables[f"scale_shift_table_a2v_ca_{'audio' if prefix else 'video'}"] = 5
            for name, rows in tables.items():
                setattr(self, name, torch.nn.Parameter(torch.empty(rows, cols, dtype=torch.bfloat16)))
        self.audio_to_video_attn = CrossAttention(operations, VIDEO, AUDIO, AUDIO)
        self.video_to_audio_attn = CrossAttention(operations, AUDIO, VIDEO, AUDIO)

    def get_ada_values(self, table, batch, timestep, indices=...):
        raise AssertionError("the small block does without")

    def _text(self, x, side, context, timestep, prompt, mask, options):
        attn, own = getattr(self, f"{side}attn2"), _values(getattr(self, f"{side}scale_shift_table"), timestep, x)
        if not self.cross_attention_adaln:
            return attn(_norm(x), context=context, mask=mask, transformer_options=options)
        shift, scale = _values(getattr(self, f"{side}prompt_scale_shift_table"), prompt, context)
        normed, context = _norm(x) * (1 + own[7]) + own[6], context * (1 + scale) + shift
        return attn(normed, context=context, mask=mask, transformer_options=options) * own[8]

    def forward(
        self, x, v_context=None, a_context=None, attention_mask=None, v_timestep=None, a_timestep=None, v_pe=None,
        a_pe=None, v_cross_pe=None, a_cross_pe=None, v_cross_scale_shift_timestep=None,
        a_cross_scale_shift_timestep=None, v_cross_gate_timestep=None, a_cross_gate_timestep=None,
        transformer_options=None, self_attention_mask=None, v_prompt_timestep=None, a_prompt_timestep=None,
        somebody_s=None,
    ):  # fmt: skip
        options = transformer_options
        run_ax = options.get("run_ax", True) and x[1].numel() > 0
        vx, ax = x
        for side, run, context, time, prompt, pe in (
            ("", True, v_context, v_timestep, v_prompt_timestep, v_pe),
            ("audio_", run_ax, a_context, a_timestep, a_prompt_timestep, a_pe),
        ):
            if run:
                stream = vx if side == "" else ax
                own = _values(getattr(self, f"{side}scale_shift_table"), time, stream)
                out = getattr(self, f"{side}attn1")(
                    _norm(stream) * (1 + own[1]) + own[0], pe=pe, transformer_options=options,
                    **{} if side else {"mask": self_attention_mask},
                )  # fmt: skip
                stream += out * own[2]
                stream += self._text(stream, side, context, time, prompt, attention_mask, options)
        if ax.numel():
            audio = _values(self.scale_shift_table_a2v_ca_audio[:4], a_cross_scale_shift_timestep, ax)
            video = _values(self.scale_shift_table_a2v_ca_video[:4], v_cross_scale_shift_timestep, vx)
            quiet = _norm(ax)
        if ax.numel() and options.get("a2v_cross_attn", True):
            gate = _values(self.scale_shift_table_a2v_ca_video[4:], v_cross_gate_timestep, vx)[0]
            vx += gate * self.audio_to_video_attn(
                _norm(vx) * (1 + video[0]) + video[1], context=quiet * (1 + audio[0]) + audio[1], pe=v_cross_pe,
                k_pe=a_cross_pe, transformer_options=options,
            )  # fmt: skip
        if run_ax and options.get("v2a_cross_attn", True):
            gate = _values(self.scale_shift_table_a2v_ca_audio[4:], a_cross_gate_timestep, ax)[0]
            ax += gate * self.video_to_audio_attn(
                quiet * (1 + audio[2]) + audio[3], context=_norm(vx) * (1 + video[2]) + video[3], pe=a_cross_pe,
                k_pe=v_cross_pe, transformer_options=options,
            )  # fmt: skip
        for side, run, stream, time in (("", True, vx, v_timestep), ("audio_", run_ax, ax, a_timestep)):
            if run:
                own = _values(getattr(self, f"{side}scale_shift_table"), time, stream)
                stream += getattr(self, f"{side}ff")(_norm(stream) * (1 + own[4]) + own[3]) * own[5]
        return vx, ax


def install(monkeypatch) -> None:
    """The host's modules have these classes; their source is taken for known, FP8 runs on the CPU, for any rows."""
    model, av = (types.ModuleType(f"comfy.ldm.lightricks.{name}") for name in ("model", "av_model"))
    for part in (GuideAttentionMask, GELU_approx, FeedForward, CrossAttention, apply_rotary_emb, apply_rotary_emb_qk):
        setattr(model, part.__name__, part)
    av.BasicAVTransformerBlock, av.CompressedTimestep = BasicAVTransformerBlock, CompressedTimestep
    for module in (model, av):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")
    monkeypatch.setattr(fusions, "_stands_down", lambda *modules: "")
    monkeypatch.setattr(matmul, "least_rows", lambda *_: 1)


def build(mode: str = "fp8", **options: Any) -> tuple[torch.nn.Module, torch.nn.Module, str]:
    """The same block twice, as fused and as the host built it, and what the report says of it."""
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=Compute(mode))
    pair = [BasicAVTransformerBlock(operations, **options) for _ in range(2)]
    state = {}
    for name, module in pair[0].named_modules():
        if isinstance(module, operations.Linear):
            record = reference.quantize(torch.randn(module.out_features, module.in_features) / module.in_features**0.5)
            bias = torch.randn(module.out_features).bfloat16() / 4
            state |= {f"{name}.weight": matmul.wrap(record), f"{name}.comfy_quant": NVFP4, f"{name}.bias": bias}
        elif isinstance(module, torch.nn.RMSNorm):
            state[f"{name}.weight"] = torch.randn(module.weight.shape)
    state |= {name: torch.randn(table.shape) / 4 for name, table in pair[0]._parameters.items()}
    for block in pair:
        block.load_state_dict(dict(state))
        for module in block.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.bfloat16()
    return *pair, fusions.fuse(pair[0], operations.Linear)


def arguments(count: int = 9) -> dict[str, Any]:
    """Random arguments of a call, video and sound among them."""

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16() / 4

    def turned(tokens: int, cols: int) -> tuple[torch.Tensor, bool]:
        angle = torch.randn(1, tokens, HEADS, cols // HEADS // 2)
        matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1)
        return matrix.bfloat16().view(*angle.shape, 2, 2), True

    tokens = FRAMES * PATCHES
    found: dict[str, Any] = {"x": (4 * made(1, tokens, VIDEO), 4 * made(1, SOUNDS, AUDIO))}
    found |= {"attention_mask": None, "self_attention_mask": None, "transformer_options": {}}
    for letter, cols, length in (("v", VIDEO, tokens), ("a", AUDIO, SOUNDS)):
        found |= {f"{letter}_context": 4 * made(1, WORDS, cols), f"{letter}_prompt_timestep": made(1, 1, 2 * cols)}
        found |= {f"{letter}_pe": turned(length, cols), f"{letter}_cross_pe": turned(length, AUDIO)}
        found[f"{letter}_timestep"] = made(1, FRAMES if letter == "v" else 1, count * cols)
        found[f"{letter}_cross_scale_shift_timestep"] = made(1, 1, 4 * cols)
        found[f"{letter}_cross_gate_timestep"] = made(1, 1, cols)
    found["v_timestep"] = CompressedTimestep(found["v_timestep"])
    return found


def in_fp32(given: Any) -> Any:
    """The same arguments in FP32."""
    if isinstance(given, dict):
        return {name: in_fp32(value) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(map(in_fp32, given))
    if isinstance(given, CompressedTimestep):
        return CompressedTimestep(given.data.float())
    return given.float() if isinstance(given, torch.Tensor) else given


def run(block: torch.nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A call of the block with copies of the streams."""
    with torch.no_grad():
        return block(tuple(x.clone() for x in given["x"]), **{k: v for k, v in given.items() if k != "x"})
