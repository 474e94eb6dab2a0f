# SPDX-License-Identifier: Apache-2.0
"""The parent of ``bench``: which files and rows there are, the turns they take, and the result after each of them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..checkpoint.file.header import Header, read_header
from ..checkpoint.identify.components import DIFFUSION_MODEL, find_components
from ..checkpoint.identify.signatures import context_width, find_model, transformer_config
from ..checkpoint.identify.vae_signatures import AUDIO, find_vaes
from ..host.bench.row import MAKE
from ..measure import bench
from ..measure.clip_quality import clip_quality
from ..measure.ltx import CFG, SIGMAS, SPATIAL, TEMPORAL, whole_schedule
from . import bench_child
from .console import CommandError, Console, write_file

JSON, MARKDOWN, PICTURE, LOGS = "bench.json", "bench.md", "bench.png", "logs"
COLD_NOTE = (
    "A cold clip is the load and the first clip of a fresh process, the start of Python and ComfyUI not counted; "
    "the system's page cache may hold the file already."
)
DROPPED_NOTE = "A cold clip is the load and the first clip of a fresh process; its file was not in the page cache."
TURNS_NOTE = (
    "Each repetition of a row is a process of its own, alone on the GPU; the rows take turns, every second time in "
    "reverse order, so that a slow drift of the machine hits all alike. Ranges are those of the repetitions' medians."
)


def run_bench(args: argparse.Namespace, comfyui: Path, console: Console) -> tuple[dict[str, Any], bool]:
    """Checked arguments -> (the result, whether no row failed); writes the files of the result."""
    begun, settings = time.monotonic(), _settings(args)
    if args.scratch and not args.scratch.is_dir():
        raise CommandError(f"--scratch {args.scratch} is not a folder that is there; make it, or name another")
    out = _folder(args.out)
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".bench-", dir=args.scratch or out)))
        try:
            files = _make(args, settings["flags"], work, out, console) if args.synthetic else _named(args)
            result, jobs = _plan(args, settings, files, comfyui)
            _say_plan(result, console)
            _measure(args, result, jobs, work, out, begun, console)
        except KeyboardInterrupt:
            kept = f"; the rows measured so far are in {out / JSON}" if (out / JSON).is_file() else ""
            if not kept:
                shutil.rmtree(out / LOGS, ignore_errors=True)
            raise KeyboardInterrupt(f"interrupted{kept}; no process is left") from None
    bench.finish(result)
    result["complete"] = True
    _draw(result, out)
    write_file(out / MARKDOWN, bench.markdown(result).encode())
    _save(result, out)
    _say_result(result, out, console)
    states = [row["status"] for row in result["rows"]]
    return result, bench.FAILED not in states and bench.OK in states


def _stop(*_: object) -> None:
    """A request to end is Ctrl-C: the made files are many gigabytes, and must not stay."""
    raise KeyboardInterrupt


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is the same for all rows. Raises CommandError for a clip the model cannot make."""
    size = args.size or ("64x64" if args.small else "768x512")
    sides = re.fullmatch(r"(\d+)x(\d+)", size)
    if not sides or any(int(side) % SPATIAL or not int(side) for side in sides.groups()):
        raise CommandError(f"--size is {size!r}; expected WIDTHxHEIGHT in multiples of 32, such as 768x512")
    frames = args.frames or (9 if args.small else 121)
    if frames % TEMPORAL != 1:
        raise CommandError(f"--frames is {frames}; expected 8k + 1, such as 97 or 121")
    if args.steps >= len(SIGMAS):
        raise CommandError(f"--steps is {args.steps}; there are {len(SIGMAS) - 1} distilled sigmas")
    flags = args.flags.split() + ["--cpu"] * (args.cpu and "--cpu" not in args.flags.split())
    return {
        "size": size, "frames": frames, "steps": args.steps, "sigmas": whole_schedule(args.steps), "sampler": "euler",
        "cfg": CFG, "seed": args.seed, "repetitions": args.reps, "warm_clips": args.warm, "flags": flags,
        "dynamic_vram_asked": not args.no_dynamic, "cpu": "--cpu" in flags,
        "conditioning": args.conditioning.name if args.conditioning else "random numbers, 256 tokens",
    }  # fmt: skip


def _folder(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} is not an empty folder; name a new one, so that nothing is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def _named(args: argparse.Namespace) -> dict[str, Path]:
    """The files of the arguments by format, and the VAEs. Raises CommandError without a BF16 or NVFP4 file."""
    files = {name: path.resolve() for name in bench.FORMATS if (path := getattr(args, name))}
    if not {"bf16", "nvfp4"} & files.keys():
        raise CommandError("name at least one model with --bf16 or --nvfp4, or use --synthetic")
    parts = {"video_vae": args.vae, "audio_vae": args.audio_vae}
    for part, named in parts.items():
        audio = part == "audio_vae"
        found = named or next((path for path in files.values() if _has_vae(read_header(path), audio)), None)
        if named and not _has_vae(read_header(named), audio):
            raise CommandError(f"{named} holds no {'audio' if audio else 'full video'} VAE of LTX")
        if found:
            files[part] = found.resolve()
    return files


