# SPDX-License-Identifier: Apache-2.0
"""Time a denoising step of the whole LTX-2.3 DiT in a real ComfyUI: stock BF16, stock NVFP4 and this pack, side by
side, the pack also with `int8` and `fp8` compute, in all steps or not in the first and last, without CUDA graphs, with
attention by trial, and compiled by ComfyUI's TorchCompileModel (--rows).

One process holds all models on the GPU. The weights are random, the tensor names and shapes the released ones,
the quantised layers those of the published files (every Linear of all blocks but the first and last two). ComfyUI is
set up as its main.py does: CUDA allocator, DynamicVRAM, async offload. The NVFP4 file is written once to --scratch and
loaded by both NVFP4 rows; the BF16 weights go to the loader from memory, since 42 GB more on a disk would take longer
than all the rest. Each repetition draws fresh noise and runs the rows in another order, so that a drift of the CPU's
speed hits all alike.

A step is the time between two callbacks of the sampler, the GPU waited for at each: 8 distilled sigmas, euler, cfg 1,
joint audio and video. `--tiny --cpu` tries the script on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import in_process

ROWS = {
    "bf16": "stock BF16",
    "stock": "stock NVFP4",
    "ours": "ours NVFP4",
    "ours-eager": "ours NVFP4, no graphs",
    "fp8": "ours NVFP4, fp8",
    "fp8-eager": "ours NVFP4, fp8, no graphs",
    "ours-attention": "ours NVFP4, attention auto",
    "fp8-attention": "ours NVFP4, fp8, attention auto",
    "fp8-apart": "ours NVFP4, fp8, attention auto, blocks as the host's",
    "fp8-schedule": "ours NVFP4, fp8, first and last step bf16",
    "int8": "ours NVFP4, int8, attention auto",
    "bf16-compiled": "stock BF16, compiled",
    "ours-compiled": "ours NVFP4, compiled",
    "fp8-compiled": "ours NVFP4, fp8, compiled",
}
EQUAL = (("stock", "ours"), ("ours-eager", "ours"), ("fp8-eager", "fp8"))  # rows whose latents must have the same bits
# Rows compared with `ours` by relative error.
ROUNDED = {"fp8", "fp8-schedule", "ours-attention", "fp8-attention", "fp8-apart", "int8"}
MARKER = json.dumps({"format": "nvfp4"}).encode()
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Print with the seconds since the start: a run that is cut off shows how far it came."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def write_nvfp4(path: Path, keys: Mapping[str, list[int]], config: Mapping, device: str) -> list[str]:
    """Write the model in the host's own NVFP4 layout with markers; returns the quantised layers."""
    import torch
    from nvfp4_video.checkpoint.file import container
    from nvfp4_video.kernels import reference
    from nvfp4_video.kernels.format import PackedWeight, packed_shape
    from nvfp4_video.kernels.format import block_scale_shape as scale_shape
    from nvfp4_video.samples import synthetic
    from nvfp4_video.samples.released import random_weight

    layers = synthetic.quantised_layers({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, config)

    @functools.lru_cache(maxsize=1)
    def quantised(layer: str) -> PackedWeight:
        return reference.quantize(random_weight(f"{layer}.weight", keys[f"{layer}.weight"], device))

    marker = torch.tensor(list(MARKER), dtype=torch.uint8)
    plan = []
    for key, shape in keys.items():
        layer = key.removesuffix(".weight")
        if layer == key or layer not in layers:
            produce = functools.partial(random_weight, key, shape, device)
            plan.append(container.PlannedTensor(key, "BF16", tuple(shape), produce))
            continue
        for suffix, dtype, size, produce in (
            ("weight_scale_2", "F32", (), lambda layer=layer: quantised(layer).global_scale),
            ("weight_scale", "F8_E4M3", scale_shape(shape), lambda layer=layer: quantised(layer).block_scale),
            ("weight", "U8", packed_shape(shape), lambda layer=layer: quantised(layer).packed),
            ("comfy_quant", "U8", (len(MARKER),), lambda: marker),
        ):
            plan.append(container.PlannedTensor(f"{layer}.{suffix}", dtype, size, produce))
    # Large items first, as safetensors' own writer orders them, and the markers of odd length last: all data aligned.
    order = {"F32": 0, "BF16": 1, "F8_E4M3": 2, "U8": 3}
    plan.sort(key=lambda tensor: (tensor.name.endswith("comfy_quant"), order[tensor.dtype]))
    container.write_checkpoint(path, plan, {"config": json.dumps({"transformer": config})})
    return layers


def load_row(row: str, path: Path, keys: Mapping[str, list[int]], config: Mapping, options: Namespace) -> Any:
    """Load one row's model as a user of it would; returns the host's ModelPatcher."""
    import comfy.sd

    if row.endswith("-compiled"):
        options = Namespace(**vars(options) | {"no_dynamic": True})
        return in_process.compiled(load_row(row.removesuffix("-compiled"), path, keys, config, options))
    if row == "bf16":
        from nvfp4_video.samples.released import random_weight

        device = "cpu" if options.cpu else "cuda"
        state = {key: random_weight(key, shape, device).cpu() for key, shape in keys.items()}
        empty_cache()
        say(f"built {sum(tensor.nbytes for tensor in state.values()) / 1e9:.2f} GB of BF16 weights")
        metadata = {"config": json.dumps({"transformer": config})}
        return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, disable_dynamic=options.no_dynamic)
    if row == "stock":
        return comfy.sd.load_diffusion_model(str(path))
    from nvfp4_video.host.load import model as load

    compute = row.partition("-")[0] if row.startswith(("fp8", "int8")) else "bf16"
    attention = "auto" if row.endswith(("-attention", "-apart")) or row == "int8" else "host"
    patcher, report = load.load_model(
        str(path), compute, backend=options.backend, disable_dynamic=options.no_dynamic, attention=attention
    )
    say(str(report))
    if row.endswith("-schedule"):
        from nvfp4_video.host.compute import schedule

        say(schedule.use_schedule(patcher, schedule.FIRST_AND_LAST))
    if row.endswith("-eager"):
        in_process.without_graphs(patcher)
    if row.endswith("-apart"):
        in_process.without_fused_blocks(patcher)
    return patcher


