"""An NVFP4 file of any dialect -> the host's MODEL, and a report of what was loaded and how it will compute.

The host does the loading. This module finds the dialect, replaces each packed weight in the state dict by a tensor in
the host's layout that shows its logical shape, writes the markers the host looks for, and passes its own operations
class. Native tensors are not copied: they stay slices of the mapped file.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections import Counter
from dataclasses import dataclass

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS

from ...checkpoint.file.header import MARKER, CheckpointError, read_header
from ...checkpoint.file.shards import Checkpoint, Source, open_checkpoint
from ...checkpoint.identify.dialects import AUTO, DIALECTS, DialectPlan, detect, host_layer, input_scale
from ...checkpoint.identify.formats import LOW_RANK, OLD_FP8, SMOOTHING
from ...checkpoint.identify.layers import Layer, refuse
from ...checkpoint.identify.signatures import Model, find_model, transformer_config
from ...checkpoint.identify.values import Get, check_layer, expand, read_scale
from ...kernels import backends
from .. import residency
from ..compute.block_graphs import use_graphs
from ..compute.device_modes import remember
from ..compute.fusions import fuse
from ..compute.linear import supports, weight_only_operations, wrap
from ..compute.lora_patcher import use_branches
from ..compute.modes import AUTO as FASTEST
from ..compute.modes import MODES, Compute, describe, parse_overrides, pick_mode, plan_layers
from .files import read_tensors

logger = logging.getLogger(__name__)

COMPUTE_MODES = (*MODES, FASTEST)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and how it computes; ``str()`` is the text shown to the user."""

    file: str
    family: str
    dialect: str
    evidence: str
    layers: dict[str, int]  # format -> number of Linears
    gigabytes: float
    compute: str
    compute_reason: str
    modes: dict[str, int]  # mode -> number of NVFP4 Linears
    backend: str
    reason: str
    device: str
    dynamic_vram: bool
    config_from: str | None
    graphs: str  # CUDA graphs of the blocks: which, or why none; empty if nobody would expect any
    unknown: str = ""  # what of the host's book-keeping this pack does not find, and does without

    def __str__(self) -> str:
        layers = ", ".join(f"{count:,} {name}" for name, count in self.layers.items())
        how = f"{self.compute} ({self.compute_reason})" if self.compute_reason != "asked for" else self.compute
        if len(self.modes) > 1:
            how += f": {describe(self.modes)}"
        how += f", weights decoded by the {self.backend} backend ({self.reason})"
        if self.dialect == "none":
            how = "as ComfyUI's own loader, there is nothing to dequantise"
        lines = [
            f"{self.file}: {self.family}, {self.gigabytes:.2f} GB",
            f"dialect: {self.dialect} ({self.evidence})",
            f"layers: {layers}",
            f"compute: {how}",
            f"device: {self.device}, DynamicVRAM {'on' if self.dynamic_vram else 'off'}",
        ]
        if self.graphs:
            lines.append(f"CUDA graphs: {self.graphs}")
        if self.unknown:
            lines.append(self.unknown)
        if self.config_from:
            lines.append(f"config taken from {self.config_from}")
        return "\n".join(lines)


