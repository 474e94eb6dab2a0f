# SPDX-License-Identifier: Apache-2.0
"""What keeps stock ComfyUI from loading a checkpoint's quantised layers, found without loading a weight.

Beside the header only `comfy_quant` markers are read, a few bytes each (files exist whose markers are all NUL), and a
few block scales where their order is open.
``inspect_checkpoint`` reports these faults, ``repair`` removes their causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..file.header import HEADER_ENTRY, CheckpointError, Header
from ..file.shards import Checkpoint, Source
from . import dialects
from .components import AUDIO_VAE, DIFFUSION_MODEL, VIDEO_VAE, Component, find_components, model_of
from .formats import FORMATS, FP8_FORMATS, OLD_FP8
from .layers import Layer
from .signatures import Model, config_fault, diffusers_names
from .vae_signatures import find_vaes

FULL_PREFIX = "model.diffusion_model."
# What ComfyUI's loaders for diffusion models strip: comfy/model_detection.py, unet_prefix_from_state_dict.
_STRIPPED = ("", FULL_PREFIX, "model.model.", "net.", "model.")
_STOCK_ON_FOREIGN = {
    "modelopt": "does not recognise the layers; with markers added it loads and the result is noise, without an error",
    "modelopt_swizzled": "loads it where the header lists the layers, and the result is noise, without an error",
    "compressed_tensors": "stops with a KeyError",
    "lightx2v": "does not recognise the layers",
}
# Faults of the file around the tensors -> what ``repair`` does about them.
CONTAINER = {"shards": "which NVFP4 Repair joins", "trailing": "which NVFP4 Repair cuts off"}


@dataclass(frozen=True)
class Fault:
    """One fault. ``stock``: what ComfyUI's own loaders do because of it; ``curable``: whether ``repair`` removes it."""

    code: str
    text: str
    stock: str
    curable: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """``plan``: the dialect of the layers outside the VAEs, None where it is open (then ``open_dialect`` says why).

    ``unmarked``: quantised layer -> the marker it lacks. ``misnamed``: layer as the header names it -> its name.
    ``prefix``: of the diffusion model as stored; ``new_prefix``: the one ComfyUI needs.
    """

    checkpoint: Checkpoint
    components: Mapping[str, Component]
    model: Model | None
    plan: dialects.DialectPlan | None
    open_dialect: str | None
    faults: tuple[Fault, ...]
    unmarked: Mapping[str, dict]
    misnamed: Mapping[str, str]
    prefix: str
    new_prefix: str

    def has(self, code: str) -> bool:
        """Whether ``code`` is among the faults."""
        return any(fault.code == code for fault in self.faults)


def diagnose(checkpoint: Checkpoint, dialect: str = dialects.AUTO) -> Diagnosis:
    """Checkpoint -> Diagnosis. An open dialect is a fault, damage a CheckpointError."""
    header = checkpoint.header
    model, components = model_of(header, find_vaes(header)), find_components(header)
    prefix = model.prefix if model else ""
    vaes = {name for key in (VIDEO_VAE, AUDIO_VAE) if key in components for name in components[key].names}
    body = header.of(name for name in header.tensors if name not in vaes)
    with Source(checkpoint) as reader:
        plan, open_dialect = _plan(body, dialect, reader.tensor)
    faults = list(_container_faults(checkpoint))
    unmarked, misnamed = {}, {}
    if plan is None:
        stock = "fails with a size mismatch, or (DynamicVRAM) loads silently and stops at the first Linear"
        faults.append(Fault("open_dialect", open_dialect, stock, curable=False))
    else:
        misnamed = dict(plan.misnamed) | _misnamed(header, plan.groups, prefix)
        unmarked = _unmarked(header, plan, misnamed)
        faults += _layer_faults(header, plan, unmarked, misnamed)
    others = [key for key in components if key != DIFFUSION_MODEL]
    new_prefix = prefix
    if model is not None and (prefix not in _STRIPPED or (others and prefix != FULL_PREFIX)):
        new_prefix = FULL_PREFIX if others else ""
        kind = "full checkpoint" if others else "diffusion model"
        text = f"the diffusion model's names begin with {prefix!r}, those of a {kind} with {new_prefix!r}"
        faults.append(Fault("prefix", text, "does not recognise the model"))
    diffusers = diffusers_names(header) if model is None else None
    if diffusers is not None and not diffusers.loads:
        faults.append(Fault("diffusers", diffusers.found, diffusers.stock, curable=False))
    lacks = config_fault(header) if model is not None and model.needs_config else ""
    if lacks:
        stock = "guesses the model's settings, several of them wrong"
        faults.append(Fault("config", f"{lacks}, from which ComfyUI builds this model", stock, curable=False))
    return Diagnosis(
        checkpoint, components, model, plan, open_dialect, tuple(faults), unmarked, misnamed, prefix, new_prefix
    )


def _container_faults(checkpoint: Checkpoint):
    """What keeps ComfyUI from reading the files as such."""
    if checkpoint.sharded:
        text = f"it is in {len(checkpoint.files)} files"
        stock = "reads the one file picked: no model is recognised, or one that lacks the tensors of the others"
        yield Fault("shards", text, stock)
    for header in checkpoint.files:
        if header.trailing:
            text = f"{header.trailing:,} bytes follow the last tensor of {header.path.name}"
            yield Fault("trailing", text, "refuses the file (not fully covered), and reads it where DynamicVRAM is on")


def _plan(body: Header, dialect: str, read) -> tuple[dialects.DialectPlan | None, str | None]:
    try:
        return dialects.detect(body, dialect, read=read, shown=True), None
    except CheckpointError as error:
        if dialect != dialects.AUTO or not _is_open(body):
            raise
        return None, str(error).removeprefix(body.path.name).lstrip(":, ")


