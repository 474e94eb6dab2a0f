# SPDX-License-Identifier: Apache-2.0
"""What the tests of LoRA share: Linears with packed weights, adapters as the host hands them over, their sum."""

from __future__ import annotations

from collections import namedtuple

import torch
from nvfp4_video.host.compute import linear, matmul
from nvfp4_video.host.compute.modes import Compute
from nvfp4_video.kernels import reference

CPU = torch.device("cpu")
NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
Adapter = namedtuple("Adapter", "name weights")
# strength, rank, alpha
SETS = {
    "one": ((1.0, 4, None),),
    "with alpha": ((0.8, 8, 2.0),),
    "negative": ((-1.3, 3, None),),
    "three": ((1.0, 4, None), (-0.5, 1, 4.0), (0.25, 17, 8.5)),
    "one of strength 0": ((0.0, 4, None), (0.7, 2, None)),
}


def build(rows: int, cols: int, mode: str = "bf16", **tensors) -> tuple[torch.nn.Module, torch.Tensor]:
    """A Linear with a random packed weight in a model, and that weight in FP32."""
    record = reference.quantize(torch.randn(rows, cols))
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=Compute(mode))
    model = torch.nn.ModuleDict({"to_q": operations.Linear(cols, rows)})
    state = {"weight": matmul.wrap(record), "comfy_quant": NVFP4, "bias": torch.randn(rows).bfloat16()} | tensors
    model.load_state_dict({f"to_q.{key}": value for key, value in state.items()})
    decoded = reference.dequantize(record, torch.float32)
    return model["to_q"], decoded


def adapter(rows: int, cols: int, rank: int, alpha: float | None = None, name: str = "lora", **others) -> Adapter:
    up, down = torch.randn(rows, rank), torch.randn(rank, cols) / cols**0.5
    return Adapter(name, (up, down, alpha, others.get("mid"), others.get("dora"), others.get("reshape")))


def change(patches) -> torch.Tensor:
    """What the host would add to the weight."""
    total = 0
    for strength, value, *_ in patches:
        up, down, alpha = value.weights[:3]
        total = total + strength * (1.0 if alpha is None else alpha / down.shape[0]) * (up.flatten(1) @ down.flatten(1))
    return total


def patches_of(which: str, rows: int, cols: int) -> list[tuple]:
    return [(strength, adapter(rows, cols, rank, alpha), 1.0, None, None) for strength, rank, alpha in SETS[which]]
