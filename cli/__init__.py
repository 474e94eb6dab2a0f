"""The commands of `python <pack folder> <command>`, and what they have in common.

A command is a function of the module that ``COMMANDS`` names; it gives the parser its arguments and says what to run
(``parser.set_defaults(run=...)``). That function takes (args, console) and returns (record, ok): the record is what
--json prints, and ok decides between the exit codes

    0  done, and nothing is wrong        1  done, and something is wrong: the output says what
    2  could not be done: wrong usage, or a file that cannot be used; one line on stderr says why

The module of a command is imported only when it is asked for, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module

from .console import MAX_WIDTH, CommandError, Console

# Command -> (module of this package, summary).
COMMANDS = {
    "demo": ("demo", "build one small model in every NVFP4 dialect, read it back, sample it in ComfyUI"),
    "inspect": ("files", "tell what is in a checkpoint, what it lacks, and what loads it"),
    "split": ("files", "write the VAE, audio VAE and other components of a checkpoint to their own files"),
    "repair": ("files", "make a quantised checkpoint loadable by stock ComfyUI"),
    "quantize": ("quantize", "write a BF16 or FP8 checkpoint as NVFP4, in little memory, with a model card"),
    "verify": ("quantize", "compare an NVFP4 file with its source, layer by layer"),
    "plan": ("plan", "tell whether a model fits a GPU, and what NVFP4 changes there: size, speed or both"),
    "bench": ("bench", "render one clip by every format and compute mode: size, time, memory, quality"),
    "sharpness": ("media", "measure how sharp images, folders or videos are, and name preview decodes"),
    "compare": ("media", "compare two clips of the same seed: picture, sharpness, sound"),
    "doctor": ("doctor", "report what this machine and its ComfyUI can do, and check a prompt"),
}
OK, FOUND, FAILED, INTERRUPTED = 0, 1, 2, 130


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of all commands; only the one that ``argv`` names has its arguments."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    parser = argparse.ArgumentParser(
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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name of a file need not be text of this terminal
    console = Console(quiet="--json" in argv)
    try:
        args = build_parser(argv).parse_args(argv)
        record, ok = args.run(args, console)
        if args.json:
            sys.stdout.write(json.dumps(record, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except SystemExit as end:  # argparse has printed its help, or what is wrong
        return int(end.code or OK)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt as stop:
        console.error(str(stop) or "interrupted; unfinished files were removed")
        return INTERRUPTED
    except _expected() as error:
        message = _describe(error)
        console.error(message)
        if console.quiet:
            sys.stdout.write(json.dumps({"error": message}, indent=2) + "\n")
        return FAILED
    return OK if ok else FOUND


def _expected() -> tuple[type[Exception], ...]:
    """Errors that are the user's to solve: one line, no traceback. Only modules already in use can have raised them."""
    names = {
        "checkpoint.file.header": "CheckpointError",
        "measure.media": "MediaError",
        "tests.real.harness": "HostError",
    }
    loaded = {sys.modules.get(f"{__package__.rpartition('.')[0]}.{module}"): name for module, name in names.items()}
    found = [getattr(module, name) for module, name in loaded.items() if module is not None]
    return (CommandError, OSError, ModuleNotFoundError, *found)


def _describe(error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    if (error.name or "").startswith(__package__.rpartition(".")[0]):
        raise error  # a part of the pack is missing: that is no matter of packages to install
    wanted = "run the command with ComfyUI's Python, after pip install -r requirements.txt of this folder"
    return f"{error} in {sys.executable}; {wanted}"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    codes = "Exit codes: 0 nothing is wrong; 1 something is wrong with what was examined; 2 it could not be done."
    return "\n".join(["Tools for NVFP4 video models. <command> --help explains a command.", "", *lines, "", codes])


def _help_format(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    return argparse.HelpFormatter(prog, max_help_position=28, width=width)
