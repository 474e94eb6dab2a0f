# SPDX-License-Identifier: Apache-2.0
"""LoRAs that are folded into the weights before these are packed, named and scaled as ComfyUI does it.

A LoRA file gives, for a tensor of the diffusion model, something to be added to it; for a weight W of N rows and K
columns (all dimensions but the first as one), with s = strength * alpha / rank, or the strength alone without alpha:

* LoRA, LoCon  s * up (N, r) @ down (r, K)
* LoHa         s * (w1_a (N, r) @ w1_b (r, K)) * (w2_a (N, r) @ w2_b (r, K))
* LoKr         s * kron(w1, w2), either of which may be a product of two; alpha counts only if one is
* diff         strength * diff, of the tensor's own shape; also of a bias

A layer is named as in ComfyUI (``comfy/lora.py``): behind ``diffusion_model.``, as ``lora_unet_`` with underscores for
dots, as some trainers and the diffusers library do it, or bare. What cannot be folded in is refused, key by key: DoRA,
OFT, GLoRA, Tucker decompositions, parts of other models. Nothing of a file is left out.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..file.guard import SourceGuard
from ..file.header import CheckpointError, Header, TensorInfo, open_regular, quote
from ..file.shards import Checkpoint, Source, open_checkpoint
from ..identify.formats import FLOATS

Given = Sequence[tuple[str | os.PathLike[str], float]]

# Ending of a key -> kind of change, what the tensor is in it.
_PARTS = {
    ".lora_up.weight": ("LoRA", "up"),
    "_lora.up.weight": ("LoRA", "up"),
    ".lora_down.weight": ("LoRA", "down"),
    "_lora.down.weight": ("LoRA", "down"),
    ".lora.up.weight": ("LoRA", "up"),
    ".lora.down.weight": ("LoRA", "down"),
    ".lora_linear_layer.up.weight": ("LoRA", "up"),
    ".lora_linear_layer.down.weight": ("LoRA", "down"),
    ".lora_B.weight": ("LoRA", "up"),
    ".lora_A.weight": ("LoRA", "down"),
    ".lora_B.default.weight": ("LoRA", "up"),
    ".lora_A.default.weight": ("LoRA", "down"),
    ".lora_B": ("LoRA", "up"),
    ".lora_A": ("LoRA", "down"),
    **{f".hada_{part}": ("LoHa", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".lokr_{part}": ("LoKr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    ".diff": ("diff", "diff"),
    ".w_norm": ("diff", "diff"),
    ".diff_b": ("bias", "diff"),
    ".b_norm": ("bias", "diff"),
    ".alpha": ("", "alpha"),
}
_REFUSED = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_mid.weight": "LoCon with a tensor in the middle",
    ".hada_t1": "LoHa with Tucker decomposition",
    ".hada_t2": "LoHa with Tucker decomposition",
    ".lokr_t2": "LoKr with Tucker decomposition",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".rescale": "OFT",
    **{f".{part}.weight": "GLoRA" for part in ("a1", "a2", "b1", "b2")},
    ".set_weight": "a weight to be replaced",
    ".reshape_weight": "a weight to be given another shape",
    ".lora_B.bias": "a LoRA with a bias",
}
_WHOLE = {
    "LoRA": ({"up", "down"},),
    "LoHa": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "LoKr": tuple(one | two for one in ({"w1"}, {"w1_a", "w1_b"}) for two in ({"w2"}, {"w2_a", "w2_b"})),
    "diff": ({"diff"},),
}
_DOTTED = ("diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "unet.", "")
_UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_SHOWN = 5


@dataclass(frozen=True)
class Change:
    """What is added to one tensor. ``parts``: what a tensor of the file is in it -> its name. ``scale``: s."""

    kind: str
    parts: Mapping[str, str]
    scale: float


@dataclass(frozen=True)
class Lora:
    """One file at one strength. ``changes``: tensor of the checkpoint -> Change."""

    checkpoint: Checkpoint
    strength: float
    changes: Mapping[str, Change]

    @property
    def file(self) -> str:
        """Its name."""
        return self.checkpoint.header.path.name

    def as_dict(self, sha256: str | None = None) -> dict:
        """For a record."""
        return {"file": self.file, "strength": self.strength, "tensors": len(self.changes), "sha256": sha256}


def read_loras(given: Given, header: Header, names: Mapping[str, str]) -> tuple[Lora, ...]:
    """(file, strength) of each, a checkpoint's header, {its tensor: name without the model's prefix} -> Loras.

    Reads headers and alphas. CheckpointError for a file any key of which is not understood, finds no tensor, or does
    not fit it, and for a strength that is zero or not finite.
    """
    return tuple(_read(path, strength, header, _targets(names)) for path, strength in given)


class Deltas:
    """Reads what is to be added to tensors of a checkpoint; a context manager, as ``Source`` is."""

    def __init__(self, loras: Sequence[Lora]) -> None:
        self._loras = loras
        self._stack = ExitStack()
        self._guards = [SourceGuard(lora.checkpoint) for lora in loras]
        self.tensors = frozenset(name for lora in loras for name in lora.changes)

    def __enter__(self) -> Deltas:
        self._readers = [self._stack.enter_context(Source(lora.checkpoint)) for lora in self._loras]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, name: str, device: torch.device) -> Delta | None:
        """What is added to a tensor, or None. CheckpointError for NaN or infinity, and for a file that changed."""
        if name not in self.tensors:
            return None
        found = []
        for lora, reader, guard in zip(self._loras, self._readers, self._guards, strict=True):
            if (change := lora.changes.get(name)) is None:
                continue
            guard.check()
            parts = {}
            for part, key in change.parts.items():
                parts[part] = reader.tensor(key).float().to(device)
                if not torch.isfinite(parts[part]).all():
                    where, remedy = f"{lora.file}, {key}", "take a sound file"
                    raise CheckpointError("NaN or infinity in it", where=where, remedy=remedy)
            found.append(_ROWS[change.kind](parts, change.scale))
        return Delta(found)


@dataclass(frozen=True)
class Delta:
    """What all LoRAs together add to one tensor."""

    _terms: Sequence[Callable[[int, int], torch.Tensor]]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``, (rows, K) fp32."""
        first, *rest = (term(start, stop) for term in self._terms)
        return sum(rest, first)


