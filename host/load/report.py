# SPDX-License-Identifier: Apache-2.0
"""What the loader of models tells: what was in the file, and how each kind of layer will compute. It only tells."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...checkpoint.identify.dialects import DialectPlan
from ...checkpoint.identify.signatures import Model
from ...measure.escape import report as text_report
from .. import residency
from ..compute.linear import modes_of
from ..compute.modes import Compute, describe


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
    attention: str
    graphs: str  # CUDA graphs of the blocks: which, or why none; empty if nobody would expect any
    fusions: str = ""  # what neighbouring layers in FP8 mode do together; empty without such layers
    lacks: str = ""  # what the host builds and the file does not have
    unknown: str = ""  # what of the host's book-keeping this pack does not find, and does without

    def __str__(self) -> str:
        layers = ", ".join(f"{count:,} {name}" for name, count in self.layers.items())
        how = f"{self.compute} ({self.compute_reason})" if self.compute_reason != "asked for" else self.compute
        if len(self.modes) > 1:
            how += f": {describe(self.modes)}"
        how += f", weights decoded by the {self.backend} backend ({self.reason})"
        if self.dialect == "none":
            how = "as ComfyUI's own loader, there is nothing to dequantize"
        lines = [
            f"{self.file}: {self.family}, {self.gigabytes:.2f} GB",
            f"dialect: {self.dialect} ({self.evidence})",
            f"layers: {layers}",
            f"compute: {how}",
            f"device: {self.device}, DynamicVRAM {'on' if self.dynamic_vram else 'off'}",
        ]
        if self.attention:
            lines.append(f"attention: {self.attention}")
        if self.graphs:
            lines.append(f"CUDA graphs: {self.graphs}")
        if self.fusions:
            lines.append(f"in one pass: {self.fusions}")
        if self.lacks:
            lines.append(f"the file has {self.lacks}")
        if self.unknown:
            lines.append(self.unknown)
        if self.config_from:
            lines.append(f"config taken from {self.config_from}")
        return text_report(lines)


def count_layers(plan: DialectPlan) -> Counter[str]:
    """Format -> number of matrices."""
    layers = Counter(content["format"] for content in plan.formats.values())
    plain = [layer for name, layer in plan.layers.items() if name not in plan.formats and len(layer.shape) == 2]
    names = {"fp8_blocks": "FP8 in blocks, restored to BF16"}
    dtypes = (names.get(layer.kind) or plan.groups[layer.name][layer.weight].dtype for layer in plain)
    return layers + Counter(dtypes)


def report_of(
    plan: DialectPlan,
    model: Model,
    compute: Compute,
    backend: tuple[str, str],
    device: str,
    patcher: Any,
    config_from: str | None,
    attention: str,
    graphs: str,
    fusions: str,
    lacks: str,
) -> LoadReport:
    """What the loader read, decided and built -> its report; ``backend`` is a name and the reason for it."""
    tensors = {key: info for key, info in plan.header.tensors.items() if key.startswith(model.prefix)}
    layers = count_layers(plan)
    return LoadReport(
        file=plan.header.path.name,
        family=model.family or type(patcher.model).__name__,
        dialect=plan.dialect or "none",
        evidence=plan.evidence,
        layers=dict(layers.most_common()),
        gigabytes=sum(info.nbytes for info in tensors.values()) / 1e9,
        compute=compute.mode,
        compute_reason=compute.reason,
        modes=dict(modes_of(patcher.model.diffusion_model).most_common()),
        backend=backend[0],
        reason=backend[1],
        device=device,
        dynamic_vram=bool(getattr(patcher, "is_dynamic", bool)()),
        config_from=config_from,
        attention=attention,
        graphs=graphs,
        fusions=fusions,
        lacks=lacks,
        unknown=str(residency.check()),
    )
