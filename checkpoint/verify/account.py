# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a file and of its source has a place: copied, coded anew, rightly left out, or named as a fault.

Headers decide it; no values are read here but the few of input scales. Names are compared without the prefix of the
diffusion model, which a file may have and its source not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..file.header import HEADER_ENTRY, MARKER, CheckpointError
from ..file.shards import Checkpoint, Source
from ..identify.components import COMPONENTS, DIFFUSION_MODEL, find_components
from ..identify.declarations import match_entries
from ..identify.dialects import DialectPlan
from ..identify.formats import OLD_FP8
from ..identify.layers import Layer
from ..identify.values import check_input_scale
from ..write.card import PROVENANCE
from ..write.weights import FloatWeight, float_weight

INPUTS = ("input_scale", "scale_input", "input_global_scale", "input_absmax")
# Entries of a header that speak of how a file is stored, or of who wrote it: those of file and source may differ.
# All others of the source's are the model's, and a file of it keeps them.
OWN_ENTRIES = (HEADER_ENTRY, "quantization_config", "format", PROVENANCE)
# FP8 files of two generations call the same numbers by two names.
_ALIASES = {"weight_scale": ("scale_weight", "weight_scale_inv"), "input_scale": ("scale_input",)}


class Side:
    """One of the two checkpoints, its tensors by names without the model's prefix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.header = checkpoint, checkpoint.header
        self.components = find_components(self.header)
        component = self.components.get(DIFFUSION_MODEL)
        if component is None:
            remedy = "choose a diffusion model or a full checkpoint"
            raise CheckpointError("there is no diffusion model in it", where=self.header.path.name, remedy=remedy)
        self.names = {name: component.names.get(name, name) for name in self.header.tensors}
        self.full = {own: name for name, own in self.names.items()}
        self.own = component.names
        self.prefix = component.prefix
        self.plan: DialectPlan | None = None
        self.stored: Mapping[str, Layer] = {}

    def take(self, plan: DialectPlan) -> None:
        """Say how its layers are stored."""
        self.plan, self.stored = plan, plan.layers

    def layer(self, layer: str) -> str:
        """Layer as stored -> without prefix."""
        return layer.removeprefix(self.prefix)

    def weight(self, own: str) -> FloatWeight | None:
        """FloatWeight of a layer, or None."""
        layer = self.stored.get(self.prefix + own)
        found = None if layer is None else float_weight(self.header, layer)
        return None if isinstance(found, str) else found


@dataclass
class Account:
    """Where every tensor belongs. Names of ``recoded`` and ``copies`` are the file's, all others without prefix.

    ``recoded``: weight -> how file and source store its layer; ``copies``: tensor -> that of the source it must equal.
    """

    recoded: dict[str, tuple[Layer, Layer]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()


def account_for(ours: Side, theirs: Side, plan: DialectPlan) -> Account:
    """Both sides, the file's plan -> Account."""
    found, alone = Account(), []
    explained, used = set(), set()  # full names in the file, in the source
    for name, mine in ours.stored.items():
        other = theirs.stored.get(theirs.prefix + ours.layer(name))
        if other is None:
            if mine.coded:
                alone.append(ours.layer(name))
                explained |= _keys(mine, mine.read)
        elif mine.kind != other.kind or (mine.coded and _written_otherwise(ours, theirs, mine, other)):
            found.recoded[f"{name}.{mine.weight}"] = mine, other
            explained |= _keys(mine, mine.read)
            used |= _keys(other, (*other.read, *other.ignored))
        elif mine.coded:
            explained |= _keys(mine, mine.read)
            used |= _keys(other, other.read)
            _pair(found, ours, theirs, mine, other)
        elif other.marker is None:
            used |= {f"{other.name}.{MARKER}"}  # an empty marker on a plain weight says nothing
    for name in ours.header.tensors.keys() - explained:
        if name.rpartition(".")[2] != OLD_FP8:
            _copy(found, ours, theirs, name, theirs.full.get(ours.names[name]))
    used |= {theirs.full[own] for own in ours.names.values() if own in theirs.full}
    used |= {name for name in theirs.header.tensors if name.rpartition(".")[2] == OLD_FP8}
    missing = theirs.header.tensors.keys() - used
    others = set(theirs.header.tensors) - set(theirs.own)
    if others and missing >= others and ours.components.keys() == {DIFFUSION_MODEL}:
        found.left_out = tuple(COMPONENTS[key] for key in theirs.components if key != DIFFUSION_MODEL)
        missing -= others
    found.alone, found.missing = tuple(alone), tuple(sorted({*found.missing, *(theirs.names[n] for n in missing)}))
    found.extra = tuple(sorted(found.extra))
    found.faults = sorted(found.faults) + _declarations(ours, theirs, plan)
    return found


