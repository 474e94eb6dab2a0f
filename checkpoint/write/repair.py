# SPDX-License-Identifier: Apache-2.0
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
from ...measure.escape import report
from ..file.container import PlannedTensor, sync_folder, write_checkpoint
from ..file.dtypes import BITS
from ..file.guard import SourceGuard
from ..file.header import (
    BACKUP_ENDING,
    HEADER_ENTRY,
    METADATA_KEY,
    CheckpointError,
    Header,
    layers_entry,
    open_regular,
)
from ..file.place import write_small
from ..file.shards import Checkpoint, Source, open_checkpoint
from ..identify import dialects, host_layer
from ..identify.components import DIFFUSION_MODEL
from ..identify.declarations import layer_entries
from ..identify.diagnosis import Diagnosis, Fault, diagnose
from ..identify.formats import OLD_FP8, SMOOTHING
from ..identify.layers import refuse
from ..identify.values import check_layer, check_packed
from .split import check_targets, with_config

_RENAMED = {"scale_weight": "weight_scale", "weight_scale_inv": "weight_scale", "scale_input": "input_scale"}


@dataclass(frozen=True)
class Repaired:
    """What ``repair`` did. ``method``: "header" (in place), "copy", "nothing", or "planned" in a dry run.

    ``path``: the file that was written, else the source; ``remaining``: faults that stay.
    """

    path: Path
    method: str
    cured: tuple[Fault, ...]
    remaining: tuple[Fault, ...]
    converted: int
    backup: Path | None = None
    evidence: str = ""  # of the dialect, where the user stated it or the block scales were measured

    def __str__(self) -> str:
        planned = self.method == "planned"
        nothing = "nothing that can be repaired" if self.remaining else "nothing to repair"
        done = {"nothing": nothing, "planned": "can be repaired"}.get(self.method, "repaired")
        lines = [f"{self.path.name}: {done}"]
        if self.method == "header":
            lines[0] += f", header rewritten in place, the old one kept in {self.backup.name}"
        elif self.converted:
            lines[0] += f", {self.converted:,} layers {'to convert' if planned else 'converted'}"
        lines += [f"  dialect: {self.evidence}"] if self.evidence else []
        if planned:
            lines += [f"  to cure: {finding.text}; stock ComfyUI {finding.stock}" for finding in self.cured]
        else:
            lines += [f"  cured: {finding.text}" for finding in self.cured]
        lines += [f"  remains: {finding.text}; stock ComfyUI {finding.stock}" for finding in self.remaining]
        return report(lines)


