# SPDX-License-Identifier: Apache-2.0
# SPDX-License-Identifier: Apache-2.0
# SPDX-License-Identifier: Apache-2.0
"""A quantised file against its source, layer by layer: how far off is it, and is that what its format costs.

The measure is the relative Frobenius error, ||decoded - original|| / ||original||, and its logarithm, the SQNR. What is
allowed is not a constant: each original layer is also quantised with plain block maxima, and a file may be a quarter
worse than that, one made by GPTQ twice as bad: it lets weights go where the outputs gain. Reading the wrong way is far
outside: 0.36 where row-major block scales are taken for tiled ones, 1.41 where the nibbles of a byte are exchanged
(also what an unrelated model gives). Such a layer is read in the other dialects too, and the one that fits is named; a
file that leaves its dialect open is read in the one that fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from ..file.guard import SourceGuard
from ..file.header import CheckpointError, quote
from ..file.shards import Source, open_checkpoint
from ..identify import dialects
from ..write.calibration import Calibration, check_belongs, read_calibration
from ..write.card import loras_of
from ..write.lora import Deltas, Given, Lora, read_loras
from ..write.split import same_file
from .account import Side, account_for, input_scale_faults
from .compare import Layers
from .found import LayerCheck, Verification, blocks_and_kinds, summary
from .independent import sample, structure_faults


def verify(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dialect: str = dialects.AUTO,
    plain_source: bool = False,
    loras: Given = (),
    calibration: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Quantised file, its source (each a file, index, shard or wildcard) -> Verification; reads both once.

    ``plain_source``: refuse a source that is NVFP4 itself; a file that `repair` wrote can be compared with one, but how
    far off its numbers are is then not measured. ``loras``: (file, strength) of what was folded in. ``calibration``:
    the file by which layers are judged by their outputs; it belongs to the source. ``on_step(done, total)`` counts
    bytes of the quantised file and may raise. Raises CheckpointError.
    """
    device, step = torch.device(device), on_step or (lambda done, total: None)
    ours, theirs = Side(open_checkpoint(path)), Side(open_checkpoint(source))
    _check_pair(ours, theirs, plain_source)
    added = read_loras(loras, theirs.header, theirs.own)
    if (folded := loras_of(ours.header)) and not loras:
        found = f"LoRAs were folded in: {', '.join(f'{quote(name)} at {strength:g}' for name, strength in folded)}"
        remedy = "name them (--lora FILE=STRENGTH; the node looks for them in models/loras)"
        raise CheckpointError(found, where=ours.header.path.name, remedy=remedy)
    known = None
    if calibration is not None:
        known = read_calibration(calibration)
        check_belongs(known, theirs.checkpoint)
    guards = SourceGuard(ours.checkpoint), SourceGuard(theirs.checkpoint)
    try:
        found = _verify(ours, theirs, dialect, added, known, device, step)
    except Exception:
        for guard in guards:
            guard.check()  # what changed meanwhile is the reason, whatever it led to
        raise
    for guard in guards:
        guard.check()
    return found


def _verify(
    ours: Side,
    theirs: Side,
    dialect: str,
    loras: Sequence[Lora],
    calibration: Calibration | None,
    device: torch.device,
    step: Callable[[int, int], None],
) -> Verification:
    with Source(ours.checkpoint) as reader, Source(theirs.checkpoint) as original, Deltas(loras) as deltas:
        theirs.take(dialects.detect(theirs.header.of(theirs.own), prefix=theirs.prefix))
        layers = Layers(ours, theirs, reader, original, device, deltas, calibration)
        plan = layers.plan(dialect)
        account = account_for(ours, theirs, plan)
        checks, identical, changed, faults = [], 0, [], [*account.faults, *structure_faults(ours.checkpoint)]
        done, total = 0, sum(info.nbytes for info in ours.header.tensors.values())
        for name in sorted(ours.header.tensors, key=reader.place):
            step(done, total)
            done += ours.header.tensors[name].nbytes
            if name in account.recoded:
                found = layers.compare(*account.recoded[name])
                checks += [found] if isinstance(found, LayerCheck) else []
                faults += [found] if isinstance(found, str) else []
            elif name in account.copies:
                same = layers.same(name, account.copies[name])
                identical += same
                changed += [] if same else [ours.names[name]]
        faults += input_scale_faults(ours, reader)
        sampled, wrong = sample(layers, [pair for pair in account.recoded.values() if pair[0].kind == "nvfp4"])
        step(total, total)
    return Verification(
        ours.header.path.name, theirs.header.path.name, plan.dialect, layers.evidence or plan.evidence,
        tuple(checks), identical, tuple(changed), account.alone, account.missing, account.extra,
        (*faults, *wrong), account.left_out, sampled, tuple(f"{lora.file} at {lora.strength:g}" for lora in loras),
        calibration.header.path.name if calibration else "",
    )  # fmt: skip


def _check_pair(ours: Side, theirs: Side, plain_source: bool) -> None:
    """Refuse two names of one checkpoint, which would agree with itself, and a source that can measure nothing."""
    where, remedy = theirs.header.path.name, "choose the checkpoint that the file was made from"
    if any(same_file(a.path, b.path) for a in ours.checkpoint.files for b in theirs.checkpoint.files):
        raise CheckpointError("it is both the file and its source", where=where, expected="two files", remedy=remedy)
    packed = dialects.packed_layers(theirs.header.of(theirs.own)) if plain_source else []
    if packed:
        found = f"the source is quantized itself ({len(packed):,} NVFP4 layers), so nothing can be measured against it"
        raise CheckpointError(found, where=where, expected="a source in BF16, FP16, FP32 or FP8", remedy=remedy)


__all__ = ["LayerCheck", "Verification", "blocks_and_kinds", "summary", "verify"]
