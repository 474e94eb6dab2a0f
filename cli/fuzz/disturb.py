# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, whose source changes, or that meet another writer: nothing is torn, lost or replaced."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from ...checkpoint.file.header import BACKUP_ENDING, CheckpointError, read_header
from ...checkpoint.file.resume import JOURNAL, PART
from ...checkpoint.write.repair import restore_header
from .jobs import DONE, READERS, REFUSED, WRITERS, Child, Job, Sources, prepare
from .run import WRONG, Found, Kind, Outcome, logged

_PAUSES = (0.0, 0.0, 0.0003, 0.002)
_OLD = b"what was there before"


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def killed(sources: Sources, rng: Random, folder: Path) -> Outcome:
    """One kill at a random moment, then the same run to its end."""
    name = rng.choice(list(WRITERS))
    job, outcome = WRITERS[name], Outcome()
    wanted = sources.made[name, 0]
    source, target = sources.set_up(job, 0, folder)
    before = source.read_bytes()
    old = _OLD if not job.in_place and rng.random() < 0.5 else None
    if old is not None:
        target.write_bytes(old)
    pause = rng.choice(_PAUSES)
    child = Child(job, source, target, overwrite=old is not None, pause=pause)
    time.sleep(rng.uniform(0, sources.seconds[name] * (0.8 if not pause else 1.5)))
    child.kill()
    code, said = child.wait()
    outcome.notes["killed" if code < 0 else "ended before the kill"] += 1

    def wrong(text: str) -> None:
        outcome.found.append(Found(WRONG, name, f"{text} (code {code} {said[:200]})"))

    if job.in_place:
        _check_torn(source, before, wanted, outcome, wrong)
    else:
        if source.read_bytes() != before:
            wrong("source: the source is changed")
        if _read(target) not in (old, wanted):
            wrong("torn: the target is neither the old file nor the new one")
    _check_rest(folder, outcome, wrong, job, source, target, wanted)
    return outcome


def _check_torn(source: Path, before: bytes, wanted: bytes | None, outcome: Outcome, wrong: Callable) -> None:
    """A file that was being changed in place is the old one, the new one, or known as torn and mended by undo."""
    if source.read_bytes() in (before, wanted):
        return
    try:
        read_header(source)
    except CheckpointError as error:
        if "--undo" not in str(error):
            return wrong(f"torn: its error names no mend: {error}")
    else:
        return wrong("torn: the file is neither the old one nor the new one, and can be read")
    restore_header(source)
    outcome.notes["torn, found and mended"] += 1
    if source.read_bytes() not in (before, wanted):
        wrong("torn: undo did not bring it back")
    return None


def _check_rest(place: Path, outcome: Outcome, wrong: Callable, job: Job, source: Path, target: Path, wanted) -> None:
    """The next run ends the work, and what the killed one left is taken up or named."""
    with logged() as words:
        try:
            job.run(source, target, True, lambda done, total: None)
        except CheckpointError as error:
            return wrong(f"resume: the next run refuses: {error}")
    if _read(source if job.in_place else target) != wanted:
        wrong("resume: the next run makes another file")
    known = {source.name, target.name, "other.safetensors", source.name + BACKUP_ENDING, target.with_suffix(".md").name}
    for left in {path.name for path in place.iterdir()} - known:
        outcome.notes["left-overs named"] += 1
        if not any(left in text for text in words):
            wrong(f"left over: {left.partition('.safetensors')[2] or left} is not named by the next run")
    return None


