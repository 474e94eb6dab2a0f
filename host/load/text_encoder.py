# SPDX-License-Identifier: Apache-2.0
"""The Gemma text encoder of LTX-2.x in NVFP4, any dialect -> the host's CLIP, with the pack's Linear, and a report.

The host builds the model and owns tokenizer, patcher and offload. This module brings both state dicts to the host's
layout (state_dict.py), passes an operations class, and lets the host replay the token loop of the prompt enhancer as
CUDA graphs (host/compute/token_graphs.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.quant_ops import QuantizedTensor

from ...checkpoint.file.header import CheckpointError
from ...checkpoint.file.shards import Checkpoint, open_checkpoint
from ...checkpoint.identify.dialects import AUTO, MARKER, DialectPlan
from ...checkpoint.identify.text_encoder_signatures import (
    CONNECTORS,
    EMBEDDING,
    PROJECTION,
    TextEncoder,
    find_projection,
    find_text_encoder,
)
from ...kernels import backends, dispatch
from ...kernels.format import OUTPUT_DTYPES, PackedWeight
from ..compute.linear import weight_only_operations
from ..compute.lora_patcher import use_branches
from ..compute.token_graphs import use_graphs
from .files import read_tensors
from .report import count_layers
from .state_dict import plan_file, rewrite, stored_shape

logger = logging.getLogger(__name__)

DEVICES = ("default", "cpu")


@dataclass(frozen=True)
class TextEncoderReport:
    """What was loaded and how it computes; ``str()`` is the text shown to the user."""

    file: str
    family: str
    dialect: str
    evidence: str
    layers: Mapping[str, int]  # format -> number of Linears
    gigabytes: float
    projection: str
    backend: str
    reason: str
    device: str
    dynamic_vram: bool
    decode: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(f"{count:,} {name}" for name, count in self.layers.items())
        how = f"weight-only, dequantised by the {self.backend} backend ({self.reason})"
        lines = [
            f"{self.file}: {self.family}, {self.gigabytes:.2f} GB",
            f"dialect: {self.dialect} ({self.evidence})",
            f"layers: {layers}",
            f"projection: {self.projection}",
            f"compute: {how if self.dialect != 'none' else 'as ComfyUI, there is nothing to dequantise'}",
            f"device: {self.device}, DynamicVRAM {'on' if self.dynamic_vram else 'off'}",
            f"token loop: {self.decode}",
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def load_text_encoder(
    path: str,
    projection: str | None = None,
    dialect: str = AUTO,
    backend: str = "auto",
    device: str = "default",
    graphs: bool = True,
    disable_dynamic: bool = False,
) -> tuple[Any, TextEncoderReport]:
    """Text encoder file, file with the text projection (None: the same) -> (the host's CLIP, TextEncoderReport).

    ``dialect`` reads NVFP4 weights of the text encoder that do not declare theirs. ``graphs``: replay the blocks of the
    token loop as CUDA graphs where the host can. Raises CheckpointError for files that do not belong together or
    cannot be read, ValueError for an option that cannot be had.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; expected {' or '.join(DEVICES)}")
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    load_device = options.get("load_device") or comfy.model_management.text_encoder_device()
    backend_name, reason = backends.pick_backend(load_device, backend)
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    encoder = find_text_encoder(header)
    beside_it = checkpoint if projection is None else open_checkpoint(projection)
    other = beside_it.header
    found = find_projection(other, encoder)
    plan = plan_file(checkpoint, dialect)
    tensors = _read(checkpoint, plan, lambda name: not name.startswith((PROJECTION, *CONNECTORS)))
    beside = _read_projection(beside_it, dialect)
    norm = header.tensors["model.layers.0.input_layernorm.weight"].torch_dtype
    compute = norm if norm in OUTPUT_DTYPES else torch.bfloat16
    operations = _full_precision(weight_only_operations(compute, load_device, backend, header.path.name))
    restored = _restore_embedding(tensors, operations, backend, load_device)
    clip = _build([tensors, beside], options | {"custom_operations": operations}, disable_dynamic, header.path.name)
    _check(clip.cond_stage_model, encoder, operations.Linear, header.path.name)
    use_branches(clip.patcher)
    decode = use_graphs(clip) if graphs else "block by block, graphs are switched off"
    clip.patcher.cached_patcher_init = (_reload, (path, projection, dialect, backend, device, graphs))
    warnings = []
    if restored:
        why = "this ComfyUI cannot look up rows in that"
        warnings.append(f"its token embedding was {restored}, it is BF16 now: {why}")
    if not encoder.vision:
        warnings.append("it has no vision tower: the prompt enhancer cannot look at an image")
    report = TextEncoderReport(
        file=header.path.name,
        family=encoder.family,
        dialect=plan.dialect or "none",
        evidence=plan.evidence,
        layers=dict(count_layers(plan).most_common()),
        gigabytes=sum(info.nbytes for info in header.tensors.values()) / 1e9,
        projection=f"{found.family}, {' + '.join(map(str, found.widths))} wide, from {other.path.name}",
        backend=backend_name,
        reason=reason,
        device=str(clip.patcher.load_device),
        dynamic_vram=bool(getattr(clip.patcher, "is_dynamic", bool)()),
        decode=decode,
        warnings=tuple(warnings),
    )
    logger.info("%s", str(report).replace("\n", "; "))
    return clip, report


def _reload(path, projection, dialect, backend, device, graphs, disable_dynamic: bool = False):
    """The host's factory for clones that need weights of their own: another GPU, or no DynamicVRAM."""
    return load_text_encoder(path, projection, dialect, backend, device, graphs, disable_dynamic)[0].patcher


def _read(checkpoint: Checkpoint, plan: DialectPlan, wanted) -> dict[str, torch.Tensor]:
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


def _restore_embedding(tensors: dict, operations: type, backend: str, device: torch.device) -> str:
    """Give the host a BF16 token embedding in the place of one it cannot look up -> the format it had, if any."""
    key = f"{EMBEDDING}.weight"
    weight, scale = tensors.get(key), tensors.get(f"{EMBEDDING}.weight_scale")
    if isinstance(weight, QuantizedTensor):
        params, found = weight._params, "NVFP4"
        parts = (weight._qdata, params.block_scale, params.scale)
        record = PackedWeight(*(part.to(device) for part in parts), params.orig_shape)
        restored = dispatch.dequantize(record, torch.bfloat16, backend)
    elif scale is not None and not _reads_embeddings(operations):
        restored, found = (weight.float() * scale.float()).bfloat16(), "FP8"
    else:
        return ""
    tensors[key] = restored.cpu()
    for suffix in (MARKER, "weight_scale", "input_scale", "pre_quant_scale"):
        tensors.pop(f"{EMBEDDING}.{suffix}", None)
    return found


def _reads_embeddings(operations: type) -> bool:
    """Whether the host's operations for quantised models know quantised embeddings; older ones drop the scale."""
    known = getattr(operations, "Embedding", None)
    return known is not None and known is not getattr(comfy.ops.manual_cast, "Embedding", None)


def _full_precision(operations: type) -> type:
    """Operations whose layers of other formats leave activations alone too, as the host's for text encoders do."""

    class TextEncoderOperations(operations):
        class Linear(operations.Linear):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._full_precision_mm = True

    return TextEncoderOperations


def _build(state_dicts: list[dict], options: dict, disable_dynamic: bool, name: str) -> Any:
    load = comfy.sd.load_text_encoder_state_dicts
    arguments: dict[str, Any] = {"clip_type": comfy.sd.CLIPType.LTXV, "model_options": options}
    if "disable_dynamic" in inspect.signature(load).parameters:  # 0.15.1 lacks it
        arguments["disable_dynamic"] = disable_dynamic
    folders = folder_paths.get_folder_paths("embeddings")
    try:
        return load(state_dicts, embedding_directory=folders, **arguments)
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        found = f"ComfyUI could not build a text encoder from it ({' '.join(str(error).split())[:300]})"
        raise CheckpointError(found, where=name, remedy="update ComfyUI, or download the file again") from error


def _check(model: torch.nn.Module, encoder: TextEncoder, linear: type, name: str) -> None:
    """Refuse a model that is another Gemma than the file's, or one of whose blocks has no weight of its size."""
    built = "Gemma 4" if getattr(model, "text_encoder_key", "") == "gemma4" else "Gemma 3"
    if not encoder.family.startswith(built):
        found = f"this ComfyUI does not know {encoder.family} as a text encoder of LTX"
        raise CheckpointError(found, where=name, remedy="update ComfyUI")
    for layer, module in model.named_modules():
        if not isinstance(module, linear) or "vision" in layer or "audio_" in layer:
            continue
        shape, stored = (module.out_features, module.in_features), stored_shape(module)
        if stored != shape:
            found = "it has no `weight`" if stored is None else f"its `weight` has shape {stored}"
            remedy = "the file is damaged, or of another size of the model: download it again"
            raise CheckpointError(found, where=f"{name}, layer {layer}", expected=f"shape {shape}", remedy=remedy)


__all__ = ["DEVICES", "TextEncoderReport", "load_text_encoder"]
