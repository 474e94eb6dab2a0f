# SPDX-License-Identifier: Apache-2.0
"""Layers of text encoders: their operations class, embeddings the host cannot look up, and what the host left over.

Activations of text encoders stay in full precision, as the host has it. What it built is held against what it was
given: a Linear of another size, or a part of the model of which the file has nothing, is refused, since the host would
compute with whatever the memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...checkpoint.file.header import CheckpointError
from ...checkpoint.identify.dialects import MARKER
from ...kernels import dispatch
from ...kernels.format import OUTPUT_DTYPES, PackedWeight
from ..compute.linear import weight_only_operations
from .built import stored_shape

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens\w*|shared|token_embedding|position_embedding|\w+_attention_bias)$")
# Parts without which the text is encoded all the same.
_APART = re.compile(
    r"(^|\.)(visual|vision\w*|multi_modal_projector|embed_vision|audio\w*|embed_audio|lm_head|logit_scale"
    r"|text_projection|text_embedding_projection|\w+_embeddings_connector)(\.|$)"
)
_NEEDED = re.compile(r"\.\d+\.|embed|norm|(^|\.)shared\.")
_DEFAULTED = ("logit_scale", "text_projection.weight")
_AGAIN = "the file is damaged, or of another size of the model: download it again"


def text_operations(compute: torch.dtype, device: torch.device, backend: str, source: str) -> type:
    """Operations for text encoders: no layer quantises activations, and plain weights keep the dtype of their file.

    The host would cast them to ``compute``, which loses bits of an FP16 encoder beside a BF16 one.
    """
    operations = weight_only_operations(compute, device, backend, source)

    class TextEncoderOperations(operations):
        class Linear(operations.Linear):
            takes_fp8_rows = True  # its ``forward`` is the other's; see rows.py

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._full_precision_mm = True

            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict.get(f"{prefix}weight")
                if weight is None and prefix.endswith("text_projection."):
                    # A CLIP for FLUX has none, nor is it used there; the host needs something to multiply with.
                    state_dict[f"{prefix}weight"] = torch.eye(self.out_features, self.in_features, dtype=compute)
                elif type(weight) is torch.Tensor and weight.dtype in OUTPUT_DTYPES:
                    self.factory_kwargs = self.factory_kwargs | {"dtype": weight.dtype}
                    if self.bias is not None:
                        self.bias = torch.nn.Parameter(self.bias.to(weight.dtype), requires_grad=False)
                super()._load_from_state_dict(state_dict, prefix, *args)

    if hasattr(operations, "MoEExperts"):

        class MoEExperts(operations.MoEExperts):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._full_precision_mm = True

        TextEncoderOperations.MoEExperts = MoEExperts
    return TextEncoderOperations


def restore_embeddings(tensors: dict, operations: type, backend: str, device: torch.device) -> list[str]:
    """Give the host BF16 embeddings in the place of those it cannot look up -> what was done, a sentence for each."""
    texts = []
    for key in [key for key in tensors if key.endswith(".weight") and _EMBEDDING.search(key.removesuffix(".weight"))]:
        layer = key.removesuffix(".weight")
        found = _restore(tensors, layer, operations, backend, device)
        if found:
            name = "token embedding" if layer.endswith(("embed_tokens", "shared")) else f"embedding {layer}"
            texts.append(f"its {name} was {found}, it is BF16 now: this ComfyUI cannot look up rows in that")
    return texts


def _restore(tensors: dict, layer: str, operations: type, backend: str, device: torch.device) -> str:
    weight, scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
    if isinstance(weight, QuantizedTensor):
        params, found = weight._params, "NVFP4"
        parts = (weight._qdata, params.block_scale, params.scale)
        record = PackedWeight(*(part.to(device) for part in parts), params.orig_shape)
        restored = dispatch.dequantize(record, torch.bfloat16, backend)
    elif scale is not None and not _reads_embeddings(operations):
        scale = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float()
        restored, found = (weight.float() * scale).bfloat16(), "FP8"
    else:
        return ""
    tensors[f"{layer}.weight"] = restored.cpu()
    for suffix in (MARKER, "weight_scale", "input_scale", "pre_quant_scale"):
        tensors.pop(f"{layer}.{suffix}", None)
    return found


def _reads_embeddings(operations: type) -> bool:
    """Whether the host's operations for quantised models know quantised embeddings; older ones drop the scale."""
    known = getattr(operations, "Embedding", None)
    return known is not None and known is not getattr(comfy.ops.manual_cast, "Embedding", None)


def check_shapes(model: torch.nn.Module, linear: type, name: str) -> None:
    """Refuse a model one of whose Linears has no weight of its size; those of parts that may be absent can lack it."""
    for layer, module in model.named_modules():
        if not isinstance(module, linear):
            continue
        shape, stored = (module.out_features, module.in_features), stored_shape(module)
        if stored == shape or (stored is None and _APART.search(layer)):
            continue
        found = "it has no `weight`" if stored is None else f"its `weight` has shape {stored}"
        raise CheckpointError(found, where=f"{name}, layer {layer}", expected=f"shape {shape}", remedy=_AGAIN)


def check_taken(model: torch.nn.Module, given: set[str], placed: set[str], name: str) -> list[str]:
    """The model, names of the tensors it was ``given``, and as the host ``placed`` them -> what to tell of the rest.

    The host names parameters after a part of its own, such as ``qwen3_4b.transformer.``, and then as the file does.
    CheckpointError for a block's parameter, a norm or an embedding of the text model that the file lacks.
    """
    parameters = [key for key, _ in model.named_parameters()]
    ends = {end for key in (*parameters, *(key for key, _ in model.named_buffers())) for end in _ends(key)}
    absent = [key for key in parameters if not key.endswith(_DEFAULTED) and given.isdisjoint(_ends(key))]
    lost = [key for key in absent if _NEEDED.search(key) and not _APART.search(key)]
    if lost:
        found = f"it has nothing for {len(lost)} parameters of the model that ComfyUI builds, such as {lost[0]}"
        remedy = "choose the `type` of the model that it is for, or download it again"
        raise CheckpointError(found, where=name, expected="a whole text encoder of this type", remedy=remedy)
    texts = []
    if absent:
        texts.append(f"it lacks {len(absent)} parameters of other parts, such as {absent[0]}: images can fail")
    unused = sorted(key for key in placed - ends if key.endswith((".weight", ".bias")))
    if unused:
        texts.append(f"ComfyUI has no place for {len(unused)} of its tensors, such as {unused[0]}")
    return texts


def _ends(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))