def _change(how: str, source: Path, other: bytes, rng: Random) -> None:
    size = source.stat().st_size
    if how == "shorter":
        os.truncate(source, rng.choice((0, 7, size // 3, size - 1)))
    elif how == "replaced":
        twin = source.with_name("new")
        twin.write_bytes(other)
        os.replace(twin, source)
    elif how == "written":
        with source.open("r+b") as file:
            for _ in range(rng.choice((1, 5))):
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(rng.choice((1, 500))))
    elif how == "written whole":
        source.write_bytes(other)
    elif how == "longer":
        with source.open("ab") as file:
            file.write(b"more")
    elif how == "gone":
        source.unlink()
    elif how == "a pipe":
        source.unlink()
        os.mkfifo(source)
    else:
        source.unlink()
        source.mkdir()


_CHANGES = (
    "shorter", "shorter", "replaced", "written", "written", "written whole", "longer", "gone", "a pipe", "a folder",
)  # fmt: skip


def changed(sources: Sources, rng: Random, folder: Path) -> Outcome:
    """A source that changes at a random moment of a run: the result is of the old or the new one, or none."""
    jobs = {name: job for name, job in (WRITERS | READERS).items() if not job.in_place and name != "picture"}
    name, how = rng.choice(list(jobs)), rng.choice(_CHANGES)
    job, outcome = jobs[name], Outcome()
    wanted = sources.made[name, 0]
    source, target = sources.set_up(job, 0, folder)
    pause = rng.choice(_PAUSES)
    child = Child(job, source, target, pause=pause)
    time.sleep(rng.uniform(0, sources.seconds[name] * (0.8 if not pause else 1.5)))
    _change(how, source, sources.files[job.source, 1][".safetensors"], rng)
    code, said = child.wait()
    found = _read(target)
    if code == REFUSED:
        outcome.notes["refused"] += 1
        if found is not None:
            outcome.found.append(Found(WRONG, name, f"target: refused and yet written, {how}: {said[:300]}"))
    elif code != DONE:
        outcome.found.append(Found(WRONG, name, f"ended with {code}: {how}: {said[:500]}"))
    elif found == wanted:
        outcome.notes["of the old file"] += 1
    elif found == _again(job, source, folder / "again"):
        outcome.notes["of the new file"] += 1
    else:
        outcome.found.append(Found(WRONG, name, f"mixed: the result is neither of the old nor of the new file, {how}"))
    return outcome


def _again(job: Job, source: Path, folder: Path) -> bytes | None:
    """What a run makes of the source as it is now."""
    if not source.is_file():
        return None
    folder.mkdir()
    shutil.copyfile(source, folder / source.name)
    shutil.copyfile(source.with_name("other.safetensors"), folder / "other.safetensors")
    code, _ = Child(job, folder / source.name, folder / "t.safetensors").wait()
    return _read(folder / "t.safetensors") if code == DONE else None


def paired(sources: Sources, rng: Random, folder: Path) -> Outcome:
    """Two runs with one target, and sometimes a file that somebody else puts there."""
    names = [rng.choice([name for name, job in WRITERS.items() if not job.in_place and name != "picture"])]
    names.append(rng.choice((names[0], "repair", "split", "quantize")))
    outcome, overwrite = Outcome(), rng.random() < 0.3
    wanted = [sources.made[name, i] for i, name in enumerate(names)]
    paths = [sources.put(WRITERS[name].source, i, folder, f"m{i}") for i, name in enumerate(names)]
    target, children = folder / "t.safetensors", []
    longest = max(sources.seconds[name] for name in names)
    theirs = False
    for name, path in zip(names, paths, strict=True):
        children.append(Child(WRITERS[name], path, target, overwrite, rng.choice(_PAUSES)))
        time.sleep(rng.uniform(0, longest) if rng.random() < 0.5 else 0)
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, longest))
        try:
            with target.open("xb") as file:
                file.write(_OLD)
            theirs = True
        except FileExistsError:
            pass
    ends = [child.wait() for child in children]
    _judge_pair(names, ends, wanted, _read(target), theirs, overwrite, outcome)
    rest = {path.name for path in folder.iterdir()} - {target.name, *(path.name for path in paths)}
    if hidden := [name for name in rest if name.startswith(".")]:
        outcome.found.append(Found(WRONG, " + ".join(names), f"left over: {len(hidden)} hidden files"))
    outcome.notes["unfinished, for the next run"] += bool(rest & {target.name + PART, target.name + JOURNAL})
    return outcome


def _judge_pair(names, ends, wanted, found, theirs: bool, overwrite: bool, outcome: Outcome) -> None:
    def wrong(text: str) -> None:
        about = f"{text}; overwrite {overwrite}, theirs {theirs}, ends {[(code, said[:200]) for code, said in ends]}"
        outcome.found.append(Found(WRONG, " + ".join(names), about))

    winners = [i for i, (code, _) in enumerate(ends) if code == DONE]
    outcome.notes[f"{len(winners)} of two finished"] += 1
    if any(code not in (DONE, REFUSED) for code, _ in ends):
        wrong("ended: a run neither finished nor refused")
    if theirs and not overwrite:
        if found != _OLD or winners:
            wrong("replaced: somebody's file")
    elif overwrite:
        if found not in [*(wanted[i] for i in winners), *([_OLD] if theirs else [])]:
            wrong("torn: the target is of no run that finished")
    elif len(winners) > 1:
        wrong("replaced: both finished without leave to overwrite")
    elif winners and found != wanted[winners[0]]:
        wrong("torn: the target is not what the run made that finished")
    elif not winners and found is not None:
        wrong("target: it is there, and no run finished")


@functools.cache
def _sources() -> Sources:
    """What the three kinds share; nothing of it lies in files."""
    with tempfile.TemporaryDirectory(prefix="nvfp4-fuzz-") as folder:
        return prepare(Path(folder))


KILLS = Kind("kills at random moments, and the next run", lambda folder: _sources(), killed)
SOURCES = Kind("sources that change under a run", lambda folder: _sources(), changed)
PAIRS = Kind("two writers of one target", lambda folder: _sources(), paired)
