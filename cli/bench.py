# SPDX-License-Identifier: Apache-2.0
"""``bench``: one clip by every format and compute mode of a model, side by side; only the model file differs.

This module must not import torch: in the processes of the rows, ComfyUI has to choose the CUDA allocator first.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..measure.bench import ROWS
from .amounts import amount, count, positive_count
from .console import CommandError, Console


def bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    parser.description = (
        "Renders one clip of joint audio and video by LTX-2.x from BF16, FP8 and NVFP4 files, by ComfyUI's own loader "
        "and by this pack's, and compares size, times, memory, latents, frames and sound. Steps, sigmas, seed and VAE "
        "are the same for all. Run it with ComfyUI's Python. Every repetition of a row is a process of its own, so a "
        "row that fails stops no other; rows take turns, every second time in reverse order. Writes bench.json, "
        "bench.md and bench.png. Exits with 1 if a row failed."
    )
    files = parser.add_argument_group("files, .safetensors; at least one of --bf16 and --nvfp4, or --synthetic")
    files.add_argument("--bf16", type=Path, metavar="FILE", help="model or full checkpoint in BF16")
    files.add_argument("--fp8", type=Path, metavar="FILE", help="the same model in FP8")
    files.add_argument("--nvfp4", type=Path, metavar="FILE", help="the same model in NVFP4")
    files.add_argument("--vae", type=Path, metavar="FILE", help="video VAE; else that of the first file that has one")
    files.add_argument("--audio-vae", type=Path, metavar="FILE", help="audio VAE; likewise")
    files.add_argument(
        "--conditioning", type=Path, metavar="FILE",
        help="one tensor (1, tokens, width) of a processed text; else seeded random numbers",
    )  # fmt: skip
    files.add_argument("--synthetic", action="store_true", help="make the files: LTX-2.3 with random weights")
    files.add_argument("--layers", type=positive_count, metavar="N", help="with --synthetic: only the first N blocks")
    files.add_argument("--small", action="store_true", help="with --synthetic: the scaled-down model and VAEs")
    clip = parser.add_argument_group("clip")
    clip.add_argument("--size", metavar="WxH", help="multiples of 32; default 768x512, with --small 64x64")
    clip.add_argument("--frames", type=positive_count, metavar="N", help="8k + 1; default 121, with --small 9")
    clip.add_argument(
        "--steps", type=positive_count, default=8, metavar="N", help="spread over the 8 distilled sigmas; default 8"
    )
    clip.add_argument("--seed", type=count, default=1, metavar="N", help="default 1")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rows", metavar="A,B,...", help=f"some of {', '.join(ROWS)}; default: all the files allow")
    how.add_argument("--reps", type=positive_count, default=3, metavar="N", help="processes for each row; default 3")
    how.add_argument("--warm", type=positive_count, default=1, metavar="N", help="clips after the cold one; default 1")
    how.add_argument("--limit", type=amount, metavar="SECONDS", help="begin no further repetition that would end later")
    how.add_argument("--drop-cache", action="store_true", help="drop a file from the page cache before it is loaded")
    host = parser.add_argument_group("ComfyUI")
    host.add_argument("--comfyui", type=Path, metavar="DIR", help="its folder; default COMFYUI_PATH, or the pack's own")
    host.add_argument("--flags", default="", metavar='"..."', help="launch flags of ComfyUI")
    host.add_argument("--cpu", action="store_true", help="run on the CPU")
    host.add_argument("--no-dynamic", action="store_true", help="leave DynamicVRAM off")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results, new or empty")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make files; default: in --out")
    parser.add_argument("--row-job", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the result, whether no row failed)."""
    if args.row_job:
        from ..host.bench.row import main

        return {}, main(args.row_job)
    if args.out is None:
        raise CommandError("name a folder for the results: --out DIR")
    if args.steps < 2:
        raise CommandError(f"--steps is {args.steps}; expected 2 or more")
    if args.layers is not None and (args.layers < 5 or not args.synthetic or args.small):
        raise CommandError("--layers takes 5 blocks or more, and only with --synthetic (without --small)")
    if args.small and not args.synthetic:
        raise CommandError("--small makes the files of --synthetic; give both")
    from .bench_run import run_bench

    return run_bench(args, comfyui_folder(args.comfyui), console)


def comfyui_folder(named: Path | None) -> Path:
    """The checkout of --comfyui, COMFYUI_PATH, or that in which the pack lies. Raises CommandError without one."""
    from ..host.bench.session import is_checkout

    pack = Path(__file__).resolve().parent.parent
    path = (named or Path(os.environ.get("COMFYUI_PATH") or pack.parent.parent)).expanduser().resolve()
    if not is_checkout(path):
        raise CommandError(f"{path} is not a ComfyUI: name its folder, the one with main.py, with --comfyui")
    return path
