# SPDX-License-Identifier: Apache-2.0
"""LoRA beside packed weights: out = x W^T + (x A^T) B^T, the packed W untouched.

ComfyUI adds a LoRA to the decoded weight and packs the sum again, which rounds W a second time. Here the low-rank
patches of a Linear become a ``Branch`` in the layer's ``__dict__``, under ``nvfp4_lora``; linear.py computes with it,
lora_patcher.py makes and drops it. What is no plain LoRA goes the host's way: ``obstacle`` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...kernels.format import OUTPUT_DTYPES

# Bytes an element that packing saves over BF16: 2 - (1/2 + 1/16). A branch may hold as many, and always 1 MiB.
_SAVED = 23 / 16
_ALWAYS = 1 << 20

OTHER_FORMAT = "the layer is not NVFP4"

Term = tuple[float, torch.Tensor, torch.Tensor]  # strength * alpha / rank, up (N, r, ...), down (r, K, ...)


@dataclass(frozen=True, eq=False)
class Branch:
    """All LoRAs of one layer along the rank: ``down`` (R, K) and ``up`` (N, R), which holds strength * alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self.down.nbytes + self.up.nbytes

    def is_of(self, terms: Sequence[Term], device: torch.device) -> bool:
        """Whether it was made of these very tensors and strengths, and lies there."""
        same = len(terms) == len(self.terms) and self.down.device == device
        pairs = zip(terms, self.terms, strict=False)
        return same and all(a[0] == b[0] and a[1] is b[1] and a[2] is b[2] for a, b in pairs)


def make_branch(module: torch.nn.Module, terms: Sequence[Term], device: torch.device) -> Branch:
    """Linear, LoRAs -> Branch on ``device`` in the layer's compute dtype; products of strengths are rounded once."""
    weight = module._parameters.get("weight")
    params = getattr(weight, "_params", None)
    dtype = getattr(weight, "dtype", None) if params is None else params.orig_dtype
    dtype = dtype if dtype in OUTPUT_DTYPES else torch.bfloat16
    smoothing = module._parameters.get("pre_quant_scale")
    # No inference tensors: one may have to take part in a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        down = torch.cat([low.to(device).float().flatten(1) for _, _, low in terms])
        up = torch.cat([high.to(device).float().flatten(1) * scale for scale, high, _ in terms], dim=1)
        if smoothing is not None:  # the layer multiplies its input by it, the LoRA was made for the input itself
            down = down / smoothing.to(device).float()
        return Branch(down.to(dtype), up.to(dtype), tuple(terms))


def add(out: torch.Tensor, x: torch.Tensor, branch: Branch) -> torch.Tensor:
    """out (..., N) of this very call + (x (..., K) A^T) B^T; in place where ``out`` is contiguous."""
    down, up = tensors(branch, x)
    low = torch.nn.functional.linear(x, down)
    low = low.reshape(-1, low.shape[-1])
    if out.is_contiguous():
        out.view(-1, out.shape[-1]).addmm_(low, up.t())
        return out
    return torch.addmm(out.reshape(-1, out.shape[-1]), low, up.t()).view(out.shape)


def tensors(branch: Branch, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``down`` and ``up`` in the device and dtype of ``x``, which are theirs but for odd inputs."""
    down, up = branch.down, branch.up
    if down.dtype != x.dtype or down.device != x.device:
        down, up = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
    return down, up


def beside(parameters: Mapping[str, Any], out: torch.Tensor, x: torch.Tensor, branch: Branch) -> torch.Tensor:
    """Output of the host's forward for ``x`` -> with the branch; gradients reach ``x`` through it."""
    x = (x.dequantize() if hasattr(x, "_qdata") else x).to(out.dtype)
    smoothing = parameters.get("pre_quant_scale")
    if smoothing is not None:
        x = x * comfy.model_management.cast_to_device(smoothing, x.device, x.dtype)
    down, up = tensors(branch, x)
    return out + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)


def terms_of(patches: Iterable[Sequence]) -> list[Term]:
    """Patches that ``obstacle`` lets pass -> LoRAs; those of strength 0 are left out."""
    found = []
    for strength, value, *_ in patches:
        up, down, alpha = value.weights[:3]
        scale = float(strength) * (1.0 if alpha is None else float(alpha) / down.shape[0])
        if scale:
            found.append((scale, up, down))
    return found


def obstacle(module: torch.nn.Module, patches: Iterable[Sequence], hook: bool = False) -> str:
    """Why the patches of a Linear's weight cannot be a branch, or an empty string.

    ``patches`` are the host's tuples (strength, value, strength_model, offset, function). ``hook``: any format will do.
    """
    mode = module.__dict__.get("nvfp4_mode")
    if not hook and mode not in ("bf16", "fp8"):
        return "the layer computes in FP4" if mode == "fp4" else OTHER_FORMAT
    rank, shape = 0, (module.out_features, module.in_features)
    for _, value, strength_model, *rest in patches:
        offset, function = (*rest, None, None)[:2]
        if reason := _not_plain(value, shape):
            return reason
        if strength_model != 1.0:
            return "it scales the weight itself"
        if offset is not None or function is not None:
            return "it changes a part of the weight, or transforms the change"
        rank += value.weights[1].shape[0]
    if (nbytes := 2 * rank * sum(shape)) > max(_ALWAYS, _SAVED * shape[0] * shape[1]):
        return f"of rank {rank} it would hold {nbytes / 2**20:.0f} MiB, more than packing saves"
    return ""


def _not_plain(value: Any, shape: tuple[int, int]) -> str:
    """Why a patch's value is no LoRA for a weight of this shape, or an empty string."""
    name = getattr(value, "name", None)
    if name is None:
        kind = value[0] if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) else "weight"
        return f"it is a patch of the kind {kind}, no LoRA"
    if name != "lora" or len(value.weights) < 5:
        return f"it is a {name}, no LoRA"
    up, down, _, mid, dora, *reshape = value.weights
    if mid is not None or dora is not None:
        return "it is a DoRA" if mid is None else "it is a LoCon with a tensor in the middle"
    if any(size is not None for size in reshape):
        return "it changes the weight's shape"
    rank = down.shape[0]
    if up.numel() != shape[0] * rank or down.numel() != rank * shape[1] or up.shape[0] != shape[0]:
        return f"it is of another shape, {up.shape[0]} x {down.numel() // max(rank, 1)}"
    return ""


__all__ = [
    "OTHER_FORMAT", "Branch", "Term", "add", "beside", "make_branch", "obstacle", "tensors", "terms_of",
]  # fmt: skip
