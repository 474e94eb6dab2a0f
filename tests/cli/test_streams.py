# SPDX-License-Identifier: Apache-2.0
"""Exit codes and streams: 0, 1 and 2 whoever reads the output, JSON whenever it was asked for, options spelled out."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from nvfp4_video import cli
from nvfp4_video.cli import COMMANDS, main
from nvfp4_video.cli.amounts import amount, count, positive_count
from nvfp4_video.cli.console import CommandError

ROOT = Path(__file__).resolve().parents[2]
# A process with one command more, `probe`, which prints many lines and finds a fault; it needs no torch.
PROBE = textwrap.dedent("""
    import runpy, sys, types
    runpy.run_path({main!r})["_alias_folder"]()
    from nvfp4_video import cli
    def run(args, console):
        for number in range(20000):
            console.say(f"line {{number}}")
        {act}
        return {{"found": True}}, False
    module = types.ModuleType("nvfp4_video.cli.probe")
    module.probe = lambda parser: parser.set_defaults(run=run)
    sys.modules[module.__name__] = module
    cli.COMMANDS["probe"] = ("probe", "")
    sys.exit(cli.main(sys.argv[1:]))
""")


def probe(shell: str, act: str = "pass") -> subprocess.CompletedProcess:
    """The probe under bash, where ``shell`` has PROBE for its command line."""
    code = PROBE.format(main=str(ROOT / "__main__.py"), act=act)
    script = shell.replace("PROBE", '"$0" -c "$1" probe')
    command = ["bash", "-c", script, sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def command(monkeypatch):
    """Registers ``probe`` with a given body -> main's words for it."""

    def registered(run):
        module = types.ModuleType("nvfp4_video.cli.probe")
        module.probe = lambda parser: parser.set_defaults(run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "probe", ("probe", ""))
        return ["probe"]

    return registered


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("PROBE | head -1; exit ${PIPESTATUS[0]}", 1),
        ("PROBE | true; exit ${PIPESTATUS[0]}", 1),
        ("PROBE --json | true; exit ${PIPESTATUS[0]}", 1),
        ("PROBE >&-", 1),
        ("PROBE >&- 2>&-", 1),
        ("PROBE 2>&1 | true; exit ${PIPESTATUS[0]}", 1),
        ("PROBE --help | true; exit ${PIPESTATUS[0]}", 0),
        ("PROBE --nonsense 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
    ],
)
def test_what_was_found_decides_the_exit_code_whoever_reads_the_output(shell, code):
    done = probe(shell)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", ["", " --json", " --help"])
def test_output_that_cannot_be_written_is_a_command_that_could_not_be_done(words):
    done = probe(f"PROBE{words} > /dev/full")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_a_broken_pipe_within_a_command_is_no_success():
    done = probe("PROBE > /dev/null", act="raise BrokenPipeError(32, 'Broken pipe')")
    assert done.returncode == 2 and "Broken pipe" in done.stderr


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), MemoryError("odd"), KeyError("odd")])
def test_an_unforeseen_error_is_2_with_one_line_and_its_traceback_in_a_file(
    error, command, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(args, console):
        raise error

    assert main([*command(run), "--json"]) == 2
    said = capsys.readouterr()
    (log,) = tmp_path.iterdir()
    assert said.err.count("\n") == 1 and type(error).__name__ in said.err and str(log) in said.err
    assert "test_streams.py" in said.err, "where it happened"
    assert json.loads(said.out)["error"] in said.err
    assert "Traceback" in log.read_text("utf-8") and "odd" in log.read_text("utf-8")


def test_a_missing_part_of_the_pack_is_unforeseen_too(command, capsys):
    def run(args, console):
        raise ModuleNotFoundError("No module named 'nvfp4_video.gone'", name="nvfp4_video.gone")

    assert main(command(run)) == 2
    assert "fault of the pack" in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "stopped; nothing was written"])
def test_an_interrupted_command_says_so_in_json(said, command, capsys):
    def run(args, console):
        raise KeyboardInterrupt(said)

    assert main([*command(run), "--json"]) == cli.INTERRUPTED == 130
    assert json.loads(capsys.readouterr().out)["error"] == (said or "interrupted; unfinished files were removed")


def test_wrong_usage_is_json_too_where_that_was_asked_for(command, capsys):
    words = command(lambda args, console: ({}, True))
    assert main([*words, "--json", "--nonsense"]) == 2
    said = capsys.readouterr()
    assert "--nonsense" in json.loads(said.out)["error"] and "usage: " in said.err


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_codes_are_0_for_good_and_1_for_wrong(ok, code, command):
    assert main(command(lambda args, console: ({}, ok))) == code


def test_a_command_error_is_2(command):
    def run(args, console):
        raise CommandError("no")

    assert main(command(run)) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "a", "b", "--wor", "3"],
        ["inspect", "a", "--jso"],
        ["quantize", "a", "b", "--over"],
        ["repair", "a", "b", "--over"],
        ["split", "a", "b", "--vae", "x"],
        ["plan", "a", "--wid", "64"],
        ["bench", "--synth"],
        ["compare", "a", "b", "--common"],
        ["sharpness", "a", "--ref", "3"],
        ["doctor", "--rel", "x"],
        ["demo", "--kee", "x"],
    ],
)
def test_no_command_takes_an_abbreviated_option(words, capsys):
    assert main(words) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        *((["plan", "a", f"--{name}", value], name) for name in ("fps", "memory", "text-encoder") for value in
          ("nan", "-1", "inf", "0", "x")),
        *((["plan", "a", f"--{name}", value], name) for name in ("width", "frames") for value in ("-1", "0", "1.5")),
        (["verify", "a", "b", "--worst", "-1"], "worst"),
        (["quantize", "a", "b", "--keep-first-last", "-1"], "keep-first-last"),
        (["bench", "--limit", "nan"], "limit"),
        (["bench", "--seed", "-1"], "seed"),
        (["bench", "--reps", "0"], "reps"),
        (["sharpness", "a", "--reference", "nan"], "reference"),
        (["sharpness", "a", "--reference", "-3"], "reference"),
        (["sharpness", "a", "--max-frames", "0"], "max-frames"),
    ],
)  # fmt: skip
def test_numbers_that_are_no_amounts_are_refused_by_name(words, option, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"--{option}" in said and "expected" in said


def test_amounts_are_read_as_numbers():
    assert (amount("0.5"), count("0"), positive_count("12")) == (0.5, 0, 12)
