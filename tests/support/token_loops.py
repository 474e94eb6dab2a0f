# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins for ComfyUI's decoder of Gemma 3 and its token loop: before the Comfy Compiler, with it, and changed.

They keep what host/compute/token_graphs.py relies on: names, shapes, and that a rotation is three tensors, of which
Gemma 3 has a list of two. ``install`` puts them where the pack looks; tests/real runs the same against real checkouts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

FORMS = ("lists", "matrix", "changed")  # before the compiler, with it, and a host that nobody has seen yet


@dataclass
class FixedKV:
    key: torch.Tensor
    value: torch.Tensor
    index: int
    position: torch.Tensor
    seqlen: torch.Tensor

    def prepare(self, num_tokens: int) -> None:
        self.position.copy_(self.seqlen)

    def advance(self, num_tokens: int) -> None:
        self.index += num_tokens


@dataclass
class ChangedKV(FixedKV):
    page: torch.Tensor = field(kw_only=True)


@dataclass
class Config:
    vocab_size: int = 64
    hidden_size: int = 32
    intermediate_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim = 16
    sliding_attention = (3, 3, False)
    transformer_type = "gemma3"
    mlp_activation, rms_norm_add, q_norm, k_norm = "gelu_pytorch_tanh", True, "gemma3", "gemma3"


def rope_matrix(rotation: Any) -> torch.Tensor:
    if torch.is_tensor(rotation):
        return rotation
    cos, sin, negative = rotation
    first, second = cos.chunk(2, -1)
    return torch.stack((first, negative, sin, second), -1).unflatten(-1, (2, 2))


def apply_rope(query: torch.Tensor, key: torch.Tensor, freqs_cis: Any) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = rope_matrix(freqs_cis)
    halves = (torch.stack(x.chunk(2, -1), -1) for x in (query, key))
    return tuple((matrix @ x.unsqueeze(-1)).squeeze(-1).transpose(-1, -2).flatten(-2) for x in halves)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class RMSNorm(torch.nn.Module):
    def __init__(self, width: int, eps: float = 1e-6, add: bool = True):
        super().__init__()
        self.eps, self.add = eps, add
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight + 1.0, self.eps)


class Attention(torch.nn.Module):
    def __init__(self, config: Any, ops: Any):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, hidden = config.head_dim, config.hidden_size
        self.inner_size = self.num_heads * self.head_dim
        self.q_proj = ops.Linear(hidden, self.inner_size, bias=False)
        self.k_proj = ops.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = ops.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = ops.Linear(self.inner_size, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, hidden_states, freqs_cis=None, past_key_value=None, sliding_window=None, attention_mask=None):
        batch, count, _ = hidden_states.shape
        query, key, value = (
            proj(hidden_states).view(batch, count, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rope(self.q_norm(query), self.k_norm(key), freqs_cis)
        if isinstance(past_key_value, FixedKV):
            assert past_key_value.index == 0, "one token at a time takes heads of 128 numbers and knows no window"
            past_key_value.key[:, :count], past_key_value.value[:, :count] = key.transpose(1, 2), value.transpose(1, 2)
            kept = past_key_value
        else:
            past = past_key_value or (key[:, :, :0], value[:, :, :0])
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
            kept = (key, value)
            if sliding_window and count == 1:
                key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), kept


class MLP(torch.nn.Module):
    def __init__(self, config: Any, ops: Any):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = ops.Linear(hidden, inner, bias=False), ops.Linear(hidden, inner, bias=False)
        self.down_proj = ops.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TransformerBlockGemma2(torch.nn.Module):
    def __init__(self, config: Any, index: int, ops: Any):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, ops), MLP(config, ops)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(config.hidden_size) for _ in range(2))
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (
            RMSNorm(config.hidden_size) for _ in range(2)
        )
        self.sliding_attention = config.sliding_attention[index % len(config.sliding_attention)]

    def forward(self, x, attention_mask=None, freqs_cis=None, optimized_attention=None, past_key_value=None):
        window, mask = self.sliding_attention or None, None
        if x.shape[1] > 1:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = mask.triu(1 - window) if window else mask
        freqs_cis = freqs_cis[1] if window else freqs_cis[0]
        attend = {"freqs_cis": freqs_cis, "past_key_value": past_key_value}
        out, kept = self.self_attn(self.input_layernorm(x), **attend, sliding_window=window, attention_mask=mask)
        between = x + self.post_attention_layernorm(out)
        out = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(between)))
        return torch.add(between, out, out=x), kept


