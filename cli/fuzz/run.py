# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of one kind in processes of their own, which may be killed by what they do, and keeps what they find.

A case is a number; with the seed it decides everything. Each process writes the number it is at into shared memory, so
that a case which ends the process, or does not end, is known by its number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import mmap
import os
import selectors
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

FOREIGN, SLOW, WRONG, ENDED = "foreign exception", "slow", "wrong", "ended or hung"
SLOW_SECONDS = 2.0
HANG_SECONDS = 120.0
MOST_ALIKE = 3  # findings of one place that are kept as files
_MOST_KEPT = 4 << 20
_SLOT = struct.Struct("qd")


@dataclass(frozen=True)
class Found:
    """One finding: what kind, in which reader or writer, what was seen. ``text`` names the error and its place."""

    what: str
    where: str
    text: str
    trace: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for findings that are one fault, as far as one can tell."""
        return self.what, self.where, self.text.partition(": ")[0]


@dataclass
class Outcome:
    """What came of one case. ``most``: CPU seconds of its longest call; ``notes``: what to count."""

    found: list[Found] = field(default_factory=list)
    most: float = 0.0
    notes: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Kind:
    """``prepare(folder)`` makes what all cases share, ``case(shared, rng, empty folder)`` does one of them.

    ``minimise(shared, rng, folder, finding)`` writes the smallest input that still shows a finding, if it can.
    """

    title: str
    prepare: Callable[[Path], Any]
    case: Callable[[Any, Random, Path], Outcome]
    minimise: Callable[[Any, Random, Path, Found], Any] | None = None


@dataclass
class Tally:
    """All cases of a kind so far; ``kept``: folders with findings."""

    tried: int = 0
    seconds: float = 0.0
    most: float = 0.0
    counts: Counter = field(default_factory=Counter)  # of findings, by what they are
    notes: Counter = field(default_factory=Counter)
    alike: Counter = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """``cases`` or ``seconds``, whichever is reached first; ``start``: number of the first case."""

    seconds: float
    cases: int
    jobs: int = 1
    start: int = 0


def judge(outcome: Outcome, where: str, call: Callable[[], Any], allowed: tuple[type[Exception], ...] = ()) -> Any:
    """Run one call of a case: its result, or None after an error; what is wrong with it goes into ``outcome``."""
    start, result = time.process_time(), None
    try:
        result = call()
        outcome.notes["read"] += 1
    except allowed as error:
        outcome.notes["refused"] += 1
        if "\n" in str(error):
            outcome.found.append(Found(WRONG, where, f"an error of several lines: {str(error)[:500]!r}"))
    except Exception as error:
        outcome.found.append(Found(FOREIGN, where, describe(error), traceback.format_exc()[-4000:]))
    took = time.process_time() - start
    outcome.most = max(outcome.most, took)
    if took > SLOW_SECONDS:
        outcome.found.append(Found(SLOW, where, f"CPU time: {took:.1f} s"))
    return result


def describe(error: BaseException) -> str:
    """Kind and place of an error, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:300]}"


def numbers(seed: int, name: str, number: int) -> Random:
    """The random numbers of one case."""
    return Random(f"{seed}:{name}:{number}")  # noqa: S311  (nothing secret)


def one_case(kind: Kind, name: str, shared: Any, seed: int, number: int, folder: Path) -> Outcome:
    """A case; an error of the case itself is a finding, too."""
    try:
        return kind.case(shared, numbers(seed, name, number), folder)
    except Exception as error:
        return Outcome([Found(FOREIGN, "the case itself", describe(error), traceback.format_exc()[-4000:])])


