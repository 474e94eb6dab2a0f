# SPDX-License-Identifier: Apache-2.0
"""How much memory and time does quantising a whole LTX-2.3 checkpoint take?

usage: python benchmarks/quantize_file.py [--bf16] [--scale full|small] [--model-only] [--fast] [--verify]
                                          [--device NAME] [--folder DIR] [--out FILE]

The checkpoint has all 4,444 tensors of the transformer in their true shapes, both VAEs, the vocoder and the text
projection, random numbers of trained weights' size: 29.1 GB with the Linears of blocks 2 to 45 in scaled FP8, 46 GB
in BF16. It is written tensor by tensor first (the disk's write rate), then quantised in a process of its own, which
says by how much its memory peaked: the whole of it (ru_maxrss, torch and CUDA included) and what the GPU's allocator
had. Source and target need 49 GB of disk together, 66 GB with --bf16. --scale small divides all sizes by 16.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

GIB = 2**30
PREFIX = "model.diffusion_model."
POOL = 2**27  # numbers, from which every tensor is a slice
MARKER = b'{"format": "float8_e4m3fn"}'


def shapes(small: bool, model_only: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a full LTX-2.3 checkpoint; small: sizes from 64 on divided by 16."""
    from nvfp4_video.samples.recorded import recorded

    found = {PREFIX + name: tuple(shape) for name, shape in recorded("ltxav_keys")["keys"].items()}
    if not model_only:
        vae = recorded("ltx_vae_keys")
        found |= {f"vae.{name}": tuple(shape) for name, shape in vae["video_vae"].items()}
        found |= {name: tuple(shape) for name, shape in vae["audio_vae"].items()}
        found["text_embedding_projection.video_aggregate_embed.weight"] = (4096, 188160)
        found["text_embedding_projection.audio_aggregate_embed.weight"] = (2048, 188160)
    if small:
        found = {n: tuple(size // 16 if size >= 64 else size for size in s) for n, s in found.items()}
    return found


def write_source(path: Path, fp8: bool, small: bool, model_only: bool) -> None:
    """The checkpoint, each tensor made when its turn comes."""
    import numpy as np
    import torch
    from nvfp4_video.checkpoint.file.container import PlannedTensor, write_checkpoint
    from nvfp4_video.samples.recorded import recorded

    pool = POOL // 64 if small else POOL
    noise = torch.randn(pool, generator=torch.Generator().manual_seed(0)) * 0.02
    pools = {"BF16": noise.to(torch.bfloat16).view(torch.uint8).numpy()}
    pools["F8_E4M3"] = (noise * (448 / 0.12)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    scale = memoryview(np.array([0.12 / 448], dtype=np.float32).tobytes())
    del noise

    def slice_of(dtype: str, nbytes: int, number: int) -> memoryview:
        data = pools[dtype]
        start = 2 * (number * 7_919_017 % max((len(data) - nbytes) // 2, 1)) if nbytes < len(data) else 0
        return memoryview(np.resize(data, nbytes) if nbytes > len(data) else data[start : start + nbytes])

    planned = []
    for number, (name, shape) in enumerate(shapes(small, model_only).items()):
        block = re.match(rf"{re.escape(PREFIX)}transformer_blocks\.(\d+)\..+\.weight$", name)
        as_fp8 = fp8 and block is not None and len(shape) == 2 and 2 <= int(block[1]) <= 45
        dtype = "F8_E4M3" if as_fp8 else "BF16"
        nbytes = math.prod(shape) * (1 if as_fp8 else 2)
        planned.append(PlannedTensor(name, dtype, shape, functools.partial(slice_of, dtype, nbytes, number)))
        if as_fp8:
            layer = name.removesuffix(".weight")
            planned.append(PlannedTensor(f"{layer}.weight_scale", "F32", (), lambda: scale))
            planned.append(PlannedTensor(f"{layer}.comfy_quant", "U8", (len(MARKER),), lambda: memoryview(MARKER)))
    planned.sort(key=lambda tensor: {"F32": 0, "BF16": 1}.get(tensor.dtype, 2))
    write_checkpoint(path, planned, {"config": json.dumps(recorded("ltx23_config")), "license": "random numbers"})


def quantize_once(source: str, target: str, device: str, search: str) -> dict[str, Any]:
    """Runs in the child: the record, with seconds and peaks of memory."""
    common.import_pack()
    import torch
    from nvfp4_video.checkpoint.write.plan import QuantizeSettings
    from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint

    cuda = device.startswith("cuda")
    if cuda:
        torch.zeros(1, device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    record = quantize_checkpoint(source, target, QuantizeSettings(search=search), device=device)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "rss_before_gib": before,
        "gpu_allocated_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "gpu_reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        **{key: record[key] for key in ("layers", "nbytes", "source_bytes", "sha256", "kept", "recipe")},
    }


def verify_once(source: str, target: str, device: str) -> dict[str, Any]:
    """Runs in the child: every layer against its source."""
    common.import_pack()
    from nvfp4_video.checkpoint.verify.verify import verify

    start = time.perf_counter()
    found = verify(target, source, device=device)
    return {
        "verify_s": time.perf_counter() - start,
        "ok": found.ok,
        "mean_error": found.mean_error,
        "worst_error": max(check.error for check in found.layers),
        "identical_tensors": found.identical,
    }


def in_child(*words: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *words]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    if answer.returncode:
        raise SystemExit(answer.returncode)
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        work = {"quantize": quantize_once, "verify": verify_once}[sys.argv[2]]
        print(json.dumps(work(*sys.argv[3:])))
        return
    parser = common.make_parser(__doc__)
    parser.add_argument("--bf16", action="store_true", help="source in BF16 instead of FP8")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--model-only", action="store_true", help="a source without VAEs and text projection")
    parser.add_argument("--fast", action="store_true", help="block maxima instead of the search")
    parser.add_argument("--verify", action="store_true", help="compare every layer with its source afterwards")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--folder", type=Path, help="where to write; default the system's folder for temporary files")
    args = parser.parse_args()
    common.import_pack()
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = common.facts() | {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)}
    common.print_facts(found)
    with tempfile.TemporaryDirectory(prefix="nvfp4-quantize-", dir=args.folder) as name:
        source, target = Path(name) / "source.safetensors", Path(name) / "target.safetensors"
        start = time.perf_counter()
        write_source(source, not args.bf16, args.scale == "small", args.model_only)
        written = time.perf_counter() - start
        print(f"source: {source.stat().st_size / 1e9:.2f} GB in {written:.1f} s", flush=True)
        row = in_child("quantize", str(source), str(target), device, "amax" if args.fast else "mse")
        if args.verify:
            row |= in_child("verify", str(source), str(target), device)
    sizes = [math.prod(s) * 2 for s in shapes(args.scale == "small", args.model_only).values()]
    limit = 1.5 + 3 * max(sizes) / GIB
    gpu = row["gpu_reserved_gib"]
    row = {
        "source": "BF16" if args.bf16 else "FP8", "scale": args.scale, "device": device,
        "search": "amax" if args.fast else "mse", "source_gb": row["source_bytes"] / 1e9,
        "target_gb": row["nbytes"] / 1e9, "shrinks_by": 1 - row["nbytes"] / row["source_bytes"],
        "write_source_gb_s": row["source_bytes"] / 1e9 / written,
        "read_and_write_gb_s": (row["source_bytes"] + row["nbytes"]) / 1e9 / row["seconds"],
        "largest_tensor_gib": max(sizes) / GIB, "rss_limit_gib": limit,
        "within_limits": row["peak_rss_gib"] <= limit and (gpu is None or gpu < 2), **row,
    }  # fmt: skip
    shown = ("source", "device", "search", "source_gb", "target_gb", "shrinks_by", "seconds", "read_and_write_gb_s",
             "peak_rss_gib", "rss_limit_gib", "gpu_reserved_gib", "within_limits")  # fmt: skip
    common.print_table([{key: row.get(key) for key in shown}], {"seconds": ".1f"})
    name = "quantize_file" + ("_bf16" if args.bf16 else "") + ("_small" if args.scale == "small" else "")
    common.save(name, args.out, {"facts": found, "rows": [row]})


if __name__ == "__main__":
    main()
