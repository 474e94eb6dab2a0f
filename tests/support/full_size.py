# SPDX-License-Identifier: Apache-2.0
"""Headers of LTX-2.3 in its released size, from the recorded names and shapes: no data behind them."""

from __future__ import annotations

import json
import math
import struct
from functools import cache
from pathlib import Path

from nvfp4_video.checkpoint.file.header import Header, TensorInfo
from nvfp4_video.samples.recorded import recorded

ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "U8": 1}

recorded = cache(recorded)


def transformer(stored: str = "NVFP4") -> dict[str, TensorInfo]:
    """The diffusion model with the Linears of blocks 2 to 45 in NVFP4, FP8 or (none of them) BF16."""
    entries = {}
    for name, shape in recorded("ltxav_keys")["keys"].items():
        inside = name.startswith("transformer_blocks.") and 2 <= int(name.split(".")[1]) <= 45
        if not (inside and name.endswith(".weight") and len(shape) == 2) or stored == "BF16":
            entries[name] = entry("BF16", *shape)
        elif stored == "FP8":
            entries[name] = entry("F8_E4M3", *shape)
            entries[f"{name}_scale"] = entry("BF16")
        else:
            entries[name] = entry("U8", shape[0], shape[1] // 2)
            entries[f"{name}_scale"] = entry("F8_E4M3", -(-shape[0] // 128) * 128, shape[1] // 16)
            entries[f"{name}_scale_2"] = entry("BF16")
    return entries


def entry(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, math.prod(shape) * ITEM_BYTES[dtype])


def checkpoint(stored: str = "NVFP4") -> Header:
    """A full checkpoint: diffusion model, both VAEs, text projection."""
    tensors = {f"model.diffusion_model.{name}": info for name, info in transformer(stored).items()}
    vaes = recorded("ltx_vae_keys")
    tensors |= {f"vae.{name}": entry("BF16", *shape) for name, shape in vaes["video_vae"].items()}
    tensors |= {name: entry("BF16", *shape) for name, shape in vaes["audio_vae"].items()}
    tensors["text_embedding_projection.video_aggregate_embed.weight"] = entry("BF16", 4096, 188_160)
    tensors["text_embedding_projection.audio_aggregate_embed.weight"] = entry("BF16", 2048, 188_160)
    return Header(Path(f"ltx-2.3-{stored.lower()}.safetensors"), tensors, {}, sum(i.nbytes for i in tensors.values()))


def write(path: Path, header: Header) -> Path:
    """``header`` as a sparse file: it takes no room on the disk, whatever its size."""
    entries, at = {}, 0
    for name, info in header.tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path
