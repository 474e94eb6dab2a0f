# SPDX-License-Identifier: Apache-2.0
"""What the commands show: text and tables on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
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
_WIPE = "\r\033[K"
_BLANKS = re.compile(r"[ \t\r\n]+")
_REFRESH_SECONDS = 0.1
_LOG_SECONDS = 10.0
_ESTIMATE_AFTER_SECONDS = 2.0

Cell = str | tuple[str, str]  # text, or (text, style)
size = functools.partial(size_text, decimals=2)  # columns of sizes line up


class CommandError(PackError):
    """A request that cannot be met, in one line for the user."""


def check_ending(out: Path | None, ending: str) -> None:
    """Refuse to write an output under a name of another kind, or in a folder's place."""
    if out and out.suffix.lower() != ending:
        raise CommandError(f"the output {out} does not end in {ending}")
    if out and out.is_dir():
        raise CommandError(f"the output {out} is a folder; name a file in it")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, replacing an old one; its folder is made if need be. OSError."""
    from ..checkpoint.file.place import write_small  # and with it torch, which --help does without

    path.parent.mkdir(parents=True, exist_ok=True)
    write_small(path, data, overwrite=True)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most ``width``, at least one; paths and flags are not taken apart at their hyphens."""
    folded = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return folded or [""]


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
        """Lines, wrapped to the width; a wrapped one keeps its own indentation."""
        for row in visible(text).split("\n"):
            own = " " * (indent + len(row) - len(row.lstrip()))
            for part in wrapped(row.lstrip(), self.width, own):
                self._write(self.paint(part, style))

    def title(self, text: str) -> None:
        """A heading with a blank line before it."""
        self._write()
        self._write(self.paint(line(text), "bold"))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]], align: str, indent: int = 2) -> None:
        """Columns as wide as their widest cell; ``align`` has `<` or `>` for each. The last column wraps if it must.

        An empty ``head`` leaves the heading out.
        """
        lines = [[(text, "dim") for text in head], *rows] if head else rows
        texts = [[line(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in lines]
        styles = [["" if isinstance(cell, str) else cell[1] for cell in row] for row in lines]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        start = indent + sum(widths[:-1]) + 2 * (len(widths) - 1)
        widths[-1] = max(min(widths[-1], self.width - start), 10)
        for row, style in zip(texts, styles, strict=True):
            last = wrapped(row[-1], widths[-1])
            shown = zip([*row[:-1], last[0]], align, widths, strict=True)
            cells = [f"{text:{how}{width}}" for text, how, width in shown]
            painted = "  ".join(self.paint(cell, how) for cell, how in zip(cells, style, strict=True))
            self._write((" " * indent + painted).rstrip())
            for rest in last[1:]:
                self._write(" " * start + self.paint(rest, style[-1]))

    def paint(self, text: str, style: str) -> str:
        """Text in a style of ``_STYLES`` where the terminal shows it."""
        return f"\033[{_STYLES[style]}m{text}\033[0m" if style and self.colour else text

    def error(self, text: str) -> None:
        """One line on stderr, if it can be written to."""
        with contextlib.suppress(OSError):
            put(sys.stderr, f"error: {line(_BLANKS.sub(' ', text).strip())}\n")

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

    def line(self) -> str:
        """Title, bar, amount, note, rate in bytes, seconds passed and left."""
        seconds = max(time.monotonic() - self._started, 0.001)
        parts = [line(self.title)]
        if self.total:
            filled = _BAR * min(self.done, self.total) // self.total
            parts += [self._full * filled + self._empty * (_BAR - filled)]
            parts += [f"{self.amount(self.done)} / {self.amount(self.total)}"]
        elif self.done:
            parts += [self.amount(self.done)]
        parts += [line(self.note)] if self.note else []
        parts += [f"{size(int(self.done / seconds))}/s"] if self.amount is size and self.done else []
        parts += [f"{seconds:.1f} s"]
        if self.total and 0 < self.done < self.total and seconds > _ESTIMATE_AFTER_SECONDS:
            parts += [f"{seconds * (self.total - self.done) / self.done:.0f} s left"]
        return "  ".join(parts)

    def _tick(self) -> None:
        while self.live and not self._stop.is_set():
            width = shutil.get_terminal_size((MAX_WIDTH, 24)).columns - 1
            self._write(_WIPE + self.line()[:width])
            self._stop.wait(_REFRESH_SECONDS)
        while not self._stop.wait(_LOG_SECONDS):
            self._write(self.line() + "\n")

    def _write(self, text: str) -> None:
        put(self.stream, text)


def _takes_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that shows colours and its user wants them (https://no-color.org)."""
    shows = os.environ.get("TERM", "dumb") != "dumb" if os.name == "posix" else "WT_SESSION" in os.environ
    return stream.isatty() and shows and not os.environ.get("NO_COLOR")
