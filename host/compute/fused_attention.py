# SPDX-License-Identifier: Apache-2.0
"""LTX's attention in fewer passes: norm and rotation of q and k are one, and the gates of heads with rows in FP8.

``attention_class`` derives from the host's class and calls what that calls; each pass that somebody's function might
want to see (a hook on a norm, a LoRA on the output) is done as the host does it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import torch

from ...kernels import fused
from ...kernels.format import FP8Rows
from .. import residency
from .attention import is_chosen
from .graph_key import SCHEDULED
from .matmul import rows_for

EXACT = "_nvfp4_exact"  # a module of a model that promises the host's own bits


def is_apart(module: torch.nn.Module, options: Mapping | None = None) -> bool:
    """Whether a call now is one of those the host's own code is for: compiled, with gradients, or of a patched class.

    ``module`` is of a class that this pack derived from the host's, whose ``forward`` somebody may have exchanged;
    ``options``: the call's. A model without a layer in FP8 mode, and a step that a schedule has in the exact mode, are
    the host's as long as their attention is: with another they differ from it by rounding already.
    """
    own = type(module)
    exact = module.__dict__.get(EXACT, False) or (options is not None and options.get(SCHEDULED) == "bf16")
    return (
        own.host_class.forward is not own.host_forward
        or (exact and not is_chosen(options))
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or bool(getattr(comfy.model_management, "in_training", False))
    )


@functools.cache
def attention_class(found: type, host: ModuleType) -> type:
    """The host's CrossAttention and its module -> a class derived from it."""

    rotary = _rotary(host)

    class FusedAttention(found):
        host_class, host_forward = found, found.forward

        def accepts(self, rows: int, others: int, device: torch.device) -> tuple[bool, bool, bool]:
            """Whether the ``rows`` for q may come in FP8, whether the gates need their tensor too, and as the first
            for the ``others`` for k and v."""
            if residency.taken_over(self.__dict__) or is_apart(self):
                return False, False, False
            gates = self.to_gate_logits
            return (
                rows_for(self.to_q, rows, device),
                gates is not None and not rows_for(gates, rows, device),
                rows_for(self.to_k, others, device) and rows_for(self.to_v, others, device),
            )

        def forward(self, x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):  # noqa: B006
            if is_apart(self, transformer_options) or x.dtype != torch.bfloat16:
                return super().forward(x, context, mask, pe, k_pe, transformer_options)
            q, source = self.to_q(x), x if context is None else context
            k, v = self.to_k(source), self.to_v(source)
            if type(x) is FP8Rows and x.kept is not None:
                x = x.kept
            gates = None if self.to_gate_logits is None else self.to_gate_logits(x)
            del source
            if context is None and transformer_options.get("stg_skip_self_attn", False):
                out = v
            else:
                q, k = _normed(self, host, rotary, q, k, pe, k_pe)
                out = _attend(self, host, q, k, v, mask, transformer_options)
            del q, k, v
            return _projected(self, out, gates)

    return FusedAttention


def _rotary(host: ModuleType) -> tuple:
    """The host's functions that rotate, as they are now."""
    return host.apply_rotary_emb, host.apply_rotary_emb_qk


def _normed(attn: Any, host: ModuleType, rotary: tuple, q, k, pe, k_pe) -> tuple[torch.Tensor, torch.Tensor]:
    """The norms of q and k, and their rotations if there are any; ``rotary``: the functions that this stands for."""
    other = pe if k_pe is None else k_pe
    weights = _weight(attn.q_norm, q), _weight(attn.k_norm, k)
    fused_here = _rotates(pe, q) and _rotates(other, k) and _rotary(host) == rotary
    if not fused_here or any(weight is None for weight in weights):
        q, k = attn.q_norm(q), attn.k_norm(k)
        if pe is None:
            return q, k
        if k_pe is None and q.shape == k.shape:
            return host.apply_rotary_emb_qk(q, k, pe)
        return host.apply_rotary_emb(q, pe), host.apply_rotary_emb(k, other)
    turns = (None, None) if pe is None else (pe[0], other[0])
    if turns[0] is turns[1] and q.shape == k.shape and attn.q_norm.eps == attn.k_norm.eps:
        return tuple(fused.norm_rope([(q, weights[0]), (k, weights[1])], turns[0], attn.q_norm.eps))
    return (
        fused.norm_rope([(q, weights[0])], turns[0], attn.q_norm.eps)[0],
        fused.norm_rope([(k, weights[1])], turns[1], attn.k_norm.eps)[0],
    )


def _weight(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """A norm's weight where it lies for this call; None if the norm has to be asked itself."""
    own = norm.__dict__
    if not isinstance(norm, torch.nn.RMSNorm) or residency.taken_over(own) or norm.eps is None or not fused.fits(x):
        return None
    weight = residency.plain_weight(norm, x.device)
    return weight if weight is not None and weight.is_floating_point() and weight.shape == x.shape[-1:] else None


def _rotates(pe: tuple | None, x: torch.Tensor) -> bool:
    """Whether ``fused.norm_rope`` takes these matrices for x (B, T, C): none, or split halves, one a pair and token."""
    if pe is None:
        return True
    rotation, split = pe
    return (
        bool(split)
        and rotation.dtype == torch.bfloat16
        and rotation.is_contiguous()
        and rotation.device == x.device
        and rotation.ndim == 6
        and rotation.shape[0] in (1, x.shape[0])
        and rotation.shape[1] == x.shape[1]
        and 2 * rotation.shape[2] * rotation.shape[3] == x.shape[2]
        and rotation.data_ptr() % 8 == 0  # a matrix is read as a word
    )


def _attend(attn: Any, host: ModuleType, q, k, v, mask, options: dict) -> torch.Tensor:
    """The host's attention, called as it calls it; newer hosts hand tensors over in containers."""
    named = {"attn_precision": attn.attn_precision, "transformer_options": options}
    if "comfy_attention" in attn._modules:
        named["preferred_attention"] = attn.comfy_attention
    if isinstance(mask, host.GuideAttentionMask):
        return host._attention_with_guide_mask(q, k, v, attn.heads, mask, **named)
    container = getattr(host, "AttentionTensorContainer", None)
    if container is not None:
        q, k, v = container(q), container(k), container(v)
    return host_attention.optimized_attention(q, k, v, attn.heads, mask=mask, **named)


def _projected(attn: Any, out: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    """Attention's output times its gates, through the layer after it."""
    if gates is None or out.dtype != torch.bfloat16 or gates.dtype != out.dtype or out.shape[-1] % 16:
        if gates is not None:
            out = out.unflatten(-1, (attn.heads, attn.dim_head)) * (2.0 * torch.sigmoid(gates)).unsqueeze(-1)
            out = out.flatten(-2)
        return attn.to_out(out)
    layers = tuple(attn.to_out)
    direct = (
        len(layers) == 2
        and type(layers[1]) is torch.nn.Dropout
        and rows_for(layers[0], out.numel() // out.shape[-1], out.device)
        and not any(residency.taken_over(module.__dict__) for module in (attn.to_out, layers[1]))
    )
    out = fused.gate_heads(out, gates, direct)
    return layers[0](out) if isinstance(out, FP8Rows) else attn.to_out(out)
