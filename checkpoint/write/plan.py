# SPDX-License-Identifier: Apache-2.0
"""What a quantised file will hold, tensor by tensor, worked out from headers before a weight is read.

The target has ComfyUI's own dialect with a `comfy_quant` marker in every quantised layer and no header entry: markers
travel with their layer's name, so UNETLoader, the checkpoint loaders and this pack find them whatever the prefix is.
FP8 layers that stay keep their bytes; what only the header or the old `scaled_fp8` key said of them becomes a marker
too. Everything outside the diffusion model is copied byte for byte, or left out on request.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..file.container import PlannedTensor
from ..file.dtypes import BITS
from ..file.header import HEADER_ENTRY, CheckpointError, Header, layers_entry
from ..file.shards import Checkpoint, Source, open_checkpoint
from ..identify import dialects
from ..identify.components import DIFFUSION_MODEL, VIDEO_VAE, find_components
from ..identify.formats import FP8_SCALES, OLD_FP8
from ..identify.layers import Layer, refuse
from ..identify.signatures import config_fault, find_model
from .calibration import Statistics, find_statistics
from .card import licence_of, tool_version
from .lora import Lora, read_loras
from .recipes import AUTO, Options, Recipe, Selection, find_recipe, select
from .split import with_config
from .units import Spent, fp8_tensors, nvfp4_tensors, planned_tensor
from .weights import FloatWeight, float_weight

MSE, AMAX, GPTQ = "mse", "amax", "gptq"
QUALITIES = {"best": MSE, "fast": AMAX, "calibrated": GPTQ}
NON_FINITE = "NaN or infinity in it, kept on request"
SENSITIVE = "its outputs are sensitive, kept within the byte budget"
_REPLACED = ("weight", *FP8_SCALES, "input_scale", "scale_input", dialects.MARKER)
_RENAMED = {"scale_weight": "weight_scale", "weight_scale_inv": "weight_scale", "scale_input": "input_scale"}


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantise. ``recipe``: "auto" or a name of RECIPES. ``only_model``: leave out all but the diffusion model.

    ``search``: "mse", "amax", or "gptq" with a calibration file. ``keep_non_finite``: keep layers with NaN or infinity
    instead of refusing the file. ``calibration``: a calibration file (calibration.py), or a safetensors file with the
    mean squares of each layer's inputs, (K,) under the layer's name, which weight the search "mse".
    ``config_from``: as in ``split``. ``budget``: what to spend on wider layers (budget.py), a preset or a size; "" is
    as little as the recipe allows. ``loras``: (file, strength) of LoRAs that are added to the weights first.
    """

    recipe: str = AUTO
    options: Options = field(default_factory=Options)
    only_model: bool = False
    search: str = MSE
    keep_non_finite: bool = False
    calibration: str | os.PathLike[str] | None = None
    config_from: str | os.PathLike[str] | None = None
    loras: tuple[tuple[str | os.PathLike[str], float], ...] = ()
    budget: str = ""


