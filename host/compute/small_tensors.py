# SPDX-License-Identifier: Apache-2.0
"""The small tensors of a model's blocks, kept where they are for the graphs that know them by address.

Under DynamicVRAM large weights have a place for good. Norms, tables and whatever else is small the host copies to the
GPU before each sampling, from what it keeps in RAM, to wherever there is room. ``put_back`` copies them on to where
they lay in the sampling before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .. import residency

_MOST_BYTES = 1 << 20  # of one tensor: a LoRA that resizes a weight makes the host bring it as a small one


class Place(NamedTuple):
    """A module's parameters or buffers, a name among them, and the tensor that stood there."""

    holder: dict
    name: str
    tensor: torch.Tensor


def places_of(blocks: torch.nn.Module, device: torch.device) -> list[Place]:
    """Where the small tensors of these modules lie on ``device``."""
    return [
        Place(holder, name, tensor)
        for module in blocks.modules()
        for holder in (module.__dict__["_parameters"], module.__dict__["_buffers"])
        for name, tensor in holder.items()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device == device
        and tensor.nbytes <= _MOST_BYTES
        and not residency.has_place(module.__dict__, name)
    ]


def put_back(patcher: Any, places: Iterable[Place]) -> bool:
    """After the host has loaded the model: what is new goes to its former place -> whether the places are still good.

    They are not where one of them may be the host's only copy, or belongs to a tensor of another kind now.
    """
    moved = [(place, place.holder.get(place.name)) for place in places]
    moved = [(place, now) for place, now in moved if now is not place.tensor]
    if not moved:
        return True
    if not all(_alike(place.tensor, now) for place, now in moved) or not residency.has_originals_in_ram(patcher):
        return False
    with torch.inference_mode():
        torch._foreach_copy_([place.tensor for place, _ in moved], [now for _, now in moved])
    for place, _ in moved:
        place.holder[place.name] = place.tensor
    return True


def _alike(old: torch.Tensor, new: Any) -> bool:
    kinds = [
        # Tensors made in inference mode are no good where a node trains, outside it.
        (type(one), one.shape, one.stride(), one.dtype, one.device, one.is_inference())
        if isinstance(one, torch.Tensor)
        else None
        for one in (old, new)
    ]
    return kinds[0] == kinds[1]
