# SPDX-License-Identifier: Apache-2.0
"""Takes a full checkpoint apart: each component into a file of its own, which ComfyUI's loaders take as it is.

Names lose exactly the prefix they have in the checkpoint (components.py). All metadata is kept, `config` and licence
among it; what describes quantised layers goes only where those layers go. Tensors are streamed by plain file reads, one
in memory at a time. Quantised weights of the VAEs become BF16, because ComfyUI dequantises none (restore.py); those of
the diffusion model stay as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...measure.text import size_text
from ..file.container import PlannedTensor, write_checkpoint
from ..file.guard import SourceGuard
from ..file.header import HEADER_ENTRY, CheckpointError, Header, layers_entry
from ..file.shards import Source, open_checkpoint
from ..identify import dialects
from ..identify.components import AUDIO_VAE, COMPONENTS, DIFFUSION_MODEL, REST, VIDEO_VAE, Component, find_components
from ..identify.vae_signatures import pick_vae
from .restore import Restoration, plan_restoration

KEEP, BF16 = "keep", "bf16"
_TO_BF16 = ("F64", "F32", "F16")
_ABOUT_LAYERS = ("quantization_config",)


@dataclass(frozen=True)
class SplitFile:
    """A file that was written. ``restored``: weights that were quantised and are BF16 now."""

    component: str
    path: Path
    tensors: int
    nbytes: int
    restored: int

    def __str__(self) -> str:
        restored = f", {self.restored} weights restored to BF16" if self.restored else ""
        size = f"{size_text(self.nbytes, 2)}, {self.tensors:,} tensors{restored}"
        return f"{COMPONENTS[self.component]}: {self.path.name} ({size})"


def split(
    source: str | os.PathLike[str],
    targets: Mapping[str, str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str = KEEP,
    dialect: str = dialects.AUTO,
    vae_prefix: str | None = None,
    config_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    on_bytes: Callable[[int, int], None] | None = None,
) -> list[SplitFile]:
    """Write components of the checkpoint ``source`` to files; ``targets``: component (a key of COMPONENTS) -> path.

    ``source``: a file, an index, a shard or a wildcard (shards.py). ``base``: folder that relative targets start from
    and that none may leave; folders below it are made. ``dtype``: "keep", or "bf16" for every plain float of another
    type. ``vae_prefix`` chooses among several VAEs; ``dialect`` reads packed VAE weights that do not declare it;
    ``config_from``: a file whose `config` to use. ``device``: where weights are restored. ``on_bytes(done, total)``
    counts over all files and may raise to interrupt. A file appears only when it is complete; those finished before an
    error stay. Raises CheckpointError before anything is written if a component is missing or a target is refused.
    """
    checkpoint = open_checkpoint(source)
    guard = SourceGuard(checkpoint)
    header = with_config(checkpoint.header, config_from)
    if dtype not in (KEEP, BF16):
        raise CheckpointError(f"unknown dtype {dtype!r}", where=header.path.name, expected=f"{KEEP} or {BF16}")
    chosen = _choose(header, list(targets), vae_prefix)
    paths = check_targets(header, targets, [file.path for file in checkpoint.files], base, overwrite, [config_from])
    with Source(checkpoint) as reader:
        plans = {}
        for name, component in chosen.items():
            restores = name in (VIDEO_VAE, AUDIO_VAE)
            restoration = plan_restoration(header, component.names, dialect) if restores else None
            plans[name] = _plan(header, component, restoration, dtype, reader, torch.device(device)), restoration
        if base is not None:
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, (tensors, _) in plans.items()}
        _check_space([paths[name] for name in plans], [sizes[name] for name in plans])
        done, total, parts = 0, sum(sizes.values()), []
        for name, (tensors, restoration) in plans.items():
            report = None if on_bytes is None else _shifted(on_bytes, done, total)
            metadata = metadata_of(header, chosen[name])
            write_checkpoint(
                paths[name], tensors, metadata, report, overwrite=overwrite, before_naming=guard.check
            )
            done += sizes[name]
            restored = len(restoration.weights) if restoration else 0
            parts.append(SplitFile(name, paths[name], len(tensors), sizes[name], restored))
    return parts


def check_targets(
    header: Header,
    targets: Mapping[str, str | os.PathLike[str]],
    sources: Sequence[Path],
    base: str | os.PathLike[str] | None,
    overwrite: bool,
    also_read: Sequence[str | os.PathLike[str] | None] = (),
) -> dict[str, Path]:
    """Targets -> resolved paths. CheckpointError for one outside ``base``, that exists, is a source or named twice.

    ``also_read``: files beside the source that are read, a calibration or a LoRA; None stands for one not given.
    No name leads out of ``base``, nor does a link in the place of the file. Folders in it may be links: whoever has
    made them can write there anyway.
    """
    paths: dict[str, Path] = {}
    for name, target in targets.items():
        named = Path(os.path.abspath(Path(base or ".") / target))  # without `..`, before any link is followed
        path = Path(os.path.realpath(named))
        plain = path.parent == Path(os.path.realpath(named.parent))
        inside = base is not None and plain and named.is_relative_to(os.path.abspath(base))
        if base is not None and not inside and not path.is_relative_to(os.path.realpath(base)):
            found = "the target lies outside the output folder"
            remedy = "give a name without `..`, relative to that folder"
            raise CheckpointError(found, where=os.fspath(target), remedy=remedy)
        if path.suffix != ".safetensors":
            raise CheckpointError("this is no name for the new file", where=path.name, expected="one in .safetensors")
        if any(same_file(path, file) for file in sources):
            raise CheckpointError("the target is the source itself", where=path.name, remedy="choose another name")
        if any(same_file(path, Path(file)) for file in also_read if file is not None):
            raise CheckpointError("the target is a file that is read", where=path.name, remedy="choose another name")
        if any(same_file(path, other) or str(path).casefold() == str(other).casefold() for other in paths.values()):
            raise CheckpointError("two components have this one target", where=path.name, remedy="choose two names")
        if path.exists() and not overwrite:
            remedy = "choose another name, or allow overwriting (`overwrite`)"
            raise CheckpointError("the target exists", where=path.name, remedy=remedy)
        paths[name] = path
    return paths


def same_file(path: Path, other: Path) -> bool:
    """Whether two names are of one file, by links or by case."""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def metadata_of(header: Header, component: Component) -> dict[str, str]:
    """The header entries for a component's own file: all of them, but of quantised layers only those it keeps."""
    metadata = {key: text for key, text in header.metadata.items() if key != HEADER_ENTRY}
    if component.name in (VIDEO_VAE, AUDIO_VAE):
        return {key: value for key, value in metadata.items() if key not in _ABOUT_LAYERS}
    own = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in component.names.items()}
    own |= {new: new for new in own.values()} if component.name == DIFFUSION_MODEL else {}
    layers = {own[layer]: content for layer, content in header.listed_layers().items() if layer in own}
    return metadata | ({HEADER_ENTRY: layers_entry(layers)} if layers else {})


