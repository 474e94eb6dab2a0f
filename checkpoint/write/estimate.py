# SPDX-License-Identifier: Apache-2.0
"""What quantising a checkpoint would give and take, without doing it: exact sizes from headers, times from trials."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ...kernels import dispatch, gptq
from ..file.container import build_header
from ..file.header import CheckpointError, Header, open_regular
from .budget import spend
from .card import PROVENANCE, provenance
from .plan import GPTQ, MSE, QuantizePlan, QuantizeSettings, plan_quantization

_SAMPLE = (2048, 2048)
_SAMPLE_BYTES = 64 * 2**20


def estimate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    settings: QuantizeSettings | None = None,
    *,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """What ``quantize_checkpoint`` would write and how long it would take, by a short trial of each of its steps.

    The times come from the first 64 MiB of the source, a small matrix, and 64 MiB written to a nameless file in the
    target's folder; caches make them optimistic. With a budget every calibrated layer is read, to tell what it buys.
    Nothing stays on disk.
    """
    plan = plan_quantization(source, settings or QuantizeSettings())
    if plan.settings.budget:
        plan = spend(plan, source, frozenset(), torch.device(device), lambda: None)
    folder = Path(os.path.realpath(target)).parent
    folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    elements = sum(job.info.numel for job in plan.jobs.values())
    rates = {
        "read": _read_rate(plan.checkpoint.files[0]),
        "quantize": _quantise_rate(plan, torch.device(device)),
        "write": _write_rate(folder),
    }
    amounts = {"read": plan.record["source_bytes"], "quantize": elements, "write": 2 * plan.nbytes}
    metadata = dict(plan.metadata) | {PROVENANCE: provenance(plan.record)}
    nbytes = len(build_header(Path(target), plan.tensors, metadata)[0]) + plan.nbytes
    free = shutil.disk_usage(folder).free
    return dict(plan.record) | {
        "file": Path(target).name,
        "nbytes": nbytes,
        "shrinks_by": 1 - nbytes / plan.record["source_bytes"],
        "seconds": sum(amounts[key] / rate for key, rate in rates.items()),
        "rates": rates,
        "free_bytes": free,
        "fits": free > nbytes,
        "largest_tensor": max(info.nbytes for info in plan.checkpoint.header.tensors.values()),
        "quantized_layers": list(plan.selection.quantized),
        "kept_layers": dict(plan.selection.kept),
    }


def _read_rate(file: Header) -> float:
    started = time.perf_counter()
    with open_regular(file.path) as opened:
        count = len(opened.read(_SAMPLE_BYTES))
    return count / max(time.perf_counter() - started, 1e-6)


def _quantise_rate(plan: QuantizePlan, device: torch.device) -> float:
    """Elements a second, of the second of two runs: the first compiles.

    With GPTQ also that of one run of it; trials of the damping are few rows, and the judgement is like the search.
    """
    weight = torch.randn(_SAMPLE, device=device)
    calibrated = plan.settings.search == GPTQ
    if calibrated:
        width = min(plan.statistics.width, _SAMPLE[1])
        grams = torch.eye(width, device=device).expand(-(-_SAMPLE[1] // width), width, width)
        scale = torch.full((), 2.0**-8, device=device)
    for _ in range(2):
        started = time.perf_counter()
        dispatch.quantize(weight, search=MSE if calibrated else plan.settings.search).packed.cpu()
        if calibrated:
            gptq.quantize(weight, gptq.feedback(grams, 0.01), scale).packed.cpu()
        seconds = time.perf_counter() - started
    return weight.numel() / max(seconds, 1e-6)


def _write_rate(folder: Path) -> float:
    data = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(_SAMPLE_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _SAMPLE_BYTES / max(time.perf_counter() - started, 1e-6)
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written there ({error})", where=folder, remedy="choose another"
        ) from error
