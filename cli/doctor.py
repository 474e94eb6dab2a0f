# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what host/ finds out about a ComfyUI, its launch flags and a prompt, and a file's page cache."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.file.header import open_regular
from .console import CommandError, Console, size

PACK = Path(__file__).resolve().parent.parent
_NO_COMFYUI = "No ComfyUI: set COMFYUI_PATH to its folder to ask it. What only it knows is unknown below."
_LARGEST = 64 << 20
_NOT_RUNNING = "This ComfyUI is asked without being started; a running one tells all at /nvfp4/report."


def doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``doctor``."""
    parser.description = (
        "What this machine and its ComfyUI are able to do with NVFP4, which launch flags fit, and what is wrong with a "
        "prompt. COMFYUI_PATH names the folder of the ComfyUI, if the pack does not lie in its custom_nodes. Exits "
        "with 1 if something is wrong."
    )
    parser.add_argument(
        "prompt", nargs="?", type=Path, metavar="PROMPT_JSON",
        help="a workflow, exported as API format, saved, or in a request to a server",
    )  # fmt: skip
    parser.add_argument(
        "--release", type=Path, metavar="FILE", help="only drop this file from the page cache, for unified memory"
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (the report, or what was released; whether no finding is worse than an information)."""
    if args.release:
        if args.prompt:
            raise CommandError("--release does nothing else: leave the prompt out, or call doctor twice")
        return _release(args.release, console), True
    text = _read(args.prompt) if args.prompt else None
    connected = _connect()
    if text is not None and not connected:
        raise CommandError("a prompt is checked against the files of a ComfyUI: set COMFYUI_PATH to its folder")
    # Imported here, after _connect has made that ComfyUI importable.
    from ..host.doctor import report as host_doctor
    from ..host.doctor.probe import probe

    facts, findings, reading = probe(), [], None
    if connected:
        from ..host.guard import check as guard

        findings = guard.check_host(facts)
        if text is not None:
            reading = _understand(args.prompt, text)
            findings += guard.check(reading.prompt, facts)
    report = host_doctor.report(facts, findings, reading)
    console.say(_NOT_RUNNING if connected else _NO_COMFYUI, "yellow")
    console.say()
    console.say(host_doctor.text(report))
    return report, all(finding["severity"] == "info" for finding in report["findings"])


def _release(path: Path, console: Console) -> dict[str, Any]:
    from ..host.doctor import page_cache

    done = page_cache.release(path)
    console.say(f"{path.name}, {size(done.size)}: {size(done.before)} were cached, {size(done.after)} are now.")
    if done.after:
        console.say("A program that has the file mapped, such as a ComfyUI with the model loaded, keeps its pages.")
    return {"file": path.name} | asdict(done)


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise CommandError(f"{path} is larger than {size(_LARGEST)}, which no workflow is")
    return text


def _understand(path: Path, text: bytes) -> Any:
    """What the guard reads out of a file. Raises CommandError for one with nothing in it that could be checked."""
    from ..host.guard import reading

    try:
        found = reading.read(text)
    except reading.NotRead as error:
        raise CommandError(f"{path}: {error}") from None
    if found.shape == reading.EMPTY:
        raise CommandError(f"{path}: {found}")
    return found


def _connect() -> bool:
    """Make the ComfyUI importable that COMFYUI_PATH or the pack's own place names -> whether there is one."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named).expanduser().resolve() if named else PACK.parent.parent
    if not (path / "comfy" / "cli_args.py").is_file():
        if named:
            raise CommandError(f"COMFYUI_PATH is {named!r}; expected the folder of a ComfyUI, the one with main.py")
        return False
    sys.path.insert(0, str(path))
    # ComfyUI reads its command line while it is imported, and wants a GPU unless told otherwise.
    torch = importlib.import_module("torch")
    sys.argv = ["main.py"] if torch.cuda.is_available() else ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    return True