def run(
    kind: Kind, name: str, seed: int, limits: Limits, out: Path, on_step: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """All cases of a kind within ``limits``; findings go to folders of ``out``."""
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nvfp4-fuzz-") as scratch, contextlib.ExitStack() as stack:
        base = Path(scratch)
        (base / "shared").mkdir()
        shared = kind.prepare(base / "shared")
        task = _Task(kind, name, shared, seed, limits, out, base, time.monotonic() + limits.seconds)
        workers = [_Worker(task, lane) for lane in range(limits.jobs)]
        stack.callback(lambda: [worker.kill() for worker in workers])
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                worker.begin(limits.start + worker.lane)
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            while selector.get_map():
                for key, _ in selector.select(timeout=0.2):
                    worker = key.data
                    if not worker.read(tally):
                        selector.unregister(worker.pipe)
                        if (following := worker.ended(tally)) is not None:
                            worker.begin(following)
                            selector.register(worker.pipe, selectors.EVENT_READ, worker)
                for worker in workers:
                    worker.end_if_hung()
                tally.seconds = time.monotonic() - started
                on_step(tally)
    return tally


@dataclass(frozen=True)
class _Task:
    kind: Kind
    name: str
    shared: Any
    seed: int
    limits: Limits
    out: Path
    base: Path
    until: float


class _Worker:
    """One lane of cases, ``start + lane``, ``start + lane + jobs``, ..., in a process that is begun anew if lost."""

    def __init__(self, task: _Task, lane: int) -> None:
        self.task, self.lane = task, lane
        self.slot = mmap.mmap(-1, _SLOT.size)
        self.folder = task.base / f"lane{lane}"
        self.pid, self.pipe, self.rest, self.hung, self.told = 0, -1, b"", False, -1

    def begin(self, number: int) -> None:
        """Start the process at this case."""
        read, write = os.pipe()
        self.slot[:] = _SLOT.pack(number, time.monotonic())
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _be_quiet()
            with contextlib.suppress(BaseException):
                self._work(number, write)
            os._exit(0)
        os.close(write)
        self.pipe, self.rest, self.hung = read, b"", False

    def _work(self, number: int, pipe: int) -> None:
        task, parent = self.task, os.getppid()
        while number < task.limits.start + task.limits.cases and time.monotonic() < task.until:
            if os.getppid() != parent:
                return
            self.slot[:] = _SLOT.pack(number, time.monotonic())
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            outcome = one_case(task.kind, task.name, task.shared, task.seed, number, self.folder)
            line = {"n": number, "most": outcome.most, "notes": outcome.notes, "found": [*map(asdict, outcome.found)]}
            data = memoryview(json.dumps(line).encode() + b"\n")
            while data:
                data = data[os.write(pipe, data) :]
            number += task.limits.jobs
        self.slot[:] = _SLOT.pack(-1, 0.0)

    def read(self, tally: Tally) -> bool:
        """Take what the process wrote; False at its end."""
        data = os.read(self.pipe, 1 << 20)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in map(json.loads, lines):
            tally.tried, self.told = tally.tried + 1, line["n"]
            tally.most = max(tally.most, line["most"])
            tally.notes.update(line["notes"])
            for found in line["found"]:
                self._keep(tally, Found(**found), line["n"])
        return bool(data)

    def ended(self, tally: Tally) -> int | None:
        """Wait for a process that wrote its last -> the case to go on with, if it ended before its time."""
        os.close(self.pipe)
        _, status, usage = os.wait4(self.pid, 0)
        tally.peak_bytes = max(tally.peak_bytes, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        self.pid = 0
        number, _ = _SLOT.unpack(self.slot[:])
        if number < 0:
            return None
        if number == self.told:  # killed for its time between the end of a case and the next
            return number + self.task.limits.jobs
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        how = f"killed after {HANG_SECONDS:g} s" if self.hung else how
        found = Found(ENDED, "", f"case: {how}")
        tally.tried += 1
        self._keep(tally, found, number)
        return number + self.task.limits.jobs

    def end_if_hung(self) -> None:
        """Kill a process whose case takes too long."""
        number, since = _SLOT.unpack(self.slot[:])
        if self.pid and number >= 0 and not self.hung and time.monotonic() - since > HANG_SECONDS:
            self.hung = True
            os.kill(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _keep(self, tally: Tally, found: Found, number: int) -> None:
        tally.counts[found.what] += 1
        tally.alike[found.key] += 1
        if tally.alike[found.key] <= MOST_ALIKE:
            tally.kept.append(str(keep(self.task, found, number)))


def keep(task: _Task, found: Found, number: int) -> Path:
    """Write a finding's input, as small as it gets cheaply, and what was found -> its folder."""
    folder = task.out / f"{task.name}-{number}"
    count = 2
    while folder.exists():
        folder, count = task.out / f"{task.name}-{number}-{count}", count + 1
    folder.mkdir(parents=True)
    about = asdict(found) | {"again": f"fuzz --what {task.name} --seed {task.seed} --case {number}"}
    if task.kind.minimise is not None and found.what != ENDED:
        with contextlib.suppress(Exception):  # the number of the case is enough to see it again
            rng = numbers(task.seed, task.name, number)
            about["input"] = task.kind.minimise(task.shared, rng, folder, found)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > _MOST_KEPT:
            path.unlink()
    (folder / "finding.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folder


def _be_quiet() -> None:
    """A process whose words nobody reads, and which Ctrl-C ends by way of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    faulthandler.disable()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages of the pack's loggers while the block runs, as text."""
    found: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    root, before = logging.getLogger(), logging.root.manager.disable
    logging.disable(logging.NOTSET)
    root.addHandler(handler)
    try:
        yield found
    finally:
        root.removeHandler(handler)
        logging.disable(before)
