"""Makes a quantised checkpoint loadable by stock ComfyUI: marks, names and, for foreign dialects, layout.

Where the layers already have ComfyUI's layout, only the header changes and the data are copied as a stream, or stay in
place where the new header fits into the old one's space. Layers of a foreign dialect are converted one at a time.
Layers are declared by the header entry `_quantization_metadata`; sound `comfy_quant` markers stay. All other metadata
stay too, except `quantization_config`, which describes the layout the file had before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.format import block_scale_shape, packed_shape
from ..file.container import PlannedTensor, write_checkpoint
from ..file.header import HEADER_ENTRY, ITEM_BYTES, METADATA_KEY, CheckpointError, Header, layers_entry, open_regular
from ..file.shards import Checkpoint, Source, open_checkpoint
from ..identify import dialects
from ..identify.components import DIFFUSION_MODEL
from ..identify.diagnosis import Diagnosis, Fault, diagnose, marker_content
from .split import check_targets, with_config

BACKUP_ENDING = ".header-backup"
_REPLACED = ("weight", *dialects.STORAGE_KEYS, dialects.MARKER)
_OLD_FP8 = {"scale_weight": "weight_scale", "scale_input": "input_scale"}


@dataclass(frozen=True)
class Repaired:
    """What ``repair`` did. ``method``: "header" (in place), "copy" or "nothing". ``remaining``: faults that stay."""

    path: Path
    method: str
    cured: tuple[Fault, ...]
    remaining: tuple[Fault, ...]
    converted: int
    backup: Path | None = None

    def __str__(self) -> str:
        lines = [f"{self.path.name}: {'nothing to repair' if self.method == 'nothing' else 'repaired'}"]
        if self.method == "header":
            lines[0] += f", header rewritten in place, the old one kept in {self.backup.name}"
        elif self.converted:
            lines[0] += f", {self.converted:,} layers converted"
        lines += [f"  cured: {fault.text}" for fault in self.cured]
        lines += [f"  remains: {fault.text}; stock ComfyUI {fault.stock}" for fault in self.remaining]
        return "\n".join(lines)


def repair(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dialect: str = dialects.AUTO,
    config_from: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Write a repaired copy of ``source`` to ``target``, or change it ``in_place``; see the module's docstring.

    In place, the old header is first saved beside the file (``restore_header`` puts it back); where more than the
    header has to change, the file is replaced by a copy once that is complete. ``dialect`` decides where the file
    leaves it open; ``config_from``: a file whose `config` to use. ``base``, ``overwrite``, ``on_bytes``: as in
    ``split``. A file without fault is left alone. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(source)
    header = checkpoint.header
    if in_place == (target is not None):
        raise CheckpointError("give either a target or in_place", where=header.path.name)
    if in_place and checkpoint.sharded:
        found, remedy = "a checkpoint in several files cannot be changed in place", "name a target; it becomes one file"
        raise CheckpointError(found, where=header.path.name, remedy=remedy)
    checkpoint = Checkpoint(with_config(header, config_from), checkpoint.homes, checkpoint.files)
    found = diagnose(checkpoint, dialect)
    if found.plan is None:
        where = header.path.name
        raise CheckpointError(found.open_dialect, where=where, remedy="state the dialect; `auto` cannot decide")
    cured = tuple(fault for fault in found.faults if fault.curable)
    remaining = tuple(fault for fault in found.faults if not fault.curable)
    path = header.path
    if target is not None:
        path = check_targets(header, {"": target}, [file.path for file in checkpoint.files], base, overwrite)[""]
    if not cured and checkpoint.header == header:
        return Repaired(path, "nothing", (), remaining, 0)
    _check_sidecar(path, found)
    names = _names(found)
    metadata = _metadata(found, names)
    if base is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    backup = _back_up(header, overwrite) if in_place else None
    new_header = _header_bytes(found, names, metadata) if in_place else None
    if new_header is not None:
        _overwrite(path, new_header)
        return Repaired(path, "header", cured, remaining, 0, backup)
    with Source(checkpoint) as reader:
        write_checkpoint(path, _plan(found, names, reader), metadata, on_bytes)
    converted = 0 if found.plan.native else len(found.plan.nvfp4)
    return Repaired(path, "copy", cured, remaining, converted, backup)


def restore_header(path: str | os.PathLike[str], backup: str | os.PathLike[str] | None = None) -> None:
    """Undo a repair in place: put the saved header back. CheckpointError if it is not one of this file's size."""
    path = Path(path)
    backup = Path(backup) if backup else path.with_name(path.name + BACKUP_ENDING)
    with open_regular(backup) as file:
        saved = file.read()
    length = int.from_bytes(saved[:8], "little")
    with open_regular(path) as file:
        present = int.from_bytes(file.read(8), "little")
    if len(saved) != length + 8 or present != length:
        found = f"this is not the header of {path.name}: {len(saved):,} bytes, there {present + 8:,}"
        raise CheckpointError(found, where=backup.name, remedy="name the backup made when the header was rewritten")
    _overwrite(path, saved)


