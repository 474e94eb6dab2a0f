# SPDX-License-Identifier: Apache-2.0
"""Where does the full VAE run, how fast, and with the same pixels? The host's own loader against NVFP4 VAE Loader.

usage: python benchmarks/decode.py [--comfyui DIR] [--frames N] [--size WxH] [--folder DIR] [--out FILE]

LTX-2.3's VAEs in their true shapes with random weights (tests/real/vae_in_process.py), DynamicVRAM on as ComfyUI's
main.py sets it. Each side decodes the same latent three times; the first time includes the way of the weights to the
GPU. "parameters" is where a node finds the weights that infers the device from them, before and after a decode. Then
the decodes of split, embedded, FP8 and NVFP4 files and of the audio VAE are compared bit for bit with the host's; the
last one by deterministic cuDNN algorithms, because without them two decodes of one audio VAE already differ.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import in_process as comfyui

REPEATS = 3


def devices(vae: Any) -> str:
    return ", ".join(sorted({str(p.device) for p in vae.first_stage_model.parameters()}))


def decode(vae: Any, latent: Any) -> tuple[dict[str, Any], Any]:
    """Seconds, memory and devices of ``REPEATS`` decodes, and the pixels."""
    import torch

    row: dict[str, Any] = {"parameters before": devices(vae), "dtype": str(vae.vae_dtype).removeprefix("torch.")}
    seconds, pixels = [], None
    torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            pixels = vae.decode(latent.clone())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        comfyui.end_of_node()
    row |= {"parameters after": devices(vae), "first_s": seconds[0], "best_s": min(seconds[1:])}
    return row | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}, pixels


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="checkout; default COMFYUI_PATH")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--size", default="768x512")
    parser.add_argument("--folder", type=Path, help="where to write 4 GB; default the system's temporary folder")
    args = parser.parse_args()
    version = comfyui.start_host(args.comfyui)
    common.import_pack()
    sys.modules.pop("in_process")  # the scene's own module of that name
    sys.path.insert(0, str(common.ROOT / "tests" / "real"))
    import vae_in_process
    from comfy import memory_management, model_management

    found = common.facts() | {"comfyui": version, "dynamic_vram": bool(memory_management.aimdo_enabled)}
    common.print_facts(found)
    os.chdir(args.comfyui)
    rows, equal = [], {}
    with tempfile.TemporaryDirectory(prefix="nvfp4-decode-", dir=args.folder) as folder:
        scene = vae_in_process.Scene(Path(folder))
        equal["video"] = vae_in_process.video(scene)["equal"]
        video, _ = comfyui.latent_shapes(args.size, args.frames)
        latent = scene.torch.randn(video, generator=scene.generator)
        pixels = []
        for side in ("stock VAELoader", "NVFP4VAELoader"):
            model_management.unload_all_models()
            gc.collect()
            name = vae_in_process.VIDEO
            vae = scene.stock(name) if side.startswith("stock") else scene.ours(name)[0]
            row, made = decode(vae, latent)
            pixels.append(made)
            rows.append({"loader": side} | row)
            del vae
        equal["clip"] = scene.equal(*pixels)
        equal["restored"] = {name: row["equal"] for name, row in vae_in_process.restored(scene).items()}
        scene.torch.backends.cudnn.deterministic = True
        equal["audio"] = vae_in_process.audio(scene)["equal"]
    common.print_table(rows, dict.fromkeys(("first_s", "best_s", "peak_gb"), ".3f"))
    print(f"decodes equal the host's bit for bit: {json.dumps(equal)}")
    result = {"facts": found, "size": args.size, "frames": args.frames, "rows": rows, "equal": equal}
    common.save("decode", args.out, result)


if __name__ == "__main__":
    main()
