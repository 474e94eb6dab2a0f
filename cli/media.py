# SPDX-License-Identifier: Apache-2.0
"""``sharpness`` and ``compare``: measure/ over files, with its pictures as PNG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure import media
from ..measure.compare import Comparison, compare_clips
from ..measure.sharpness import Sharpness, measure_sharpness
from .amounts import amount, positive_count
from .console import CommandError, Console, check_ending, write_file

if TYPE_CHECKING:
    import numpy as np

_FILE = "an image, a folder of images, or a video"


def sharpness(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sharpness``."""
    parser.description = (
        "Variance of the Laplacian of 8-bit grey (OpenCV), frame by frame. Exits with 1 if something looks like a "
        "preview decode or blurred, is noise, mostly black or of one colour, or stands still. The value "
        "depends on content and resolution: give the value of a good clip of the "
        "same scene and size as --reference where there is one."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=_FILE)
    parser.add_argument("--reference", metavar="VALUE|PATH", help="median of a good clip, or the clip itself")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="write the plot as .png; several into a folder")
    _add_limit(parser)
    parser.set_defaults(run=run_sharpness)


def compare(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``compare``."""
    parser.description = (
        "PSNR, SSIM, difference and sharpness of two clips of the same seed, and of their sound: level, spectral "
        "distance, sync offset. Exits with 1 if they differ in more than a little detail: in what they show, in "
        "sharpness by half, in frozen, black or noisy frames, flicker, frame rate, length, or sound."
    )
    parser.add_argument("a", type=Path, metavar="A", help=f"the clip to trust: {_FILE}")
    parser.add_argument("b", type=Path, metavar="B", help="the clip under test, of the same size")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="write the card, as .png: heat map, crops, curves")
    parser.add_argument("--out", type=Path, metavar="OUT", help="write the numbers of --json into a file as well")
    parser.add_argument("--common-prefix", action="store_true", help="compare over the shorter clip, if they differ")
    _add_limit(parser)
    parser.set_defaults(run=run_compare)


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-frames", type=positive_count, metavar="N", help="look at the first N frames only")


def run_sharpness(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> ({"files": [record]}, whether none calls for a warning)."""
    pictures = _plot_paths(args.paths, [*args.paths, *([Path(args.reference)] if args.reference else [])], args.picture)
    reference = _reference(args, console)
    records, rows, measured = [], [], []
    for path, picture in zip(args.paths, pictures, strict=True):
        found = _measure(path, args.max_frames, reference, console)
        measured.append((path, found))
        if picture:
            from ..draw.compare import sharpness_plot  # Pillow, which only the pictures need

            write_file(picture, media.encode_png(sharpness_plot(found)))
        records.append({"path": str(path), **found.to_dict(), "picture": str(picture) if picture else None})
        values = [f"{value:.1f}" for value in (found.median, found.min, found.max)]
        verdict = (found.verdict, "red" if found.warns else {"sharp": "green"}.get(found.verdict, ""))
        rows.append([str(len(found.values)), f"{found.width}x{found.height}", *values, verdict, str(path)])
    if len(measured) > 1:
        console.table(["frames", "size", "median", "min", "max", "verdict", "file"], rows, ">>>>><<", indent=0)
    for path, found in measured:
        if len(measured) == 1 or found.warns:
            console.say(("" if len(measured) == 1 else "\n") + f"{path}", "bold")
            console.say(found.text)
    for picture in filter(None, pictures):
        console.say(f"Plot: {picture}")
    return {"files": records}, not any(found.warns for _, found in measured)


def _reference(args: argparse.Namespace, console: Console) -> float | None:
    if args.reference is None:
        return None
    try:
        float(args.reference)
    except ValueError:
        return _measure(Path(args.reference), args.max_frames, None, console).median
    try:
        return amount(args.reference)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"--reference: {error}, or a clip") from error


def _measure(path: Path, limit: int | None, reference: float | None, console: Console) -> Sharpness:
    with console.progress(f"Measuring {path.name}", limit, _frames) as progress:
        return measure_sharpness(islice(media.iter_frames(path), limit), reference, progress.update)


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _plot_paths(paths: list[Path], inputs: list[Path], out: Path | None) -> list[Path | None]:
    """Where the plot of each path goes; refuses an answer that would hit an input or another plot."""
    if out is None:
        return [None] * len(paths)
    if out.suffix.lower() == ".png":
        if len(paths) > 1:
            raise CommandError(f"--picture {out} is one file for {len(paths)} plots; name a folder")
        check_ending(out, ".png")
        _check_output(out, inputs)
        return [out]
    pictures = [out / f"{path.resolve().name}-sharpness.png" for path in paths]
    for picture in pictures:
        _check_output(picture, inputs)
    if len(set(pictures)) < len(pictures):
        raise CommandError("two of the paths have the same name, and their plots would too; measure them one by one")
    return pictures


def _check_output(out: Path, inputs: list[Path]) -> None:
    """Refuse an output that would replace an input, or be a frame of one the next time."""
    for path in inputs:
        if out.resolve() == path.resolve():
            raise CommandError(f"{out} is an input; choose another name for the output")
        if out.suffix.lower() == ".png" and out.resolve().parent == path.resolve():
            raise CommandError(f"{out} would be a frame of {path}, which is measured; choose another folder")


def run_compare(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (record, whether only a little detail tells them apart)."""
    for out, suffix in ((args.picture, ".png"), (args.out, ".json")):
        check_ending(out, suffix)
        if out:
            _check_output(out, [args.a, args.b])
    a, b = (_read(path, args.max_frames, console) for path in (args.a, args.b))
    sound = [media.read_audio(path) for path in (args.a, args.b)]
    rates = tuple(media.frame_rate(path) for path in (args.a, args.b))
    names = (args.a.name, args.b.name) if args.a.name != args.b.name else (str(args.a), str(args.b))
    with console.progress("Comparing", min(len(a), len(b)), _frames) as progress:
        found = compare_clips(a, b, *sound, names, args.common_prefix, rates, lambda done, _: progress.update(done))
    record = found.to_dict()
    if args.picture:
        from ..draw.compare import comparison_card

        write_file(args.picture, media.encode_png(comparison_card(found, a, b)))
    if args.out:
        write_file(args.out, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return record | {"picture": str(args.picture) if args.picture else None}, _show_comparison(found, args, console)


def _show_comparison(found: Comparison, args: argparse.Namespace, console: Console) -> bool:
    """Show findings and table -> whether only a little detail tells the clips apart."""
    console.say(found.head)
    console.table([], [list(row) for row in found.rows()], "<<")
    for line in found.findings:
        console.say(line, "red" if line in found.faults else "green")
    for title, out in (("Card", args.picture), ("Numbers", args.out)):
        if out:
            console.say(f"{title}: {out}")
    return found.agree


def _read(path: Path, limit: int | None, console: Console) -> np.ndarray:
    """(F, H, W, 3) uint8, with progress."""
    with console.progress(f"Reading {path.name}", limit, _frames) as progress:
        return media.to_frames(list(_counted(islice(media.iter_frames(path), limit), progress.update)))


def _counted(frames: Iterator[np.ndarray], on_frame) -> Iterator[np.ndarray]:
    for count, frame in enumerate(frames, 1):
        on_frame(count)
        yield frame