def load_model(
    path: str,
    compute: str = "bf16",
    dialect: str = AUTO,
    backend: str = "auto",
    config_from: str | None = None,
    disable_dynamic: bool = False,
    layer_compute: str = "",
) -> tuple:
    """File, options -> (ModelPatcher, LoadReport).

    ``compute``, ``layer_compute``: host/compute/modes.py. ``config_from``: a safetensors file whose header entry
    `config` is used where ``path`` has none. Raises CheckpointError for a file that cannot be loaded rightly,
    ValueError for an option that cannot be had.
    """
    device = comfy.model_management.get_torch_device()
    picked = pick_mode(compute, device)
    overrides = parse_overrides(layer_compute, device)
    backend_name, reason = backends.pick_backend(device, backend)
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    model = find_model(header)
    plan = plan_file(checkpoint, dialect, model.prefix)
    how = _plan_compute(picked, overrides, plan, model)
    state_dict, metadata = read_tensors(checkpoint)
    config_source = _complete_config(metadata, header, model, config_from)
    state_dict = {key: tensor for key, tensor in state_dict.items() if key.startswith(model.prefix)}
    state_dict = {key[len(model.prefix) :]: tensor for key, tensor in rewrite(plan, state_dict).items()}
    compute_dtype = _compute_dtype(state_dict, metadata, device, header.path.name)
    operations = weight_only_operations(compute_dtype, device, backend, header.path.name, how)
    options = {"custom_operations": operations}
    state_dict_keys = frozenset(state_dict)
    patcher = use_branches(_load(state_dict, options, metadata, disable_dynamic, header.path.name))
    check_linears(patcher.model.diffusion_model, operations.Linear, state_dict_keys, header.path.name)
    fuse(patcher.model.diffusion_model, operations.Linear)

    def compute_on(other: torch.device) -> Compute:
        modes = MODES if how.uses("fp4") else tuple(mode for mode in MODES if mode != "fp4")
        return _plan_compute(pick_mode(compute, other, modes), parse_overrides(layer_compute, other), plan, model)

    remember(patcher.model.diffusion_model, device, operations.Linear, compute_on)
    patcher.cached_patcher_init = (_reload, (path, compute, dialect, backend, config_from, layer_compute))
    report = _report(plan, model, how, (backend_name, reason), device, patcher, config_source)
    logger.info("%s", str(report).replace("\n", "; "))
    return patcher, report


def _reload(path, compute, dialect, backend, config_from, layer_compute="", disable_dynamic: bool = False):
    """The host's factory for clones that need weights of their own: another GPU, or no DynamicVRAM."""
    return load_model(path, compute, dialect, backend, config_from, disable_dynamic, layer_compute)[0]


def _plan_compute(picked: tuple[str, str], overrides: dict[str, str], plan: DialectPlan, model: Model) -> Compute:
    """Modes by layer, named as the model will name them."""
    start = len(model.prefix)
    matrices = [
        layer[start:]
        for layer, group in plan.groups.items()
        if layer in plan.nvfp4 or "weight" in group and len(group["weight"].shape) == 2
    ]
    return plan_layers(picked, overrides, plan.header, [layer[start:] for layer in plan.nvfp4], matrices)


def _complete_config(metadata: dict, header, model: Model, config_from: str | None) -> str | None:
    """Make sure the metadata has the `config` the model needs -> the name of the file it came from, if another."""
    if transformer_config(header) is not None:
        return None
    if config_from is not None:
        other = read_header(config_from)
        if transformer_config(other) is None:
            found = "its header has no `config` with a `transformer` section"
            raise CheckpointError(found, where=other.path.name, expected="the file of a model of the same version")
        metadata["config"] = other.metadata["config"]
        return other.path.name
    if model.needs_config:
        raise CheckpointError(
            f"its header has no `config`, and {model.family} cannot be built rightly without it: ComfyUI would guess "
            "dimensions and leave rotary embeddings and time scales at wrong defaults",
            where=header.path.name,
            expected="the header entry `config` of the original file",
            remedy="set `config_from` to another file of the same model version, or convert the file again",
        )
    return None


def plan_file(checkpoint: Checkpoint, dialect: str = AUTO, prefix: str = "") -> DialectPlan:
    """Checkpoint -> DialectPlan of what can be loaded. CheckpointError, which names the layer, for what cannot."""
    header = checkpoint.header
    with Source(checkpoint) as reader:
        plan = detect(header, dialect, prefix, reader.tensor)
    refuse(header.path.name, plan.layers)
    for layer, fault in plan.faults().items():
        if not plan.stated:
            raise CheckpointError(
                f"its `{MARKER}` marker {fault}",
                where=f"{header.path.name}, layer {layer}",
                expected='{"format": "nvfp4"} or another format that fits its tensors and this ComfyUI',
                remedy="download the file again, or state its `dialect` (comfy, if a tool for ComfyUI wrote it): "
                "the markers are then made from the tensors",
            )
    for name, content in plan.formats.items():
        if content["format"] not in QUANT_ALGOS:
            where, found = f"{header.path.name}, layer {name}", f"its format is {content['format']!r}"
            known = f"one that this ComfyUI knows: {', '.join(QUANT_ALGOS)}"
            raise CheckpointError(found, where=where, expected=known, remedy="update ComfyUI")
    if plan.absent:
        text = "%s declares %d layers that it does not have, such as %s"
        logger.warning(text, header.path.name, len(plan.absent), plan.absent[0])
    return plan


