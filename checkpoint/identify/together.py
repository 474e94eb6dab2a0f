# SPDX-License-Identifier: Apache-2.0
"""Faults that no layer shows alone: what the layers of one file must have in common."""

from __future__ import annotations

from collections.abc import Mapping

from ..file.header import CheckpointError
from .formats import LOW_RANK, OLD_FP8
from .layers import Layer


def check_together(name: str, layers: Mapping[str, Layer], dialect: str | None, old: Mapping, svd: bool) -> None:
    """What a layer alone does not show: FP8 without scale in a file of scaled FP8, low-rank tensors of some layers."""
    bare = next((layer for layer in layers.values() if layer.kind == "fp8_cast"), None)
    scaled = next((layer.name for layer in layers.values() if layer.kind in ("fp8", "fp8_rows", "fp8_blocks")), None)
    if bare is not None and (scaled is not None or any(bare.name.startswith(start) for start in old)):
        found = f"its FP8 weight has no scale, though {f'{scaled} has one' if scaled else f'the file has `{OLD_FP8}`'}"
        remedy = "the file is damaged: download or convert it again"
        raise CheckpointError(found, where=f"{name}, layer {bare.name}", expected="`weight_scale`", remedy=remedy)
    packed = [layer for layer in layers.values() if layer.kind == "nvfp4"]
    without = next((layer for layer in packed if not layer.low_rank), None)
    if without is not None and (svd or any(layer.low_rank for layer in packed)):
        why = "the file is declared NVFP4_SVD" if svd else "other NVFP4 layers have them"
        found = f"it has no low-rank tensors, {why}"
        raise CheckpointError(found, where=f"{name}, layer {without.name}", expected=" and ".join(LOW_RANK))
    bank = next((layer for layer in packed if len(layer.shape) == 3), None)
    if bank is not None and dialect not in (None, "comfy"):
        found = f"a bank of NVFP4 matrices in the dialect {dialect}"
        raise CheckpointError(found, where=f"{name}, layer {bank.name}", expected="ComfyUI's own layout for banks")