@dataclass(frozen=True)
class QuantizePlan:
    """``jobs``: source tensor -> the weight it is, to become NVFP4. ``fp8``, ``restored``: the same, to FP8, to BF16.

    ``kept``: coded layers that stay in their format. ``copies``: source tensor -> tensor of the target. ``made``:
    tensor of the target -> its bytes. ``loras``: what changes tensors of these and of ``copies``. ``units``:
    what is finished together, by source tensor, or by target tensor for ``made``. ``tensors``: the file, wide elements
    first, so that all are aligned. ``model_bytes``: of the diffusion model's tensors among them.
    """

    checkpoint: Checkpoint
    settings: QuantizeSettings
    recipe: Recipe
    family: str | None
    selection: Selection
    jobs: Mapping[str, FloatWeight]
    fp8: Mapping[str, FloatWeight]
    restored: Mapping[str, FloatWeight]
    kept: Mapping[str, Layer]
    copies: Mapping[str, str]
    made: Mapping[str, bytes]
    units: Mapping[str, tuple[PlannedTensor, ...]]
    tensors: tuple[PlannedTensor, ...]
    model_bytes: int
    loras: tuple[Lora, ...]
    statistics: Statistics | None
    metadata: Mapping[str, str]
    record: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the target's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_quantization(
    source: str | os.PathLike[str],
    settings: QuantizeSettings,
    non_finite: frozenset[str] = frozenset(),
    spent: Spent | None = None,
) -> QuantizePlan:
    """Source (file, index, shard, wildcard) -> QuantizePlan. ``non_finite``: layers that are kept for what is in them.

    ``spent``: what becomes of layers by a byte budget; without it they are planned as if there were none.
    Raises CheckpointError for a file that holds no diffusion model, is quantised to NVFP4 already, or lacks `config`.
    """
    found = open_checkpoint(source)
    checkpoint = Checkpoint(with_config(found.header, settings.config_from), found.homes, found.files)
    header = checkpoint.header
    if settings.search not in (MSE, AMAX, GPTQ):
        raise CheckpointError(f"unknown search {settings.search!r}", expected=f"{MSE}, {AMAX} or {GPTQ}")
    if settings.calibration is None and settings.search == GPTQ:
        remedy = "name one in `calibration`, or choose another quality"
        raise CheckpointError("calibrated quality needs a calibration file", remedy=remedy)
    if settings.calibration is not None and settings.search == AMAX:
        raise CheckpointError("block maxima take no calibration statistics", remedy="leave out one of the two")
    model = find_model(header)
    component = find_components(header).get(DIFFUSION_MODEL)
    if component is None:
        raise CheckpointError("there is no diffusion model in it", where=header.path.name, remedy="choose another file")
    lacks = config_fault(header) if model.needs_config else ""
    if lacks:
        found = f"{lacks}, without which ComfyUI misbuilds {model.family}"
        remedy = "name a file of the same model version that has it (`config_from`)"
        raise CheckpointError(found, where=header.path.name, remedy=remedy)
    _refuse_packed(header, component.names)
    stored = dialects.detect(header.of(component.names), prefix=component.prefix)
    refuse(header.path.name, stored.layers)
    recipe = find_recipe(header, settings.recipe)
    weights, shapes, own_layers = _weights(stored, component.names)
    selection = select(recipe, shapes, settings.options)
    kept = dict(selection.kept) | {layer: NON_FINITE for layer in selection.quantized if layer in non_finite}
    kept |= {layer: found for layer in selection.quantized if isinstance(found := weights[layer], str)}
    calibrated = {layer: weights[layer] for layer in selection.quantized if layer not in kept}
    spent = spent or Spent()
    kept |= {layer: SENSITIVE for layer in selection.quantized if layer in spent.whole}
    fp8 = {weights[layer].name: weights[layer] for layer in selection.quantized if layer in spent.fp8 - kept.keys()}
    packed = [layer for layer in selection.quantized if layer not in kept and layer not in spent.fp8]
    jobs = {weights[layer].name: weights[layer] for layer in packed}
    if not jobs and not fp8:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(kept.values()).most_common(3))
        raise CheckpointError(
            f"nothing in it would be quantized ({reasons or 'no matrices'})", where=header.path.name,
            expected=f"layers for the recipe {recipe.name}",
            remedy="choose another recipe, or keep less; on the command line --quantize names layers all the same",
        )  # fmt: skip
    selection = Selection(tuple(packed), kept, selection.warnings)
    quantized = {job.layer for job in (*jobs.values(), *fp8.values())}
    loras = read_loras(settings.loras, header, component.names)
    changed = {name for lora in loras for name in lora.changes}
    restored = _restored(header, stored, quantized, changed)
    anew = quantized | {weight.layer for weight in restored.values()}
    copies, made = _others(checkpoint, stored, component.names, anew)
    still = {name: layer for name, layer in stored.layers.items() if layer.coded and name not in anew}
    names = dict(component.names) if settings.only_model else {name: name for name in header.tensors}
    copies = {name: _rename(names[name], new) for name, new in copies.items() if name in names}
    made = {_rename(names[f"{layer}.weight"], dialects.MARKER): content for layer, content in made.items()}
    units = {name: (planned_tensor(new, *_like(header, stored, name)),) for name, new in copies.items()}
    units |= {name: (planned_tensor(names[name], "BF16", weight.info.shape),) for name, weight in restored.items()}
    units |= {name: nvfp4_tensors(names[name].rpartition(".")[0], job.info.shape) for name, job in jobs.items()}
    units |= {name: fp8_tensors(names[name].rpartition(".")[0], job.info.shape) for name, job in fp8.items()}
    units |= {name: (planned_tensor(name, "U8", (len(content),)),) for name, content in made.items()}
    tensors = sorted((tensor for unit in units.values() for tensor in unit), key=lambda t: -BITS[t.dtype])
    statistics = None
    if settings.calibration is not None:
        grams = settings.search == GPTQ or bool(settings.budget)
        statistics = find_statistics(settings.calibration, calibrated, component.prefix, checkpoint, grams)
    record = _record(checkpoint, settings, recipe, model.family, selection, len(jobs))
    record["fp8"] = len(fp8)
    record["loras"] = [lora.as_dict() for lora in loras]
    record["calibrated"] = len(statistics.tensors.keys() & jobs.keys()) if statistics else 0
    metadata = _metadata(header, own_layers, settings.only_model)
    return QuantizePlan(
        checkpoint, settings, recipe, model.family, selection, jobs, fp8, restored, still, copies, made, units,
        tuple(tensors), sum(t.nbytes for name in (*component.names, *made) for t in units.get(name, ())), loras,
        statistics, metadata, record,
    )  # fmt: skip


