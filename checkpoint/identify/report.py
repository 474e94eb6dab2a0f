# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint and what becomes of it: the `inspect` command and node. Only the header is read.

``draw/inspect.py`` draws the same record.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ...measure.escape import report as text_report
from ...measure.text import size_text, table
from ..file.header import CheckpointError, Header
from ..file.shards import open_checkpoint
from . import dialects
from .components import AUDIO_VAE, COMPONENTS, DIFFUSION_MODEL, TEXT_PROJECTION, VIDEO_VAE, Component
from .diagnosis import CONTAINER, Diagnosis, diagnose
from .formats import FORMATS, title_of, weight_suffix
from .layers import group_tensors
from .signatures import config_fault, diffusers_names, find_model
from .vae_signatures import AUDIO, FULL, Identity, Vae, identify

_BLOCK = re.compile(r"(?:transformer_blocks|double_blocks|single_blocks|blocks|layers|double_layers)\.(\d+)\.")
_WEIGHTS = ("weight", "weight_packed")
OUTSIDE = "outside the blocks"
# Where stock ComfyUI ends up with a VAE of this fault.
_STOCK_ON_VAE = {
    "config": "stops with a RuntimeError while it builds the VAE",
    "statistics": "warns, then decodes garbage",
    "quantized": "does not dequantize it: decoding fails or gives noise",
    "prefix": "says 'No VAE weights detected'",
    "vocoder": "says 'No VAE weights detected'",
    "layout": "does not know this layout",
}


@dataclass(frozen=True)
class ComponentSize:
    """One component: its size, and where its names begin."""

    name: str
    title: str
    prefix: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """All there is to say of a checkpoint from its header.

    ``blocks``: block of the diffusion model -> format -> (layers, bytes), a layer being a weight of two or more
    dimensions with its scales; ``formats``: the same over all components. ``dialect``: None where it is open or there
    is none, ``evidence`` says which. ``missing``: what the file lacks. ``loaders``: component -> the node that loads
    it. ``stock``: component -> what ComfyUI's own loaders do with it. ``container``: what is odd about the file, or the
    files, around the tensors.
    """

    file: str
    files: int
    file_size: int
    kind: str
    parts: tuple[ComponentSize, ...]
    blocks: Mapping[str, Mapping[str, tuple[int, int]]]
    formats: Mapping[str, tuple[int, int]]
    dialect: str | None
    evidence: str
    missing: tuple[str, ...]
    loaders: Mapping[str, str]
    stock: Mapping[str, str]
    metadata: tuple[str, ...]
    container: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return text_report(_lines(self))


def inspect_checkpoint(path: str | os.PathLike[str], dialect: str = dialects.AUTO) -> Inspection:
    """File, index, shard or wildcard -> Inspection. An open dialect is reported, damage a CheckpointError."""
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    found = diagnose(checkpoint, dialect)
    identity = identify(header)
    parts, blocks = [], {}
    formats: dict[str, tuple[int, int]] = {}
    for component in found.components.values():
        layers = _formats(header, component)
        for block, sizes in layers.items():
            for name, size in sizes.items():
                formats[name] = _add(formats.get(name, (0, 0)), size)
            if component.name == DIFFUSION_MODEL:
                blocks[block] = sizes
        numbers = len(component.names), _parameters(header, component), component.nbytes(header)
        parts.append(ComponentSize(component.name, component.title, component.prefix, *numbers))
    plan = found.plan
    return Inspection(
        header.path.name,
        len(checkpoint.files),
        header.file_size,
        _kind(header, found, identity),
        tuple(parts),
        dict(sorted(blocks.items(), key=lambda item: _block_order(item[0]))),
        dict(sorted(formats.items(), key=lambda item: -item[1][1])),
        plan.dialect if plan else None,
        plan.evidence if plan else found.open_dialect,
        tuple(_missing(found, identity)),
        dict(_loaders(found, identity)),
        dict(_stock(found, identity)),
        tuple(sorted(header.metadata)),
        tuple(f"{fault.text}, {CONTAINER[fault.code]}" for fault in found.faults if fault.code in CONTAINER),
    )


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _formats(header: Header, component: Component) -> dict[str, dict[str, tuple[int, int]]]:
    """Block -> format -> (layers, bytes); scales and markers count with their weight, single vectors by their dtype."""
    groups = group_tensors({name: header.tensors[name] for name in component.names})
    stored = {layer: title_of(members) for layer, members in groups.items() if weight_suffix(members)}
    homes = {f"{layer}.{suffix}": layer for layer, members in groups.items() for suffix in members}
    result: dict[str, dict[str, tuple[int, int]]] = {}
    for name, own in component.names.items():
        layer = homes.get(name, name.rpartition(".")[0])
        suffix = name[len(layer) + 1 :] if layer else name
        info = header.tensors[name]
        quantised = layer in stored and stored[layer] != info.dtype and suffix != "bias"
        label = stored[layer] if quantised else info.dtype
        number = _BLOCK.match(own)
        block = number[1] if number else OUTSIDE
        is_layer = int(suffix in _WEIGHTS and len(info.shape) > 1)
        sizes = result.setdefault(block, {})
        sizes[label] = _add(sizes.get(label, (0, 0)), (is_layer, info.nbytes))
    return result


