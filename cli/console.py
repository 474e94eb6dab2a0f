# SPDX-License-Identifier: Apache-2.0
"""What the commands show: text and tables on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from ..kernels.errors import PackError
from ..measure.escape import line, visible
from ..measure.text import size_text

MAX_WIDTH = 100
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_BAR = 24
_LEAST = 12  # columns of the screen for a column of text
_COLUMN = re.compile(r" {2,}")  # what lies between the columns of a table
_WIPE = "\r\033[K"
_BLANKS = re.compile(r"[ \t\r\n]+")
_REFRESH_SECONDS = 0.1
_LOG_SECONDS = 10.0
_ESTIMATE_AFTER_SECONDS = 2.0

Cell = str | tuple[str, str]  # text, or (text, style)
size = functools.partial(size_text, decimals=2)  # columns of sizes line up


# The pack's messages speak of nodes and their widgets; what those are called on the command line.
_FLAGS = (
    "dialect config_from vae_prefix common_prefix keep_first_last keep_non_finite calibration overwrite memory_gib"
).split()
_WIDGET = re.compile(rf"`({'|'.join(_FLAGS)})`")
_COMMANDS = {"Repair": "repair", "Split Checkpoint": "split", "Quantize": "quantize", "Verify": "verify"}
_NODE = re.compile(rf"NVFP4 ({'|'.join(_COMMANDS)})")


def for_terminal(text: str) -> str:
    """What a message says to users of nodes -> to those of the command line: flags and commands."""
    text = _WIDGET.sub(lambda found: "--" + found[1].replace("_gib", "").replace("_", "-"), text)
    return _NODE.sub(lambda found: f"`{_COMMANDS[found[1]]}`", text)


class CommandError(PackError):
    """A request that cannot be met, in one line for the user."""


def check_ending(out: Path | None, ending: str) -> None:
    """Refuse to write an output under a name of another kind, or in a folder's place."""
    if out and out.suffix.lower() != ending:
        raise CommandError(f"the output {out} does not end in {ending}")
    if out and out.is_dir():
        raise CommandError(f"the output {out} is a folder; name a file in it")
    if out:
        check_folder(out)


def check_folder(out: Path) -> None:
    """Refuse an output in a folder that is not there: a mistyped one would else be made in silence."""
    if not out.parent.is_dir():
        raise CommandError(f"the folder {out.parent} of the output is not there; make it, or name another")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, replacing an old one. CommandError if that cannot be done."""
    from ..checkpoint.file.place import write_small  # and with it torch, which --help does without

    check_folder(path)
    try:
        write_small(path, data, overwrite=True)
    except OSError as error:
        found = f"{path} cannot be written ({error.strerror})"
        raise CommandError(f"{found}; check free space and rights, or name another file") from error


def put(stream: TextIO, text: str) -> None:
    """Write and flush; a stream whose reader has gone (`| head`) is silent from then on, other errors are raised."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _silence(stream)
        # Windows calls a pipe without a reader an invalid argument.
        if error.errno != errno.EPIPE and not (os.name == "nt" and error.errno == errno.EINVAL):
            raise


def _silence(stream: TextIO) -> None:
    """Let what a stream still holds, and all that follows, go nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class Console:
    """Text on stdout unless ``quiet`` (with --json, stdout is the record's alone); progress and errors on stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.colour = _takes_colour(sys.stdout)
        self.width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)

    def say(self, text: str = "", style: str = "", indent: int = 0) -> None:
        """Lines, wrapped between words; a wrapped one keeps its indentation, that of its last column in a table."""
        for row in visible(for_terminal(text)).split("\n"):
            own = " " * (indent + len(row) - len(row.lstrip()))
            columns = _COLUMN.split(row.strip())
            last = len(own) + len(row.strip()) - len(columns[-1])  # where the last column of a table begins
            rest = " " * last if len(columns) > 1 and last < self.width - _LEAST else own
            for part in wrap(row.lstrip(), self.width, own, rest) or [""]:
                self._write(self.paint(part, style))

    def title(self, text: str) -> None:
        """A heading with a blank line before it."""
        self._write()
        self._write(self.paint(line(text), "bold"))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]], align: str, indent: int = 2) -> None:
        """Columns as wide as their widest cell; ``align`` has `<` or `>` for each. Headings, then columns of text wrap
        if they must; where a name is too long for that, it has a line of its own, above the rest of its row.

        An empty ``head`` leaves the heading out.
        """
        lines = [[(text, "dim") for text in head], *rows] if head else rows
        texts = [[line(for_terminal(cell if isinstance(cell, str) else cell[0])) for cell in row] for row in lines]
        styles = [["" if isinstance(cell, str) else cell[1] for cell in row] for row in lines]
        widths, excess = _widths(texts, align, self.width - indent, bool(head))
        names = [column for column, how in enumerate(align) if how == "<"]
        if excess > 0 and names and len(widths) > 1:
            apart, indent = max(names, key=widths.__getitem__), indent + 2
            above = [(row.pop(apart), style.pop(apart)) for row, style in zip(texts, styles, strict=True)]
            align = align[:apart] + align[apart + 1 :]
            widths, _ = _widths(texts, align, self.width - indent, bool(head))
        else:
            above = [None] * len(texts)
        for row, style, name in zip(texts, styles, above, strict=True):
            if name is not None:
                self._write(" " * (indent - 2) + self.paint(*name))
            wrapped = [wrap(text, width) or [""] for text, width in zip(row, widths, strict=True)]
            for parts in itertools.zip_longest(*wrapped, fillvalue=""):
                cells = [f"{text:{how}{width}}" for text, how, width in zip(parts, align, widths, strict=True)]
                painted = "  ".join(self.paint(cell, how) for cell, how in zip(cells, style, strict=True))
                self._write((" " * indent + painted).rstrip())

    def paint(self, text: str, style: str) -> str:
        """Text in a style of ``_STYLES`` where the terminal shows it."""
        return f"\033[{_STYLES[style]}m{text}\033[0m" if style and self.colour else text

    def error(self, text: str) -> None:
        """One line on stderr, if it can be written to."""
        with contextlib.suppress(OSError):
            put(sys.stderr, f"error: {line(_BLANKS.sub(' ', for_terminal(text)).strip())}\n")

    def progress(self, title: str, total: int | None = None, amount: Callable[[int], str] = str) -> Progress:
        """Context manager for a long step; ``amount`` writes its units (files, frames, bytes)."""
        return Progress(sys.stderr, title, total, amount)

    def _write(self, row: str = "") -> None:
        if not self.quiet:
            put(sys.stdout, row + "\n")