def merged(stored: torch.Tensor, delta: Delta, device: torch.device, where: str) -> torch.Tensor:
    """A floating-point tensor of a checkpoint, what is added, where it is for errors -> the sum, in its own dtype.

    CPU -> CPU, added in FP32 on ``device``. CheckpointError for a sum that its dtype cannot hold.
    """
    rows = stored.shape[0] if stored.ndim else 1
    made = (stored.to(device).float() + delta.rows(0, rows).view(stored.shape)).to(stored.dtype).cpu()
    if not torch.isfinite(made).all():
        found, remedy = f"with the LoRA it is too large for {stored.dtype}", "fold in less of it, or another"
        raise CheckpointError(found, where=where, remedy=remedy)
    return made


def hash_of(lora: Lora, on_bytes: Callable[[int], None]) -> str:
    """sha256 of the file, of a sharded one of all its files one after the other; ``on_bytes`` counts and may raise."""
    digest = hashlib.sha256()
    for file in lora.checkpoint.files:
        with open_regular(file.path) as opened:
            while data := opened.read(2**24):
                digest.update(data)
                on_bytes(len(data))
    return digest.hexdigest()


def _lora_rows(parts: Mapping[str, torch.Tensor], scale: float) -> Callable[[int, int], torch.Tensor]:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    return lambda start, stop: scale * (up[start:stop] @ down)