def with_config(header: Header, config_from: str | os.PathLike[str] | None) -> Header:
    if config_from is None:
        return header
    config = open_checkpoint(config_from).header.metadata.get("config")
    if config is None:
        remedy = "name a file of the same model that has it"
        raise CheckpointError("its header has no `config`", where=Path(config_from).name, remedy=remedy)
    return replace(header, metadata=header.metadata | {"config": config})


def _choose(header: Header, wanted: list[str], vae_prefix: str | None) -> dict[str, Component]:
    unknown = [name for name in wanted if name not in COMPONENTS]
    if unknown or not wanted:
        found = f"unknown component {unknown[0]!r}" if unknown else "no component was asked for"
        raise CheckpointError(found, where=header.path.name, expected=f"some of {', '.join(COMPONENTS)}")
    if VIDEO_VAE in wanted:
        vae_prefix = pick_vae(header, prefix=vae_prefix).prefix
    if AUDIO_VAE in wanted:
        pick_vae(header, audio=True)
    components = find_components(header, vae_prefix)
    for name in wanted:
        if name not in components:
            present = ", ".join(component.title for component in components.values())
            found = "it has nothing else" if name == REST else f"there is no {COMPONENTS[name]} in it"
            remedy = "choose a full checkpoint, or leave this component out"
            raise CheckpointError(found, where=header.path.name, expected=f"one beside: {present}", remedy=remedy)
    return {name: components[name] for name in wanted}


