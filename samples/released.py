# SPDX-License-Identifier: Apache-2.0
"""LTX-2.3 in its released shapes, or scaled down, with seeded random weights: BF16, FP8 and NVFP4 files, both VAEs.

Names and shapes are the recorded ones (``data/``); each tensor is seeded by its own name and made when its turn to be
written comes, so a file needs memory for one tensor and is the same whatever else is written. The three formats of the
model hold one set of weights: FP8 and NVFP4 are made from the BF16 file, the first with the layers of the second.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from ..checkpoint.file.container import PlannedTensor, TensorReader, write_checkpoint
from ..checkpoint.file.header import read_header
from ..checkpoint.identify.dialects import detect
from ..checkpoint.write.quantize import quantize_checkpoint
from .recorded import recorded
from .synthetic import fp8_tensors

Shapes = dict[str, list[int]]
OnStep = Callable[[int, int], None]
FORMATS = ("bf16", "fp8", "nvfp4")


def recorded_model(layers: int | None = None, small: bool = False) -> tuple[Shapes, dict]:
    """-> ({tensor name: shape}, transformer config) of LTX-2.3 cut to ``layers`` blocks, or of its scaled-down copy."""
    found = recorded("ltx23_small" if small else "ltxav_keys")
    keys, config = found["keys"], found["config"]
    config["num_layers"] = min(layers or config["num_layers"], config["num_layers"])
    dropped = tuple(f"transformer_blocks.{block}." for block in range(config["num_layers"], 100))
    return {key: shape for key, shape in keys.items() if not key.startswith(dropped)}, config


def random_weight(
    key: str, shape: Collection[int], device: str | torch.device = "cpu", gain: float = 0.5, bias: float = 0.01
) -> torch.Tensor:
    """BF16 tensor seeded by its name; norms and standard deviations are 1.

    A gain below one keeps 48 random blocks, or a decoder's depth, from overflowing.
    """
    shape = tuple(shape)
    if key.endswith("std-of-means") or (len(shape) == 1 and "norm" in key and key.endswith("weight")):
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
    scale = gain / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else bias
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * scale


def write_model(path: Path, keys: Shapes, config: Mapping, device: str = "cpu", on_step: OnStep | None = None) -> None:
    """Write the model in BF16, with its `config`."""
    plan = [
        PlannedTensor(key, "BF16", tuple(shape), functools.partial(random_weight, key, shape, device))
        for key, shape in keys.items()
    ]
    write_checkpoint(path, plan, {"config": json.dumps({"transformer": config})}, on_step)


def write_fp8(source: Path, target: Path, layers: Collection[str], on_step: OnStep | None = None, device="cpu") -> None:
    """Write ``source`` with the weights of ``layers`` as published FP8 files have them: E4M3, one scale, a marker."""
    header = read_header(source)
    with TensorReader(header) as reader:

        @functools.lru_cache(maxsize=1)
        def parts(layer: str) -> dict[str, torch.Tensor]:
            return fp8_tensors(reader.get(f"{layer}.weight").to(device))

        plan = []
        for key, info in header.tensors.items():
            layer = key.removesuffix(".weight")
            if layer == key or layer not in layers:
                plan.append(PlannedTensor(key, info.dtype, info.shape, functools.partial(reader.get, key)))
                continue
            marker = len(fp8_tensors(torch.ones(1))["comfy_quant"])
            for suffix, dtype, shape in (
                ("weight_scale", "F32", ()),
                ("weight", "F8_E4M3", info.shape),
                ("comfy_quant", "U8", (marker,)),
            ):
                produce = functools.partial(lambda layer, suffix: parts(layer)[suffix], layer, suffix)
                plan.append(PlannedTensor(f"{layer}.{suffix}", dtype, shape, produce))
        # Large items first, and the markers of odd length last: all data aligned. A weight is made once for its scale
        # and once for its bytes.
        order = {"F32": 0, "BF16": 1, "F8_E4M3": 2, "U8": 3}
        plan.sort(key=lambda tensor: order[tensor.dtype])
        write_checkpoint(target, plan, header.metadata, on_step)


def write_vae(path: Path, part: str, small: bool = False, device: str = "cpu", smooth: bool = False) -> None:
    """Write ``part``, "video_vae" or "audio_vae", as a file of its own.

    ``smooth``: with weights by which noise becomes flowing colours and a murmur, to be looked at and listened to.
    """
    keys = recorded("ltx23_small_vae")["keys"][part] if small else recorded("ltx_vae_keys")[part]
    config = recorded("ltx23_config") | (recorded("ltx23_small_vae")["config"] if small else {})

    def weight(key: str) -> torch.Tensor:
        made = random_weight(key, keys[key], device, 0.8, 0.02)
        return _smoothed(made, key, _copies(key, keys)) if smooth else made

    plan = [PlannedTensor(key, "BF16", tuple(shape), functools.partial(weight, key)) for key, shape in keys.items()]
    write_checkpoint(path, plan, {"config": json.dumps(config)})


def _copies(key: str, keys: Shapes) -> int:
    """How many neighbouring output channels of a decoder's convolution become places of one channel."""
    block = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.conv\.conv\.weight", key)
    if block:
        return keys[key][0] // keys[f"decoder.up_blocks.{int(block[1]) + 1}.res_blocks.0.conv1.conv.weight"][1]
    return keys[key][0] // 3 if key == "decoder.conv_out.conv.weight" else 1


