# SPDX-License-Identifier: Apache-2.0
"""What the host's functions that tests/stub_comfy imitates give for the same inputs; run by test_stub_values.py.

usage: <the host's python> stub_values.py, in the folder of a ComfyUI checkout

``values`` asks whatever is imported as ``comfy``: the real one in that process, the stub in the tests' own. Each value
is JSON; a tensor is its dtype, shape and numbers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "values: "
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64, FP8)


def values() -> dict[str, Any]:
    """Name of a case -> its value."""
    return {name: plain(case()) for name, case in cases().items()}


def plain(value: Any) -> Any:
    """As JSON has it: tensors and dtypes written out, tuples as lists, sets sorted."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.detach().double().flatten().tolist()]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value if value is None or isinstance(value, str | int | float) else str(value)


def cases() -> dict[str, Callable[[], Any]]:
    """Name -> what to ask; each makes its own inputs, since some functions change theirs."""
    utils, management = comfy("utils"), comfy("model_management")
    both = (torch.bfloat16, torch.float32)
    found: dict[str, Callable[[], Any]] = {
        "convert_old_quants, nothing to convert": lambda: utils.convert_old_quants(plain_layers(), ""),
        "convert_old_quants, no metadata": lambda: utils.convert_old_quants(plain_layers(), "", metadata=None),
        "convert_old_quants, header": lambda: utils.convert_old_quants(plain_layers(), "", metadata=header_metadata()),
        "weight_dtype": lambda: utils.weight_dtype(old_fp8("", 1, 0.5)),
        "weight_dtype, nothing": lambda: utils.weight_dtype({}, "a."),
        "calculate_parameters": lambda: utils.calculate_parameters(old_fp8("net.", 1, 0.5), "net."),
        "detect_layer_quantization": lambda: utils.detect_layer_quantization(marked("fp8", ""), ""),
        "detect_layer_quantization, elsewhere": lambda: utils.detect_layer_quantization(marked("fp8", "a."), "b."),
        "cast_to_device": lambda: management.cast_to_device(torch.arange(4.0), CPU, torch.bfloat16),
        "should_use_bf16": lambda: management.should_use_bf16(CPU),
        "supports_fp8_compute": lambda: management.supports_fp8_compute(CPU),
        "supports_nvfp4_compute": lambda: management.supports_nvfp4_compute(CPU),
        "get_torch_device": management.get_torch_device,
        "merge_nested_dicts": merged,
    }
    for elements in (0, 1, 2):
        for scale in (0.5, 1.0):
            for prefix in ("", "model.diffusion_model."):
                found[f"convert_old_quants, scaled_fp8 of {elements}, input scale {scale}, {prefix!r}"] = (
                    lambda e=elements, s=scale, p=prefix: utils.convert_old_quants(old_fp8(p, e, s), p, metadata={})
                )
    for filtered in (False, True):
        found[f"state_dict_prefix_replace, {filtered}"] = lambda f=filtered: utils.state_dict_prefix_replace(
            old_fp8("net.", 1, 0.5), {"net.": "", "other": "moved"}, filter_keys=f
        )
    for count in (4, 6):
        for prefix in ("model.diffusion_model.", "net.", ""):
            found[f"unet_prefix_from_state_dict, {count} of {prefix!r}"] = lambda c=count, p=prefix: comfy(
                "model_detection"
            ).unet_prefix_from_state_dict({f"{p}{number}": None for number in range(c)})
    for dtype in DTYPES:
        found[f"unet_manual_cast of {dtype}"] = lambda d=dtype: management.unet_manual_cast(d, CPU, both)
        found[f"unet_dtype of {dtype}"] = lambda d=dtype: management.unet_dtype(CPU, 10, both, d)
    for kind in ("bf16", "fp8", "nvfp4"):
        found[f"Linear, {kind}"] = lambda k=kind: linear(k)
    return found


def comfy(name: str) -> Any:
    return importlib.import_module(f"comfy.{name}")


def plain_layers() -> dict:
    return {"a.weight": torch.arange(4.0), "b.weight": torch.arange(2.0)}


def header_metadata() -> dict:
    layers = {"a": {"format": "nvfp4"}, "not.there": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}
    return {"_quantization_metadata": json.dumps({"layers": layers}), "format": "pt"}


def old_fp8(prefix: str, elements: int, input_scale: float) -> dict:
    """A layer as FP8 files had it before markers, one without scales, and one that is not below ``prefix``."""
    return {
        f"{prefix}scaled_fp8": torch.zeros(elements, dtype=FP8),
        f"{prefix}a.weight": torch.arange(16.0).reshape(4, 4).to(FP8),
        f"{prefix}a.scale_weight": torch.tensor(2.0),
        f"{prefix}a.scale_input": torch.tensor(input_scale),
        f"{prefix}b.bias": torch.arange(4.0).bfloat16(),
        "other.scale_weight": torch.tensor(3.0),
    }


def marked(kind: str, prefix: str) -> dict:
    """A Linear's tensors, (16, 32), plain or with the marker of its format."""
    bias = torch.arange(16.0).bfloat16()
    if kind == "bf16":
        return {f"{prefix}weight": torch.arange(512.0).reshape(16, 32).bfloat16() / 64, f"{prefix}bias": bias}
    if kind == "fp8":
        name = "float8_e4m3fn"
        found = {"weight": (torch.arange(512.0).reshape(16, 32) / 64).to(FP8), "weight_scale": torch.tensor(0.5)}
    else:
        name, scale = "nvfp4", torch.full((128, 4), 1.5).to(FP8)
        packed = (torch.arange(256) % 256).to(torch.uint8).reshape(16, 16)
        found = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.25)}
    found["comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    return {f"{prefix}{key}": tensor for key, tensor in (found | {"bias": bias}).items()}


@torch.no_grad()
def linear(kind: str) -> dict:
    """What a Linear of mixed operations for FP32 on the CPU becomes, computes and saves."""
    config = type("Config", (), {"quant_config": {"mixed_ops": True}})()
    operations = comfy("ops").pick_operations(None, torch.float32, CPU, model_config=config)
    layer = operations.Linear(32, 16, bias=True, device="cpu", dtype=torch.float32)
    layer.load_state_dict(marked(kind, ""), strict=False)
    quantized = hasattr(layer.weight, "dequantize") and hasattr(layer.weight, "_qdata")
    return {
        "weight": layer.weight.dequantize() if quantized else layer.weight,
        "output": layer(torch.arange(64.0).reshape(2, 32) / 64),
        "format": getattr(layer, "quant_format", None),
        "saved": dict(sorted(layer.state_dict().items())),
        "disabled": sorted({"nvfp4", "float8_e4m3fn"} & set(operations._disabled)),
    }


def merged() -> dict:
    merge = comfy("patcher_extension").merge_nested_dicts
    return merge({"a": {"x": [1], "y": 2}, "b": 3}, {"a": {"x": [4], "z": {"w": 5}}, "b": 6, "c": [7]})


def main() -> None:
    # ComfyUI reads its command line while it is imported, and looks for a GPU unless told not to.
    sys.argv = ["main.py", "--cpu"]
    sys.path[0] = str(Path.cwd())
    importlib.import_module("comfy.options").enable_args_parsing()
    sys.stdout.write(f"\n{MARK}{json.dumps(values())}\n")


if __name__ == "__main__":
    main()
