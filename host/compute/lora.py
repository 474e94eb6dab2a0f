# SPDX-License-Identifier: Apache-2.0
"""LoRA beside packed weights: out = x W^T + (x A^T) B^T, the packed W untouched.

ComfyUI adds a LoRA to the decoded weight and packs the sum again, which rounds W a second time. Here the low-rank
patches of a Linear become a ``Branch`` in the layer's ``__dict__``, under ``nvfp4_lora``; linear.py computes with it,
lora_patcher.py makes and drops it. What is no plain LoRA goes the host's way: ``obstacle`` says why.

Factors are kept without their strengths, which are numbers on the device by which one of them is multiplied at use: a
strength that changes moves a few bytes, addresses stay, and a captured block does what the new strength asks for.

Where the adapters of a model would hold more than ADAPTER_BYTES, the largest are kept in 8 bits: INT8 with a scale for
FACTOR_BLOCK columns, 1 % of the change for normally distributed factors where E4M3 with a scale a row is off by 3.7 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...kernels import dispatch
from ...kernels.format import FACTOR_BLOCK, OUTPUT_DTYPES
from ...kernels.reference import pack_factor
from .modes import OWN

# What a model's adapters may hold before they are kept in 8 bits; a LoRA of rank 64 on the whole of LTX-2.3 holds 1.2
# GB in BF16, the official one of rank 384 7.
ADAPTER_BYTES = 2_000_000_000
_MARGIN = 1.01  # of bounds: factors are rounded after they were multiplied

OTHER_FORMAT = "the layer is not NVFP4"

Term = tuple[float, torch.Tensor, torch.Tensor]  # strength * alpha / rank, up (N, r, ...), down (r, K, ...)


@dataclass(eq=False)
class Branch:
    """All LoRAs of one layer along the rank: ``down`` (R, K) and ``up`` (N, R), float or INT8, without strengths.

    ``down_scale`` (R, C) fp32, by which ``down`` is multiplied at use, has the strengths in it, ``up_scale`` (N, C)
    goes with an ``up`` in INT8. ``peak`` (R,) fp32 bounds the magnitudes of the rows of ``down`` at these strengths.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_scale: torch.Tensor
    up_scale: torch.Tensor | None
    peak: torch.Tensor
    terms: tuple[Term, ...] = ()
    own_scale: torch.Tensor | None = None  # ``down_scale`` without strengths
    own_peak: torch.Tensor | None = None  # ``peak`` without them
    ranks: tuple[int, ...] = ()  # of the terms

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that a use of it reads."""
        return [one for one in (self.down, self.up, self.down_scale, self.up_scale, self.peak) if one is not None]

    @property
    def nbytes(self) -> int:
        """Of the factors and their scales."""
        return sum(one.nbytes for one in self.tensors if one is not self.peak)

    @property
    def packed(self) -> bool:
        """Whether the factors are in 8 bits."""
        return self.up_scale is not None

    def is_of(self, terms: Sequence[Term], device: torch.device, packed: bool = False) -> bool:
        """Whether it was made of these very tensors, in this form, and lies there; strengths may differ."""
        same = len(terms) == len(self.terms) and self.down.device == device and self.packed == packed
        return same and all(a[1] is b[1] and a[2] is b[2] for a, b in zip(terms, self.terms, strict=True))

    def set_strengths(self, terms: Sequence[Term]) -> None:
        """Those of ``terms``, of whose tensors it was made, from the next kernel on; nothing else changes or moves."""
        terms = tuple(terms)
        if [term[0] for term in terms] != [term[0] for term in self.terms]:
            self._put([term[0] for term in terms])
            self.terms = terms

    def _put(self, strengths: Sequence[float]) -> None:
        first = 0
        with torch.inference_mode(False), torch.no_grad():
            for strength, rank in zip(strengths, self.ranks, strict=True):
                part = slice(first, first + rank)
                torch.mul(self.own_scale[part], strength, out=self.down_scale[part])
                torch.mul(self.own_peak[part], abs(strength), out=self.peak[part])
                first += rank


def branch_of(
    factors: Sequence[tuple[float, torch.Tensor, torch.Tensor]], dtype: torch.dtype, packed: bool = False
) -> Branch:
    """Strengths, ups (N, r) and downs (r, K), fp32 -> Branch in ``dtype``, or ``packed`` in 8 bits."""
    up, down = torch.cat([one for _, one, _ in factors], 1), torch.cat([one for _, _, one in factors])
    if packed:
        (up, up_scale), (down, own_scale) = pack_factor(up), pack_factor(down)
        peak = own_scale.amax(1) * 127
    else:
        up, down, up_scale = up.to(dtype), down.to(dtype), None
        own_scale = torch.ones(len(down), 1, device=down.device)
        peak = down.abs().amax(1).float()
    own_peak = peak * _MARGIN
    ranks = tuple(one.shape[0] for _, _, one in factors)
    scale, peak = torch.empty_like(own_scale), torch.empty_like(own_peak)
    branch = Branch(down, up, scale, up_scale, peak, own_scale=own_scale, own_peak=own_peak, ranks=ranks)
    branch._put([strength for strength, _, _ in factors])
    return branch


def make_branch(module: torch.nn.Module, terms: Sequence[Term], device: torch.device, packed: bool = False) -> Branch:
    """Linear, LoRAs -> Branch on ``device`` in the layer's compute dtype, or ``packed`` in 8 bits."""
    weight = module._parameters.get("weight")
    params = getattr(weight, "_params", None)
    dtype = getattr(weight, "dtype", None) if params is None else params.orig_dtype
    dtype = dtype if dtype in OUTPUT_DTYPES else torch.bfloat16
    smoothing = module._parameters.get("pre_quant_scale")
    # No inference tensors: one may have to take part in a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        factors = []
        for strength, up, down in terms:
            up, down = (one.to(device).float().flatten(1) for one in (up, down))
            if smoothing is not None:  # the layer multiplies its input by it, the LoRA was made for the input itself
                down = down / smoothing.to(device).float()
            factors.append((strength, *_narrowed(up, down)))
        branch = branch_of(factors, dtype, packed)
    branch.terms = tuple(terms)
    return branch