def repair(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dialect: str = dialects.AUTO,
    config_from: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Write a repaired copy of ``source`` to ``target``, or change it ``in_place``; see the module's docstring.

    In place, old and new header are first saved beside the file (``restore_header`` puts the old one back); where more
    than the header has to change, the file is replaced by a copy once that is complete, and cannot be brought back.
    ``dialect`` decides where the file leaves it open; ``config_from``: a file whose `config` to use. ``base``,
    ``overwrite``, ``on_bytes``: as in ``split``; it is called with 0 bytes while values are checked. ``dry_run``: check
    all and write nothing; the target may exist. A file without fault is left alone. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(source)
    guard = SourceGuard(checkpoint)
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
    own = found.components[DIFFUSION_MODEL].names if DIFFUSION_MODEL in found.components else header.tensors
    strays = [text for name, text in found.plan.strays.items() if name in own]
    refuse(header.path.name, found.plan.layers, repair=True, strays=strays)
    evidence = f"{found.plan.dialect}, {found.plan.evidence}" if found.plan.stated or found.plan.order else ""
    cured = tuple(finding for finding in found.faults if finding.curable)
    remaining = tuple(finding for finding in found.faults if not finding.curable)
    if checkpoint.header != header:
        lacks = "another `config` than" if "config" in header.metadata else "no `config`, unlike"
        text = f"the header has {lacks} {Path(config_from).name}"
        cured += (Fault("config", text, "guesses the model's settings, several of them wrong"),)
    path = header.path
    if target is not None:
        sources = [file.path for file in checkpoint.files]
        path = check_targets(header, {"": target}, sources, base, overwrite or dry_run, [config_from])[""]
    with Source(checkpoint) as reader:
        _check_values(found.plan, reader, on_bytes or (lambda done, total: None))
        if not cured:
            return Repaired(header.path, "nothing", (), remaining, 0, None, evidence)
        names = _names(found, reader)
    _check_sidecar(path, found)
    converted = 0 if found.plan.native else len(found.plan.nvfp4)
    guard.check()
    if dry_run:
        return Repaired(header.path, "planned", cured, remaining, converted, None, evidence)
    metadata = _metadata(found, names)
    if base is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    new_header = _header_bytes(found, names, metadata) if in_place else None
    if new_header is not None:
        backup, old_header = _back_up(header, new_header, overwrite)
        guard.check()
        _overwrite(path, old_header, new_header)
        return Repaired(path, "header", cured, remaining, 0, backup, evidence)
    with Source(checkpoint) as reader:
        write_checkpoint(
            path, _plan(found, names, reader), metadata, on_bytes,
            overwrite=overwrite or in_place, before_naming=guard.check,
        )  # fmt: skip
    return Repaired(path, "copy", cured, remaining, converted, None, evidence)


def restore_header(path: str | os.PathLike[str], backup: str | os.PathLike[str] | None = None) -> None:
    """Undo a repair in place, also one that was interrupted: put the saved header back.

    CheckpointError, and nothing done, unless the file begins with what that repair wrote over the saved header.
    """
    path = Path(path)
    backup = Path(backup) if backup else path.with_name(path.name + BACKUP_ENDING)
    if not os.path.lexists(backup):
        found, remedy = "no header was kept", "a repair in place keeps it only where it changes nothing but the header"
        raise CheckpointError(found, where=path, expected=backup.name, remedy=remedy)
    with open_regular(backup) as file:
        saved = file.read()
    size = int.from_bytes(saved[:8], "little") + 8
    old, new = saved[:size], saved[size:]
    with open_regular(path) as file:
        present = file.read(size)
    sound = len(saved) == 2 * size and new[:8] == old[:8]
    if not sound or (present not in (old, new) and not _torn(present, old, new)):
        found = f"this is not the header that a repair of {path.name} replaced, or the file has changed since"
        raise CheckpointError(found, where=backup.name, remedy="name the backup made when the header was rewritten")
    if present != old:
        _overwrite(path, present, old)


def _torn(present: bytes, old: bytes, new: bytes) -> bool:
    """Whether a header is what is left of writing ``new`` over ``old``, or the reverse: each byte is of one of them."""
    if len(present) != len(old) or present[:8] not in (old[:8], bytes(8)):
        return False
    return all(byte in pair for byte, pair in zip(present[8:], zip(old[8:], new[8:], strict=True), strict=True))


def _check_sidecar(path: Path, found: Diagnosis) -> None:
    """A ModelOpt file beside the new checkpoint would declare it to be ModelOpt's."""
    evidence = dialects.modelopt_declaration(Header(path, {}, {}, 0))
    if evidence is not None and found.plan.dialect is not None:
        found_there = f"{evidence} declares every checkpoint of that folder to be in ModelOpt's layout"
        remedy = "choose a target in another folder, or move that file away"
        raise CheckpointError(found_there, where=path.name, remedy=remedy)


def _check_values(plan: dialects.DialectPlan, reader: Source, on_bytes: Callable[[int, int], None]) -> None:
    """The scales of every layer, also of those that are copied; CheckpointError names the layer."""
    file, total = plan.header.path.name, sum(info.nbytes for info in plan.header.tensors.values())
    for name, layer in plan.layers.items():
        on_bytes(0, total)
        if layer.coded:
            check_layer(file, layer, lambda suffix, name=name: reader.tensor(f"{name}.{suffix}"))
        if name in plan.nvfp4:
            scale = reader.tensor(f"{name}.weight_scale")
            factor = host_layer.global_scale(plan, name, lambda suffix, name=name: reader.tensor(f"{name}.{suffix}"))
            weight = f"{name}.{layer.weight}"
            check_packed(file, name, scale, factor, lambda weight=weight: reader.tensor(weight))


@dataclass(frozen=True)
class _Names:
    """Old -> new names of tensors and layers, and what the header will declare of the layers.

    ``dropped``: tensors that are left out; ``shapes``: tensors that get another shape, of the same bytes.
    """

    tensors: Mapping[str, str]
    layers: Mapping[str, str]
    declared: Mapping[str, dict]
    dropped: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]


def _names(found: Diagnosis, reader: Source) -> _Names:
    header, plan = found.checkpoint.header, found.plan
    tensors = {name: name for name in header.tensors}
    if found.prefix != found.new_prefix and DIFFUSION_MODEL in found.components:
        own = found.components[DIFFUSION_MODEL].names
        tensors |= {name: found.new_prefix + name[len(found.prefix) :] for name in own}
    layers = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in tensors.items()}
    wrong = plan.markers_to_drop()
    dropped = {f"{name}.{dialects.MARKER}" for name in wrong}
    shapes = {}
    # Of the layers it speaks of, the header says all that is known; entries of other parts stay as they are.
    declared = {found.misnamed.get(name, name): content for name, content in layer_entries(header).items()}
    for name, layer in plan.layers.items():
        if layer.marker is None:
            continue
        marker = f"{name}.{dialects.MARKER}"
        if name in plan.nvfp4 and not plan.native and marker in tensors:
            dropped.add(marker)
        if marker not in tensors or marker in dropped or name in declared:
            declared[name] = dict(layer.marker)
        for suffix in layer.read:
            if suffix in _RENAMED and name not in plan.nvfp4:
                tensors[f"{name}.{suffix}"] = f"{layers.get(name, name)}.{_RENAMED[suffix]}"
            # ComfyUI, too, takes an input scale of one in the old files for none.
            if suffix == "scale_input" and reader.tensor(f"{name}.{suffix}").float().item() == 1:
                dropped.add(f"{name}.{suffix}")
        scale = f"{name}.{layer.scale}"
        if layer.scaled_by_rows(header) and header.tensors[scale].shape != (wanted := _column(layer.shape)):
            shapes[scale] = wanted
    if declared:  # ComfyUI looks for this key only where the header declares nothing
        dropped |= {name for name in tensors if name.rpartition(".")[2] == OLD_FP8}
    declared = {layers.get(layer, layer): content for layer, content in declared.items()}
    return _Names(tensors, layers, declared, frozenset(dropped), shapes)