class Llama2(torch.nn.Module):
    def __init__(self, config: Any, device: Any = None, dtype: Any = None, ops: Any = torch.nn):
        super().__init__()
        self.config = config
        self.graph_dynamic_vbar_blocks = False
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (TransformerBlockGemma2(config, index, ops) for index in range(config.num_hidden_layers))
        self.layers = torch.nn.ModuleList(blocks)

    def get_dynamic_vram__units(self):
        return list(self.layers), []

    def init_kv_cache(self, batch, capacity, device, dtype):
        return [None for _ in self.layers]

    def compute_freqs_cis(self, position_ids, device):
        steps = torch.arange(self.config.head_dim // 2) / self.config.head_dim
        angles = [position_ids[:, None, :, None] * base**-steps for base in (1e6, 1e4)]
        return [(torch.cat([angle.cos()] * 2, -1), angle.sin(), -angle.sin()) for angle in angles]

    def forward(self, x, embeds=None, past_key_values=None):
        return self._run(embeds, past_key_values, lambda *inputs: inputs)

    def _run(self, x, past_key_values, settle):
        """``settle``: (x, rotations) of a token in a FixedKV -> what the blocks get, at an address that stays."""
        first, count = past_key_values[0], x.shape[1]
        fixed = isinstance(first, FixedKV)
        past = first.index if fixed else 0 if first is None else first[0].shape[2]
        freqs_cis = self.compute_freqs_cis(torch.arange(past, past + count)[None], x.device)
        if fixed and past:
            x, freqs_cis = settle(x, freqs_cis)
        kept = list(past_key_values)
        for index, layer in enumerate(self.layers):
            if fixed:
                past_key_values[index].prepare(count)
            x, kept[index] = layer(x=x, freqs_cis=freqs_cis, past_key_value=past_key_values[index])
            if fixed:
                kept[index].advance(count)
        return x, None, kept


class CompiledLlama2(Llama2):
    def init_decode_buffers(self, batch, device, dtype):
        hidden = torch.empty((batch, 1, self.config.hidden_size), dtype=dtype)
        return hidden, rope_matrix(self.compute_freqs_cis(torch.zeros((1, 1)), device))

    def forward(self, x, embeds=None, past_key_values=None, decode_buffers=None):
        def settle(x, freqs_cis):
            hidden, rotation = decode_buffers
            return hidden.copy_(x), rotation.copy_(rope_matrix(freqs_cis))

        return self._run(embeds, past_key_values, settle)


def install(monkeypatch: Any, form: str) -> ModuleType:
    """Put a host of ``form`` in place of comfy.text_encoders.llama and comfy.model_prefetch -> the former."""
    llama, prefetch = ModuleType("comfy.text_encoders.llama"), ModuleType("comfy.model_prefetch")
    kind = Llama2 if form == "lists" else CompiledLlama2
    cache = ChangedKV if form == "changed" else FixedKV
    llama.FixedKV, llama.Attention, llama.apply_rope, llama.Gemma3_12B_Config = cache, Attention, apply_rope, Config
    llama.Llama2_, llama.TransformerBlockGemma2, llama.MLP, llama.RMSNorm = kind, TransformerBlockGemma2, MLP, RMSNorm
    llama.comfy = SimpleNamespace(ldm=SimpleNamespace(common_dit=SimpleNamespace(rms_norm=rms_norm)))
    if form != "lists":
        llama.rope_matrix = rope_matrix
        prefetch.malloc_graph_enabled = lambda device: True
    prefetch.prefetch_queue_pop = lambda queue, device, module, core=None, enable_graph=False: core()
    monkeypatch.setitem(sys.modules, "comfy.text_encoders", ModuleType("comfy.text_encoders"))
    monkeypatch.setitem(sys.modules, llama.__name__, llama)
    monkeypatch.setitem(sys.modules, prefetch.__name__, prefetch)
    return llama


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The host's token loop, the likeliest token each time; its buffers where the compiler is there."""
    cpu, dtype = torch.device("cpu"), torch.float32
    caches, extra, tokens = model.init_kv_cache(1, len(prompt) + count, cpu, dtype), {}, []
    if hasattr(model, "init_decode_buffers") and model.graph_dynamic_vbar_blocks:
        extra["decode_buffers"] = model.init_decode_buffers(1, cpu, dtype)
    embeds = model.embed_tokens(torch.tensor([prompt]))
    for step in range(count):
        x, _, caches = model.forward(None, embeds=embeds, past_key_values=caches, **extra)
        output = model.embed_tokens.weight.roll(step, 0)  # or a token would say itself for ever
        tokens.append(int((output @ x[0, -1]).argmax()))
        embeds = model.embed_tokens(torch.tensor([tokens[-1:]]))
    return tokens
