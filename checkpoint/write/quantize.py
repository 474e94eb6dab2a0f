# SPDX-License-Identifier: Apache-2.0
"""Quantises a checkpoint to NVFP4: streams it tensor by tensor into a file that a kill cannot tear (resume.py).

The source is read once, front to back, and hashed on the way by a thread of its own; each tensor is copied, or brought
to FP32 (weights.py), quantised in pieces of 128k rows, and written to its place. So memory holds one tensor and a
piece's temporaries, whatever the size of the file. What becomes of which layer is planned in plan.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..file.container import PlannedTensor, produce_bytes
from ..file.guard import SourceGuard
from ..file.header import CheckpointError, Header, open_regular, read_header
from ..file.resume import PartFile, discard, left_behind
from ..file.shards import Source
from ..identify import dialects
from ..identify.values import check_layer
from .budget import spend
from .card import PROVENANCE, provenance, provenance_of, write_card
from .lora import Deltas, hash_of, merged
from .pack import Packer
from .plan import QuantizePlan, QuantizeSettings, plan_quantization
from .split import check_targets
from .units import fp8_marker, nvfp4_marker, quantize_fp8
from .weights import FloatRows, non_finite

OnStep = Callable[[int, int], None]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    settings: QuantizeSettings | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Write ``source`` (file, index, shard, wildcard), quantised, to ``target``, and its card beside it -> the record.

    An unfinished run of the same request is gone on with. ``base``, ``overwrite``: as in ``split``. ``on_step(done,
    total)``, in bytes read and checked, may raise to interrupt; what is finished stays for the next run. Raises
    CheckpointError: for a source that cannot be quantised, that changes meanwhile, or holds NaN or infinity (by name).
    """
    settings, device = settings or QuantizeSettings(), torch.device(device)
    step = on_step or (lambda done, total: None)
    plan = plan_quantization(source, settings)
    guard = SourceGuard(plan.checkpoint)
    bad = _not_finite(plan, device, step) if settings.keep_non_finite else frozenset()
    plan = plan_quantization(source, settings, bad) if bad else plan
    request = _request(plan, guard)
    sources = [file.path for file in plan.checkpoint.files]
    also_read = [file.path for lora in plan.loras for file in lora.checkpoint.files]
    also_read += [settings.calibration, settings.config_from]
    path = check_targets(plan.checkpoint.header, {"": target}, sources, base, True, also_read)[""]
    if (left := left_behind(path, request)) is not None:
        return _finish(path, left)
    check_targets(plan.checkpoint.header, {"": target}, sources, base, overwrite)
    _check_sidecar(path)
    if settings.budget:
        plan = spend(plan, source, bad, device, lambda: step(0, 1))
    if base is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return _finish(path, _write(plan, path, guard, request, device, step, overwrite))


def is_made_of(path: str | os.PathLike[str], source: str | os.PathLike[str], settings: QuantizeSettings) -> bool:
    """Whether the file at ``path`` says that it was made of a source of this name with these settings."""
    said = dict(provenance_of(read_header(path)))
    due = json.loads(provenance(plan_quantization(source, settings).record))
    if not isinstance(files := said.get("source"), list):
        return False
    said["source"] = [file.get("file") if isinstance(file, dict) else None for file in files]
    due["source"] = [file["file"] for file in due["source"]]
    for side in (said, due):
        side.pop("tool", None)  # another version of the pack made it
    return said == due


def _write(
    plan: QuantizePlan,
    path: Path,
    guard: SourceGuard,
    request: str,
    device: torch.device,
    step: OnStep,
    overwrite: bool,
) -> dict:
    """Everything up to the finished file under its name -> the record."""
    started = time.monotonic()
    total = sum(file.file_size for file in plan.checkpoint.files) + plan.nbytes
    loras = [lora.as_dict(hash_of(lora, lambda _: step(0, total))) for lora in plan.loras]
    plan = replace(plan, record=dict(plan.record) | {"loras": loras})
    metadata = dict(plan.metadata) | {PROVENANCE: provenance(plan.record)}
    packer = Packer(plan.statistics, plan.settings.search, device)
    with Source(plan.checkpoint) as reader:
        for layer in plan.kept.values():
            check_layer(
                plan.checkpoint.header.path.name, layer, lambda key, layer=layer: reader.tensor(f"{layer.name}.{key}")
            )
    with (
        Source(plan.checkpoint) as reader,
        Deltas(plan.loras) as deltas,
        PartFile(path, plan.tensors, plan.units, metadata, request, lambda _: step(0, total), overwrite) as part,
    ):
        resumed = len(part.finished)
        try:
            hashes, done = _stream(plan, reader, deltas, part, guard, packer, lambda done: step(done, total))
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):  # it is in what is read: no run of this request can go on
                part.close()
                discard(path)
            raise
        for name, content in plan.made.items():
            if name not in part.finished:
                part.write(name, [memoryview(content)])
        guard.check()

        def checked(count: int) -> None:
            nonlocal done
            done += count
            step(min(done, total), total)

        part.on_bytes = checked
        metadata[PROVENANCE] = provenance(plan.record, hashes)
        known = {"file": path.name, "sources": hashes, "request": request, "resumed": resumed, "nbytes": part.nbytes}
        known |= packer.report()
        return part.publish(
            metadata, lambda sha: dict(plan.record) | known | {"sha256": sha, "seconds": time.monotonic() - started}
        )


