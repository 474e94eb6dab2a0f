# SPDX-License-Identifier: Apache-2.0
"""Time a denoising step of LTX-2.3 in NVFP4 where only so much GPU memory is left as a smaller card has.

usage: python benchmarks/small_cards.py [--comfyui DIR] [--cards 12,16] [--rows stock,ours,fp8-attention] [--reps N]

The rest of the GPU's memory is held by a tensor, so that with what driver and torch use the card seems full but for the
rest. Speed of memory, PCIe and tensor cores stay those of this GPU: what is imitated is how much must be streamed, and
a real small card computes several times slower beside it. All rows read one file; ComfyUI streams the weights
(DynamicVRAM). Each row samples once uncounted: for the first attention of a process torch can take another kernel than
ComfyUI asks for. Then rows alternate, with one noise throughout: whether a row repeats its own latents tells what it
means if it has not stock's. The first step of each sampling, in which the row before gives way, is left out.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import in_process
import step

STEPS = 5  # of the distilled 8
ROWS = {row: step.ROWS[row] for row in ("stock", "ours", "fp8-attention")}


def hold(gib: int) -> Any:
    """A tensor that leaves ``gib`` GiB of the GPU, what is in use counted in; None where the GPU has no more."""
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    torch.cuda.synchronize()
    count = torch.cuda.mem_get_info()[1] - (gib << 30)
    return torch.empty(count, dtype=torch.uint8, device="cuda") if count > 0 else None


def measure(card: int, patchers: dict[str, Any], config: dict, options: Namespace) -> list[dict[str, Any]]:
    """Table rows of one card."""
    import torch

    held = None if options.cpu else hold(card)
    free = 0.0 if options.cpu else torch.cuda.mem_get_info()[0] / 2**30
    step.say(f"{card} GiB: {free:.1f} are free")
    size, names = options.sizes[0], list(patchers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    latents: dict[str, list] = {name: [] for name in names}
    for name in names:
        in_process.sample(patchers[name], size, config, options.frames, seed=0, steps=2)
    for rep in range(options.reps):
        for name in names[rep % len(names) :] + names[: rep % len(names)]:
            if time.perf_counter() - step.STARTED > options.limit:
                step.say(f"{options.limit:.0f} s are over")
                break
            clip = (patchers[name], size, config, options.frames)
            seconds, made = in_process.sample(*clip, seed=0, steps=STEPS)
            latents[name].append(made)
            taken[name].append(statistics.median(seconds[1:]))
            step.say(f"{card} GiB, repetition {rep + 1}, {ROWS[name]}: {taken[name][-1]:.4f} s a step")
    del held
    medians = {name: statistics.median(found) for name, found in taken.items() if found}
    rows = []
    for name, found in medians.items():
        row: dict[str, Any] = {"card GiB": card, "free GiB": free, "row": ROWS[name], "step s": found}
        row |= {"lowest": min(taken[name]), "highest": max(taken[name]), "repetitions": len(taken[name])}
        row |= {f"x {ROWS[base]}": found / medians[base] for base in ("stock", "ours") if base in medians}
        row["repeats itself"] = all(map(same, latents[name], latents[name][1:]))
        if "stock" in medians:
            row["equal to stock"] = same(latents["stock"][0], latents[name][0])
        rows.append(row)
    return rows


def same(one: list, other: list) -> bool:
    """Whether the latents of two samplings have the same bits."""
    import torch

    return all(map(torch.equal, one, other))


def main() -> int:
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, ",".join(ROWS))
    parser.add_argument("--cards", default="12,16", help="GiB; default %(default)s")
    parser.add_argument("--layers", type=int, help="transformer blocks; default all (48, with --tiny 6)")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 18 GB free; default %(default)s")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no counted sampling after so many s")
    options = in_process.parse_options(parser, ROWS)
    found = in_process.begin(options)
    import torch
    from nvfp4_video.samples.released import recorded_model

    result: dict[str, Any] = {"facts": found, "frames": options.frames, "size": options.sizes[0], "rows": []}
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        keys, config = recorded_model(options.layers, options.tiny)
        path = Path(scratch) / "ltx23-nvfp4.safetensors"
        step.write_nvfp4(path, keys, config, "cpu" if options.cpu else "cuda")
        step.empty_cache()
        result["file_gb"] = path.stat().st_size / 1e9
        patchers = {name: step.load_row(name, path, keys, config, options) for name in options.rows}
        for card in map(int, options.cards.split(",")):
            result["rows"] += measure(card, patchers, config, options)
            in_process.save("small_cards", options, result)
        patchers.clear()
    common.print_table(result["rows"], {f"x {name}": ".3f" for name in ROWS.values()} | {"free GiB": ".1f"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
