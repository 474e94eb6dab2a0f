# SPDX-License-Identifier: Apache-2.0
"""Which Gemma a text encoder file holds, and where LTX's text projection lies: from the names and shapes in a header.

LTX-2.x conditions on all hidden states of a Gemma, the embedding's included, which a projection maps to the width of
the diffusion model: one matrix in LTX-2, one for video and one for audio since LTX-2.3. The projection comes with the
checkpoint, or with the text encoder (LTX-2.5), under ``text_embedding_projection.``; it fits a Gemma if it has
``hidden size * (layers + 1)`` columns.

Sources: ComfyUI ``comfy/sd.py`` (detect_te_model) and ``comfy/text_encoders/lt.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..file.header import CheckpointError, Header
from .signatures import MODEL_PREFIXES, is_lora

PROJECTION = "text_embedding_projection."
# Connectors of LTX-2's first checkpoints, which the host runs as a part of the text encoder.
CONNECTORS = tuple(f"model.diffusion_model.{kind}_embeddings_connector." for kind in ("video", "audio"))
_NORM, _Q_NORM, _V = "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.v_proj"
_BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TYPE = "set `type` to the model that it is for"
_WEIGHTS = ("weight", "weight_packed")
_ENCODERS = "a Gemma 3 12B (LTX-2, LTX-2.3) or Gemma 4 12B (LTX-2.5) file for ComfyUI"
# What people pick instead: beginning of a name -> what it is, and where it belongs.
_OTHERS = (
    (("language_model.model.", "model.language_model."), "it has the names of the transformers library"),
    (("text_model.encoder.", "transformer.resblocks."), "this is a CLIP text encoder"),
    (("encoder.block.", "shared."), "this is a T5 text encoder"),
    ((*MODEL_PREFIXES, "transformer_blocks.", "double_blocks.", "vae.", "first_stage_model."), "this is a checkpoint"),
    (("decoder.", "encoder."), "this is a VAE"),
    (("model.layers.", "layers."), "this is a text encoder, but no Gemma"),
)


_ENCODERS_OF_OTHERS = tuple(starts for starts, found in _OTHERS if "text encoder" in found)


@dataclass(frozen=True)
class TextEncoder:
    """A Gemma in a file. ``tokenizer``: name of the tensor that holds it; ``vision``: whether it can look at images."""

    family: str
    hidden: int
    layers: int
    tokenizer: str
    vision: bool

    @property
    def states(self) -> int:
        """Columns of the projections that fit it."""
        return self.hidden * (self.layers + 1)


@dataclass(frozen=True)
class Projection:
    """LTX's text projection. ``columns``: of its input; ``widths``: of its outputs, one for LTX-2, else two."""

    family: str
    columns: int
    widths: tuple[int, ...]
    names: tuple[str, ...]


def is_t5(header: Header) -> bool:
    """Whether it is the T5 XXL of LTX-Video, the family before LTX-2."""
    return any(name.startswith("encoder.block.23.layer.1.DenseReluDense.") for name in header.tensors)


def find_text_encoder(header: Header) -> TextEncoder:
    """Header -> the Gemma it holds, complete. Raises CheckpointError for any other file, with what it is."""
    where, names = header.path.name, header.tensors.keys()
    modules = {name.rpartition(".")[0] for name in names}
    layers = 1 + max((int(part) for m in modules if (part := _layer_number(m)) is not None), default=-1)
    if f"model.layers.0.{_NORM}" not in modules:
        found, remedy = _what_else(names)
        raise CheckpointError(found, where=where, expected=_ENCODERS, remedy=remedy)
    family = _family(modules, layers)
    if family not in ("Gemma 3 12B", "Gemma 4 12B"):
        remedy = f"LTX-2.x was trained with no other: choose one of these, or {_TYPE}"
        raise CheckpointError(f"this is {family}", where=where, expected=_ENCODERS, remedy=remedy)
    for number in range(layers):
        layer = f"model.layers.{number}."
        missing = [part for part in (*_BLOCK, _NORM, _Q_NORM) if layer + part not in modules]
        if missing:
            remedy = "the file is cut or badly converted: download it again"
            raise CheckpointError(f"it has no `{layer}{missing[0]}`", where=where, expected=family, remedy=remedy)
    tokenizer = "spiece_model" if family == "Gemma 3 12B" else "tokenizer_json"
    if tokenizer not in names:
        raise CheckpointError(
            f"it has no tokenizer (`{tokenizer}`)",
            where=where,
            expected=_ENCODERS,
            remedy="choose the version of the file made for ComfyUI; converters that drop this tensor make it useless",
        )
    shape = header.tensors[f"model.layers.0.{_NORM}.weight"].shape
    vision = any(name.startswith(("vision_model.", "vision_embedder.")) for name in names)
    return TextEncoder(family, shape[-1], layers, tokenizer, vision)