def empty_cache() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_sampling(name: str, patcher: Any, config: Mapping, options: Namespace) -> dict[str, Any]:
    """Sample two steps, which brings the weights to the GPU; returns what that cost in memory."""
    import torch
    from nvfp4_video.host.bench.meter import PeakMemory, memory

    before = memory()
    with PeakMemory() as peak:
        in_process.sample(patcher, options.sizes[0], config, options.frames, seed=0, steps=2)
    after = memory()
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    found = {
        "weights on GPU GB": patcher.loaded_size() / 1e9,
        "GPU grew GB": after.get("gpu", 0.0) - before.get("gpu", 0.0),
        "GPU peak GB": peak.gpu,
        "torch peak GB": peak.torch,
        "RAM grew GB": after.get("RssAnon", 0.0) - before.get("RssAnon", 0.0),
        "DynamicVRAM": dynamic,
    }
    if dynamic and torch.cuda.is_available() and hasattr(patcher, "partially_unload_ram"):
        # The host keeps a pinned copy of every weight while there is RAM. This is its own answer to a lack of RAM; the
        # weights stay on the GPU, and three models at once need not fit.
        torch.cuda.synchronize()
        patcher.partially_unload_ram(1e32)
    say(f"{name}: {found['weights on GPU GB']:.2f} GB of weights, torch peak {found['torch peak GB']:.2f} GB")
    return found