def _check_sidecar(path: Path, found: Diagnosis) -> None:
    """A ModelOpt file beside the new checkpoint would declare it to be ModelOpt's."""
    evidence = dialects.modelopt_declaration(Header(path, {}, {}, 0))
    if evidence is not None and found.plan.dialect is not None:
        found_there = f"{evidence} declares every checkpoint of that folder to be in ModelOpt's layout"
        remedy = "choose a target in another folder, or move that file away"
        raise CheckpointError(found_there, where=path.name, remedy=remedy)


@dataclass(frozen=True)
class _Names:
    """Old -> new names of tensors and layers, and what the header will declare of the layers."""

    tensors: Mapping[str, str]
    layers: Mapping[str, str]
    declared: Mapping[str, dict]
    dropped_markers: frozenset[str]
    old_fp8: frozenset[str]  # layers whose scales have the names of older FP8 files


def _names(found: Diagnosis) -> _Names:
    header, plan = found.checkpoint.header, found.plan
    tensors = {name: name for name in header.tensors}
    if found.prefix != found.new_prefix and DIFFUSION_MODEL in found.components:
        own = found.components[DIFFUSION_MODEL].names
        tensors |= {name: found.new_prefix + name[len(found.prefix) :] for name in own}
    layers = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in tensors.items()}
    old = {found.misnamed.get(layer, layer): content for layer, content in header.listed_layers().items()}
    markers = _markers(found)
    dropped = {layer for layer, content in markers.items() if content is None or not plan.native}
    old |= {layer: plan.formats[layer] | (markers[layer] or {}) for layer in dropped}
    old |= found.unmarked
    old_fp8: set[str] = set()
    if old:
        old_fp8 = {layer for layer, group in plan.groups.items() if "scale_weight" in group}
        full = any(name.endswith("scaled_fp8") and header.tensors[name].numel == 2 for name in tensors)
        content = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if full else {})
        old |= dict.fromkeys(old_fp8, content)
    declared = {layers.get(layer, layer): content for layer, content in old.items()}
    return _Names(tensors, layers, declared, frozenset(dropped), frozenset(old_fp8))


def _markers(found: Diagnosis) -> dict[str, dict | None]:
    """Marked NVFP4 layer -> content of its marker, None if damaged; read only where a fault makes it matter."""
    plan = found.plan
    if plan.native and not found.has("markers"):
        return {}
    with Source(found.checkpoint) as source:
        return {
            layer: marker_content(bytes(source.view(f"{layer}.{dialects.MARKER}")))
            for layer in plan.nvfp4
            if dialects.MARKER in plan.groups[layer]
        }


def _metadata(found: Diagnosis, names: _Names) -> dict[str, str]:
    metadata = dict(found.checkpoint.header.metadata)
    if names.declared:
        metadata[HEADER_ENTRY] = layers_entry(names.declared, (",", ":"))
    if found.plan.dialect is not None:
        metadata.pop("quantization_config", None)
    return metadata


