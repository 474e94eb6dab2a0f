# SPDX-License-Identifier: Apache-2.0
"""``quantize`` and ``verify``: make an NVFP4 file, and prove what it is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.file.resume import PART
from ..checkpoint.identify.components import DIFFUSION_MODEL
from ..checkpoint.identify.dialects import AUTO
from ..checkpoint.verify.found import Verification, summary, worst_layers
from ..checkpoint.verify.quality import quality_card
from ..checkpoint.verify.verify import verify as verify_files
from ..checkpoint.write.budget import PRESETS
from ..checkpoint.write.card import budget_text, calibration_text, curve_rows, less_text, lora_text
from ..checkpoint.write.estimate import estimate
from ..checkpoint.write.plan import QUALITIES, QuantizeSettings
from ..checkpoint.write.quantize import quantize_checkpoint
from ..checkpoint.write.recipes import FAMILIES, Options
from .amounts import count
from .console import CommandError, Console, check_ending, size, write_file
from .options import add_dialect, add_lora, add_source, add_target


def quantize(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``quantize``."""
    parser.description = (
        "Writes a BF16, FP16, FP32 or FP8 checkpoint as NVFP4 in ComfyUI's own layout, with a model card beside it. "
        "Needs memory for one tensor, not for the model. The same command continues an interrupted run."
    )
    add_source(parser)
    parser.add_argument("target", type=Path, metavar="TARGET", help="the new .safetensors file")
    parser.add_argument("--estimate", action="store_true", help="only tell size and time; nothing is written")
    parser.add_argument("--recipe", choices=FAMILIES, default=AUTO, metavar="NAME", help=f"{', '.join(FAMILIES)}")
    parser.add_argument("--only", choices=(DIFFUSION_MODEL,), help="leave out VAE, audio VAE and all else")
    quality = parser.add_mutually_exclusive_group()
    quality.add_argument(
        "--quality", choices=QUALITIES, default="best", metavar="NAME",
        help="best (default): search for better scales; fast: plain block maxima; calibrated: GPTQ, with --calibration",
    )
    quality.add_argument("--fast", dest="quality", action="store_const", const="fast", help="as --quality fast")
    parser.add_argument("--protect-audio", action="store_true", help="keep the audio branch as it is")
    parser.add_argument("--protect-cross-attention", action="store_true", help="keep all cross-attention as it is")
    parser.add_argument(
        "--keep-first-last", type=count, metavar="N", help="keep N blocks at either end; default: as the recipe"
    )
    patterns = {"action": "extend", "nargs": "+", "default": [], "metavar": "REGEX"}
    parser.add_argument("--keep", **patterns, help="keep the layers these match")
    parser.add_argument("--quantize", **patterns, help="quantize these, though the recipe keeps them")
    parser.add_argument(
        "--keep-non-finite", action="store_true", help="keep layers with NaN or infinity; reads the source twice"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a calibration file, or mean squares of each layer's inputs as safetensors; with --quality best both "
        "weight the search by the mean squares",
    )
    parser.add_argument(
        "--budget", default="", metavar="SIZE",
        help=f"{', '.join(PRESETS)}, or a size such as 20GB: with --calibration the layers whose outputs gain most are "
        "kept or written in FP8, as many as this size of the file allows; --estimate shows what sizes buy",
    )  # fmt: skip
    add_lora(parser, "a LoRA to fold into the weights before they are packed")
    add_target(parser, "a file that exists")
    _add_device(parser)
    parser.set_defaults(run=run_quantize)


def verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``verify``."""
    parser.description = (
        "Compares an NVFP4 file of any dialect with the checkpoint it was made from, tensor by tensor. Exits with 1 if "
        "a layer is worse than its format allows or is read in the wrong dialect, or if anything else is missing, new, "
        "altered or not declared. A file of the diffusion model alone may lack the VAEs, and that is said."
    )
    parser.add_argument("file", metavar="FILE", help="the quantized checkpoint")
    add_source(parser, "SOURCE")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="write the errors by block and layer type as .png")
    parser.add_argument("--card", type=Path, metavar="OUT", help="write the errors by block and layer type as Markdown")
    parser.add_argument("--worst", type=count, default=10, metavar="N", help="how many layers to list (default 10)")
    add_lora(parser, "a LoRA that was folded in")
    text = "a calibration file of SOURCE: layers are judged by their outputs"
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=text)
    add_dialect(parser)
    _add_device(parser)
    parser.set_defaults(run=run_verify)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # no other was tried
        raise CommandError(f"--device: found {name!r}, expected auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not 0 <= (device.index or 0) < found:  # torch makes a negative one of cuda:999
        there = f"torch finds {found or 'no'} CUDA device{'s' * (found > 1)}"
        raise CommandError(f"--device: found {name!r}, but {there}; use --device cpu" + " or another" * bool(found))
    return device


def run_quantize(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the record of the file or the estimate, whether it can be written)."""
    settings = QuantizeSettings(
        recipe=args.recipe,
        options=Options(
            args.protect_audio, args.protect_cross_attention, args.keep_first_last, tuple(args.keep),
            tuple(args.quantize),
        ),
        only_model=args.only == DIFFUSION_MODEL,
        search=QUALITIES[args.quality],
        keep_non_finite=args.keep_non_finite,
        calibration=args.calibration,
        config_from=args.config_from,
        loras=tuple(args.lora),
        budget=args.budget,
    )  # fmt: skip
    device = _device(args.device)
    if args.estimate:
        found = estimate(args.source, args.target, settings, device=device)
        _say_estimate(found, console, args.target)
        return found, found["fits"]
    try:
        with console.progress(f"Quantizing to {args.target.name}", amount=size) as progress:
            record = quantize_checkpoint(
                args.source, args.target, settings, overwrite=args.overwrite, device=device, on_step=progress.of
            )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; run it again to go on, {args.target.name}{PART} is kept") from stop
    _say_warnings(record, console)
    resumed = f", {record['resumed']:,} tensors were there already" if record["resumed"] else ""
    rows = [
        ("file", f"{record['path']}, {size(record['nbytes'])}, {less_text(record)} than the source"),
        ("sha256", record["sha256"]),
        ("layers", f"{record['layers']:,} in NVFP4, {sum(record['kept'].values()):,} kept (recipe {record['recipe']})"),
        *(("LoRA", lora_text(lora)) for lora in record["loras"]),
        *_calibration(record),
        *_budget(record),
        ("card", record["card"]),
        ("time", f"{record['seconds']:.1f} s{resumed}"),
    ]
    console.table((), rows, "<<", indent=0)
    return record, True


def _say_estimate(found: dict[str, Any], console: Console, target: Path) -> None:
    rates = found["rates"]
    _say_warnings(found, console)
    rows = [
        ("size", f"{size(found['nbytes'])}, {less_text(found)} than the source ({size(found['source_bytes'])})"),
        ("time", f"about {found['seconds'] / 60:.1f} min (reads {size(int(rates['read']))}/s, writes "
         f"{size(int(rates['write']))}/s, quantizes {rates['quantize'] / 1e6:.0f} M weights/s)"),
        ("disk", f"{size(found['free_bytes'])} free" + ("" if found["fits"] else ": NOT ENOUGH")),
        ("layers", f"{found['layers']:,} to NVFP4 (recipe {found['recipe']}: {found['why']})"),
        *(("LoRA", lora_text(lora)) for lora in found["loras"]),
        *_calibration(found),
        *_budget(found),
        *((f"keeps {count:,}", reason) for reason, count in found["kept"].items()),
    ]  # fmt: skip
    console.table((), rows, "<<", indent=0)
    if curve := curve_rows(found):
        console.say()
        console.table(curve[0], curve[1:], ">>>>", indent=0)
    console.say(f"Nothing was written to {target}.")


def _calibration(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [("calibration", calibration_text(record).partition(": ")[2])] if record["calibration"] else []


def _budget(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [("budget", text)] if (text := budget_text(record)) else []


def _say_warnings(record: dict[str, Any], console: Console) -> None:
    for text in record["warnings"]:
        console.say(f"Warning: {text}", "yellow")


def run_verify(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the verification, whether nothing is wrong)."""
    check_ending(args.picture, ".png")
    check_ending(args.card, ".md")
    with console.progress(f"Verifying {Path(args.file).name}", amount=size) as progress:
        found = verify_files(
            args.file, args.source, dialect=args.dialect, loras=args.lora, calibration=args.calibration,
            device=_device(args.device), on_step=progress.of,
        )  # fmt: skip
    console.say(summary(found))  # before the files, which a full disk may refuse: what was found took minutes
    _say_worst(found, console, args.worst)
    if args.picture:
        from ..draw.verify import verification_picture  # Pillow, which only the picture needs
        from ..measure.media import encode_png

        write_file(args.picture, encode_png(verification_picture(found)))
    if args.card:
        write_file(args.card, quality_card(found, args.picture.name if args.picture else "").encode())
    for what, path in (("Picture", args.picture), ("Quality card", args.card)):
        if path:
            console.say(f"{what}: {path}")
    # Strict JSON has no infinity; a layer that decodes to it has one.
    record = json.loads(json.dumps(found.as_dict()), parse_constant=lambda _: None)
    return record | {key: str(path) if (path := getattr(args, key)) else None for key in ("picture", "card")}, found.ok


def _say_worst(found: Verification, console: Console, count: int) -> None:
    if rows := worst_layers(found, count):
        console.say()
        console.table(rows[0], rows[1:], "<<>>>>>", indent=0)