def kernel_seconds(name: str, run: Callable[[], Any], steps: int) -> float:
    """Seconds of GPU kernels a step, by torch.profiler; prints the largest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    total = sum(event.self_device_time_total for event in events) / 1e6 / steps
    say(f"{name}: {total:.4f} s of kernels a step")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:12]:
        each = event.self_device_time_total / 1e6 / steps
        print(f"  {each:.4f} s  {event.count // steps:6d} x  {event.key[:110]}", flush=True)
    return total


def compare(outputs: Mapping[str, list], first: str, second: str, repeat: Callable[[], list]) -> dict[str, Any]:
    """Final latents of two rows; where they differ, the first is run again to see if it repeats itself."""
    import torch

    pairs = list(zip(outputs[first], outputs[second], strict=True))
    found: dict[str, Any] = {
        "rows": [first, second],
        "bit_equal": all(torch.equal(a, b) for a, b in pairs),
        "max_abs_diff": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
        "finite": all(bool(torch.isfinite(b).all()) for _, b in pairs),
        "std": float(outputs[first][0].float().std()),
    }
    if not found["bit_equal"]:
        found["repeats_itself"] = all(map(torch.equal, outputs[first], repeat()))
    return found


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def measure_size(size: str, patchers: Mapping[str, Any], config: Mapping, options: Namespace) -> dict[str, Any]:
    """All rows at one size, interleaved; returns the table rows and the comparison of latents."""
    frames, names = options.frames, list(patchers)
    for name in names:
        in_process.sample(patchers[name], size, config, frames, seed=0, steps=2)
    steps: dict[str, list[list[float]]] = {name: [] for name in names}
    phases: dict[str, dict[str, float]] = {}
    latents, errors = [], []
    for rep in range(options.reps):
        if rep and time.perf_counter() - STARTED > options.limit:
            say(f"{options.limit:.0f} s are over: no further repetition")
            break
        outputs = {}
        for name in names[rep % len(names) :] + names[: rep % len(names)]:
            found = in_process.Phases()
            with contextlib.nullcontext() if name.endswith("-compiled") else found:
                taken, outputs[name] = in_process.sample(
                    patchers[name], size, config, frames, seed=1 + rep, on_step=found.step
                )
            steps[name].append(taken)
            phases[name] = {} if name.endswith("-compiled") else found.medians()
            say(f"{size} repetition {rep + 1}, {ROWS[name]}: {statistics.median(taken):.4f} s a step")
        for first, second in EQUAL:
            if {first, second} <= outputs.keys():
                again = functools.partial(in_process.sample, patchers[first], size, config, frames, seed=1 + rep)
                latents.append(compare(outputs, first, second, lambda again=again: again()[1]))
                say(f"{size} repetition {rep + 1}: {ROWS[second]} against {ROWS[first]} {latents[-1]}")
        for name in outputs.keys() & ROUNDED if "ours" in outputs else ():
            pairs = zip(outputs[name], outputs["ours"], strict=True)
            errors.append({"row": ROWS[name], "video, audio": [relative_error(*pair) for pair in pairs]})
            say(f"{size} repetition {rep + 1}: latents against bf16 compute with ComfyUI's attention {errors[-1]}")
    video = in_process.latent_shapes(size, frames)[0]
    medians = {name: statistics.median(sum(taken, [])) for name, taken in steps.items()}
    rows = []
    for name, taken in steps.items():
        each = [statistics.median(one) for one in taken]
        row: dict[str, Any] = {"size": size, "tokens": video[2] * video[3] * video[4], "row": ROWS[name]}
        row |= {"step s": medians[name], "lowest": min(each), "highest": max(each), "repetitions": len(each)}
        row |= phases[name]
        row |= {f"x {ROWS[base]}": medians[name] / medians[base] for base in ("bf16", "stock") if base in medians}
        rows.append(row)
    return {"rows": rows, "latents": latents, "errors": errors}


def run(options: Namespace, found: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Everything between building the weights and the tables; the result so far is saved after each stage."""
    from nvfp4_video.host.bench.meter import memory
    from nvfp4_video.samples.released import recorded_model

    device = "cpu" if options.cpu else "cuda"
    keys, config = recorded_model(options.layers, options.tiny)
    path = scratch / "ltx23-nvfp4.safetensors"
    layers = write_nvfp4(path, keys, config, device)
    empty_cache()
    written = path.stat().st_size / 1e9
    say(f"wrote {written:.2f} GB, {config['num_layers']} blocks, {len(layers)} NVFP4 Linears, to {scratch}")
    result: dict[str, Any] = {"facts": found, "file_gb": written, "quantised": len(layers)}
    result |= {"blocks": config["num_layers"], "frames": options.frames, "memory": {}, "sizes": {}, "launch_us": {}}
    patchers: dict[str, Any] = {}
    for name in options.rows:
        gc.collect()
        before, start = memory(), time.perf_counter()
        patchers[name] = load_row(name, path, keys, config, options)
        gc.collect()
        grown = {kind: value - before[kind] for kind, value in memory().items()}
        result["memory"][name] = {"load s": time.perf_counter() - start}
        result["memory"][name] |= {f"load {kind} GB": value for kind, value in grown.items()}
        say(f"loaded {ROWS[name]}; grew by {', '.join(f'{kind} {value:.2f} GB' for kind, value in grown.items())}")
        result["memory"][name] |= first_sampling(ROWS[name], patchers[name], config, options)
    for size in options.sizes:
        result["sizes"][size] = measure_size(size, patchers, config, options)
        in_process.save("step", options, result)
    for name, patcher in patchers.items():
        result["launch_us"][name] = in_process.launch_cost(patcher, layers)
        say(f"{ROWS[name]}: {result['launch_us'][name]:.1f} us of CPU time to launch a Linear of the quantised blocks")
    if options.profile and not options.cpu:
        result["kernel_s"] = {}
        for size, name in itertools.product(options.sizes, patchers):
            work = functools.partial(in_process.sample, patchers[name], size, config, options.frames)
            seconds = kernel_seconds(f"{size} {ROWS[name]}", lambda work=work: work(seed=0, steps=2), steps=2)
            result["kernel_s"].setdefault(size, {})[name] = seconds
    result["attention"] = _trials()
    in_process.save("step", options, result)
    return result


def _trials() -> list[str]:
    from nvfp4_video.host.compute.attention import trials

    return [str(trial) for trial in trials()]


def parse() -> Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, "bf16,stock,ours")
    parser.add_argument("--layers", type=int, help="transformer blocks; default all (48, with --tiny 6)")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 18 GB free; default %(default)s")
    parser.add_argument("--profile", action="store_true", help="also the GPU kernels of a step, by torch.profiler")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no repetition after so many seconds")
    return in_process.parse_options(parser, ROWS)


def main() -> int:
    """Returns 1 if latents that must be equal differ on a GPU."""
    options = parse()
    found = in_process.begin(options)
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = run(options, found, Path(scratch))
    common.print_table(
        [row for size in result["sizes"].values() for row in size["rows"]],
        {f"x {name}": ".3f" for name in ROWS.values()},
    )
    common.print_table(
        [{"row": ROWS[name], **values} for name, values in result["memory"].items()],
        {key: ".2f" for values in result["memory"].values() for key in values},
    )
    print("CPU time to launch a Linear: " + ", ".join(f"{ROWS[k]} {v:.1f} us" for k, v in result["launch_us"].items()))
    differing = [one for size in result["sizes"].values() for one in size["latents"] if not one["bit_equal"]]
    return int(bool(differing) and not options.cpu)


if __name__ == "__main__":
    sys.exit(main())
