# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's block for one token in nine launches instead of some thirty (kernels/one_token.py).

``block_class`` derives from the host's block. One token of a text, decoded with the caches of token_graphs.py, is
computed from the packed weights as the host has brought them; what the block does, and in which order, is the host's.
Any other call is the host's too, and so is one that meets a hook, somebody's ``forward``, a LoRA, a weight that is
elsewhere, or a module of a class not known.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from comfy.quant_ops import QuantizedTensor

from ...kernels import one_token
from ...kernels.backends import pick_backend
from .. import residency
from .fused_attention import is_apart
from .fusions import fingerprint
from .rows import packed_weight

# ``fingerprint`` of what is computed here, in ComfyUI 0.33 and in 0.38.
_BLOCKS = frozenset(("81fe312255c5ab31",))
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class _Weights(NamedTuple):
    """What a block's token meets: packed weights, and those of the norms, where they lie for this call."""

    qkv: tuple[QuantizedTensor, ...]
    out: QuantizedTensor
    gate_up: tuple[QuantizedTensor, ...]
    down: QuantizedTensor
    norms: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]


class _Functions(NamedTuple):
    """What computes the products and attention of one block."""

    qkv: Any
    out: Any
    gate_up: Any
    down: Any
    attend: Any


def obstacle(llama: ModuleType, config: Any, backend: str, device: torch.device) -> str:
    """Why the host's blocks are left as they are, or an empty string."""
    try:
        parts = llama.TransformerBlockGemma2.forward, llama.MLP.forward, llama.RMSNorm.forward
        known = fingerprint(*parts, llama.comfy.ldm.common_dit.rms_norm) in _BLOCKS
    except (AttributeError, OSError, TypeError, SyntaxError) as error:
        return f"this ComfyUI's block cannot be read: {error}"
    gelu = getattr(config, "mlp_activation", "") == "gelu_pytorch_tanh"
    if not known or not gelu or not (config.q_norm == config.k_norm == "gemma3" and config.rms_norm_add):
        return "this ComfyUI's block is not one that this pack knows"
    if pick_backend(device, backend)[0] != "triton":
        return "nothing here multiplies packed weights by one row"
    return str(residency.check())


@functools.cache
def block_class(llama: ModuleType, cache: type, attention: type, backend: str) -> type:
    """The host's module of decoders; the classes of caches with a bias and of attention to them -> a block's class.

    It derives from the host's, and stands aside while somebody else's function has the place of one it computes.
    """
    found, known = llama.TransformerBlockGemma2, _replaceable(llama)

    class TokenBlock(found):
        host_class, host_forward = found, found.forward

        def forward(self, x, attention_mask=None, freqs_cis=None, optimized_attention=None, past_key_value=None):
            own = type(past_key_value) is cache and type(self.self_attn) is attention and _replaceable(llama) == known
            if own and past_key_value.index > 0 and attention_mask is None and not is_apart(self):
                rotation = _rotation(freqs_cis[1 if self.sliding_attention else 0])
                weights = None if rotation is None else _read(self, llama, x)
                call = None if weights is None else _functions(self, x, weights, past_key_value, backend)
                if call is not None:
                    return _run(self, x, weights, rotation, past_key_value, call), past_key_value
            return super().forward(x, attention_mask, freqs_cis, optimized_attention, past_key_value)

    return TokenBlock


def _replaceable(llama: ModuleType) -> tuple:
    return llama.MLP.forward, llama.RMSNorm.forward, llama.apply_rope, llama.comfy.ldm.common_dit.rms_norm


def _rotation(freqs_cis: Any) -> torch.Tensor | None:
    """The host's rotation of one token, a tensor or its three parts -> (D / 2, 2, 2) fp32, or None for another."""
    if isinstance(freqs_cis, tuple) and len(freqs_cis) == 3:  # before the compiler
        cosine, sine, negative = (part.flatten() for part in freqs_cis)
        half = sine.numel()
        freqs_cis = torch.stack((cosine[:half], negative, sine, cosine[half:]), -1)
    if not isinstance(freqs_cis, torch.Tensor) or freqs_cis.dtype != torch.float32 or not freqs_cis.is_contiguous():
        return None
    return freqs_cis.view(-1, 2, 2)