def _loha_rows(parts: Mapping[str, torch.Tensor], scale: float) -> Callable[[int, int], torch.Tensor]:
    one, also, other, too = (parts[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return lambda start, stop: scale * ((one[start:stop] @ also) * (other[start:stop] @ too))


def _lokr_rows(parts: Mapping[str, torch.Tensor], scale: float) -> Callable[[int, int], torch.Tensor]:
    outer, inner = (parts[n] if n in parts else parts[f"{n}_a"] @ parts[f"{n}_b"] for n in ("w1", "w2"))
    height = inner.shape[0]

    def rows(start: int, stop: int) -> torch.Tensor:
        first = start // height
        whole = torch.kron(outer[first : -(-stop // height)], inner)
        return scale * whole[start - first * height : stop - first * height]

    return rows


def _diff_rows(parts: Mapping[str, torch.Tensor], scale: float) -> Callable[[int, int], torch.Tensor]:
    diff = parts["diff"].reshape(parts["diff"].shape[0], -1) if parts["diff"].ndim else parts["diff"].reshape(1, 1)
    return lambda start, stop: scale * diff[start:stop]


_ROWS = {"LoRA": _lora_rows, "LoHa": _loha_rows, "LoKr": _lokr_rows, "diff": _diff_rows}


def _targets(names: Mapping[str, str]) -> dict[str, str]:
    """{tensor: name without prefix} -> how LoRAs call a layer or tensor, without their own prefix: the tensor.

    With underscores for dots two may have one name, which then is none.
    """
    found: dict[str, str] = {}
    for name, own in names.items():
        found[own.removesuffix(".weight")] = name
    dots = dict(found)
    shared = set()
    for own, name in dots.items():
        flat = own.replace(".", "_")
        if found.setdefault(flat, name) != name:
            shared.add(flat)
    return {key: name for key, name in found.items() if key not in shared or key in dots}


def _read(path, strength: float, header: Header, targets: Mapping[str, str]) -> Lora:
    checkpoint = open_checkpoint(path)
    where, keys = checkpoint.header.path.name, checkpoint.header.tensors
    if not math.isfinite(strength) or not strength:
        raise CheckpointError(f"strength {strength}", where=where, expected="a number other than 0")
    grouped: dict[str, dict[str, dict[str, str]]] = {}
    refused, strange, twice, stems = [], [], [], {}
    known = frozenset(targets.values())
    for key, info in keys.items():
        stem, kind, part = _split(key)
        if why := _refusal(key):
            refused.append(f"{quote(key)} ({why})")
        elif kind is None or (name := _target(stem, kind, targets, known)) is None or not _fits(info, header, name):
            strange.append(quote(key))
        else:
            parts = grouped.setdefault(name, {}).setdefault("diff" if kind == "bias" else kind, {})
            if parts.setdefault(part, key) != key or stems.setdefault(name, stem) != stem:
                twice.append(quote(key))
    if refused:
        found = f"{len(refused):,} keys of a kind that is not folded in: {_listed(refused)}"
        remedy = "load it with ComfyUI's LoRA nodes beside the packed model, or merge it before"
        raise CheckpointError(found, where=where, expected="LoRA, LoCon, LoHa, LoKr or diff", remedy=remedy)
    if strange or not keys:
        found = f"{len(strange):,} of its {len(keys):,} keys fit no layer of {header.path.name}: {_listed(strange)}"
        remedy = "take a LoRA made for this model, in ComfyUI's names, without a text encoder's part"
        raise CheckpointError(found if keys else "there is no tensor in it", where=where, remedy=remedy)
    if twice:
        found = f"{_listed(twice)} change what other keys change, too"
        raise CheckpointError(found, where=where, expected="one change of each tensor", remedy="merge them before")
    with Source(checkpoint) as reader:
        changes = {name: _change(group, strength, header, name, reader, where) for name, group in grouped.items()}
    return Lora(checkpoint, strength, changes)


def _split(key: str) -> tuple[str, str | None, str | None]:
    """Key -> name of the layer, kind of change, part; the last two None for one that is not known."""
    ending = next((end for end in _PARTS if key.endswith(end)), None)
    if ending is None:
        return key, None, None
    return key.removesuffix(ending), *_PARTS[ending]


def _refusal(key: str) -> str | None:
    return next((why for ending, why in _REFUSED.items() if key.endswith(ending)), None)


def _fits(info: TensorInfo, header: Header, name: str) -> bool:
    """Whether both are floating point, or the tensor is a weight, coded or not."""
    return info.dtype in FLOATS and (header.tensors[name].dtype in FLOATS or name.endswith("weight"))


def _target(stem: str, kind: str, targets: Mapping[str, str], known: frozenset[str]) -> str | None:
    """The one of the ``known`` tensors that a layer's name stands for, its bias for a change of that, or None."""
    prefixes = (*_DOTTED, *_UNDERSCORED)
    names = (targets.get(stem[len(prefix) :]) for prefix in prefixes if stem.startswith(prefix))
    name = next((name for name in names if name is not None), None)
    if kind != "bias" or name is None:
        return name
    bias = f"{name.removesuffix('.weight')}.bias"
    return bias if name.endswith(".weight") and bias in known else None


def _change(group, strength: float, header: Header, name: str, reader: Source, where: str) -> Change:
    """Keys of one tensor by kind -> its Change. CheckpointError for more than one kind, or tensors that do not fit."""
    alpha = group.pop("", {}).get("alpha")
    keys = [key for parts in group.values() for key in parts.values()]
    found = next(iter(group.items()), None)
    if len(group) != 1 or set(found[1]) not in _WHOLE[found[0]]:
        listed = _listed([quote(key) for key in (*keys, *([alpha] if alpha else []))])
        raise CheckpointError(f"{listed} are not one change of one tensor", where=where, expected="one, and whole")
    kind, parts = found
    shapes = {part: reader.checkpoint.header.tensors[key].shape for part, key in parts.items()}
    shape = header.tensors[name].shape
    rank = _rank(kind, shapes, shape)
    if rank is None:
        listed = ", ".join(f"{quote(parts[part])} {shapes[part]}" for part in shapes)
        remedy = "take a LoRA made for this model"
        raise CheckpointError(f"{listed}, for a tensor of shape {shape}", where=where, remedy=remedy)
    scale = float(strength)
    if alpha is not None and rank:
        value = reader.tensor(alpha).float()
        if value.numel() != 1 or not torch.isfinite(value).all():
            raise CheckpointError("it is no finite number", where=f"{where}, {alpha}")
        scale *= value.item() / rank
    return Change(kind, parts, scale)


def _rank(kind: str, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> int | None:
    """The rank by which alpha is divided, 0 where it does not count, None where the shapes do not fit ``shape``."""
    if kind == "diff":
        return 0 if shapes["diff"] == shape else None
    if len(shape) < 2 or any(len(found) < 2 for found in shapes.values()):
        return None
    height, width = shape[0], math.prod(shape[1:])
    flat = {part: (found[0], math.prod(found[1:])) for part, found in shapes.items()}
    if kind == "LoKr":
        if any(len(found) != 2 for found in shapes.values()):
            return None
        sides, rank = [], 0
        for name in ("w1", "w2"):
            one, also = flat.get(name, flat.get(f"{name}_a")), flat.get(name, flat.get(f"{name}_b"))
            if name not in flat:
                rank = also[0]
                if one[1] != rank:
                    return None
            sides.append((one[0], also[1]))
        (a, b), (c, d) = sides
        return rank if (a * c, b * d) == (height, width) else None
    pairs = (("up", "down"),) if kind == "LoRA" else (("w1_a", "w1_b"), ("w2_a", "w2_b"))
    for one, also in pairs:
        if flat[one] != (height, flat[also][0]) or flat[also][1] != width or not flat[also][0]:
            return None
    return flat[pairs[0][1]][0]


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else "")
