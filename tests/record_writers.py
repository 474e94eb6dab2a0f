# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/writers/: small files by other people's quantisers, and what their own libraries read in them.

    python tests/record_writers.py [FOLDER]

Needs convert_to_quant (with prodigy-plus-schedule-free), compressed-tensors and comfy-kitchen; no ComfyUI, no GPU.
For each NAME there are NAME.safetensors, as the writer leaves it, and NAME.meant.safetensors, every weight in FP32
as that writer's library dequantises it. tests/host/load/test_writers.py loads them, and where the libraries are
installed it runs them anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parent / "data" / "writers"
SHAPES = {"blocks.0.q": (32, 64), "blocks.0.k": (16, 32), "blocks.1.q": (64, 64)}
Tensors = dict[str, torch.Tensor]
# What convert_to_quant is asked for.
CONVERT_TO_QUANT = {
    "nvfp4": ("--nvfp4",),
    "mxfp8": ("--mxfp8",),
    "fp8": ("--comfy_quant",),
    "fp8_rows": ("--comfy_quant", "--scaling_mode", "row", "--save-quant-metadata"),
    "fp8_blocks": ("--comfy_quant", "--scaling_mode", "block", "--block_size", "16"),
    "int8": ("--int8", "--comfy_quant"),
    "int8_rows": ("--int8", "--comfy_quant", "--scaling_mode", "row"),
    "mixed": (
        *("--comfy_quant", "--exclude-layers", "0.q", "--fallback", "nvfp4", "--fallback-simple"),
        *("--custom-layers", "1.q", "--custom-type", "mxfp8", "--custom-simple"),
    ),
}  # fmt: skip


def model() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {"blocks.0.norm.weight": torch.ones(64).bfloat16()}
    for layer, shape in SHAPES.items():
        tensors[f"{layer}.weight"] = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        tensors[f"{layer}.bias"] = (torch.randn(shape[:1], generator=generator) * 0.05).bfloat16()
    return tensors


def convert_to_quant(folder: Path, name: str) -> tuple[Path, Tensors]:
    """One case of CONVERT_TO_QUANT -> the file, its weights as the library reads them."""
    source, target = folder / "source.safetensors", folder / f"convert_to_quant_{name}.safetensors"
    save_file(model(), source)
    start = [sys.executable, "-c", "from convert_to_quant.cli.main import main; main()", "-i", source, "-o", target]
    options = ("--device", "cpu", "--simple", "--verbose", "MINIMAL", "--manual_seed", "0")
    subprocess.run([*start, *options, *CONVERT_TO_QUANT[name]], check=True, capture_output=True, timeout=300)  # noqa: S603
    return target, _read_by_convert_to_quant(load_file(target))


def _read_by_convert_to_quant(tensors: Tensors) -> Tensors:
    from convert_to_quant.comfy import quant_ops
    from convert_to_quant.converters.mxfp8_converter import MXFP8Converter
    from convert_to_quant.converters.nvfp4_converter import NVFP4Converter

    meant = {}
    for layer, (rows, cols) in SHAPES.items():
        weight, scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
        said = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) if scale is not None else {"format": ""}
        form, f32 = said["format"], torch.float32
        if form == "nvfp4":
            found = NVFP4Converter()._dequantize_pytorch(weight, tensors[f"{layer}.weight_scale_2"], scale, f32)
        elif form == "mxfp8":
            found = MXFP8Converter()._dequantize_pytorch(weight, scale, f32)
        elif form == "float8_e4m3fn":
            found = quant_ops.TensorCoreFP8Layout.dequantize(weight, scale, f32)
        elif form == "float8_e4m3fn_rowwise":
            found = quant_ops.RowWiseFP8Layout.dequantize(weight, scale, f32)
        elif form == "float8_e4m3fn_blockwise":
            found = quant_ops.BlockWiseFP8Layout.dequantize(weight, scale, said["group_size"], f32)
        elif form == "int8_tensorwise":
            found = quant_ops.TensorWiseINT8Layout.dequantize(weight, scale, True, f32)
        else:
            found = weight
        meant[layer] = found.float()[:rows, :cols].contiguous()
    return meant


def compressed_tensors(folder: Path, name: str) -> tuple[Path, Tensors]:
    """NVFP4 as compressed-tensors packs it."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme, tensors, meant = preset_name_to_scheme("NVFP4A16", ["Linear"]), model(), {}
    for layer in SHAPES:
        weight = tensors.pop(f"{layer}.weight").float()
        factor = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
        blocks = weight.unflatten(1, (-1, 16))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=factor)
        parts = NVFP4PackedCompressor.compress(
            {"weight": weight, "weight_scale": scale, "weight_global_scale": factor}, scheme
        )
        meant[layer] = NVFP4PackedCompressor.decompress(parts, scheme)["weight"].float()
        tensors |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    target = folder / f"compressed_tensors_{name}.safetensors"
    save_file(tensors, target, {"format": "pt"})
    return target, meant


def comfy_kitchen(folder: Path, name: str) -> tuple[Path, Tensors]:
    """Each layer in another of comfy-kitchen's formats, with the markers that ComfyUI saves."""
    import comfy_kitchen.tensor as kitchen

    layouts = {
        "blocks.0.q": ("TensorCoreNVFP4Layout", "nvfp4"),
        "blocks.0.k": ("TensorWiseINT8Layout", "int8_tensorwise"),
        "blocks.1.q": ("TensorCoreMXFP8Layout" if name == "mxfp8" else "TensorCoreFP8Layout", name),
    }
    tensors, meant = model(), {}
    for layer, (layout, form) in layouts.items():
        kitchen.register_layout_class(layout, getattr(kitchen, layout))
        packed = kitchen.QuantizedTensor.from_float(tensors.pop(f"{layer}.weight"), layout)
        meant[layer] = packed.dequantize().float()
        parts = packed.state_dict(f"{layer}.weight") | {f"{layer}.comfy_quant": _marker(form)}
        tensors |= {key: part.contiguous() for key, part in parts.items()}
    target = folder / f"comfy_kitchen_{name}.safetensors"
    save_file(tensors, target)
    return target, meant


def _marker(form: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


WRITERS = {
    **{("convert_to_quant", name): convert_to_quant for name in CONVERT_TO_QUANT},
    ("compressed_tensors", "nvfp4"): compressed_tensors,
    **{("comfy_kitchen", name): comfy_kitchen for name in ("float8_e4m3fn", "mxfp8")},
}


def main(folder: Path = DATA) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for (library, name), write in WRITERS.items():
            path, meant = write(Path(temporary), name)
            (folder / path.name).write_bytes(path.read_bytes())
            save_file(meant, folder / f"{library}_{name}.meant.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