def rewrite(plan: DialectPlan, state_dict: dict) -> dict:
    """State dict as stored -> in the host's layout with markers, layer by layer and in place.

    NVFP4 weights become the host's QuantizedTensor; a converted layer's original is dropped before the next is read.
    FP8 scaled in blocks, which the host does not have, becomes BF16. Raises CheckpointError for scales that are NaN.
    """
    for name, layer in plan.layers.items():
        if f"{name}.{layer.weight}" not in state_dict:
            continue  # of another part of the file
        get = functools.partial(_tensor_of, state_dict, name)
        check_layer(plan.header.path.name, layer, get)
        new = _converted(plan, layer, get)
        if layer.marker is not None:
            new[MARKER] = torch.tensor(list(json.dumps(dict(layer.marker)).encode()), dtype=torch.uint8)
        for suffix in (*layer.read, *layer.ignored):
            if suffix not in _KEPT_KEYS or suffix in new:
                state_dict.pop(f"{name}.{suffix}", None)
        state_dict.update({f"{name}.{suffix}": tensor for suffix, tensor in new.items()})
    for key in [key for key in state_dict if key.rpartition(".")[2] == OLD_FP8]:
        del state_dict[key]
    return state_dict


def _converted(plan: DialectPlan, layer: Layer, get: Get) -> dict[str, torch.Tensor]:
    """The tensors of one layer that the host wants otherwise, by key suffix; all others of it stay."""
    where = f"{plan.header.path.name}, layer {layer.name}"
    if layer.name in plan.nvfp4:
        new = {"weight": wrap(host_layer(plan, layer.name, get))}
        activation = input_scale(plan, layer.name, get)
        if activation is not None:
            new["input_scale"] = activation
        if SMOOTHING in layer.read and not supports(SMOOTHING):
            found = f"it has AWQ smoothing (`{SMOOTHING}`), which this ComfyUI would ignore"
            expected = "a ComfyUI of August 2026 or later"
            raise CheckpointError(found, where=where, expected=expected, remedy="update ComfyUI")
        return new
    if layer.scale is None or not layer.kind.startswith("fp8"):
        # What the host reads by itself stays under its own names.
        return {suffix: get(suffix) for suffix in layer.read if suffix != MARKER}
    scale = expand(read_scale(plan.header.path.name, layer, get), layer)
    if layer.kind == "fp8_blocks":
        return {"weight": (get("weight").float() * scale).to(torch.bfloat16)}
    new = {"weight": get("weight"), "weight_scale": scale}
    old = next((get(suffix) for suffix in ("input_scale", "scale_input") if suffix in layer.read), None)
    # The host, too, takes an input scale of one in its older files for none.
    if old is not None and not (layer.scale == "scale_weight" and old.item() == 1):
        new["input_scale"] = old.float().reshape(())
    return new


# Tensors of a layer that the host, or the pack's Linear, takes as they are.
_KEPT_KEYS = (SMOOTHING, *LOW_RANK)


def check_linears(model: torch.nn.Module, linear: type, keys: frozenset[str], name: str) -> None:
    """Refuse Linears that the host gave a weight of another shape, or none though the file has parts of them.

    A layer of which the file has nothing may be one that this host builds and the model does not use: a warning.
    """
    absent = []
    present = {key.rpartition(".")[0] for key in keys}
    remedy = "the file is damaged, or of another version of the model than its `config` says: download it again"
    for layer, module in model.named_modules():
        if not isinstance(module, linear):
            continue
        shape, stored = (module.out_features, module.in_features), stored_shape(module)
        if stored is None and layer in present:
            found = "it has no `weight`"
        elif stored is not None and stored != shape:
            found = f"its `weight` has shape {stored}"
        elif layer in present and module.bias is not None and f"{layer}.bias" not in keys:
            found, shape = "it has no `bias`", shape[:1]
        else:
            absent += [layer] if stored is None else []
            continue
        where, expected = f"{name}, layer {layer}", f"one of shape {shape}"
        raise CheckpointError(found, where=where, expected=expected, remedy=remedy)
    if absent:
        logger.warning("%s has nothing of %d layers of the model, such as %s", name, len(absent), absent[0])