def _pair(found: Account, ours: Side, theirs: Side, mine: Layer, other: Layer) -> None:
    """A layer that both store in one coded format: every tensor of it is a copy, and it is declared alike."""
    for suffix in mine.read:
        if suffix != MARKER:
            same = next((key for key in (suffix, *_ALIASES.get(suffix, ())) if key in other.read), None)
            _copy(found, ours, theirs, f"{mine.name}.{suffix}", None if same is None else f"{other.name}.{same}")
    for suffix in other.read:
        renamed = next((new for new, old in _ALIASES.items() if suffix in old), suffix)
        # Older files have input scales of one, which ComfyUI takes for none.
        if suffix not in (MARKER, "scale_input") and not {suffix, renamed} & set(mine.read):
            found.missing += (f"{theirs.layer(other.name)}.{suffix}",)
    if mine.marker is not None and other.marker is not None and dict(mine.marker) != dict(other.marker):
        said, expected = json.dumps(dict(mine.marker)), json.dumps(dict(other.marker))
        found.faults.append(f"{ours.layer(mine.name)}: it is declared {said}, in the source {expected}")


def _copy(found: Account, ours: Side, theirs: Side, name: str, other: str | None) -> None:
    """A tensor of the file that is to be the source's own, bit for bit."""
    if other is None:
        found.extra += (ours.names[name],)
        return
    info, wanted = ours.header.tensors[name], theirs.header.tensors[other]
    column = info.numel == wanted.numel and info.shape == (*wanted.shape, 1)  # a scale a row, as ComfyUI wants it
    scale = name.rpartition(".")[2] == "weight_scale"
    if info.dtype == wanted.dtype and (info.shape == wanted.shape or scale and column):
        found.copies[name] = other
    else:
        text = f"it is {info.dtype} of shape {info.shape}, in the source {wanted.dtype} of shape {wanted.shape}"
        found.faults.append(f"{ours.names[name]}: {text}")


def _declarations(ours: Side, theirs: Side, plan: DialectPlan) -> list[str]:
    """Markers that are damaged or missing while other layers have theirs; header entries that were lost or changed."""
    found = [f"{ours.layer(name)}: its `{MARKER}` marker {fault}" for name, fault in plan.faults().items()]
    listed = match_entries(ours.header, ours.stored, ours.prefix).layers
    coded = {name for name, layer in ours.stored.items() if layer.coded}
    declared = {name for name in coded if MARKER in ours.stored[name].read or name in listed}
    if declared and plan.native:
        text = f"nothing declares its format (`{MARKER}`), as other layers have it"
        found += [f"{ours.layer(name)}: {text}" for name in sorted(coded - declared)]
    has = ours.header.metadata
    for key, wanted in sorted(theirs.header.metadata.items()):
        if key not in OWN_ENTRIES and _parsed(wanted) != _parsed(has.get(key)):
            text = "it is not that of the source" if key in has else "the file lacks it"
            found.append(f"header entry `{key}`: {text}")
    return found


def input_scale_faults(ours: Side, reader: Source) -> list[str]:
    """Input scales that are NaN, infinite, zero or negative."""
    found, where = [], ours.header.path.name
    for name, layer in ours.stored.items():
        for suffix in INPUTS:
            if suffix in layer.read:
                try:
                    check_input_scale(where, name, suffix, reader.tensor(f"{name}.{suffix}"))
                except CheckpointError as error:
                    found.append(f"{ours.layer(name)}: {error}")
    return found


def _keys(layer: Layer, suffixes) -> set[str]:
    return {f"{layer.name}.{suffix}" for suffix in suffixes}


def _written_otherwise(ours: Side, theirs: Side, mine: Layer, other: Layer) -> bool:
    """Whether a layer that both have in one format is of another dtype, or of another dialect."""
    if mine.kind == "nvfp4":
        return ours.plan.dialect != theirs.plan.dialect
    tensors, sources = ours.header.tensors, theirs.header.tensors
    return tensors[f"{mine.name}.{mine.weight}"].dtype != sources[f"{other.name}.{other.weight}"].dtype


def _parsed(text: str | None) -> object:
    try:
        return json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return text