def _smoothed(weight: torch.Tensor, key: str, copies: int) -> torch.Tensor:
    """A decoder's kernel -> one that blurs, and enlarges by repetition; that of the last sound layer -> a soft one.

    Of a smooth input the output is as large as before. The layers before the first enlargement stay, for some detail.
    """
    if "conv_post" in key:
        return weight * 0.1
    if not key.startswith("decoder.") or key.startswith(("decoder.conv_in", "decoder.up_blocks.0.")):
        return weight
    if weight.dim() < 5:
        return weight * 0  # a bias would tint all frames
    flat = weight.float().mean((2, 3, 4), keepdim=True) * math.sqrt(math.prod(weight.shape[2:]))
    flat = flat.unflatten(0, (-1, copies)).mean(1, keepdim=True) * math.sqrt(copies)
    paler = 0.3 if key.startswith("decoder.conv_out") else 1.0
    return (flat.expand(-1, copies, *flat.shape[2:]).flatten(0, 1).expand_as(weight) * paler).to(weight.dtype)


def write_all(
    folder: Path,
    formats: Collection[str] = FORMATS,
    layers: int | None = None,
    small: bool = False,
    device: str = "cpu",
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Path]:
    """Write the model in ``formats`` and both VAEs -> {"bf16": path, ..., "video_vae": path, "audio_vae": path}.

    ``on_step(file, done, total)`` in bytes. The BF16 file is removed again where it is not asked for.
    """
    keys, config = recorded_model(layers, small)
    found = {name: folder / f"ltx23-{name}.safetensors" for name in (*FORMATS, "video_vae", "audio_vae")}
    write_model(found["bf16"], keys, config, device, functools.partial(on_step, found["bf16"].name))
    if {"fp8", "nvfp4"} & {*formats}:
        step = functools.partial(on_step, found["nvfp4"].name)
        quantize_checkpoint(found["bf16"], found["nvfp4"], device=device, on_step=step)
    if "fp8" in formats:
        quantised = {*detect(read_header(found["nvfp4"])).nvfp4}
        write_fp8(found["bf16"], found["fp8"], quantised, functools.partial(on_step, found["fp8"].name), device)
    for part in ("video_vae", "audio_vae"):
        write_vae(found[part], part, small, device)
    for name in FORMATS:
        if name not in formats:
            found.pop(name).unlink(missing_ok=True)
    return found
