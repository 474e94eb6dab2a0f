# SPDX-License-Identifier: Apache-2.0
"""A low-rank product beside a packed weight, as ModelOpt's NVFP4_SVD has it: out = W x + B (A x), x smoothed.

Both parts are the file's own, so the sum is what the writer's own forward gives. It is no LoRA: LoRAs come and go on
top of it (host/compute/lora.py), and the layer saves it with its weight.
"""

from __future__ import annotations

import functools

import comfy.model_management
import torch

from ...checkpoint.identify.formats import LOW_RANK, SMOOTHING
from ...kernels import reference


def add_low_rank(module: torch.nn.Module, parts: list[torch.Tensor]) -> None:
    """Make a loaded Linear one that adds ``parts``. The host moves further parameters, as it does `pre_quant_scale`."""
    device = module.factory_kwargs["device"]
    for suffix, part in zip(LOW_RANK, parts, strict=True):
        part = part[: module.out_features] if suffix == LOW_RANK[1] else part
        module.register_parameter(suffix, torch.nn.Parameter(part.to(device=device), requires_grad=False))
    module.__class__ = _low_rank_class(type(module))


@functools.cache
def _low_rank_class(linear: type) -> type:
    """Linear of this module -> one that adds a low-rank product of the same input, as ModelOpt's SVDQuant does."""

    class LowRankLinear(linear):
        def forward(self, input, *args, activation="", **kwargs):
            input = reference.activate(input, activation)
            return _with_low_rank(self._parameters, super().forward(input, *args, **kwargs), input)

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            out = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            out.update({f"{prefix}{suffix}": self._parameters[suffix] for suffix in LOW_RANK})
            return out

    return LowRankLinear


def _with_low_rank(parameters: dict, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out (..., N) + ((x * smoothing) A^T) B^T: ModelOpt's SVDQuant multiplies both parts by the smoothed input."""
    parts = [parameters.get(SMOOTHING), *(parameters[suffix] for suffix in LOW_RANK)]
    smoothing, down, up = (
        None if part is None else comfy.model_management.cast_to_device(part, x.device, out.dtype) for part in parts
    )
    x = x.to(out.dtype) if smoothing is None else x.to(out.dtype) * smoothing
    return out + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
