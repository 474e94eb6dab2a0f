# SPDX-License-Identifier: Apache-2.0
"""Stub of the host's attention functions; the real ones ask the call's options for an override first."""

import torch

__all__ = ["attention_pytorch", "get_attention_function", "optimized_attention", "optimized_attention_masked"]

REGISTERED_ATTENTION_FUNCTIONS = {}


def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def get_attention_function(name, default=...):
    return REGISTERED_ATTENTION_FUNCTIONS[name]


optimized_attention = optimized_attention_masked = attention_pytorch
REGISTERED_ATTENTION_FUNCTIONS["pytorch"] = attention_pytorch
