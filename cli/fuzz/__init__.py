# SPDX-License-Identifier: Apache-2.0
"""``fuzz``: what others may send or do to the pack, made up at random by the thousand, and what went wrong with it.

``files.py``, ``media.py``, ``prompts.py``, ``disturb.py`` each have kinds of cases, ``run.py`` runs them. The guard and
the loaders run over tests/stub_comfy, which only the repository has; without it they are named as not run.
"""

from __future__ import annotations

import argparse
import os
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

from ..amounts import amount, positive_count
from ..console import CommandError, Console

# What --what takes -> module, name of its Kind there, cases a job does at a time, whether it needs the stub.
KINDS = {
    "files": ("files", "KIND", False),
    "media": ("media", "KIND", False),
    "kills": ("disturb", "KILLS", False),
    "sources": ("disturb", "SOURCES", False),
    "writers": ("disturb", "PAIRS", False),
    "prompts": ("prompts", "PROMPTS", True),
    "loop": ("prompts", "LOOP", True),
}
_MINUTES = 2.0
_MOST_SHOWN = 20
_COUNTED = ("foreign exception", "slow", "ended or hung", "wrong")  # as run.py names them


def fuzz(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``fuzz``."""
    parser.description = (
        "Reads damaged files and prompts, kills writers, changes their sources, all at random: whatever raises another "
        "error than the pack's own, takes long, tears or replaces a file is a finding, kept in a folder with what "
        "causes it. Exits with 1 if there is one. For developers; needs Linux or macOS."
    )
    parser.add_argument("--what", default=",".join(KINDS), metavar="KIND,...", help=f"some of {', '.join(KINDS)}")
    minutes = "for all kinds together; default %(default)g"
    parser.add_argument("--minutes", type=amount, default=_MINUTES, metavar="N", help=minutes)
    parser.add_argument("--cases", type=positive_count, metavar="N", help="at most so many of each kind")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same cases; chosen if left out")
    parser.add_argument("--case", type=int, metavar="N", help="only this case, of one kind")
    parser.add_argument("--jobs", type=positive_count, default=1, metavar="N", help="processes; default %(default)s")
    out = "folder of the findings; default %(default)s"
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), metavar="DIR", help=out)
    parser.set_defaults(run=run_fuzz)


def run_fuzz(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (record, whether nothing was found)."""
    if not hasattr(os, "fork"):
        raise CommandError("fuzz runs its cases in processes made by fork(), which this system does not have")
    names = list(dict.fromkeys(name.strip() for name in args.what.split(",") if name.strip()))
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise CommandError(f"--what names {', '.join(unknown) or 'nothing'}; expected some of {', '.join(KINDS)}")
    if args.case is not None and len(names) > 1:
        raise CommandError("--case is the number of a case of one kind: say which with --what")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    console.say(f"seed {seed}")
    from . import stub

    left_out = {name: stub.NO_STUB for name in names if KINDS[name][2] and not stub.there()}
    names = [name for name in names if name not in left_out]
    if "files" in names and not stub.there():
        left_out["the loaders and the guard, of files"] = stub.NO_STUB
    rows = {name: _run(name, seed, args, len(names), console) for name in names}
    _show(rows, left_out, console)
    found = sum(sum(row["counts"].values()) for row in rows.values())
    if found:
        again = f"--what KIND --seed {seed} --case N"
        console.say(f"\n{found:,} findings, examples in {args.out}. To see one again: {again}", "red")
    return {"seed": seed, "kinds": rows, "not run": left_out, "ok": not found}, not found


def _run(name: str, seed: int, args: argparse.Namespace, kinds: int, console: Console) -> dict[str, Any]:
    import torch

    from .run import Limits, run

    torch.set_num_threads(1)
    module, kind, _ = KINDS[name]
    kind = getattr(import_module(f".{module}", __package__), kind)
    cases = 1 if args.case is not None else args.cases or 10**9
    limits = Limits(args.minutes * 60 / kinds, cases, args.jobs, args.case or 0)
    with console.progress(kind.title, args.cases, lambda count: f"{count:,}") as progress:
        def on_step(tally: Any) -> None:
            progress.update(tally.tried, f"{sum(tally.counts.values())} findings")

        tally = run(kind, name, seed, limits, args.out, on_step)
    return {
        "title": kind.title, "tried": tally.tried, "counts": dict(tally.counts), "notes": dict(tally.notes),
        "alike": [[*key, count] for key, count in tally.alike.most_common()], "kept": tally.kept,
        "longest_s": round(tally.most, 3), "seconds": round(tally.seconds, 1), "peak_bytes": tally.peak_bytes,
    }  # fmt: skip


def _show(rows: dict[str, dict[str, Any]], left_out: dict[str, str], console: Console) -> None:
    head = ["what", "cases", *_COUNTED, "longest", "minutes"]
    lines = []
    for row in rows.values():
        numbers = [row["tried"], *(row["counts"].get(what, 0) for what in _COUNTED)]
        longest = f"{row['longest_s']:.2f} s" if row["longest_s"] else "-"
        lines.append([row["title"], *(f"{n:,}" for n in numbers), longest, f"{row['seconds'] / 60:.1f}"])
    console.table(head, lines, "<" + ">" * (len(head) - 1), indent=0)
    for row in rows.values():
        notes = ", ".join(f"{count:,} {note}" for note, count in sorted(row["notes"].items()))
        console.say(f"{row['title']}: {notes}", "dim", indent=2)
        for what, where, text, count in row["alike"][:_MOST_SHOWN]:
            console.say(f"{count:,} x {what}, {where}: {text}", "red", indent=4)
    for name, why in left_out.items():
        console.say(f"{name}: not run, {why}", "yellow")
