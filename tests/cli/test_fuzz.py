# SPDX-License-Identifier: Apache-2.0
"""cli/fuzz: some cases of every kind, always the same ones; and what is planted is found, kept, and seen again."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.cli import COMMANDS, main
from nvfp4_video.cli import fuzz as command
from nvfp4_video.cli.fuzz import files, run
from nvfp4_video.cli.fuzz.run import Kind, Outcome, judge, numbers
from nvfp4_video.host.guard import routes
from nvfp4_video.samples.damage import DAMAGE, choose, damaged, read_draft

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fuzz needs fork()")
SEED = "20261130"
# Kind -> cases, a few seconds each.
CASES = {"files": 40, "media": 40, "kills": 8, "sources": 8, "writers": 6, "prompts": 200, "loop": 2}


def fuzz(capsys: pytest.CaptureFixture, tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """Exit code and record of a run."""
    code = main(["fuzz", "--json", "--minutes", "5", "--out", str(tmp_path / "found"), *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> files.Bases:
    """What the cases of ``files`` share, made once."""
    return files.prepare(tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True)
def the_guard_of_this_process(monkeypatch):
    """The fuzzer, which has a process of its own elsewhere, exchanges parts of the guard: here they come back."""
    for name in ("probe", "log_fault"):
        monkeypatch.setattr(routes, name, getattr(routes, name))


@pytest.fixture
def prepared(bases, monkeypatch):
    """``files`` takes ``bases`` instead of making its own."""
    monkeypatch.setattr(files, "KIND", replace(files.KIND, prepare=lambda folder: bases))


@pytest.mark.parametrize("kind", command.KINDS)
def test_the_first_cases_of_every_kind_find_nothing(kind: str, prepared, capsys, tmp_path):
    if kind == "media":
        pytest.importorskip("av")
    code, record = fuzz(capsys, tmp_path, "--what", kind, "--seed", SEED, "--cases", str(CASES[kind]))
    row = record["kinds"][kind]
    # How long a prompt takes is for the machine to say; the work on it is counted in test_guard_hostile.py.
    alike = [entry for entry in row["alike"] if entry[0] != run.SLOW]
    assert alike == [] and row["tried"] == CASES[kind]
    assert code == (0 if not row["counts"] else 1)


def _planted(how: str) -> Kind:
    def case(shared: Path, rng: Random, folder: Path) -> Outcome:
        outcome, number = Outcome(), rng.randrange(4)

        def fault() -> None:
            if number == 0 and how == "raise":
                raise KeyError("planted")
            if number == 0 and how == "die":
                os.kill(os.getpid(), signal.SIGBUS)
            if number == 0 and how == "hang":
                time.sleep(60)
            if number == 1:
                raise CheckpointError("as it should be")

        judge(outcome, "reader", fault, (CheckpointError,))
        return outcome

    return Kind("planted", lambda folder: folder, case)


@pytest.mark.parametrize(
    ("how", "what"), [("raise", run.FOREIGN), ("die", run.ENDED), ("hang", run.ENDED), ("nothing", None)]
)
def test_a_planted_fault_is_counted_kept_and_seen_again(how: str, what: str, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "KIND", _planted(how))
    if how == "hang":
        monkeypatch.setattr(run, "HANG_SECONDS", 1.0)
    cases = "8" if how == "hang" else "30"
    code, record = fuzz(capsys, tmp_path, "--what", "files", "--seed", "1", "--cases", cases)
    row = record["kinds"]["files"]
    assert row["tried"] == int(cases) and row["notes"]["refused"] >= 1
    if what is None:
        assert (code, row["counts"], record["ok"]) == (0, {}, True)
        return
    assert code == 1 and not record["ok"] and set(row["counts"]) == {what} and row["counts"][what] >= 1
    assert len(row["kept"]) == min(row["counts"][what], run.MOST_ALIKE)
    about = json.loads(Path(row["kept"][0], "finding.json").read_text("utf-8"))
    assert about["again"].startswith("fuzz --what files --seed 1 --case ")
    again, record = fuzz(capsys, tmp_path, *about["again"].split()[1:])
    assert again == 1 and record["kinds"]["files"]["tried"] == 1


def test_a_case_that_was_told_is_not_counted_again_when_its_process_is_killed(capsys, tmp_path, monkeypatch):
    def work(worker, number: int, pipe: int) -> None:
        if number >= worker.task.limits.start + worker.task.limits.cases:
            worker.slot[:] = run._SLOT.pack(-1, 0.0)
            return
        os.write(pipe, json.dumps({"n": number, "most": 0, "notes": {}, "found": []}).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(files, "KIND", _planted("nothing"))
    monkeypatch.setattr(run._Worker, "_work", work)
    code, record = fuzz(capsys, tmp_path, "--what", "files", "--seed", "1", "--cases", "3")
    row = record["kinds"]["files"]
    assert (code, row["tried"], row["counts"]) == (0, 3, {})


def test_a_finding_is_kept_with_no_more_damage_than_shows_it(bases, tmp_path, monkeypatch):
    def broken(path: Path) -> None:
        if "__metadata__" in path.read_bytes()[8:].decode("latin-1") and b"planted" in path.read_bytes():
            raise KeyError("planted")

    monkeypatch.setitem(DAMAGE, "planted", lambda draft, rng: draft.metadata.update(planted="planted"))
    monkeypatch.setattr(files, "readers", lambda bases, path, rng: {"header": lambda: broken(path)})
    monkeypatch.setattr(files, "choose", lambda rng: [("values", 1), ("planted", 2), ("drop", 3)])
    (place := tmp_path / "case").mkdir()
    outcome = files.case(bases, numbers(0, "", 0), place)
    (finding := tmp_path / "finding").mkdir()
    assert files.minimise(bases, numbers(0, "", 0), finding, outcome.found[0]) == ["planted"]
    assert [path.suffix for path in finding.iterdir() if path.is_file() and path.suffix != ".json"] == [".safetensors"]


def test_the_same_seed_makes_the_same_files_and_most_keep_a_sound_header(bases, tmp_path):
    draft = bases.drafts[6]
    sound = 0
    for seed in range(120):
        twins = []
        for name in "ab":
            (folder := tmp_path / f"{seed}{name}").mkdir()
            twins.append(damaged(draft, choose(numbers(seed, "", 0))).write(folder))
        assert twins[0].read_bytes() == twins[1].read_bytes()
        try:
            read_header(twins[0])
            sound += 1
        except CheckpointError:
            pass
    assert 60 < sound < 120


@pytest.mark.parametrize("name", DAMAGE)
def test_every_kind_of_damage_changes_something(name: str, bases, tmp_path):
    draft = bases.drafts[6]
    changed = 0
    for seed in range(12):
        (folder := tmp_path / str(seed)).mkdir()
        path = damaged(draft, [(name, seed)]).write(folder)
        (plain := folder / "plain").mkdir()
        twin = draft.write(plain)
        changed += path.read_bytes() != twin.read_bytes() or len(list(folder.glob("*.json"))) > 0
        assert read_draft(twin).tensors == draft.tensors
    assert changed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--what", "files,cats,dogs"], "names cats, dogs; expected some of files"),
        (["--case", "3"], "which with --what"),
        (["--what", ""], "--what names nothing; expected some of files"),
    ],
)
def test_a_wrong_request_is_refused(arguments: list[str], said: str, capsys):
    assert main(["fuzz", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_the_stub_the_rest_is_run_and_what_is_left_out_is_named(capsys, tmp_path, monkeypatch):
    from nvfp4_video.cli.fuzz import stub

    monkeypatch.setattr(stub, "there", lambda: False)
    code, record = fuzz(capsys, tmp_path, "--what", "files,prompts", "--seed", SEED, "--cases", "3")
    assert code == 0 and list(record["kinds"]) == ["files"]
    assert list(record["not run"]) == ["prompts", "the loaders and the guard, of files"]
    assert all("clone the repository" in why for why in record["not run"].values())
    assert "fuzz" in COMMANDS
