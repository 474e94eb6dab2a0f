# SPDX-License-Identifier: Apache-2.0
"""A quantisation that is killed, interrupted, or loses what it wrote: the old file or none; the next run ends it."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.resume import JOURNAL, PART, PartFile
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.tests.support.quantize_sources import save, tiny

ROOT = Path(__file__).resolve().parents[3]
FAST = QuantizeSettings(search=AMAX)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no fork on Windows")

# Reads requests from stdin; a child of its own quantises each and may be killed. A fork is quicker than a new Python.
WORKER = f"""
import json, os, sys, time, types
package = types.ModuleType("nvfp4_video")
package.__path__ = [{str(ROOT)!r}]
sys.modules["nvfp4_video"] = package
import torch
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
torch.set_num_threads(1)
for line in sys.stdin:
    source, target, pause = json.loads(line)
    child = os.fork()
    if child == 0:
        quantize_checkpoint(source, target, QuantizeSettings(search=AMAX), overwrite=True,
                            on_step=lambda done, total: time.sleep(pause))
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Worker:
    """The process above."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-c", WORKER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, source: Path, target: Path, pause: float = 0.0, kill_after: float | None = None) -> tuple[int, float]:
        """-> exit code of the child (-9 if it was killed), seconds it ran."""
        self.process.stdin.write(json.dumps([str(source), str(target), pause]) + "\n")
        self.process.stdin.flush()
        child, started = int(self.process.stdout.readline()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # a child that has ended stays a zombie, since nobody waits for it yet
        self.process.stdin.write("wait for it\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), time.monotonic() - started


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.process.stdin.close()
    worker.process.wait(timeout=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "source.safetensors", tiny(blocks=6))


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory) -> bytes:
    """The file of a run that nothing disturbed."""
    target = tmp_path_factory.mktemp("wanted") / "t.safetensors"
    quantize_checkpoint(source, target, FAST)
    return target.read_bytes()


def leftovers(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {target.name, target.with_suffix(".md").name}


@pytest.mark.parametrize(("seed", "pause"), [(1, 0.003), (2, 0.0005), (3, 0.0)])
def test_kills_at_random_moments_leave_the_old_file_or_the_whole_new_one(worker, source, wanted, tmp_path, seed, pause):
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"old")
    _, whole = worker.run(source, tmp_path / "timing.safetensors", pause)
    for path in tmp_path.glob("timing*"):
        path.unlink()
    chance, killed = random.Random(seed), 0  # noqa: S311
    for _ in range(7):
        code, _ = worker.run(source, target, pause, kill_after=chance.uniform(0, whole))
        killed += code == -signal.SIGKILL
        assert target.read_bytes() in (b"old", wanted)
    assert killed, "no run was killed in time"
    assert worker.run(source, target)[0] == 0
    assert target.read_bytes() == wanted
    assert leftovers(target) == set()
    assert target.with_suffix(".md").is_file()


class Stop(Exception):
    pass


def stop_after(calls: int):
    count = 0

    def step(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise Stop

    return step


def interrupt(source: Path, target: Path, calls: int, settings: QuantizeSettings = FAST) -> None:
    with pytest.raises(Stop):
        quantize_checkpoint(source, target, settings, on_step=stop_after(calls))


@pytest.mark.parametrize("calls", [1, 5, 20, 45, 60])
def test_an_interrupted_run_is_gone_on_with_where_it_stopped(source, wanted, tmp_path, calls):
    target = tmp_path / "t.safetensors"
    interrupt(source, target, calls)
    assert not target.exists()
    assert leftovers(target) == {target.name + PART, target.name + JOURNAL}
    assert quantize_checkpoint(source, target, FAST)["resumed"] == calls
    assert target.read_bytes() == wanted and leftovers(target) == set()


def test_a_run_that_was_interrupted_again_and_again_keeps_what_it_has(source, wanted, tmp_path):
    target, resumed = tmp_path / "t.safetensors", []
    for _ in range(200):
        count = 0

        def step(done: int, total: int) -> None:
            nonlocal count
            count += done > 0
            if count > 30 + len(resumed) * 10:
                raise Stop

        try:
            resumed.append(quantize_checkpoint(source, target, FAST, on_step=step)["resumed"])
            break
        except Stop:
            journal = (tmp_path / (target.name + JOURNAL)).read_text().splitlines()
            resumed.append(len(journal) - 1)
    assert resumed == sorted(resumed) and len(resumed) > 2
    assert target.read_bytes() == wanted


HARMS = ("flipped", "zeroed", "shortened", "torn_line", "garbage_line", "no_part", "no_journal")


@pytest.mark.parametrize("harm", HARMS)
def test_what_was_lost_or_torn_on_disk_is_made_anew(source, wanted, tmp_path, harm):
    target = tmp_path / "t.safetensors"
    interrupt(source, target, 60)
    part, journal = (tmp_path / (target.name + end) for end in (PART, JOURNAL))
    data, lines = bytearray(part.read_bytes()), journal.read_text().splitlines(keepends=True)
    assert len(lines) > 20
    if harm == "flipped":
        for place in range(1000, len(data), 997):
            data[place] ^= 0x10
        part.write_bytes(data)
    elif harm == "zeroed":
        part.write_bytes(bytes(len(data)))
    elif harm == "shortened":
        part.write_bytes(data[: len(data) // 2])
    elif harm == "torn_line":
        journal.write_text("".join(lines)[:-25])
    elif harm == "garbage_line":
        journal.write_text("".join(lines[:10]) + "\0\0\0\n" + "".join(lines[10:]))
    elif harm == "no_part":
        part.unlink()
    else:
        journal.unlink()
    record = quantize_checkpoint(source, target, FAST)
    assert target.read_bytes() == wanted and leftovers(target) == set()
    assert record["resumed"] < len(lines) - 1


def test_an_unfinished_file_of_other_settings_or_of_an_older_source_is_begun_anew(source, wanted, tmp_path, caplog):
    target = tmp_path / "t.safetensors"
    interrupt(source, target, 60, QuantizeSettings(search=AMAX, options=Options(protect_audio=True)))
    assert quantize_checkpoint(source, target, FAST)["resumed"] == 0
    assert "starts again" in caplog.text
    assert target.read_bytes() == wanted
    changed = save(tmp_path / "other.safetensors", tiny(seed=1, blocks=6))
    second = tmp_path / "u.safetensors"
    interrupt(changed, second, 60)
    save(changed, tiny(seed=2, blocks=6))
    os.utime(changed, ns=(5, 5))
    assert quantize_checkpoint(changed, second, FAST)["resumed"] == 0


def test_a_run_killed_between_the_rename_and_the_card_is_finished_by_the_next(source, wanted, tmp_path, monkeypatch):
    from nvfp4_video.checkpoint.write import quantize as module

    target = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda path, record: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            quantize_checkpoint(source, target, FAST)
    assert target.read_bytes() == wanted and not target.with_suffix(".md").exists()
    record = quantize_checkpoint(source, target, FAST)
    assert record["sha256"] in target.with_suffix(".md").read_text(encoding="utf-8")
    assert leftovers(target) == set()
    with pytest.raises(CheckpointError, match="the target exists"):
        quantize_checkpoint(source, target, FAST)


@pytest.mark.parametrize("harm", ("touched", "away"))
def test_a_source_that_changed_leaves_nothing_and_one_that_is_out_of_reach_what_is_finished(source, tmp_path, harm):
    mine, target = shutil.copy2(source, tmp_path / "mine.safetensors"), tmp_path / "t.safetensors"
    away, calls = mine.with_suffix(".away"), 0

    def step(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            os.utime(mine) if harm == "touched" else mine.rename(away)

    with pytest.raises(CheckpointError, match="the source changed while it was in use"):
        quantize_checkpoint(mine, target, FAST, on_step=step)
    kept = leftovers(target) - {mine.name, away.name}
    assert kept == (set() if harm == "touched" else {target.name + PART, target.name + JOURNAL})
    if harm == "away":
        away.rename(mine)
        assert quantize_checkpoint(mine, target, FAST)["resumed"] > 0


def test_a_disk_that_fills_up_keeps_what_is_finished_for_the_next_run(source, wanted, tmp_path, monkeypatch):
    target, real = tmp_path / "t.safetensors", PartFile.write

    def write(self, unit, data):
        if len(self.finished) == 21:
            with self._writing():
                raise OSError(28, "No space left on device")
        real(self, unit, data)

    with monkeypatch.context() as patch:
        patch.setattr(PartFile, "write", write)
        with pytest.raises(CheckpointError, match=r"cannot be written.*stays in t\.safetensors\.part"):
            quantize_checkpoint(source, target, FAST)
    assert not target.exists()
    assert quantize_checkpoint(source, target, FAST)["resumed"] == 21
    assert target.read_bytes() == wanted


def test_a_file_that_may_not_grow_further_leaves_nothing_half_named(source, wanted, tmp_path):
    resource = importlib.import_module("resource")  # which Windows has not
    target = tmp_path / "t.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(wanted) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            quantize_checkpoint(source, target, FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
    quantize_checkpoint(source, target, FAST)
    assert target.read_bytes() == wanted


def test_a_second_process_that_wants_the_same_target_is_sent_away(worker, source, wanted, tmp_path):
    target = tmp_path / "t.safetensors"
    seen = []

    def step(done: int, total: int) -> None:
        if done and not seen:
            seen.append(worker.run(source, target)[0])

    quantize_checkpoint(source, target, FAST, on_step=step)
    assert seen == [1]
    assert target.read_bytes() == wanted


def test_nothing_of_the_unfinished_file_is_listed_as_a_model(source, tmp_path):
    interrupt(source, tmp_path / "t.safetensors", 30)
    assert not list(tmp_path.glob("*.safetensors"))


def test_threads_do_not_change_the_bytes(source, wanted, tmp_path):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            quantize_checkpoint(source, tmp_path / f"{count}.safetensors", FAST)
            assert (tmp_path / f"{count}.safetensors").read_bytes() == wanted
    finally:
        torch.set_num_threads(threads)