def stored_shape(module: torch.nn.Module) -> tuple[int, ...] | None:
    """Shape of a Linear's weight; of FP8 and INT8 that of the codes, since the host's tensor shows the model's."""
    weight = module.weight
    if weight is None:
        return None
    codes = getattr(weight, "_qdata", None)
    by_code = codes is not None and module.__dict__.get("quant_format") in _ONE_BY_ONE
    return tuple((codes if by_code else weight).shape)


_ONE_BY_ONE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # formats with a code for each number


def _tensor_of(state_dict: dict, layer: str, suffix: str) -> torch.Tensor:
    return state_dict[f"{layer}.{suffix}"]


def _compute_dtype(state_dict: dict, metadata: dict, device: torch.device, name: str) -> torch.dtype:
    """The dtype the host would compute this model's quantised layers in on ``device``."""
    # The host looks behind its own prefixes first, then takes the names as they are.
    for candidate in (comfy.model_detection.unet_prefix_from_state_dict(state_dict), ""):
        found = comfy.model_detection.model_config_from_unet(state_dict, candidate, metadata=metadata)
        if found is not None:
            supported = found.supported_inference_dtypes
            return comfy.model_management.unet_manual_cast(None, device, supported) or torch.bfloat16
    raise CheckpointError(
        "ComfyUI does not recognise a diffusion model in it",
        where=name,
        expected="a model family this ComfyUI knows",
        remedy="update ComfyUI, or pick the diffusion model's own file",
    )


def _load(state_dict: dict, options: dict, metadata: dict, disable_dynamic: bool, name: str):
    load = comfy.sd.load_diffusion_model_state_dict
    arguments = {"model_options": options, "metadata": metadata}
    if "disable_dynamic" in inspect.signature(load).parameters:  # since 0.15.1
        arguments["disable_dynamic"] = disable_dynamic
    patcher = load(state_dict, **arguments)
    if patcher is None:
        raise CheckpointError("ComfyUI could not build a model from it", where=name, remedy="update ComfyUI")
    return patcher


def count_layers(plan: DialectPlan) -> Counter[str]:
    """Format -> number of matrices."""
    layers = Counter(content["format"] for content in plan.formats.values())
    plain = [layer for name, layer in plan.layers.items() if name not in plan.formats and len(layer.shape) == 2]
    names = {"fp8_blocks": "FP8 in blocks, restored to BF16"}
    dtypes = (names.get(layer.kind) or plan.groups[layer.name][layer.weight].dtype for layer in plain)
    return layers + Counter(dtypes)


def _report(plan: DialectPlan, model: Model, compute: Compute, backend, device, patcher, config_source) -> LoadReport:
    tensors = {key: info for key, info in plan.header.tensors.items() if key.startswith(model.prefix)}
    layers = count_layers(plan)
    modules = patcher.model.diffusion_model.modules()
    modes = Counter(mode for module in modules if (mode := module.__dict__.get("nvfp4_mode")))
    return LoadReport(
        file=plan.header.path.name,
        family=model.family or type(patcher.model).__name__,
        dialect=plan.dialect or "none",
        evidence=plan.evidence,
        layers=dict(layers.most_common()),
        gigabytes=sum(info.nbytes for info in tensors.values()) / 1e9,
        compute=compute.mode,
        compute_reason=compute.reason,
        modes=dict(modes.most_common()),
        backend=backend[0],
        reason=backend[1],
        device=str(device),
        dynamic_vram=bool(getattr(patcher, "is_dynamic", bool)()),
        config_from=config_source,
        graphs=use_graphs(patcher),
        unknown=str(residency.check()),
    )


__all__ = ["COMPUTE_MODES", "DIALECTS", "LoadReport", "load_model", "rewrite"]
