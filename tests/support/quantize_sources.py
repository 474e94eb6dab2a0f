# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the tests of the quantiser: tiny ones with true LTX names, and one of full size without data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from nvfp4_video.checkpoint.file.container import PlannedTensor, build_header
from nvfp4_video.checkpoint.file.torch_dtypes import DTYPES
from nvfp4_video.samples.recorded import recorded

from . import files

PREFIX = "model.diffusion_model."
CONFIG = json.dumps({"transformer": {"_class_name": "AVTransformer3DModel"}, "vae": {}, "audio_vae": {}, "vocoder": {}})
METADATA = {"config": CONFIG, "license": "community", "note": "kept"}
BLOCKS = 4
Tensors = dict[str, torch.Tensor]


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    return files.save(path, tensors, METADATA if metadata is None else metadata)


def tiny(seed: int = 0, dtype: torch.dtype = torch.bfloat16, blocks: int = BLOCKS) -> Tensors:
    """A full LTX-2.3 checkpoint of about 200 kB: DiT of true names, and VAE tensors of odd sizes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "patchify_proj.weight": (64, 32),
        "adaln_single.linear.weight": (96, 64),
        "audio_adaln_single.linear.weight": (48, 32),
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight": (64, 64),
        "proj_out.weight": (32, 64),
        "scale_shift_table": (2, 64),
    }
    for block in range(blocks):
        at = f"transformer_blocks.{block}"
        shapes |= {
            f"{at}.attn1.to_q.weight": (64, 64),
            f"{at}.attn1.to_q.bias": (64,),
            f"{at}.attn1.q_norm.weight": (64,),
            f"{at}.attn1.to_gate_logits.weight": (32, 64),
            f"{at}.attn2.to_k.weight": (64, 32),
            f"{at}.audio_attn1.to_q.weight": (48, 32),
            f"{at}.audio_to_video_attn.to_out.0.weight": (64, 32),
            f"{at}.ff.net.0.proj.weight": (256, 64),
        }
    tensors = {PREFIX + n: (torch.randn(s, generator=generator) * 0.05).to(dtype) for n, s in shapes.items()}
    return tensors | {
        "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": torch.randn(1024, 1, 1, 1, 1, generator=generator),
        "vae.encoder.down_blocks.1.conv.conv.bias": torch.randn(7, generator=generator).half(),
        "vae.encoder.down_blocks.7.conv.conv.weight": torch.randn(128, 1, 1, 1, 1, generator=generator).bfloat16(),
        "vae.per_channel_statistics.mean-of-means": torch.randn(3, generator=generator).bfloat16(),
        "vae.per_channel_statistics.std-of-means": torch.randn(3, generator=generator).bfloat16(),
        "audio_vae.per_channel_statistics.mean-of-means": torch.arange(5, dtype=torch.int64),
        "vocoder.vocoder.resblocks.0.convs1.0.weight": torch.randn(8, 1, 1, generator=generator),
    }


def linears(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers of `tiny` that the LTX-2.3 recipe quantises, as stored."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if re.match(rf"{re.escape(PREFIX)}transformer_blocks\.\d+\..+\.weight$", name)
        and tensor.ndim == 2
        and not name.endswith("to_gate_logits.weight")
    ]


def to_fp8(weight: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight -> FP8 and its multiplying scale, () fp32."""
    scale = (weight.float().abs().amax() / torch.finfo(dtype).max).clamp(min=1e-12)
    return (weight.float() / scale).to(dtype), scale.reshape(())


def sparse_ltx23(path: Path, fp8: bool = True) -> Path:
    """LTX-2.3's full checkpoint in true names and shapes, a header only; FP8: Linears of blocks 2 to 45, 29.1 GB."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in recorded("ltxav_keys")["keys"].items():
        block = re.match(r"transformer_blocks\.(\d+)\..+\.weight$", name)
        small = fp8 and block is not None and len(shape) == 2 and 2 <= int(block[1]) <= 45
        tensors[PREFIX + name] = ("F8_E4M3" if small else "BF16", tuple(shape))
        if small:
            layer = PREFIX + name.removesuffix(".weight")
            tensors[f"{layer}.weight_scale"] = ("F32", ())
            tensors[f"{layer}.comfy_quant"] = ("U8", (27,))
    vae = recorded("ltx_vae_keys")
    others = {f"vae.{name}": shape for name, shape in vae["video_vae"].items()} | vae["audio_vae"]
    others["text_embedding_projection.video_aggregate_embed.weight"] = (4096, 188160)
    others["text_embedding_projection.audio_aggregate_embed.weight"] = (2048, 188160)
    tensors |= {name: ("BF16", tuple(shape)) for name, shape in others.items()}
    planned = [PlannedTensor(name, dtype, shape, lambda: None) for name, (dtype, shape) in tensors.items()]
    header, total = build_header(path, planned, {"config": CONFIG})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    assert total == sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in planned)
    return path
