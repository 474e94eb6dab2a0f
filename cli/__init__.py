# SPDX-License-Identifier: Apache-2.0
"""The commands of `python <pack folder> <command>`, and what they have in common.

A command is a function of the module that ``COMMANDS`` names; it gives the parser its arguments and says what to run
(``parser.set_defaults(run=...)``). That function takes (args, console) and returns (record, ok): the record is what
--json prints, and ok decides between the exit codes

    0  done, and nothing is wrong        1  done, and something is wrong: the output says what
    2  could not be done: wrong usage, a file that cannot be used, or a fault of the pack's own; stderr says why
    130  interrupted (Ctrl-C)

The code does not depend on who reads the output: a closed pipe or a closed stdout silences a command and no more. With
--json, errors and interruptions are one JSON object, too.

The module of a command is imported only when it is asked for, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from ..kernels.errors import PackError
from .console import MAX_WIDTH, CommandError, Console, for_terminal, put, wrap

# Command -> (module of this package, summary).
COMMANDS = {
    "demo": ("demo", "build one small model in every NVFP4 dialect, read it back, sample it in ComfyUI"),
    "inspect": ("files", "tell what is in a checkpoint, what it lacks, and what loads it"),
    "split": ("files", "write the VAE, audio VAE and other components of a checkpoint to their own files"),
    "repair": ("files", "make a quantized checkpoint loadable by stock ComfyUI"),
    "quantize": ("quantize", "write a BF16 or FP8 checkpoint as NVFP4, in little memory, with a model card"),
    "verify": ("quantize", "compare an NVFP4 file with its source, tensor by tensor"),
    "plan": ("plan", "tell whether a model fits a GPU, and what NVFP4 changes there: size, speed or both"),
    "bench": ("bench", "render one clip by every format and compute mode: size, time, memory, quality"),
    "sharpness": ("media", "measure how sharp images, folders or videos are, and name preview decodes"),
    "compare": ("media", "compare two clips of the same seed: picture, sharpness, sound"),
    "fuzz": ("fuzz", "damage files, prompts and runs at random and report what goes wrong; for developers"),
    "doctor": ("doctor", "report what this machine and its ComfyUI can do, and check a prompt"),
}
OK, FOUND, FAILED, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are errors like all others; options are to be spelled out."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """CommandError, after the usage."""
        put(sys.stderr, self.format_usage())
        raise CommandError(message)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of all commands; only the one that ``argv`` names has its arguments."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    parser = _Parser(
        prog=f"python {shlex.quote(sys.argv[0])}",
        usage="%(prog)s <command> [arguments]",
        description=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>", help=argparse.SUPPRESS)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, _) in COMMANDS.items():
        # A subparser would else put the usage above, arguments and all, before its own.
        command = commands.add_parser(
            name, parents=[common], prog=f"{parser.prog} {name}", formatter_class=_help_format
        )
        if name == chosen:
            getattr(import_module(f".{module}", __package__), name)(command)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command -> exit code."""
    _open_streams()
    options = argv[: argv.index("--")] if "--" in argv else argv
    console = Console(quiet="--json" in options)
    try:
        code = _run(argv, console)
    except SystemExit as end:  # argparse has printed its help
        code = end.code if isinstance(end.code, int) else FAILED if end.code else OK
    except KeyboardInterrupt as stop:
        code = _fail(console, str(stop) or "interrupted; unfinished files were removed", INTERRUPTED)
    except _expected() as error:
        code = _fail(console, _describe(error))
    except Exception as error:  # whatever it is, the command could not be run, which is no finding about a file
        code = _fail(console, _unforeseen(error))
    for stream in (sys.stdout, sys.stderr):
        try:
            put(stream, "")  # what is still unwritten would else fail when Python ends, with a code of its own
        except OSError:
            code = code or FAILED
    return code


def _run(argv: Sequence[str], console: Console) -> int:
    args = build_parser(argv).parse_args(argv)
    record, ok = args.run(args, console)
    if args.json:
        put(sys.stdout, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return OK if ok else FOUND


def _open_streams() -> None:
    """stdout and stderr that can be written to, also where the caller has closed them (`>&-`, a service, pythonw)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
        # The name of a file need not be text of this terminal.
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _fail(console: Console, message: str, code: int = FAILED) -> int:
    """The one line on stderr, and the object on stdout that --json promises."""
    console.error(message)
    if console.quiet:
        try:
            put(sys.stdout, json.dumps({"error": for_terminal(message)}, indent=2) + "\n")
        except OSError:
            pass  # the disk is full, say: stderr has said so
    return code


def _unforeseen(error: Exception) -> str:
    """One line about a fault of the pack's own; the traceback goes to a file that a report can quote."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = f"internal error, {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"
    try:
        handle, path = tempfile.mkstemp(prefix="nvfp4-video-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return f"{found}; this is a fault of the pack, please report it"
    return f"{found}; this is a fault of the pack, please report it with {path}"


def _expected() -> tuple[type[Exception], ...]:
    """Errors that are the user's to solve: one line, no traceback. The harness is the demo's, if it is in use."""
    harness = sys.modules.get(f"{__package__.rpartition('.')[0]}.tests.real.harness")
    return (PackError, OSError, ModuleNotFoundError, *([harness.HostError] if harness is not None else []))


def _describe(error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    if (error.name or "").startswith(__package__.rpartition(".")[0]):
        return _unforeseen(error)  # a part of the pack is missing: that is no matter of packages to install
    wanted = "run the command with ComfyUI's Python, after pip install -r requirements.txt of this folder"
    return f"{error} in {sys.executable}; {wanted}"


def _overview() -> str:
    name_width, width = max(map(len, COMMANDS)), _width()
    lines = ["Tools for NVFP4 video models. <command> --help explains a command.", ""]
    for name, (_, summary) in COMMANDS.items():
        lines += wrap(summary, width, f"  {name:{name_width}}  ", " " * (name_width + 4))
    codes = "Exit codes: 0 nothing is wrong; 1 something is wrong with what was examined; 2 it could not be done."
    return "\n".join([*lines, "", *wrap(codes, width)])


class _Help(argparse.HelpFormatter):
    """argparse's, which leaves words with hyphens whole, as all output of the commands does."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(wrap(" ".join(text.split()), width, indent, indent))


def _help_format(prog: str) -> argparse.HelpFormatter:
    return _Help(prog, max_help_position=28, width=_width())


def _width() -> int:
    return min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