def _plan(found: Diagnosis, names: _Names, reader: Source) -> list[PlannedTensor]:
    """Every tensor of the new file: copied, or made by converting its layer."""
    header, plan = found.checkpoint.header, found.plan
    convert = set() if plan.native else set(plan.nvfp4)
    planned = []
    for name in sorted(header.tensors, key=reader.place):
        layer, _, suffix = name.rpartition(".")
        if layer in convert and suffix in _REPLACED:
            if suffix == dialects.DIALECTS[plan.dialect].weight:
                planned += _converted(found, layer, names.layers[layer], reader)
            continue
        if suffix == dialects.MARKER and layer in names.dropped_markers or suffix == "scaled_fp8" and names.old_fp8:
            continue
        new = names.tensors[name]
        if layer in names.old_fp8 and suffix in _OLD_FP8:
            new = f"{names.layers[layer]}.{_OLD_FP8[suffix]}"
        info = header.tensors[name]
        planned.append(PlannedTensor(new, info.dtype, info.shape, _copied(reader, name)))
    return sorted(planned, key=lambda tensor: -ITEM_BYTES[tensor.dtype])


def _copied(reader: Source, name: str) -> Callable[[], memoryview]:
    return lambda: reader.view(name)


def _converted(found: Diagnosis, layer: str, new: str, reader: Source) -> Iterator[PlannedTensor]:
    """One layer in ComfyUI's layout. Its two big tensors are adjacent in the file, so it is read once."""
    plan = found.plan

    def get(suffix: str) -> torch.Tensor:
        return reader.tensor(f"{layer}.{suffix}")

    made: list = []

    def record(part: str) -> torch.Tensor:
        made[:] = made or [dialects.host_layer(plan, layer, get)]
        tensor = getattr(made[0], part)
        if part == "block_scale":
            made.clear()
        return tensor

    shape = plan.nvfp4[layer]
    yield PlannedTensor(f"{new}.weight", "U8", packed_shape(shape), lambda: record("packed"))
    yield PlannedTensor(f"{new}.weight_scale", "F8_E4M3", block_scale_shape(shape), lambda: record("block_scale"))
    yield PlannedTensor(f"{new}.weight_scale_2", "F32", (), lambda: _global_scale(plan, layer, get))
    if any(key in plan.groups[layer] for key in ("input_scale", "input_global_scale", "input_absmax")):
        yield PlannedTensor(f"{new}.input_scale", "F32", (), lambda: dialects.input_scale(plan, layer, get))


def _global_scale(plan: dialects.DialectPlan, layer: str, get: dialects.Get) -> torch.Tensor:
    return dialects.DIALECTS[plan.dialect].global_scale(plan.groups[layer])(get).reshape(())


def _header_bytes(found: Diagnosis, names: _Names, metadata: Mapping[str, str]) -> bytes | None:
    """The new header at the old one's length, or None if the data would have to move or the text does not fit."""
    header = found.checkpoint.header
    if not found.plan.native or names.old_fp8:
        return None
    data_start = min((info.start for info in header.tensors.values()), default=header.file_size)
    entries: dict = {METADATA_KEY: dict(metadata)} if metadata else {}
    for name, info in header.tensors.items():
        span = [info.start - data_start, info.end - data_start]
        entries[names.tensors[name]] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    room = data_start - 8
    return None if len(text) > room else room.to_bytes(8, "little") + text.ljust(room)


def _back_up(header: Header, overwrite: bool) -> Path:
    """Save the old header beside the file, so that a rewrite can be undone, or finished after a power cut."""
    backup = header.path.with_name(header.path.name + BACKUP_ENDING)
    with open_regular(header.path) as file:
        saved = file.read(8)
        saved += file.read(int.from_bytes(saved, "little"))
    try:
        with open(backup, "wb" if overwrite else "xb") as file:
            file.write(saved)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        remedy = "it is the backup of an earlier repair: move it away, or allow overwriting"
        raise CheckpointError("it exists already", where=backup.name, remedy=remedy) from error
    except OSError as error:
        found = f"the old header cannot be saved ({error})"
        raise CheckpointError(found, where=backup.name, remedy="nothing was changed; check rights and disk") from error
    return backup


def _overwrite(path: Path, start: bytes) -> None:
    """Replace the first bytes of a file."""
    try:
        with open(path, "r+b", buffering=0) as file:
            file.write(start)
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "put the saved header back, or check rights and disk and try again"
        raise CheckpointError(f"its header cannot be written ({error})", where=path.name, remedy=remedy) from error