def _refuse_packed(header: Header, names: Mapping[str, str]) -> None:
    """CheckpointError for a diffusion model that has NVFP4 layers."""
    for name in names:
        layer, _, suffix = name.rpartition(".")
        bytes_of = suffix == "weight_packed" or suffix == "weight" and header.tensors[name].dtype == "U8"
        if bytes_of and f"{layer}.weight_scale" in header.tensors:
            found = f"it is quantized to four bits already, layer {layer} for one"
            remedy = "take the BF16 or FP8 version; NVFP4 Repair brings other NVFP4 dialects to ComfyUI's"
            raise CheckpointError(found, where=header.path.name, expected="BF16, FP16, FP32 or FP8", remedy=remedy)


def _weights(
    stored: dialects.DialectPlan, names: Mapping[str, str]
) -> tuple[dict[str, FloatWeight | str], dict[str, tuple[int, ...]], dict[str, str]]:
    """-> layer without prefix: its weight, or why it cannot be read; its shape; and layer -> layer without prefix."""
    own_layers = {name.rpartition(".")[0]: own.rpartition(".")[0] for name, own in names.items()}
    matrices = {name: layer for name, layer in stored.layers.items() if len(layer.shape) > 1}
    weights = {own_layers[name]: float_weight(stored.header, layer) for name, layer in matrices.items()}
    return weights, {own_layers[name]: layer.shape for name, layer in matrices.items()}, own_layers


def _restored(
    header: Header, stored: dialects.DialectPlan, quantized: set[str], changed: set[str]
) -> dict[str, FloatWeight]:
    """Weights that are not quantised and become BF16: FP8 scaled in blocks, which ComfyUI does not have, and coded ones
    that a LoRA changes. CheckpointError for one of these that is not read here."""
    found = {}
    for name, layer in stored.layers.items():
        adapted = layer.coded and f"{name}.{layer.weight}" in changed
        if name in quantized or not (adapted or layer.kind == "fp8_blocks"):
            continue
        weight = float_weight(header, layer)
        if isinstance(weight, FloatWeight):
            found[weight.name] = weight
        elif adapted:
            text, remedy = f"a LoRA changes it, and it is {weight}", "take the BF16 or FP8 version of the model"
            raise CheckpointError(text, where=f"{header.path.name}, {name}", remedy=remedy)
    return found


