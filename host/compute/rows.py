# SPDX-License-Identifier: Apache-2.0
"""What a Linear in FP8 mode may be given besides a tensor of its own: rows that are quantised already, or once for all.

Either is for layers in nobody else's hands: a hook, somebody's ``forward`` or a smoothing wants the tensor, and so does
a LoRA that is computed beside the product (matmul.py).
"""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor

from ...kernels.fp8 import SharedRows
from .. import residency


def shared_rows(own: dict) -> tuple[SharedRows, int] | None:
    """What a Linear hands to its FP8 function so that its input is quantised once for all three that take it.

    None for any other layer, and as long as one of the three is not its own master: what runs between them might
    change the input.
    """
    shared = own.get("_nvfp4_shared")
    return None if shared is None or any(map(residency.taken_over, own["_nvfp4_sharers"])) else shared


def takes_rows(layer: torch.nn.Module) -> bool:
    """Whether a layer is a Linear of this pack's in FP8 mode that needs nothing but rows, if they are many."""
    return layer.__dict__.get("nvfp4_mode") == "fp8" and _is_its_own_master(layer)


def packed_weight(layer: torch.nn.Module, device: torch.device) -> QuantizedTensor | None:
    """The NVFP4 weight of a Linear of this pack's, as it lies on ``device`` for this call.

    None for any other layer, one with a bias, and one whose product takes more than the weight.
    """
    own = layer.__dict__
    alone = own.get("nvfp4_mode") in ("bf16", "fp8") and own.get("nvfp4_lora") is None
    if not alone or not _is_its_own_master(layer):
        return None
    found = residency.resident(own, device)
    return None if found is None or found[1] is not None else found[0]


def _is_its_own_master(layer: torch.nn.Module) -> bool:
    own = layer.__dict__
    return bool(
        type(layer).__dict__.get("takes_fp8_rows", False)  # not a class derived from it
        and "pre_quant_scale" not in own["_parameters"]
        and not residency.taken_over(own)
        and not residency.patched(layer)
    )