def _narrowed(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product of a rank no larger than its rows or columns: to_gate_logits has 32 rows, whatever the rank."""
    rows, rank, cols = *up.shape, down.shape[1]
    if rank <= min(rows, cols):
        return up, down
    one = torch.eye(min(rows, cols), device=up.device)
    return (one, up @ down) if rows <= cols else (up @ down, one)


def adapter_bytes(shape: tuple[int, int], ranks: Iterable[int], packed: bool = False) -> int:
    """(N, K), rank of each LoRA -> bytes of their Branch, 2 an element or about 1; exact for layers in 16 bits."""
    rank, blocks = sum(min(one, *shape) for one in ranks), lambda count: -(-count // FACTOR_BLOCK)
    scales = rank * blocks(shape[1]) + shape[0] * blocks(rank) if packed else rank
    return rank * sum(shape) * (1 if packed else 2) + 4 * scales


def to_pack(layers: Mapping[str, tuple[tuple[int, int], Sequence[int]]], budget: int | None = None) -> set[str]:
    """{key: ((N, K), ranks)} -> keys of the layers whose adapters are kept in 8 bits so that all hold ``budget`` bytes.

    The largest come first; if all of them hold more even so, all are.
    """
    budget = ADAPTER_BYTES if budget is None else budget
    size = {key: adapter_bytes(*layer) for key, layer in layers.items()}
    total, chosen = sum(size.values()), set()
    for key in sorted(size, key=lambda key: (-size[key], key)):
        if total <= budget:
            break
        if (less := adapter_bytes(*layers[key], packed=True)) < size[key]:
            total += less - size[key]
            chosen.add(key)
    return chosen


def factors(branch: Branch, x: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """``down`` and ``up`` with the strengths in them, in the device and dtype of ``x``."""
    parts = branch.down, branch.down_scale, branch.up, branch.up_scale
    if branch.down.device != x.device:
        parts = tuple(part if part is None else part.to(x.device) for part in parts)
    return dispatch.unpack_factors(*parts, x.dtype, backend)


def add(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """out (..., N) of this very call + (x (..., K) A^T) B^T; in place where ``out`` is contiguous."""
    low = torch.nn.functional.linear(x, down)
    low = low.reshape(-1, low.shape[-1])
    if out.is_contiguous():
        out.view(-1, out.shape[-1]).addmm_(low, up.t())
        return out
    return torch.addmm(out.reshape(-1, out.shape[-1]), low, up.t()).view(out.shape)


def beside(parameters: Mapping[str, Any], out: torch.Tensor, x: torch.Tensor, branch: Branch) -> torch.Tensor:
    """Output of the host's forward for ``x`` -> with the branch; gradients reach ``x`` through it."""
    x = (x.dequantize() if hasattr(x, "_qdata") else x).to(out.dtype)
    smoothing = parameters.get("pre_quant_scale")
    if smoothing is not None:
        x = x * comfy.model_management.cast_to_device(smoothing, x.device, x.dtype)
    down, up = factors(branch, x)
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
    if not hook and mode not in OWN:
        return "the layer computes in FP4" if mode == "fp4" else OTHER_FORMAT
    shape = (module.out_features, module.in_features)
    for _, value, strength_model, *rest in patches:
        offset, function = (*rest, None, None)[:2]
        if reason := _not_plain(value, shape):
            return reason
        if strength_model != 1.0:
            return "it scales the weight itself"
        if offset is not None or function is not None:
            return "it changes a part of the weight, or transforms the change"
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
