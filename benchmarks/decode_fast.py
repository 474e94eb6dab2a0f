# SPDX-License-Identifier: Apache-2.0
"""What does `decode` = `fast` of NVFP4 VAE Loader change: time, memory, pixels? Against stock, exact and layout alone.

usage: python benchmarks/decode_fast.py [--comfyui DIR] [--sizes WxH,...] [--frames N] [--reps N] [--profile FILE]
       [--out FILE]

LTX-2.3's video VAE in its true shapes with random weights, DynamicVRAM on as ComfyUI's main.py sets it. All rows take
turns in one process, each warmed up once; "layout" is exact with the convolutions' weights in channels_last_3d and
nothing else. Memory is what a decode needs beside what was there before. Then the pixels: PSNR against a decode in FP32
without TF32 (of a smaller clip), for weights as random as that and for "damped" ones, whose residual branches add a
quarter of that, as those of trained networks add little. Then the kernels against their definition and against the
memory's speed. Encoding is timed as it is and by layout alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import in_process as comfyui

ROWS = ("stock", "exact", "layout", "fast")
SHAPES = ((16, 96, 64, 512), (16, 192, 128, 128), (128, 24, 16, 1024))
SPREADS = (((16, 96, 64, 512), (2, 1, 1)), ((16, 96, 64, 512), (1, 2, 2)), ((8, 48, 32, 4096), (2, 2, 2)))
EPS = 1e-8


def write_vae(path: Path, branch: float) -> None:
    """LTX-2.3's video VAE with seeded numbers; ``branch`` scales the second convolution of each residual block."""
    import torch
    from nvfp4_video.samples.recorded import recorded
    from safetensors.torch import save_file

    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in recorded("ltx_vae_keys")["video_vae"].items():
        if name.endswith("std-of-means"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        gain = 0.8 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
        gain *= branch if ".conv2." in name else 1.0
        numbers = torch.randn(shape, generator=generator, device="cuda") * gain
        tensors[name] = numbers.to(torch.bfloat16).cpu()
    save_file(tensors, path, {"config": json.dumps(recorded("ltx23_config"))})


def build(row: str, path: Path) -> tuple[Any, str]:
    """-> the VAE of a row, and what its loader says of the way it decodes."""
    import comfy.sd
    import comfy.utils
    import torch
    from nvfp4_video.host.load.vae import load_vae

    if row in ("stock", "fp32"):
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        return comfy.sd.VAE(sd=state, metadata=metadata, dtype=torch.float32 if row == "fp32" else None), ""
    vae, report = load_vae(str(path), decode="fast" if row == "fast" else "exact")
    if row == "layout":
        for module in vae.first_stage_model.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae, report.decode


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """-> seconds, GB beside what was allocated before, result."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.inference_mode():
        made = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    comfyui.end_of_node()
    return seconds, (torch.cuda.max_memory_allocated() - before) / 1e9, made


def psnr(a: Any, b: Any) -> float:
    """dB, of pixels from 0 to 1."""
    error = sum((x.cuda() - y.cuda()).double().square().mean().item() for x, y in zip(a[0], b[0], strict=True))
    return -10 * math.log10(max(error / len(a[0]), 1e-20))


def compare_times(vaes: dict[str, Any], size: str, frames: int, reps: int) -> list[dict[str, Any]]:
    """One row each of ``vaes``, of decodes (and encodes) that take turns."""
    import torch

    shape, _ = comfyui.latent_shapes(size, frames)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {row: [] for row in vaes}
    memory: dict[str, list[float]] = {row: [] for row in vaes}
    pixels: dict[str, Any] = {}
    for rep in range(reps + 1):
        for row, vae in vaes.items():
            pixels.pop(row, None)
            took, needed, pixels[row] = timed(partial(vae.decode, latent.clone()))
            if rep:
                seconds[row].append(took)
                memory[row].append(needed)
    rows = []
    for row in vaes:
        median = statistics.median(seconds[row])
        rows.append({
            "size": size, "row": row, "s": median, "of_stock": median / statistics.median(seconds["stock"]),
            "low": min(seconds[row]), "high": max(seconds[row]), "work_gb": max(memory[row]),
            "psnr_to_exact": None if row in ("exact", "stock") else psnr(pixels["exact"], pixels[row]),
            "bits_of_stock": bool(torch.equal(pixels["stock"], pixels[row])),
        })  # fmt: skip
    return rows


def compare_encodes(vaes: dict[str, Any], size: str, frames: int, reps: int) -> list[dict[str, Any]]:
    """Encoding, which `fast` leaves as it is: as it is, and by layout alone."""
    import torch

    width, height = map(int, size.split("x"))
    clip = torch.rand((frames, height, width, 3), generator=torch.Generator().manual_seed(2))
    rows = []
    for row in ("exact", "layout"):
        took = [timed(partial(vaes[row].encode, clip.clone()))[:2] for _ in range(reps + 1)][1:]
        seconds = [one[0] for one in took]
        rows.append({"size": size, "encode": row, "s": statistics.median(seconds), "work_gb": max(t[1] for t in took)})
    return rows


def compare_pixels(folder: Path, size: str = "512x320", frames: int = 49) -> list[dict[str, Any]]:
    """PSNR of exact, layout and fast against FP32, and of one another, by kind of weights."""
    import torch

    shape, _ = comfyui.latent_shapes(size, frames)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for kind, branch in (("random", 1.0), ("damped", 0.25)):
        path, made = folder / f"{kind}.safetensors", {}
        write_vae(path, branch)
        for row in ("fp32", "exact", "layout", "fast"):
            vae, _ = build(row, path)
            with torch.inference_mode():
                made[row] = vae.decode(latent.clone())
            del vae
            release()
        std = made["fp32"].float().std().item()
        rows += [
            {"weights": kind, "pixels_std": std, "row": row, "psnr_to_fp32": psnr(made["fp32"], made[row]),
             "psnr_to_exact": None if row == "exact" else psnr(made["exact"], made[row])}
            for row in ("exact", "layout", "fast")
        ]  # fmt: skip
        path.unlink()
    torch.backends.cudnn.allow_tf32 = True
    return rows


def release() -> None:
    from comfy import model_management

    model_management.unload_all_models()
    gc.collect()
    model_management.soft_empty_cache()


def gpu_seconds(call: Callable[[], Any], calls: int = 60) -> float:
    """Median over 5 rounds of the GPU's time for one call, all of a round queued while the GPU sleeps."""
    import torch

    call()
    rounds = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(40_000_000)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(rounds)


def check_kernels(bandwidth: float) -> list[dict[str, Any]]:
    """Each kernel against its definition (largest difference in units of BF16's last place), and against a copy."""
    import torch
    from nvfp4_video.kernels import video_reference
    from nvfp4_video.kernels.backends import triton_module

    def fresh(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    def row(name: str, shape: tuple, ours: Any, right: Any, call: Callable[[], Any], moved: int) -> dict[str, Any]:
        apart = (ours.float() - right.float()).abs() / right.float().abs().clamp(min=2.0**-7) * 2**8
        differ, floor = (ours != right).float().mean().item(), moved / bandwidth
        seconds = gpu_seconds(call)
        return {
            "kernel": name, "shape": "x".join(map(str, shape)), "off_by_units": apart.max().item(),
            "differ": differ, "us": seconds * 1e6, "of_floor": seconds / floor,
        }  # fmt: skip

    rows = []
    norm, spread, pixels = (triton_module(name) for name in ("norm_silu", "depth_to_space", "to_pixels"))
    for shape in SHAPES:
        x, residual, bias = fresh(*shape), fresh(*shape), fresh(shape[-1])
        for name, options, passes in (
            ("bias, norm, silu", {"bias": bias, "eps": EPS}, 2),
            ("bias, residual, norm, silu", {"bias": bias, "residual": residual, "eps": EPS, "keep": True}, 4),
            ("bias, residual", {"bias": bias, "residual": residual}, 3),
        ):
            mine, right, kept = torch.empty_like(x), torch.empty_like(x), (x.clone(), x.clone())
            norm.norm_silu(kept[0], mine, **options)
            video_reference.norm_silu(kept[1], right, **options)
            if not torch.equal(*kept):
                raise AssertionError("the sum that is kept differs")
            call = partial(norm.norm_silu, x, mine, **options)
            rows.append(row(name, shape, mine, right, call, passes * x.nbytes))
    for shape, stride in SPREADS:
        x, bias = fresh(*shape), fresh(shape[-1])
        mine, right = spread.depth_to_space(x, stride, bias), video_reference.depth_to_space(x, stride, bias)
        call = partial(spread.depth_to_space, x, stride, bias)
        rows.append(row(f"depth to space {stride}", shape, mine, right, call, 2 * x.nbytes))
    x, bias = fresh(40, 192, 128, 48), fresh(48)
    arguments = (x, 4, bias, torch.float32, True)
    mine, right = pixels.to_pixels(*arguments), video_reference.to_pixels(*arguments)
    rows.append(row("to pixels", x.shape, mine, right, partial(pixels.to_pixels, *arguments), 3 * x.nbytes))
    weight = fresh(512, 512, 3, 3, 3)
    call = partial(weight.contiguous, memory_format=torch.channels_last_3d)
    rows.append(row("weight to channels_last_3d", weight.shape, call(), weight, call, 2 * weight.nbytes))
    return rows


def profile(vaes: dict[str, Any], size: str, frames: int) -> str:
    """Kernels of one decode by GPU time, for each VAE."""
    import torch
    from torch.profiler import ProfilerActivity

    shape, _ = comfyui.latent_shapes(size, frames)
    latent, text = torch.randn(shape, generator=torch.Generator().manual_seed(1)), []
    for name, vae in vaes.items():
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            timed(partial(vae.decode, latent.clone()))
        kernels = [one for one in found.key_averages() if one.self_device_time_total and one.device_type.name == "CUDA"]
        kernels.sort(key=lambda one: -one.self_device_time_total)
        total = sum(one.self_device_time_total for one in kernels)
        text.append(f"{size} {name}: kernels {total / 1e3:.1f} ms")
        listed = ((one.self_device_time_total / 1e3, one.count, one.key[:150]) for one in kernels[:22])
        text += [f"  {ms:8.2f} ms {count:5d}x {key}" for ms, count, key in listed]
        host = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)[:8]
        text += [f"  CPU {one.self_cpu_time_total / 1e3:8.2f} ms {one.count:5d}x {one.key[:80]}" for one in host]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="checkout; default COMFYUI_PATH")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--sizes", default="768x512,1280x704", type=lambda text: text.split(","))
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="where to write the kernels of each decode")
    args = parser.parse_args()
    version = comfyui.start_host(args.comfyui)
    from comfy import memory_management

    found = common.facts() | {"comfyui": version, "dynamic_vram": bool(memory_management.aimdo_enabled)}
    common.print_facts(found)
    result: dict[str, Any] = {"facts": found, "frames": args.frames}
    result["kernels"] = check_kernels(common.copy_bandwidth())
    common.print_table(result["kernels"], {"off_by_units": ".3f", "differ": ".2e", "us": ".1f", "of_floor": ".2f"})
    with tempfile.TemporaryDirectory(prefix="nvfp4-decode-") as folder:
        path = Path(folder) / "vae.safetensors"
        write_vae(path, 1.0)
        built = {row: build(row, path) for row in ROWS}
        print(f"fast: {built['fast'][1]}", flush=True)
        vaes = {row: vae for row, (vae, _) in built.items()}
        result["rows"], result["encodes"], profiles = [], [], []
        for size in args.sizes:
            result["rows"] += compare_times(vaes, size, args.frames, args.reps)
            common.print_table(result["rows"][-len(ROWS) :], {"psnr_to_exact": ".1f", "work_gb": ".2f"})
            if args.profile:
                profiles.append(profile({row: vaes[row] for row in ("stock", "fast")}, size, args.frames))
                args.profile.write_text("\n".join(profiles), encoding="utf-8")
            result["encodes"] += compare_encodes(vaes, size, args.frames, 2)
        common.print_table(result["encodes"])
        del vaes, built
        release()
        path.unlink()
        result["pixels"] = compare_pixels(Path(folder))
        common.print_table(result["pixels"], dict.fromkeys(("psnr_to_fp32", "psnr_to_exact"), ".1f"))
    common.save("decode_fast", args.out, result)


if __name__ == "__main__":
    main()