def _column(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a scale a row that multiplies a weight of ``shape``."""
    return (shape[0], *[1] * (len(shape) - 1))


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
        if layer in convert and suffix in plan.layers[layer].read and suffix != SMOOTHING:
            if suffix == dialects.DIALECTS[plan.dialect].weight:
                planned += _converted(found, layer, names.layers[layer], reader)
            continue
        if name in names.dropped:
            continue
        info = header.tensors[name]
        shape = names.shapes.get(name, info.shape)
        planned.append(PlannedTensor(names.tensors[name], info.dtype, shape, _copied(reader, name)))
    return sorted(planned, key=lambda tensor: -BITS[tensor.dtype])


def _copied(reader: Source, name: str) -> Callable[[], memoryview]:
    return lambda: reader.view(name)


def _converted(found: Diagnosis, layer: str, new: str, reader: Source) -> Iterator[PlannedTensor]:
    """One layer in ComfyUI's layout. Its two big tensors are adjacent in the file, so it is read once."""
    plan = found.plan

    def get(suffix: str) -> torch.Tensor:
        return reader.tensor(f"{layer}.{suffix}")

    made: list = []

    def record(part: str) -> torch.Tensor:
        made[:] = made or [host_layer.host_layer(plan, layer, get)]
        tensor = getattr(made[0], part)
        if part == "block_scale":
            made.clear()
        return tensor

    shape = plan.nvfp4[layer]
    yield PlannedTensor(f"{new}.weight", "U8", packed_shape(shape), lambda: record("packed"))
    yield PlannedTensor(f"{new}.weight_scale", "F8_E4M3", block_scale_shape(shape), lambda: record("block_scale"))
    yield PlannedTensor(f"{new}.weight_scale_2", "F32", (), lambda: host_layer.global_scale(plan, layer, get))
    if any(key in plan.groups[layer] for key in ("input_scale", "input_global_scale", "input_absmax")):
        yield PlannedTensor(f"{new}.input_scale", "F32", (), lambda: host_layer.input_scale(plan, layer, get))


def _header_bytes(found: Diagnosis, names: _Names, metadata: Mapping[str, str]) -> bytes | None:
    """The new header at the old one's length, or None if data would have to move or go, or the text does not fit."""
    header = found.checkpoint.header
    plain = {f"{name}.{dialects.MARKER}" for name, layer in found.plan.layers.items() if layer.marker is not None}
    if header.trailing or not found.plan.native or names.dropped - plain or names.shapes or _renames_scales(names):
        return None
    data_start = min((info.start for info in header.tensors.values()), default=header.file_size)
    entries: dict = {METADATA_KEY: dict(metadata)} if metadata else {}
    for name, info in header.tensors.items():
        span = [info.start - data_start, info.end - data_start]
        entries[names.tensors[name]] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    room = data_start - 8
    return None if len(text) > room else room.to_bytes(8, "little") + text.ljust(room)


def _renames_scales(names: _Names) -> bool:
    return any(old.rpartition(".")[2] != new.rpartition(".")[2] for old, new in names.tensors.items())


def _back_up(header: Header, new: bytes, overwrite: bool) -> tuple[Path, bytes]:
    """Save the old header beside the file, and after it the new one, by which ``restore_header`` knows the file."""
    backup = header.path.with_name(header.path.name + BACKUP_ENDING)
    with open_regular(header.path) as file:
        old = file.read(len(new))
    if os.path.lexists(backup) and not overwrite:
        remedy = "it is the backup of an earlier repair: move it away, or allow overwriting (`overwrite`)"
        raise CheckpointError("it exists already", where=backup.name, remedy=remedy)
    try:
        write_small(backup, old + new, overwrite)
        sync_folder(backup.parent)
    except OSError as error:
        found = f"the old header cannot be saved ({error})"
        raise CheckpointError(found, where=backup.name, remedy="nothing was changed; check rights and disk") from error
    return backup, old


def _overwrite(path: Path, present: bytes, start: bytes) -> None:
    """Replace the first bytes of a file, which are ``present``; an interruption leaves a length of 0.

    So no reader ever takes a mixture of two headers for one.
    """
    try:
        with open(path, "r+b", buffering=0) as file:
            if file.read(len(present)) != present:
                raise CheckpointError("the file changed while it was in use", where=path.name, remedy="try again")
            for place, part in ((0, bytes(8)), (8, start[8:]), (0, start[:8])):
                file.seek(place)
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
    except OSError as error:
        remedy = "put the saved header back (`repair --undo` on the command line), or check rights and disk"
        raise CheckpointError(f"its header cannot be written ({error})", where=path.name, remedy=remedy) from error
