# SPDX-License-Identifier: Apache-2.0
"""Time one quantised Linear, and what it costs the CPU to launch one.

GPU part: a weight of 16384 x 4096 against several token counts: dense BF16, comfy-kitchen's dequantisation (its CUDA
and eager kernels) followed by a matmul, the host's QuantizedTensor through its tensor-subclass dispatch, and ours.
CPU part, with a ComfyUI checkout: every Linear of a transformer block of a scaled-down LTX-2.3, loaded by the host and
by host/load/model.py, resident on the GPU without DynamicVRAM, called with one token and not waited for. step.py
measures the same on the whole model with DynamicVRAM.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import in_process

TOKENS = (1, 64, 1024, 6144, 14080)


def contenders(backend: str) -> dict[str, Callable]:
    """Name -> function of (x, PackedWeight, dense BF16 weight, host's QuantizedTensor or None)."""
    import torch
    from nvfp4_video.kernels import dispatch

    linear = torch.nn.functional.linear
    found: dict[str, Callable] = {"dense": lambda x, w, dense, quantized: linear(x, dense)}
    try:
        import comfy_kitchen
    except ImportError:
        print("comfy-kitchen is not installed: its columns stay empty.")
    else:
        for name in ("cuda", "eager"):
            if comfy_kitchen.list_backends().get(name, {}).get("available"):
                dequantize = comfy_kitchen.registry.get_implementation("dequantize_nvfp4", backend=name)
                found[f"kitchen {name}"] = lambda x, w, dense, quantized, dequantize=dequantize: linear(
                    x, dequantize(w.packed, w.global_scale, w.block_scale)
                )
        found["QuantizedTensor"] = lambda x, w, dense, quantized: linear(x, quantized)
    found["ours"] = lambda x, w, dense, quantized: dispatch.linear(x, w, backend=backend)
    return found


def as_quantized_tensor(weight: Any) -> Any:
    """PackedWeight -> the tensor subclass in which stock ComfyUI keeps it, None without comfy-kitchen."""
    try:
        from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout
    except ImportError:
        return None
    import torch

    params = TensorCoreNVFP4Layout.Params(
        scale=weight.global_scale, orig_dtype=torch.bfloat16, orig_shape=weight.shape, block_scale=weight.block_scale
    )
    return QuantizedTensor(weight.packed, "TensorCoreNVFP4Layout", params)


def gpu_part(shape: tuple[int, int], tokens: list[int], backend: str) -> list[dict[str, Any]]:
    """Token counts -> table rows in milliseconds of GPU time; ``differ`` counts elements unlike the dense result."""
    import torch
    from nvfp4_video.kernels import reference

    calls = contenders(backend)
    sets = common.rotation(shape[0] * shape[1] // 2, most=8)
    weights = [reference.quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(sets)]
    dense = [reference.dequantize(w) for w in weights]
    quantized = [as_quantized_tensor(w) for w in weights]
    rows = []
    for count in tokens:
        inputs = [torch.randn(count, shape[1], device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        arguments = list(zip(inputs, weights, dense, quantized, strict=True))
        right = calls["dense"](*arguments[0])
        differing = int((calls["ours"](*arguments[0]).view(torch.int16) != right.view(torch.int16)).sum())
        row: dict[str, Any] = {"tokens": count}
        row |= {name: common.time_gpu(call, arguments) * 1e3 for name, call in calls.items()}
        row |= {"ours / dense": row["ours"] / row["dense"], "differ": differing}
        if "kitchen cuda" in row:
            row["ours / kitchen cuda"] = row["ours"] / row["kitchen cuda"]
        rows.append(row)
        print(f"{count} tokens done", flush=True)
    return rows


def load_resident(loader: Callable, path: Path) -> Any:
    """Load a model file and put it on the GPU whole; returns the host's ModelPatcher."""
    import comfy.model_management

    patcher = loader(str(path))
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def cpu_part(backend: str) -> list[dict[str, Any]]:
    """Microseconds of CPU time to launch one Linear of the model's third block, by way of loading."""
    import comfy.sd
    import torch
    from nvfp4_video.host.load import model as load
    from nvfp4_video.samples import synthetic

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaders = {
        "stock BF16": ("bf16", comfy.sd.load_diffusion_model),
        "stock NVFP4": ("comfy_markers", comfy.sd.load_diffusion_model),
        "ours NVFP4": ("comfy_markers", lambda path: load.load_model(path, backend=backend)[0]),
    }
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    quantised = [name for name in packed if name.startswith("transformer_blocks.2.")]
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, (kind, loader) in loaders.items():
            path = Path(folder, f"{kind}.safetensors")
            if not path.exists():
                synthetic.write(path, kind, state, config, packed)
            patcher = load_resident(loader, path)
            modules = [patcher.model.diffusion_model.get_submodule(layer) for layer in quantised]
            dtype = patcher.model.get_dtype_inference()
            pairs = [(module, torch.randn(1, 1, module.in_features, device=device).to(dtype)) for module in modules]

            def launch(pairs=pairs):
                for module, x in pairs:
                    module(x)

            seconds = common.time_launch(launch, calls=5) / len(pairs)
            rows.append({"Linear": name, "class": type(modules[0]).__qualname__, "launch us": seconds * 1e6})
    return rows


def main() -> int:
    """Returns 1 if our Linear's result differs from a matmul with the reference's weight."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default="16384x4096", help="OUTxIN; default %(default)s")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default %(default)s")
    parser.add_argument("--backend", default="triton", choices=("triton", "torch", "auto"), help="default %(default)s")
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="checkout; default $COMFYUI_PATH")
    parser.add_argument("--cpu", action="store_true", help="try the CPU part on the CPU; saves nothing")
    options = parser.parse_args()
    if not options.cpu:
        common.need_cuda()
    common.import_pack()
    found = common.facts()
    rows: list[dict[str, Any]] = []
    launches: list[dict[str, Any]] = []
    if not options.cpu:
        common.print_facts(found)
        shape = tuple(map(int, options.shape.split("x")))
        rows = gpu_part(shape, list(map(int, options.tokens.split(","))), options.backend)
        print(f"milliseconds of one Linear, out x in {options.shape}")
        common.print_table(rows, {"ours / dense": ".3f", "ours / kitchen cuda": ".3f"})
    if options.comfyui:
        flags = ["--cpu"] if options.cpu else []
        found["comfyui"] = in_process.start_host(options.comfyui, flags, dynamic=False, allocator=False)
        launches = cpu_part("torch" if options.cpu else options.backend)
        print(f"CPU time to launch one Linear, ComfyUI {found['comfyui']}, without DynamicVRAM")
        common.print_table(launches, {"launch us": ".1f"})
    else:
        print("No ComfyUI checkout (--comfyui, COMFYUI_PATH): the launch cost was not measured.")
    if not options.cpu:
        save = {"facts": found, "shape": options.shape, "backend": options.backend, "rows": rows, "launch": launches}
        common.save("linear", options.out, save)
    return int(any(row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