def _has_vae(header: Header, audio: bool) -> bool:
    return any(vae.kind == AUDIO if audio else vae.final_decoder for vae in find_vaes(header))


def _make(args: argparse.Namespace, flags: list[str], work: Path, out: Path, console: Console) -> dict[str, Path]:
    """The files of --synthetic, written by a process of its own, which takes its hold on the GPU with it."""
    formats = {bench.ROWS[key].format for key in _chosen(args.rows, bench.FORMATS)}
    job = {"loader": MAKE, "save": str(work), "formats": sorted(formats), "layers": args.layers, "small": args.small}
    with console.progress("Making the files") as progress:
        told, error = bench_child.run_job(
            job | {"flags": flags}, work, out / LOGS / "make.log", lambda text: progress.update(0, text)
        )
    if error:
        raise CommandError(f"the files could not be made: {error}")
    return {name: Path(path) for name, path in told["files"].items()}


def _chosen(rows: str | None, formats: Any) -> list[str]:
    """Keys of the rows to run, in the order of the table. Raises CommandError for what there is not."""
    if rows is None:
        return [key for key, kind in bench.ROWS.items() if kind.format in formats]
    wanted = [key.strip() for key in rows.split(",") if key.strip()]
    if not wanted or (unknown := set(wanted) - bench.ROWS.keys()):
        named = ", ".join(sorted(unknown)) if wanted else "nothing"
        raise CommandError(f"--rows names {named}; expected some of {', '.join(bench.ROWS)}")
    without = [key for key in wanted if bench.ROWS[key].format not in formats]
    if without:
        raise CommandError(f"the row {without[0]} needs a file: name it with --{bench.ROWS[without[0]].format}")
    return [key for key in bench.ROWS if key in wanted]


def _plan(
    args: argparse.Namespace, settings: dict[str, Any], files: dict[str, Path], comfyui: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """-> (the result without measurements, a job for each row)."""
    headers = {name: read_header(path) for name, path in files.items() if name in bench.FORMATS}
    configs = ((transformer_config(header), header.path.name) for header in headers.values())
    config, said_by = next((pair for pair in configs if pair[0]), (None, ""))
    families = {name: find_model(header) for name, header in headers.items()}
    for name, model in families.items():
        if not model.needs_config or config is None:
            what = model.family or "a model of unknown family"
            what = what if config is not None else f"{what} without the header entry `config`"
            raise CommandError(f"{files[name].name} holds {what}; bench renders joint audio and video of LTX-2.x")
    if args.conditioning:
        _check_conditioning(args.conditioning, context_width(config, said_by))
    blocks = config.get("num_layers")
    made = f", {blocks} blocks, random weights" + (", scaled down" if args.small else "") if args.synthetic else ""
    rows, jobs = [], {}
    for key in _chosen(args.rows, headers):
        kind = bench.ROWS[key]
        rows.append({
            "key": key, "label": kind.label, "file": files[kind.format].name, "file_format": kind.format,
            "loader": kind.loader, "compute": kind.compute, "file_bytes": headers[kind.format].file_size,
            "model_bytes": find_components(headers[kind.format])[DIFFUSION_MODEL].nbytes(headers[kind.format]),
            "status": bench.WAITING, "reason": "", "notes": [], "runs": [], "summary": None, "quality": None,
            "same_latents_as": None,
        })  # fmt: skip
        jobs[key] = {
            "comfyui": str(comfyui), "path": str(files[kind.format]), "loader": kind.loader, "compute": kind.compute,
            "config": config, "dynamic": not args.no_dynamic, "warm": args.warm,
            "conditioning": str(args.conditioning.resolve()) if args.conditioning else None,
            **{part: str(files[part]) if part in files else None for part in ("video_vae", "audio_vae")},
            **{name: settings[name] for name in ("size", "frames", "steps", "sigmas", "seed", "flags")},
        }  # fmt: skip
    notes = [bench.RANDOM_NOTE] if args.synthetic else []
    notes += [bench.NO_VAE_NOTE] if "video_vae" not in files else []
    notes += [DROPPED_NOTE if args.drop_cache else COLD_NOTE, TURNS_NOTE]
    vaes = {part: files[part].name for part in ("video_vae", "audio_vae") if part in files}
    model = f"{next(iter(families.values())).family}{made}"
    result = {"model": model, "settings": settings | vaes, "facts": {}, "comfyui": None, "reference": None}
    return result | {"stock_fp4": None, "rows": rows, "notes": notes, "complete": False}, jobs


def _check_conditioning(path: Path, width: int) -> None:
    tensors = read_header(path).tensors
    shapes = [info.shape for info in tensors.values()]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] != 1 or shapes[0][2] != width:
        raise CommandError(f"{path} holds tensors of shapes {shapes[:3]}; expected one of (1, tokens, {width})")