def _parameters(header: Header, component: Component) -> int:
    """Weights as the model counts them: two in a packed byte, none in scales and markers."""
    total = 0
    for name in component.names:
        layer, _, suffix = name.rpartition(".")
        info = header.tensors[name]
        if suffix in _WEIGHTS and info.dtype == "U8":
            total += 2 * info.numel
        elif suffix not in dialects.AUXILIARY or not any(f"{layer}.{weight}" in header.tensors for weight in _WEIGHTS):
            total += info.numel * (suffix != "scaled_fp8")  # vocoders have an `alpha` that is no scale
    return total


def _block_order(block: str) -> tuple[bool, int]:
    return (False, int(block)) if block != OUTSIDE else (True, 0)


def _kind(header: Header, found: Diagnosis, identity: Identity) -> str:
    family = found.model.family if found.model else None
    model = f"{family or 'unknown family'} diffusion model" if found.model else None
    vaes = [vae.title for vae in identity.vaes]
    if identity.kind == FULL or (model and vaes):
        return f"full checkpoint: {', '.join([model or 'diffusion model', *vaes])}"
    if model or vaes:
        return ", ".join([model] if model else vaes)
    try:
        find_model(header)
    except CheckpointError as error:
        return str(error).removeprefix(f"{header.path.name}: ").partition(";")[0]
    return "of unknown kind"


def _missing(found: Diagnosis, identity: Identity):
    if found.has("diffusers"):
        yield "ComfyUI's own names: nothing here loads this model under those of diffusers"
    if found.has("config"):
        yield f"a description of the model, without which ComfyUI misbuilds it: {config_fault(found.checkpoint.header)}"
    if DIFFUSION_MODEL in found.components:
        for title, count in _unloadable(found).items():
            yield f"weights in a format that ComfyUI or this pack loads: {count:,} layers are {title}"
    yield from (f"the weight that a tensor is for: {text}" for text in _strays(found))
    for vae in identity.vaes:
        for problem in vae.problems:
            if problem.code in ("config", "statistics", "vocoder"):
                yield f"{vae.title}: {problem.text}"
    if found.plan is None:
        yield f"a declared dialect: {found.open_dialect}"
    elif found.plan.native and found.unmarked and found.has("unmarked"):
        yield f"markers or a header entry for {len(found.unmarked):,} quantized layers (NVFP4 Repair adds them)"


def _unloadable(found: Diagnosis) -> dict[str, int]:
    """Format that no loader takes -> layers of the diffusion model in it."""
    titles = [
        layer.title
        for name, layer in (found.plan.layers.items() if found.plan else ())
        if name.startswith(found.prefix) and not FORMATS[layer.kind].loads
    ]
    return dict(Counter(titles))


def _strays(found: Diagnosis) -> list[str]:
    """What is to be said of tensors of the diffusion model that belong to no layer."""
    own = found.components[DIFFUSION_MODEL].names if DIFFUSION_MODEL in found.components else {}
    return [text for name, text in (found.plan.strays.items() if found.plan else ()) if name in own]


def _loaders(found: Diagnosis, identity: Identity):
    if DIFFUSION_MODEL in found.components and not _unloadable(found) and not _strays(found):
        widget = "" if found.plan else " with its dialect widget set"
        ours = f"NVFP4 Model Loader{widget}"
        yield DIFFUSION_MODEL, ours if _quantised(found) else f"Load Diffusion Model or {ours}"
    diffusers = diffusers_names(found.checkpoint.header)
    if diffusers is not None and diffusers.loads:
        yield DIFFUSION_MODEL, "Load Diffusion Model"
    for vae in identity.vaes:
        key = AUDIO_VAE if vae.kind == AUDIO else VIDEO_VAE
        if vae.kind == AUDIO or vae.final_decoder:
            yield key, "NVFP4 VAE Loader"
        elif vae.preview and vae.family == "LTX-2":
            yield key, "NVFP4 VAE Loader with allow_preview, for previews only"
        else:
            yield key, "VAELoader, for models of its own family"
    if TEXT_PROJECTION in found.components:
        yield TEXT_PROJECTION, "NVFP4 Text Encoder Loader (second file, beside the text encoder)"