def _is_open(body: Header) -> bool:
    """Whether detection failed for want of a declaration: the file is sound once a dialect is stated."""
    for name in dialects.DIALECTS:
        try:
            dialects.detect(body, name, shown=True)
        except CheckpointError:
            continue
        return True
    return False


def _misnamed(header: Header, groups: Mapping[str, dialects.Group], prefix: str) -> dict[str, str]:
    """Layers that the header names without the model's prefix -> their names."""
    named = header.listed_layers()
    return {layer: prefix + layer for layer in named if layer not in groups and prefix and prefix + layer in groups}


def _unmarked(header: Header, plan: dialects.DialectPlan, misnamed: Mapping[str, str]) -> dict[str, dict]:
    """Quantised layers that neither a marker nor the header declares -> what to declare."""
    declared = {*header.listed_layers(), *misnamed.values()}
    return {
        layer: content
        for layer, content in plan.formats.items()
        if layer in plan.groups and dialects.MARKER not in plan.groups[layer] and layer not in declared
    }


def _layer_faults(
    header: Header, plan: dialects.DialectPlan, unmarked: Mapping[str, dict], misnamed: Mapping[str, str]
) -> list[Fault]:
    faults = []
    if not plan.native:
        title = dialects.DIALECTS[plan.dialect].title
        text = f"{len(plan.nvfp4):,} layers are in the dialect {plan.dialect} ({title})"
        faults.append(Fault("foreign", text, _STOCK_ON_FOREIGN[plan.dialect]))
    elif unmarked and not _old_fp8_only(header, unmarked):
        text = f"{len(unmarked):,} quantized layers are declared neither by markers nor by the header"
        stock = "fails with a size mismatch, or (DynamicVRAM) loads silently and stops at the first Linear"
        if not any(content["format"] == "nvfp4" for content in unmarked.values()):
            stock = "loads their codes without the scales: noise, without an error"
        faults.append(Fault("unmarked", text, stock))
    if misnamed:
        text = f"the header names {len(misnamed):,} layers with another prefix than their tensors have"
        stock = "loads it with Load Diffusion Model at best; checkpoint loaders do not find the quantized layers"
        faults.append(Fault("misnamed", text, stock))
    foreign = {name: layer.foreign for name, layer in plan.layers.items() if layer.foreign}
    if foreign:
        text = f"{len(foreign):,} layers are declared {', '.join(sorted(set(foreign.values())))}, which ComfyUI lacks"
        faults.append(Fault("names", text, "stops with a KeyError"))
    dropped = sorted(plan.markers_to_drop() - foreign.keys())
    if dropped:
        fault = plan.layers[dropped[0]].fault or "says nothing"
        text = f"the `comfy_quant` markers of {len(dropped):,} layers are no JSON, that of {dropped[0]} {fault}"
        faults.append(Fault("markers", text, "stops with a JSONDecodeError"))
    for text in plan.strays.values():
        stock = "leaves it out, or does not recognise the model"
        faults.append(Fault("stray", text, stock, curable=False))
    flat = [name for name, layer in plan.layers.items() if layer.scaled_by_rows(header) and _is_vector(header, layer)]
    if flat:
        text = f"the scales of {len(flat):,} layers, one a row, are vectors, that of {flat[0]} for one"
        stock = "multiplies columns by them: an error, or noise where a layer has as many columns as rows"
        faults.append(Fault("rows", text, stock))
    lost = [name for name, layer in plan.layers.items() if layer.loses_scale]
    if lost:
        text = f"{len(lost):,} weights that are no matrices are FP8 with a scale, {lost[0]} for one"
        faults.append(Fault("format", text, "drops the scale, without an error", curable=False))
    for kind in dict.fromkeys(layer.kind for layer in plan.layers.values()):
        own = [layer for layer in plan.layers.values() if layer.kind == kind]
        form, text = FORMATS[kind], f"{len(own):,} layers are {FORMATS[kind].title}"
        if not form.loads or any(layer.undeclared for layer in own):
            text += "" if not form.loads else ", and nothing declares how they are to be read"
            stock = "does not read them, or takes their codes for numbers"
            faults.append(Fault("format", text, stock, curable=False))
        elif not form.repairs:
            stock = "loads their codes without the scales: noise, without an error"
            faults.append(Fault("format", f"{text}, which ComfyUI has no format for", stock, curable=False))
    if any(layer.low_rank for layer in plan.layers.values()):
        text = "a low-rank product is to be added to its NVFP4 layers (SVDQuant)"
        faults.append(Fault("low_rank", text, "leaves it out, without an error", curable=False))
    return faults


def _is_vector(header: Header, layer: Layer) -> bool:
    return len(header.tensors[f"{layer.name}.{layer.scale}"].shape) == 1


def _old_fp8_only(header: Header, unmarked: Mapping[str, dict]) -> bool:
    """Whether the layers without a mark are those of the older FP8 files, which ComfyUI converts itself.

    It takes them all for E4M3 with one scale.
    """
    old = all(header.tensors.keys() & {f"{layer}.scale_weight"} for layer in unmarked)
    same = all(content["format"] == FP8_FORMATS["F8_E4M3"] for content in unmarked.values())
    one = all(header.tensors[f"{layer}.scale_weight"].numel == 1 for layer in unmarked) if old else False
    declared = OLD_FP8 in {name.rpartition(".")[2] for name in header.tensors}
    return declared and old and same and one and HEADER_ENTRY not in header.metadata