class Progress:
    """A long step on stderr: one line that ticks and is wiped at the end; where that is no terminal, a line every 10 s.

    A thread writes it, so the step's own loop may call ``update`` as often as it likes, or never.
    """

    def __init__(self, stream: TextIO, title: str, total: int | None, amount: Callable[[int], str]) -> None:
        self.stream, self.title, self.total, self.amount = stream, title, total, amount
        self.done, self.note = 0, ""
        self.live = stream.isatty()
        self._started = time.monotonic()
        self._full, self._empty = ("━", "─") if "utf" in (stream.encoding or "").lower() else ("=", "-")
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ticker.join()
        if self.live:
            self._write(_WIPE)

    def update(self, done: int, note: str = "") -> None:
        """``done`` of the total are finished; ``note`` says what is under way."""
        self.done, self.note = done, note

    def of(self, done: int, total: int) -> None:
        """``update`` for a step that learns its total on the way."""
        self.total = total
        self.update(done)

    def line(self, width: int = 1_000) -> str:
        """Title, bar, amount, note, rate in bytes, seconds passed and left, in ``width`` columns.

        Where there is too little room the bar goes, then title and note are cut: the numbers stay.
        """
        seconds = max(time.monotonic() - self._started, 0.001)
        parts = {"title": line(self.title), "bar": "", "amount": "", "note": line(self.note), "rate": ""}
        if self.total:
            filled = _BAR * min(self.done, self.total) // self.total
            parts["bar"] = self._full * filled + self._empty * (_BAR - filled)
            parts["amount"] = f"{self.amount(self.done)} / {self.amount(self.total)}"
        elif self.done:
            parts["amount"] = self.amount(self.done)
        if self.amount is size and self.done:
            parts["rate"] = f"{size(int(self.done / seconds))}/s"
        parts["passed"] = f"{seconds:.1f} s"
        if self.total and 0 < self.done < self.total and seconds > _ESTIMATE_AFTER_SECONDS:
            parts["left"] = f"{seconds * (self.total - self.done) / self.done:.0f} s left"
        for name in ("bar", "note", "title"):
            excess = len("  ".join(filter(None, parts.values()))) - width
            if excess > 0:
                parts[name] = "" if name == "bar" else _shortened(parts[name], excess)
        return "  ".join(filter(None, parts.values()))[:width]

    def _tick(self) -> None:
        while self.live and not self._stop.is_set():
            width = shutil.get_terminal_size((MAX_WIDTH, 24)).columns - 1
            self._write(_WIPE + self.line(width))
            self._stop.wait(_REFRESH_SECONDS)
        while not self._stop.wait(_LOG_SECONDS):
            self._write(self.line() + "\n")

    def _write(self, text: str) -> None:
        put(self.stream, text)


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Text -> lines broken between words only: flags, paths and numbers stay whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _widths(texts: Sequence[Sequence[str]], align: str, room: int, heading: bool) -> tuple[list[int], int]:
    """Cells by row -> (width of each column, columns of the screen that are wanting): headings give way, then text."""
    columns = list(zip(*texts, strict=True))
    widths = [max(map(len, column)) for column in columns]
    excess = sum(widths) + 2 * (len(widths) - 1) - room
    longest = [max((len(word) for text in column for word in text.split()), default=0) for column in columns]
    body = [max(map(len, column[1:]), default=0) for column in columns]
    narrowest = [max(pair) for pair in zip(longest, body, strict=True)] if heading else widths.copy()
    for column in sorted(range(len(widths)), key=lambda column: narrowest[column] - widths[column]):
        widths[column], excess = _narrowed(widths[column], narrowest[column], excess)
    text = [column for column, how in enumerate(align) if how == "<"]
    for column in sorted(text, key=lambda column: (column != len(widths) - 1, -widths[column])):
        widths[column], excess = _narrowed(widths[column], max(longest[column], _LEAST), excess)
    return widths, excess


def _narrowed(width: int, least: int, excess: int) -> tuple[int, int]:
    taken = max(min(excess, width - least), 0)
    return width - taken, excess - taken


def _shortened(text: str, by: int) -> str:
    """Text without so many characters of its end, which three dots stand for."""
    kept = len(text) - by - 3
    return f"{text[:kept]}..." if kept > 0 else ""


def _takes_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that shows colours and its user wants them (https://no-color.org)."""
    shows = os.environ.get("TERM", "dumb") != "dumb" if os.name == "posix" else "WT_SESSION" in os.environ
    return stream.isatty() and shows and not os.environ.get("NO_COLOR")