def _quantised(found: Diagnosis) -> bool:
    return found.plan is None or bool(found.plan.nvfp4)


def _stock(found: Diagnosis, identity: Identity):
    if DIFFUSION_MODEL in found.components:
        verdicts = [fault.stock for fault in found.faults]
        if verdicts:
            cure = "; NVFP4 Repair makes it loadable" if all(fault.curable for fault in found.faults) else ""
            yield DIFFUSION_MODEL, "; ".join(verdicts) + cure
        else:
            yield DIFFUSION_MODEL, "loads it"
    elif diffusers := diffusers_names(found.checkpoint.header):
        yield DIFFUSION_MODEL, diffusers.stock
    for vae in identity.vaes:
        yield AUDIO_VAE if vae.kind == AUDIO else VIDEO_VAE, _stock_on_vae(vae, found)


def _stock_on_vae(vae: Vae, found: Diagnosis) -> str:
    embedded = DIFFUSION_MODEL in found.components
    faults = [p.code for p in vae.problems if p.code != "prefix" or not embedded or vae.prefix != "vae."]
    if faults:
        return "; ".join(dict.fromkeys(_STOCK_ON_VAE[code] for code in faults))
    if vae.preview and vae.family == "LTX-2":
        return "loads it as a full VAE; a tiled decode has half the size and too few frames, without an error"
    if vae.kind != AUDIO and not vae.final_decoder:
        wrong = f"expected {vae.latent_channels} channels, got 128" if vae.latent_channels != 128 else "an error"
        return f"loads it; with LTX latents decoding stops with '{wrong}'"
    return "loads it"


def _lines(found: Inspection):
    shards = f" in {found.files} files" if found.files > 1 else ""
    yield f"{found.file}: {found.kind}"
    yield f"{size_text(found.file_size)}{shards}, {sum(part.tensors for part in found.parts):,} tensors"
    yield from found.container
    if found.dialect or found.formats.get("NVFP4"):
        yield f"dialect: {found.dialect or 'open'} ({found.evidence})"
    yield ""
    rows = [("component", "names begin with", "tensors", "parameters", "size")]
    for part in found.parts:
        sizes = f"{part.tensors:,}", _count(part.parameters), size_text(part.nbytes)
        rows.append((part.title, part.prefix or "-", *sizes))
    yield from table(rows, right=(2, 3, 4))
    if found.blocks:
        names = list(dict.fromkeys(name for sizes in found.blocks.values() for name in sizes))
        yield ""
        rows = [("layers of block", *names, "size")]
        for label, sizes in _runs(found.blocks):
            total = sum(nbytes for _, nbytes in sizes.values())
            counts = [f"{sizes[name][0]:,}" if sizes.get(name, (0, 0))[0] else "-" for name in names]
            rows.append((label, *counts, size_text(total)))
        yield from table(rows, right=tuple(range(1, len(names) + 2)))
    for heading, content in (("load with", found.loaders), ("stock ComfyUI", found.stock)):
        if content:
            yield ""
            yield f"{heading}:"
            yield from (f"  {COMPONENTS[name]}: {text}" for name, text in content.items())
    if found.missing:
        yield ""
        yield "missing:"
        yield from (f"  {text}" for text in found.missing)


def _runs(blocks: Mapping[str, Mapping[str, tuple[int, int]]]) -> list[tuple[str, Mapping[str, tuple[int, int]]]]:
    """Neighbouring blocks of equal content in one row, each with the content of one block."""
    runs: list[tuple[list[str], Mapping[str, tuple[int, int]]]] = []
    for block, sizes in blocks.items():
        if runs and block != OUTSIDE and dict(runs[-1][1]) == dict(sizes):
            runs[-1][0].append(block)
        else:
            runs.append(([block], sizes))
    return [(b[0] if len(b) == 1 else f"{b[0]} to {b[-1]}, each", sizes) for b, sizes in runs]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"