def _others(
    checkpoint: Checkpoint, stored: dialects.DialectPlan, names: Mapping[str, str], anew: set[str]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """Layers written anew -> tensors to copy: new key suffix, "" for the old one; layers that need a marker: it.

    A kept layer's marker is written anew where it is damaged, missing, or more is known of the layer than it says.
    """
    header = checkpoint.header
    copies = {name: "" for name in header.tensors if name not in names or name.rpartition(".")[2] != OLD_FP8}
    made = {}
    ones = _ones(checkpoint, [f"{layer}.scale_input" for layer in stored.layers])
    for name, layer in stored.layers.items():
        done = name in anew or layer.kind == "fp8_blocks"
        for suffix in (*layer.read, *layer.ignored):
            key = f"{name}.{suffix}"
            # ComfyUI, too, takes an input scale of one in the old files for none.
            if done and (suffix in _REPLACED or suffix in layer.ignored) or key in ones:
                copies.pop(key, None)
            elif suffix in _RENAMED:
                copies[key] = _RENAMED[suffix]
        if done or name in stored.markers_to_drop():
            copies.pop(f"{name}.{dialects.MARKER}", None)
        if not done and layer.marker is not None and f"{name}.{dialects.MARKER}" not in copies:
            made[name] = json.dumps(dict(layer.marker)).encode()
    return copies, made


def _ones(checkpoint: Checkpoint, names: list[str]) -> set[str]:
    """Those of the tensors that hold the number one; each is a few bytes."""
    present = [name for name in names if name in checkpoint.header.tensors]
    if not present:
        return set()
    with Source(checkpoint) as reader:
        return {name for name in present if (value := reader.tensor(name).float()).numel() == 1 and value.item() == 1}


def _rename(name: str, suffix: str) -> str:
    return f"{name.rpartition('.')[0]}.{suffix}" if suffix else name


def _like(header: Header, stored: dialects.DialectPlan, name: str) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a copy: a scale a row gets a column of its own, or it would multiply columns."""
    info, layer = header.tensors[name], stored.layers.get(name.rpartition(".")[0])
    if layer is not None and name == f"{layer.name}.{layer.scale}" and layer.scaled_by_rows(header):
        return info.dtype, (layer.shape[0], *[1] * (len(layer.shape) - 1))
    return info.dtype, info.shape


def _metadata(header: Header, own_layers: Mapping[str, str], only_model: bool) -> dict[str, str]:
    """All of the source's entries but those that describe how the diffusion model's layers are stored."""
    about = ("quantization_config", HEADER_ENTRY)
    metadata = {key: text for key, text in header.metadata.items() if key not in about}
    ours = {*own_layers, *own_layers.values()}
    others = {} if only_model else {key: said for key, said in header.listed_layers().items() if key not in ours}
    return metadata | ({HEADER_ENTRY: layers_entry(others)} if others else {})


def _record(
    checkpoint: Checkpoint, settings: QuantizeSettings, recipe: Recipe, family: str | None, selection: Selection,
    layers: int,
) -> dict[str, Any]:
    """What card and provenance say of the file, as far as headers tell."""
    header = checkpoint.header
    components = find_components(header)
    contents = ["diffusion model"] if settings.only_model else [part.title for part in components.values()]
    # Identity with False, since 0, which equals it, is a number of blocks that was asked for.
    options = asdict(settings.options).items()
    given = {key: value for key, value in options if not (value is None or value is False or value == ())}
    return {
        "tool": tool_version(),
        "family": family,
        "recipe": recipe.name,
        "why": recipe.why,
        "profile": list(recipe.sources),
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "search": settings.search,
        "calibration": Path(settings.calibration).name if settings.calibration else None,
        "layers": layers,
        "kept": dict(Counter(selection.kept.values()).most_common()),
        "licence": licence_of(header),
        "contents": ", ".join(contents),
        "has_vae": not settings.only_model and VIDEO_VAE in components,
        "source_files": [file.path.name for file in checkpoint.files],
        "source_bytes": header.file_size,
        "warnings": list(selection.warnings),
    }
