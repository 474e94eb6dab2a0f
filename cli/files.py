# SPDX-License-Identifier: Apache-2.0
"""``inspect``, ``split`` and ``repair``: checkpoint/ over files on disk.

What writes files is imported by the commands that write: it needs torch, which takes seconds to import, and a header
is read without it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.file.shards import open_checkpoint, plain_name
from ..checkpoint.identify.components import COMPONENTS, find_components
from ..checkpoint.identify.diagnosis import Fault
from ..checkpoint.identify.report import inspect_checkpoint
from .console import CommandError, Console, check_ending, size, write_file
from .options import add_dialect, add_source, add_target

if TYPE_CHECKING:
    from ..checkpoint.write.repair import Repaired

_OPEN = "for a file that leaves it open: "


def inspect(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``inspect``."""
    parser.description = (
        "What is in a checkpoint, what it lacks, which node loads it and what stock ComfyUI does with it, from its "
        "header alone. Exits with 1 if something is missing."
    )
    add_source(parser)
    parser.add_argument("--picture", type=Path, metavar="OUT", help="write the bytes by component and block as .png")
    add_dialect(parser, _OPEN)
    parser.set_defaults(run=run_inspect)


def split(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``split``."""
    from ..checkpoint.write.split import BF16, KEEP

    parser.description = (
        "Writes components of a checkpoint to files of their own, <name>_<component>.safetensors, with the names and "
        "the metadata that ComfyUI's loaders want. Quantized VAE weights become BF16. No unfinished file stays."
    )
    add_source(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the new files go; made if need be")
    parser.add_argument(
        "--only", action="extend", nargs="+", choices=list(COMPONENTS), metavar="COMPONENT",
        help=f"some of {', '.join(COMPONENTS)}",
    )  # fmt: skip
    parser.add_argument("--name", help="beginning of the new names, by default that of the checkpoint")
    parser.add_argument("--dtype", choices=(KEEP, BF16), default=KEEP, help="bf16 converts plain floats of other types")
    parser.add_argument("--vae-prefix", metavar="PREFIX", help="which VAE, where the checkpoint has several")
    add_target(parser, "files that exist")
    add_dialect(parser, _OPEN)
    parser.set_defaults(run=run_split)


def repair(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``repair``."""
    from ..checkpoint.write.repair import BACKUP_ENDING

    parser.description = (
        "Makes a quantized checkpoint loadable by stock ComfyUI: adds what its header lacks, mends names, and converts "
        "foreign dialects. Exits with 1 if a fault remains."
    )
    add_source(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="the repaired copy")
    where.add_argument(
        "--in-place", action="store_true", help=f"change the file; its old header is kept as *{BACKUP_ENDING}"
    )
    where.add_argument(
        "--undo", action="store_true", help="put back the header that --in-place has kept, if only that was changed"
    )
    add_target(parser, "files that exist")
    add_dialect(parser, _OPEN)
    parser.set_defaults(run=run_repair)


def run_inspect(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the inspection, whether nothing is missing)."""
    check_ending(args.picture, ".png")
    found = inspect_checkpoint(args.source, args.dialect)
    if args.picture:
        from ..draw.inspect import inspection_picture  # Pillow, which only the picture needs
        from ..measure.media import encode_png

        write_file(args.picture, encode_png(inspection_picture(found)))
    console.say(str(found))
    if args.picture:
        console.say(f"\nPicture: {args.picture}")
    return found.as_dict() | {"picture": str(args.picture) if args.picture else None}, not found.missing


def run_split(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> ({"files": what was written}, True)."""
    from ..checkpoint.write.split import split as split_checkpoint

    if args.folder.exists() and not args.folder.is_dir():
        raise CommandError(f"{args.folder} is a file; name a folder for the new files")
    header = open_checkpoint(args.source).header
    parts = args.only or list(find_components(header, args.vae_prefix))
    name = args.name or plain_name(header.path)
    if not name:
        raise CommandError(f"{args.source} gives the new files no name; state one with --name")
    targets = {part: f"{name}_{part}.safetensors" for part in parts}
    with console.progress(f"Splitting {header.path.name}", amount=size) as progress:
        written = split_checkpoint(
            args.source, targets, base=args.folder, dtype=args.dtype, dialect=args.dialect, vae_prefix=args.vae_prefix,
            config_from=args.config_from, overwrite=args.overwrite, on_bytes=progress.of,
        )  # fmt: skip
    rows = [
        (COMPONENTS[part.component], f"{part.tensors:,}", size(part.nbytes), str(part.restored or "-"), part.path.name)
        for part in written
    ]
    console.table(["component", "tensors", "size", "restored", f"file in {args.folder}"], rows, "<>>><", indent=0)
    return {"files": [asdict(part) | {"path": str(part.path)} for part in written]}, True


def run_repair(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (what was done, whether no fault remains)."""
    from ..checkpoint.write.repair import repair, restore_header

    if args.undo:
        restore_header(args.source)
        console.say(f"{Path(args.source).name}: the old header is back")
        return {"path": args.source, "method": "undo"}, True
    with console.progress(f"Repairing {Path(args.source).name}", amount=size) as progress:
        done = repair(
            args.source, args.target, dialect=args.dialect, config_from=args.config_from, in_place=args.in_place,
            overwrite=args.overwrite, on_bytes=progress.of,
        )  # fmt: skip
    console.say(str(done))
    if done.method == "nothing" and args.target:
        console.say(f"{args.target} was not written.")
    return _repair_record(done), not done.remaining


def _repair_record(done: Repaired) -> dict[str, Any]:
    def finding(found: Fault) -> dict[str, str]:
        return {"code": found.code, "text": found.text, "stock": found.stock}

    return {
        "path": str(done.path),
        "method": done.method,
        "cured": [finding(found) for found in done.cured],
        "remaining": [finding(found) for found in done.remaining],
        "converted": done.converted,
        "backup": str(done.backup) if done.backup else None,
    }