def _read(block: Any, llama: ModuleType, x: torch.Tensor) -> _Weights | None:
    """The block's weights, or None if a module is in other hands, of another class, or has its weight elsewhere."""
    attention, mlp, device = block.self_attn, block.mlp, x.device
    plain = x.dtype in one_token.DTYPES and x.shape[:2] == (1, 1) and x.is_contiguous()
    if not plain or x.shape[2] > one_token.MOST_COLS or type(mlp) is not llama.MLP or getattr(mlp, "merged_mlp", False):
        return None
    norms = [getattr(block, name) for name in _NORMS] + [attention.q_norm, attention.k_norm]
    if any(type(norm) is not llama.RMSNorm or not norm.add or norm.eps != norms[0].eps for norm in norms):
        return None
    if any(residency.taken_over(module.__dict__) for module in (attention, mlp, *norms)):
        return None
    weights = [residency.plain_weight(norm, device) for norm in norms]
    if any(weight is None or weight.dtype not in one_token.DTYPES or not weight.is_contiguous() for weight in weights):
        return None
    layers = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    layers += mlp.gate_proj, mlp.up_proj, mlp.down_proj
    found = tuple(packed_weight(layer, device) for layer in layers)
    if any(weight is None for weight in found):
        return None
    return _Weights(found[:3], found[3], found[4:6], found[6], tuple(weights[:4]), tuple(weights[4:]))


def _parts(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    params = weight._params
    return weight._qdata, params.block_scale, params.scale


def _functions(block: Any, x: torch.Tensor, weights: _Weights, cache: Any, backend: str) -> _Functions | None:
    """Prepared once for a cache's size and window, None if the GPU has no such kernel.

    The block keeps them, since a graph of it knows their tensors by address.
    """
    own, attention = block.__dict__, block.self_attn
    key = tuple(cache.key.shape), cache.slots.window, x.device
    kept = own.get("_nvfp4_token")
    if kept is not None and kept[0] == key:
        return kept[1]

    def shape(weight: QuantizedTensor) -> tuple[int, int]:
        return tuple(weight._params.orig_shape)

    with residency.outside_host_graph():
        group = functools.partial(one_token.prepare_group, dtype=x.dtype, device=x.device, backend=backend)
        size, scale = tuple(cache.key.shape[1:]), attention.head_dim**-0.5
        found = _Functions(
            qkv=group(tuple(map(shape, weights.qkv))),
            out=group((shape(weights.out),)),
            gate_up=group(tuple(map(shape, weights.gate_up)), gated=True),
            down=group((shape(weights.down),)),
            attend=one_token.prepare_attend(attention.num_heads, size, scale, cache.slots.window, x.device),
        )
    own["_nvfp4_token"] = key, None if None in found else found
    return own["_nvfp4_token"][1]


def _run(
    block: Any, x: torch.Tensor, weights: _Weights, rotation: torch.Tensor, cache: Any, call: _Functions
) -> torch.Tensor:
    """The host's ``forward``, x (1, 1, K) in place."""
    eps = block.input_layernorm.eps
    before_attention, after_attention, before_mlp, after_mlp = weights.norms
    row = x.view(1, -1)
    hidden = one_token.add_norm(row, None, before_attention, eps)
    qkv = call.qkv(hidden, *map(_parts, weights.qkv))
    kept = cache.key[0], cache.value[0]
    query = one_token.place_token(qkv, weights.heads, rotation, cache.position, kept, eps)
    out = call.attend(query, *kept, cache.position)
    out = call.out(out.view(1, -1), _parts(weights.out))
    hidden = one_token.add_norm(row, (out, after_attention), before_mlp, eps)
    hidden = call.gate_up(hidden, *map(_parts, weights.gate_up))
    out = call.down(hidden, _parts(weights.down))
    one_token.add_norm(row, (out, after_mlp), None, eps)
    return x