def _plan(
    header: Header,
    component: Component,
    restoration: Restoration | None,
    dtype: str,
    reader: Source,
    device: torch.device,
) -> list[PlannedTensor]:
    """The tensors of one file, wide elements first, so that all of them are aligned."""
    layers = _quantised_layers(header, component)
    planned = []
    for name in sorted(component.names, key=reader.place):
        own, info = component.names[name], header.tensors[name]
        weight = f"{name.rpartition('.')[0]}.weight"
        if restoration is not None and name in restoration.leftover and name != weight:
            if name.endswith(".weight_packed"):
                made = restoration.weights[weight]
                planned.append(_restored(own.removesuffix("_packed"), made, reader, device))
            continue
        if restoration is not None and name in restoration.weights:
            planned.append(_restored(own, restoration.weights[name], reader, device))
        elif dtype == BF16 and info.dtype in _TO_BF16 and not _belongs(name, layers):
            produce = _converted(reader, name)
            planned.append(PlannedTensor(own, "BF16", info.shape, produce))
        else:
            planned.append(PlannedTensor(own, info.dtype, info.shape, _copied(reader, name)))
    return sorted(planned, key=lambda tensor: -_item_bytes(tensor))


def _quantised_layers(header: Header, component: Component) -> set[str]:
    """Layers whose weight is stored quantised; their scales must not change."""
    return {
        name.rpartition(".")[0]
        for name in component.names
        if name.endswith((".weight", ".weight_packed")) and header.tensors[name].dtype not in ("BF16", *_TO_BF16)
    }


def _belongs(name: str, layers: set[str]) -> bool:
    layer, _, suffix = name.rpartition(".")
    return layer in layers and suffix != "bias"


def _restored(name: str, made, reader: Source, device: torch.device) -> PlannedTensor:
    return PlannedTensor(name, "BF16", made.shape, lambda: made.produce(lambda key: reader.tensor(key).to(device)))


def _converted(reader: Source, name: str) -> Callable[[], torch.Tensor]:
    return lambda: reader.tensor(name).to(torch.bfloat16)


def _copied(reader: Source, name: str) -> Callable[[], memoryview]:
    return lambda: reader.view(name)


def _item_bytes(tensor: PlannedTensor) -> int:
    numel = torch.Size(tensor.shape).numel()
    return tensor.nbytes // numel if numel else 0


def _check_space(paths: Sequence[Path], sizes: Sequence[int]) -> None:
    """Refuse a split of which only the first files would fit: the writer looks at one file at a time."""
    needed: dict[int, tuple[Path, int]] = {}
    for path, size in zip(paths, sizes, strict=True):
        if path.parent.is_dir():
            disk = os.stat(path.parent).st_dev
            needed[disk] = path.parent, needed.get(disk, (path, 0))[1] + size
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            found = f"only {free / 2**30:.1f} GiB are free on the disk of the new files"
            expected = f"{size / 2**30:.1f} GiB"
            remedy = "free space, choose another disk, or fewer components"
            raise CheckpointError(found, where=folder.name, expected=expected, remedy=remedy)


def _shifted(on_bytes: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_bytes(before + done, total)
