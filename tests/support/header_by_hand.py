# SPDX-License-Identifier: Apache-2.0
"""Headers made by hand: entries without data, for tests of code that reads nothing else of a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo
from nvfp4_video.checkpoint.file.torch_dtypes import DTYPES
from nvfp4_video.checkpoint.identify.dialects import detect

ENTRY = "_quantization_metadata"
LIGHTRICKS = {"config": json.dumps({"transformer": {"_class_name": "AVTransformer3DModel"}})}
MODELOPT = {"quantization_config": json.dumps({"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"})}


def entry(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize)


def comfy_layer(rows: int = 128, cols: int = 64) -> dict[str, TensorInfo]:
    """Entries of one layer whose scales, at the default shape, are (128, 4) in either order."""
    scale = entry("F8_E4M3", -(-rows // 128) * 128, -(-cols // 64) * 4)
    return {"weight": entry("U8", rows, cols // 2), "weight_scale": scale, "weight_scale_2": entry("F32")}


def row_major_layer(rows: int = 32, cols: int = 32) -> dict[str, TensorInfo]:
    return comfy_layer(rows, cols) | {"weight_scale": entry("F8_E4M3", rows, cols // 16)}


def header(metadata: dict[str, str] | None = None, **layers: dict[str, TensorInfo]) -> Header:
    """A header by hand; nothing but it is needed to detect a dialect."""
    tensors = {f"{layer}.{suffix}": info for layer, group in layers.items() for suffix, info in group.items()}
    markers = {name: b'{"format": "nvfp4"}' for name in tensors if name.endswith(".comfy_quant")}
    return Header(Path("some.safetensors"), tensors, metadata or {}, 0, markers)


def marked(layer: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    return layer | {"comfy_quant": entry("U8", 19)}


def refusal(head: Header, requested: str = "auto") -> str:
    """The one-line CheckpointError with which ``detect`` refuses a header made here."""
    with pytest.raises(CheckpointError) as raised:
        detect(head, requested)
    message = str(raised.value)
    assert message.startswith("some.safetensors") and "\n" not in message
    return message