def find_projection(header: Header, encoder: TextEncoder) -> Projection:
    """Header -> the text projection for ``encoder``. Raises CheckpointError if there is none or it does not fit."""
    where, found = header.path.name, {}
    for name in header.tensors:
        if name.startswith(PROJECTION):
            layer, _, suffix = name.rpartition(".")
            if suffix in _WEIGHTS:
                found[(layer + ".").removeprefix(PROJECTION).rstrip(".")] = header.tensors[name]
    parts = ("video_aggregate_embed", "audio_aggregate_embed")
    family = "LTX-2.3 or later"
    if not all(part in found for part in parts):
        family, parts = "LTX-2", tuple(part for part in ("", "aggregate_embed") if part in found)[:1]
    if not parts:
        raise CheckpointError(
            f"it has no text projection (no `{PROJECTION}*` tensors)",
            where=where,
            expected="the LTX-2.x checkpoint that the text encoder is for, or the file with its text projection",
            remedy="choose the full checkpoint; a file of the diffusion model alone has lost it (NVFP4 Split "
            "Checkpoint writes it into a file of its own)",
        )
    infos = [found[part] for part in parts]
    if any(len(info.shape) != 2 for info in infos):
        raise CheckpointError(f"its text projection has shape {infos[0].shape}", where=where, expected="a matrix")
    columns = {info.shape[1] * (2 if info.dtype == "U8" else 1) for info in infos}
    if columns != {encoder.states}:
        raise CheckpointError(
            f"its text projection takes {', '.join(str(number) for number in sorted(columns))} numbers a token",
            where=where,
            expected=f"{encoder.states:,}, the hidden states of {encoder.family}",
            remedy="choose the text encoder and the checkpoint of the same model version",
        )
    names = tuple(name for name in header.tensors if name.startswith(PROJECTION))
    return Projection(family, encoder.states, tuple(info.shape[0] for info in infos), names)


def _layer_number(module: str) -> int | None:
    """Number of the block a module belongs to, None for modules outside blocks."""
    parts = module.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal() else None


def _family(modules: Collection[str], layers: int) -> str:
    if f"model.layers.0.{_Q_NORM}" not in modules:
        return "Gemma 2"
    if layers == 48:
        # Gemma 4's global layers, every sixth, use their keys as values.
        return "Gemma 3 12B" if f"model.layers.5.{_V}" in modules else "Gemma 4 12B"
    names = {34: "Gemma 3 4B", 62: "Gemma 3 27B", 60: "Gemma 4 31B", 42: "Gemma 4 E4B", 35: "Gemma 4 E2B"}
    return names.get(layers, f"a Gemma of {layers} layers")


def _what_else(names: Collection[str]) -> tuple[str, str]:
    """-> (what the file is, what to do) for a file that is no Gemma of the host's."""
    if is_lora(names):
        return "this is a LoRA", "load it with LoraLoader behind the text encoder"
    if any(name.startswith(PROJECTION) for name in names) and not any(name.startswith("vae.") for name in names):
        return "this is a text projection, without a text encoder", "choose it as `projection`"
    for starts, found in _OTHERS:
        if any(name.startswith(starts) for name in names):
            remedy = "choose the file from models/text_encoders that was made for ComfyUI"
            return found, f"{remedy}, or {_TYPE}" if starts in _ENCODERS_OF_OTHERS else remedy
    return "no text encoder is in it", "choose another file"