def _measure(args, result, jobs: dict[str, dict], work: Path, out: Path, begun: float, console: Console) -> None:
    """All repetitions of all rows that the limit allows; the result is written after each."""
    started, done, rows = time.monotonic(), 0, result["rows"]
    with console.progress("Measuring", args.reps * len(rows)) as progress:
        for repetition in range(args.reps):
            spent = time.monotonic() - started
            if repetition and args.limit and started - begun + spent + spent / repetition > args.limit:
                ended = f"The limit of {args.limit:g} s ended it after {repetition} of {args.reps} repetitions."
                result["notes"].append(ended)
                return
            for row in rows if repetition % 2 == 0 else rows[::-1]:
                if row["status"] in (bench.WAITING, bench.OK):
                    name = f"{row['label']}, {repetition + 1} of {args.reps}"

                    def stage(text: str, name: str = name, done: int = done) -> None:
                        progress.update(done, f"{name}: {text}")

                    save = work / row["key"] if repetition == 0 else None
                    _run_row(args, result, row, jobs[row["key"]] | {"save": save and str(save)}, work, out, stage)
                    if save and row["status"] == bench.OK:
                        stage("comparing")
                        _compare(result, row, work)
                    _save(result, out)
                done += 1
                progress.update(done, "")


def _run_row(args, result, row: dict[str, Any], job: dict[str, Any], work: Path, out: Path, stage) -> None:
    """One repetition of a row, into the row."""
    if args.drop_cache:
        from ..host.doctor import page_cache

        page_cache.release(job["path"])
    told, error = bench_child.run_job(job, work, out / LOGS / f"{row['key']}.log", stage)
    result["facts"] = result["facts"] or told.get("facts", {})
    result["comfyui"] = result["comfyui"] or told.get("comfyui")
    refused = told.get("refused", {})
    result["stock_fp4"] = "fp4" not in refused if "refused" in told else result["stock_fp4"]
    for other in result["rows"]:  # a mode that cannot run here needs no process to say so again
        if other["status"] == bench.WAITING and other["compute"] in refused:
            other["status"], other["reason"] = bench.REFUSED, refused[other["compute"]]
    if row["status"] == bench.REFUSED:
        return
    if error or len(told["clips"]) != 1 + job["warm"]:
        row["status"] = bench.FAILED
        row["reason"] = error or "its process ended before its last clip"
        return
    wanted = ("boot_s", "load_s", "vae_load_s", "dynamic_vram", "report", "host_peak_gb", "clips")
    row["runs"].append({name: told.get(name) for name in wanted})
    row["notes"] += told["clips"][0].pop("notes", [])
    row["status"] = bench.OK


def _compare(result: dict[str, Any], row: dict[str, Any], work: Path) -> None:
    """The first repetition's clip against the reference, which is the first row that ran."""
    if result["reference"] is None:
        result["reference"] = row["key"]
        return
    row["quality"], notes = clip_quality(work / result["reference"], work / row["key"])
    row["notes"] += [note for note in notes if note not in row["notes"]]
    shutil.rmtree(work / row["key"])


def _save(result: dict[str, Any], out: Path) -> None:
    write_file(out / JSON, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _draw(result: dict[str, Any], out: Path) -> None:
    """The picture; without Pillow a sentence in its place."""
    try:
        from ..draw.bench import bench_png

        write_file(out / PICTURE, bench_png(result))
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        result["notes"].append("No picture was drawn: Pillow is not installed.")


def _say_plan(result: dict[str, Any], console: Console) -> None:
    console.say(f"{bench.headline(result)}.", "bold")
    for row in result["rows"]:
        console.say(f"{row['label']}: {row['file']}", indent=2)


def _say_result(result: dict[str, Any], out: Path, console: Console) -> None:
    styles = {bench.REFUSED: "yellow", bench.FAILED: "red"}
    console.say(f"{bench.machine_text(result)}.")
    console.title("What it costs")
    costs = [
        [(cell, styles[cell]) if cell in styles else cell for cell in cells] for cells in bench.cost_rows(result)
    ]
    console.table(bench.COST, costs, "<>>>>>>>", indent=0)
    quality = bench.quality_rows(result)
    if quality:
        console.title("What it gives")
        console.table(bench.QUALITY, quality, "<>>>>>>>", indent=0)
    console.say()
    for text in bench.remarks(result):
        console.say(text, "dim")
    drawn = [name for name in (JSON, MARKDOWN, PICTURE) if (out / name).is_file()]
    console.say(f"\nWritten to {out}: {', '.join(drawn)}.")
