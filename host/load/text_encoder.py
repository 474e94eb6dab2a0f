# SPDX-License-Identifier: Apache-2.0
"""A text encoder in NVFP4, any dialect and any family ComfyUI knows -> the host's CLIP, with the pack's Linear.

The host tells the family, builds the model and owns tokenizer, patcher and offload. This module brings the state dicts
to the host's layout (state_dict.py) and passes an operations class (encoder_layers.py). For LTX-2.x, type ``ltxv``, it
knows more: which Gemma and which text projection belong together, and how the host can replay the token loop of the
prompt enhancer as CUDA graphs (host/compute/token_graphs.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch

from ...checkpoint.file.header import CheckpointError
from ...checkpoint.file.shards import Checkpoint, open_checkpoint
from ...checkpoint.identify.dialects import AUTO, DialectPlan
from ...checkpoint.identify.text_encoder_signatures import (
    CONNECTORS,
    PROJECTION,
    TextEncoder,
    find_projection,
    find_text_encoder,
    is_t5,
)
from ...kernels import backends
from ...kernels.errors import PackError
from ...kernels.format import OUTPUT_DTYPES
from ...measure.escape import report as text_report
from ..compute.lora_patcher import use_branches
from ..compute.token_graphs import use_graphs
from .encoder_layers import check_shapes, check_taken, restore_embeddings, text_operations
from .files import read_tensors
from .report import count_layers
from .state_dict import plan_file, rewrite

logger = logging.getLogger(__name__)

DEVICES = ("default", "cpu")
LTX = "ltxv"
# The host's names of families whose hidden states were compared with those of ComfyUI's own loader.
TRIED = (
    *("T5_XXL", "CLIP_L", "GEMMA_2_2B", "GEMMA_3_4B", "LLAMA3_8", "QWEN25_7B", "QWEN3_4B", "QWEN3VL_4B"),
    "GPT_OSS_20B",
)
# Norms, whose dtype is the one in which the host builds an encoder.
_NORMS = (
    *("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.language_model.norm.weight"),
    *("encoder.final_layer_norm.weight", "norm.weight", "text_model.final_layer_norm.weight"),
)
# Files that ComfyUI takes for a text encoder by other means than ``detect_te_model``.
_OTHER_SIGNS = ("transformer.resblocks.0.ln_1.weight", "model.audio_decoder.projection.weight")


@dataclass(frozen=True)
class TextEncoderReport:
    """What was loaded and how it computes; ``str()`` is the text shown to the user."""

    file: str
    family: str
    dialect: str
    evidence: str
    layers: Mapping[str, int]  # format -> number of Linears
    gigabytes: float
    beside: str  # the text projection, or a second text encoder
    backend: str
    reason: str
    device: str
    dynamic_vram: bool
    decode: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(f"{count:,} {name}" for name, count in self.layers.items())
        how = f"weight-only, dequantized by the {self.backend} backend ({self.reason})"
        lines = [
            f"{self.file}: {self.family}, {self.gigabytes:.2f} GB",
            f"dialect: {self.dialect} ({self.evidence})",
            f"layers: {layers}",
            *([self.beside] if self.beside else []),
            f"compute: {how if self.dialect != 'none' else 'as ComfyUI, there is nothing to dequantize'}",
            f"device: {self.device}, DynamicVRAM {'on' if self.dynamic_vram else 'off'}",
            f"token loop: {self.decode}",
        ]
        return text_report([*lines, *(f"warning: {text}" for text in self.warnings)])


@dataclass(frozen=True)
class _Parts:
    """What the host is given, and what it is. ``gemma``: that of LTX-2.x, None for any other text encoder."""

    plan: DialectPlan
    state_dicts: list[dict[str, torch.Tensor]]
    family: str
    beside: str
    gemma: TextEncoder | None = None
    warnings: tuple[str, ...] = ()


def types() -> tuple[str, ...]:
    """What a text encoder can be for: the names of ComfyUI's own loaders, LTX's first."""
    names = [name.lower() for name in comfy.sd.CLIPType.__members__]
    return (LTX, *(name for name in names if name != LTX))


def load_text_encoder(
    path: str,
    projection: str | None = None,
    dialect: str = AUTO,
    backend: str = "auto",
    device: str = "default",
    graphs: bool = True,
    kind: str = LTX,
    disable_dynamic: bool = False,
) -> tuple[Any, TextEncoderReport]:
    """Text encoder file, second file -> (the host's CLIP, TextEncoderReport).

    ``kind``: what it is for, one of ``types()``. ``projection``: for LTX-2.x the file with the text projection (None:
    the same), for others a second text encoder, as the host's loader of two takes it (None: there is none).
    ``dialect`` reads NVFP4 weights that do not declare theirs. ``graphs``: replay the blocks of LTX's token loop as
    CUDA graphs where the host can. Raises CheckpointError for files that do not belong together or cannot be read,
    PackError for an option that cannot be had.
    """
    if device not in DEVICES:
        raise PackError(f"unknown device {device!r}; expected {' or '.join(DEVICES)}")
    if kind not in types():
        raise PackError(f"this ComfyUI knows no text encoders of type {kind!r}; expected {', '.join(types())}")
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    load_device = options.get("load_device") or comfy.model_management.text_encoder_device()
    backend_name, reason = backends.pick_backend(load_device, backend)
    checkpoint = open_checkpoint(path)
    header, name = checkpoint.header, checkpoint.header.path.name
    second = None if projection is None else open_checkpoint(projection)
    read = _ltx_parts if kind == LTX and not is_t5(header) else _host_parts
    parts = read(checkpoint, second, dialect, kind)
    operations = text_operations(_compute_dtype(checkpoint), load_device, backend, name)
    restored = [
        text for tensors in parts.state_dicts for text in restore_embeddings(tensors, operations, backend, load_device)
    ]
    given = {key for tensors in parts.state_dicts for key in tensors}
    clip = _build(parts.state_dicts, options | {"custom_operations": operations}, kind, disable_dynamic, name)
    if parts.gemma is not None:
        _check_family(clip.cond_stage_model, parts.gemma, name)
    check_shapes(clip.cond_stage_model, operations.Linear, name)
    placed = {key for tensors in parts.state_dicts for key in tensors}
    left = check_taken(clip.cond_stage_model, given | placed, placed, name)
    use_branches(clip.patcher)
    decode = "ComfyUI's own"
    if parts.gemma is not None:
        decode = use_graphs(clip, backend) if graphs else "block by block, graphs are switched off"
    clip.patcher.cached_patcher_init = (_reload, (path, projection, dialect, backend, device, graphs, kind))
    report = TextEncoderReport(
        file=name,
        family=parts.family,
        dialect=parts.plan.dialect or "none",
        evidence=parts.plan.evidence,
        layers=dict(count_layers(parts.plan).most_common()),
        gigabytes=sum(info.nbytes for info in header.tensors.values()) / 1e9,
        beside=parts.beside,
        backend=backend_name,
        reason=reason,
        device=str(clip.patcher.load_device),
        dynamic_vram=bool(getattr(clip.patcher, "is_dynamic", bool)()),
        decode=decode,
        warnings=(*restored, *parts.warnings, *(left if parts.gemma is None else ())),  # a Gemma has its own
    )
    logger.info("%s", str(report).replace("\n", "; "))
    return clip, report


def _reload(path, projection, dialect, backend, device, graphs, kind=LTX, disable_dynamic: bool = False):
    """The host's factory for clones that need weights of their own: another GPU, or no DynamicVRAM."""
    return load_text_encoder(path, projection, dialect, backend, device, graphs, kind, disable_dynamic)[0].patcher


def _ltx_parts(checkpoint: Checkpoint, second: Checkpoint | None, dialect: str, kind: str) -> _Parts:
    """A Gemma and LTX's text projection that fits it."""
    encoder = find_text_encoder(checkpoint.header)
    second = second or checkpoint
    found = find_projection(second.header, encoder)
    plan = plan_file(checkpoint, dialect)
    tensors = _read(checkpoint, plan, lambda name: not name.startswith((PROJECTION, *CONNECTORS)))
    widths = " + ".join(map(str, found.widths))
    beside = f"projection: {found.family}, {widths} wide, from {second.header.path.name}"
    blind = "it has no vision tower: the prompt enhancer cannot look at an image"
    warnings = () if encoder.vision else (blind,)
    return _Parts(plan, [tensors, _read_projection(second, dialect)], encoder.family, beside, encoder, warnings)


def _host_parts(checkpoint: Checkpoint, second: Checkpoint | None, dialect: str, kind: str) -> _Parts:
    """A text encoder, or two, of whatever family the host finds them to be."""
    plan = plan_file(checkpoint, dialect)
    state_dicts, families, beside = [_read(checkpoint, plan)], [], ""
    families.append(_family(state_dicts[0], checkpoint.header.path.name))
    if second is not None:
        other = plan_file(second, dialect)
        state_dicts.append(_read(second, other))
        families.append(_family(state_dicts[1], second.header.path.name))
        formats = ", ".join(f"{count:,} {name}" for name, count in count_layers(other).most_common())
        beside = f"second text encoder: {families[1]} from {second.header.path.name}, layers: {formats}"
    untried = tuple(
        f"{family} has not been tried with this loader: compare a picture with one that ComfyUI's own loader makes of "
        "a BF16 or FP8 file"
        for family in families
        if family not in TRIED
    )
    return _Parts(plan, state_dicts, f"{families[0]} for {kind}", beside, warnings=untried)


def _family(state_dict: dict[str, torch.Tensor], name: str) -> str:
    """The host's name for the text encoder in a state dict."""
    detect = getattr(comfy.sd, "detect_te_model", None)
    found = detect(state_dict) if detect is not None else None
    if found is None and detect is not None and not any(sign in state_dict for sign in _OTHER_SIGNS):
        raise CheckpointError(
            "ComfyUI does not recognise a text encoder in it",
            where=name,
            expected="a text encoder of a family this ComfyUI knows, with the names ComfyUI uses",
            remedy="choose the file from models/text_encoders that was made for ComfyUI, or update ComfyUI",
        )
    return "a text encoder that ComfyUI does not name" if found is None else found.name


def _compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    tensors = checkpoint.header.tensors
    norm = next((tensors[name].torch_dtype for name in _NORMS if name in tensors), torch.bfloat16)
    return norm if norm in OUTPUT_DTYPES else torch.bfloat16


def _read(checkpoint: Checkpoint, plan: DialectPlan, wanted=lambda name: True) -> dict[str, torch.Tensor]:
    """The wanted tensors of a file in the host's layout; native ones stay mapped."""
    state_dict, _ = read_tensors(checkpoint)
    return rewrite(plan, {name: tensor for name, tensor in state_dict.items() if wanted(name)})


def _read_projection(checkpoint: Checkpoint, dialect: str) -> dict[str, torch.Tensor]:
    """The text projection, and the connectors of a checkpoint so old that they belong to the text encoder."""
    state: dict[str, torch.Tensor] = {}
    for prefix in (PROJECTION, *CONNECTORS):
        plan = plan_file(checkpoint, dialect, prefix)
        state |= _read(checkpoint, plan, lambda name, prefix=prefix: name.startswith(prefix))
    return state


def _build(state_dicts: list[dict], options: dict, kind: str, disable_dynamic: bool, name: str) -> Any:
    load = comfy.sd.load_text_encoder_state_dicts
    arguments: dict[str, Any] = {"clip_type": comfy.sd.CLIPType[kind.upper()], "model_options": options}
    if "disable_dynamic" in inspect.signature(load).parameters:  # 0.15.1 lacks it
        arguments["disable_dynamic"] = disable_dynamic
    folders = folder_paths.get_folder_paths("embeddings")
    try:
        return load(state_dicts, embedding_directory=folders, **arguments)
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        found = f"ComfyUI could not build a text encoder from it ({' '.join(str(error).split())[:300]})"
        raise CheckpointError(found, where=name, remedy="update ComfyUI, or download the file again") from error


def _check_family(model: torch.nn.Module, encoder: TextEncoder, name: str) -> None:
    """Refuse a model that is another Gemma than the file's."""
    built = "Gemma 4" if getattr(model, "text_encoder_key", "") == "gemma4" else "Gemma 3"
    if not encoder.family.startswith(built):
        found = f"this ComfyUI does not know {encoder.family} as a text encoder of LTX"
        raise CheckpointError(found, where=name, remedy="update ComfyUI")


__all__ = ["DEVICES", "LTX", "TRIED", "TextEncoderReport", "load_text_encoder", "types"]