def _stream(
    plan: QuantizePlan,
    reader: Source,
    deltas: Deltas,
    part: PartFile,
    guard: SourceGuard,
    packer: Packer,
    on_bytes: Callable[[int], None],
) -> tuple[dict[str, str], int]:
    """Read every tensor once, in the order of the files, and write what it becomes -> {file: sha256}, bytes read."""
    header = plan.checkpoint.header
    hashers = {file.path: _hash_of_header(file) for file in plan.checkpoint.files}
    done = sum(file.file_size for file in plan.checkpoint.files) - sum(i.nbytes for i in header.tensors.values())
    with ThreadPoolExecutor(1) as pool:
        for name in sorted(header.tensors, key=reader.place):
            on_bytes(done)
            guard.check()
            view = reader.view(name)
            hashed = pool.submit(hashers[plan.checkpoint.homes[name].path].update, view)
            if name in plan.units and name not in plan.made and name not in part.finished:
                data, delta = [view], deltas.of(name, packer.device)
                if (job := plan.jobs.get(name)) is not None:
                    rows = FloatRows(reader, job, packer.device, view, delta)
                    data = _quantised(plan, reader, rows, packer, on_bytes, done)
                elif (job := plan.fp8.get(name)) is not None:
                    data = _in_fp8(plan, FloatRows(reader, job, packer.device, view, delta))
                elif (job := plan.restored.get(name)) is not None:
                    data = [_restored(plan, FloatRows(reader, job, packer.device, view, delta))]
                elif delta is not None:
                    made = merged(reader.tensor(name), delta, packer.device, f"{header.path.name}, {name}")
                    data = [_bytes(plan.units[name][0], made)]
                guard.check()
                part.write(name, data)
            hashed.result()
            view = data = rows = made = delta = None  # before the next one is read
            done += header.tensors[name].nbytes
    return {path.name: hasher.hexdigest() for path, hasher in hashers.items()}, done


def _quantised(plan, reader, rows: FloatRows, packer: Packer, on_bytes, done):
    """The bytes of a layer's four tensors. CheckpointError naming this layer and all others that are not finite."""
    made, job = packer.pack(rows), rows.weight
    if made is None:
        names = list(plan.jobs)
        rest = {key: plan.jobs[key] for key in names if key != job.name}
        bad = [job.layer] + [rest[key].layer for key in non_finite(reader, rest, packer.device, lambda: on_bytes(done))]
        listed = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise CheckpointError(
            f"NaN or infinity in {len(bad)} layers: {listed}", where=plan.checkpoint.header.path.name,
            expected="finite weights", remedy="take a sound file, or have these layers kept as they are "
            "(`keep_non_finite`)",
        )  # fmt: skip
    marker = torch.tensor(list(nvfp4_marker()), dtype=torch.uint8)
    tensors = zip(plan.units[job.name], (*made, marker), strict=True)
    return [_bytes(planned, made) for planned, made in tensors]


def _bytes(planned: PlannedTensor, made: torch.Tensor) -> memoryview:
    return produce_bytes(replace(planned, produce=lambda: made), Path(planned.name))


def _in_fp8(plan: QuantizePlan, rows: FloatRows) -> list[memoryview]:
    """The bytes of an FP8 layer's three tensors."""
    amax = rows.amax()
    coded = torch.cat([quantize_fp8(values, amax)[0].cpu() for _, values in rows])
    marker = torch.tensor(list(fp8_marker()), dtype=torch.uint8)
    tensors = zip(plan.units[rows.weight.name], (coded, quantize_fp8(amax, amax)[1].cpu(), marker), strict=True)
    return [_bytes(planned, made) for planned, made in tensors]


def _restored(plan: QuantizePlan, rows: FloatRows) -> memoryview:
    """The bytes of a weight in BF16, for a layer that is kept but has a format ComfyUI does not know."""
    made = torch.cat([values.to(torch.bfloat16).cpu() for _, values in rows])
    return _bytes(plan.units[rows.weight.name][0], made)


def _not_finite(plan: QuantizePlan, device: torch.device, step: OnStep) -> frozenset[str]:
    """The layers to be quantised that hold NaN or infinity, without prefix; reads all of them once."""
    with Source(plan.checkpoint) as reader:
        bad = non_finite(reader, plan.jobs, device, lambda: step(0, 1))
    own = dict(zip(plan.jobs, plan.selection.quantized, strict=True))
    return frozenset(own[name] for name in bad)


def _request(plan: QuantizePlan, guard: SourceGuard) -> str:
    """Digest of what decides the target's bytes beside its header: the source's state, the settings, the statistics."""
    statistics = os.stat(plan.settings.calibration) if plan.settings.calibration else None
    given = asdict(replace(plan.settings, calibration=None, config_from=None, loras=()))
    given["loras"] = [(SourceGuard(lora.checkpoint).describe(), lora.strength) for lora in plan.loras]
    state = [guard.describe(), given, statistics and (statistics.st_size, statistics.st_mtime_ns)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _hash_of_header(file: Header):
    """A sha256 that has seen a file up to its first tensor."""
    start = min((info.start for info in file.tensors.values()), default=file.file_size)
    with open_regular(file.path) as opened:
        return hashlib.sha256(opened.read(start))


def _check_sidecar(path: Path) -> None:
    """A ModelOpt file beside the target would declare it to be ModelOpt's."""
    evidence = dialects.modelopt_declaration(Header(path, {}, {}, 0))
    if evidence is not None:
        found = f"{evidence} declares every checkpoint of that folder to be in ModelOpt's layout"
        raise CheckpointError(
            found, where=path.name, remedy="choose a target in another folder, or move that file away"
        )


def _finish(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the card, remove what the work needed -> the record with both paths."""
    card = write_card(path, record)
    discard(path)
    return record | {"path": str(path), "card": str(card)}
