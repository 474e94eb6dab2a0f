# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a checkpoint needs on a GPU, and what NVFP4 changes there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoint.file.shards import open_checkpoint
from ..checkpoint.identify.components import find_components
from ..measure.gpus import DETECTED, EXAMPLES, GPUS, Gpu, NoGpuError, pick_gpu
from ..measure.plan import make_plan
from ..measure.roofline import MODES, Clip
from ..measure.text import gib
from .amounts import amount, positive_count
from .console import CommandError, Console, check_ending, write_file


def plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``plan``."""
    parser.description = (
        "Whether a model fits a GPU for a clip, what bounds a denoising step there, and what NVFP4 therefore changes: "
        "size, speed, or both. Reads only the header. Exits with 1 if weights would have to be streamed in every step."
    )
    parser.add_argument("source", metavar="FILE", nargs="?", help="a full checkpoint or a diffusion model")
    parser.add_argument(
        "--gpu",
        default=DETECTED,
        metavar="NAME",
        help=f"this machine's, if left out, or one of {len(GPUS)} NVIDIA GPUs since Turing, as {', '.join(EXAMPLES)}; "
        "`--gpu list` lists them",
    )
    parser.add_argument("--width", type=positive_count, default=768, metavar="PIXELS")
    parser.add_argument("--height", type=positive_count, default=512, metavar="PIXELS")
    parser.add_argument("--frames", type=positive_count, default=121, metavar="N")
    parser.add_argument("--fps", type=amount, default=24.0, metavar="N")
    parser.add_argument("--compute", choices=MODES, default=MODES[0], help="how NVFP4 is multiplied")
    parser.add_argument("--text-encoder", type=amount, metavar="GB", help="size of the text encoder, 9 if left out")
    parser.add_argument("--memory", type=amount, metavar="GIB", help="memory of an unlisted GPU, as on its box")
    parser.add_argument("--bandwidth", type=amount, metavar="GB/S", help="its memory bandwidth")
    parser.add_argument("--tflops", type=amount, metavar="N", help="its dense BF16 tensor rate in TFLOP/s")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="write the roofline as .png")
    parser.set_defaults(run=run_plan)


def _row(gpu: Gpu) -> list[str]:
    rates = (gpu.bandwidth and f"{gpu.bandwidth / 1e9:,.0f}", gpu.bf16 and f"{gpu.bf16 / 1e12:,.1f}")
    return [gib(gpu.memory), *(rate or "-" for rate in rates), gpu.name]


def run_plan(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the plan, whether it runs without streaming)."""
    check_ending(args.picture, ".png")
    if args.gpu == "list":
        console.table(["memory", "GB/s", "BF16 TFLOP/s", "GPU"], [_row(gpu) for gpu in GPUS.values()], ">>><", indent=0)
        return {"gpus": [gpu.as_dict() for gpu in GPUS.values()]}, True
    if args.source is None:
        raise CommandError("no file was named; name a checkpoint or a diffusion model, or list the cards by --gpu list")
    header = open_checkpoint(args.source).header
    clip = Clip(args.width, args.height, args.frames, args.fps)
    encoder = args.text_encoder and args.text_encoder * 1e9
    try:
        gpu = pick_gpu(args.gpu, memory=args.memory, bandwidth=args.bandwidth, tflops=args.tflops)
    except NoGpuError as error:
        raise CommandError(f"{error}; with --bandwidth in GB/s and --tflops, dense BF16, times as well") from error
    parts = find_components(header)
    found = make_plan(header.path.name, header.tensors, parts, clip, gpu, args.compute, encoder)
    if args.picture:
        from ..draw.planner import roofline_picture  # Pillow, which only the picture needs
        from ..measure.media import encode_png

        write_file(args.picture, encode_png(roofline_picture(found)))
    console.say(str(found))
    if args.picture:
        console.say(f"\nPicture: {args.picture}")
    return found.as_dict() | {"picture": str(args.picture) if args.picture else None}, found.runs
