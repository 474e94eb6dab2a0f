# SPDX-License-Identifier: Apache-2.0
"""What a command is given and cannot be read ends in one line: what was found, where, what was expected, what to do.

Without the right to read, since root has it to every file, is made by open() that refuses; the rest is real.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from nvfp4_video.cli import doctor, main
from nvfp4_video.host.guard.limit import within
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.guard_prompts import clip
from nvfp4_video.tests.support.quantize_sources import save, tiny

PATIENCE = 60  # seconds after which a test gives up on what should never wait
COMMANDS = {
    "inspect": ["inspect", "FILE"],
    "plan": ["plan", "FILE", "--gpu", "RTX 5090"],
    "quantize": ["quantize", "FILE", "NEW", "--device", "cpu"],
    "quantize, estimated": ["quantize", "FILE", "NEW", "--estimate", "--device", "cpu"],
    "quantize, calibration": ["quantize", "SOUND", "NEW", "--device", "cpu", "--calibration", "FILE"],
    "quantize, LoRA": ["quantize", "SOUND", "NEW", "--device", "cpu", "--lora", "FILE"],
    "quantize, config": ["quantize", "SOUND", "NEW", "--device", "cpu", "--config-from", "FILE"],
    "verify": ["verify", "FILE", "SOUND", "--device", "cpu"],
    "verify, source": ["verify", "SOUND", "FILE", "--device", "cpu"],
    "verify, calibration": ["verify", "MADE", "SOUND", "--device", "cpu", "--calibration", "FILE"],
    "split": ["split", "FILE", "FOLDER"],
    "repair": ["repair", "FILE", "NEW"],
    "doctor": ["doctor", "PROMPT"],
    "doctor, release": ["doctor", "--release", "FILE"],
}


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Whoever opens this file has no right to."""

    def unless_it(real: Callable) -> Callable:
        def opened(name, *arguments, **options):
            if isinstance(name, (str, bytes, os.PathLike)) and os.fsdecode(name) == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(name, *arguments, **options)

        return opened

    for module in (os, io, builtins):
        monkeypatch.setattr(module, "open", unless_it(module.open))


def no_right(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(content)
    refuse(monkeypatch, path)


def folder(path: Path, *_: object) -> None:
    path.mkdir()


def dangling(path: Path, *_: object) -> None:
    try:
        path.symlink_to(path.with_name("gone"))
    except OSError:
        pytest.skip("no symbolic links here")


def pipe(path: Path, *_: object) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes")
    os.mkfifo(path)


WAYS = {
    no_right: ("cannot be read (", "Permission denied", "rights"),
    folder: ("this is a folder", "expected a plain file", "choose the file itself"),
    dangling: ("this is a link to a file that does not exist", "check the name"),
    pipe: ("this is not a regular file", "expected a plain file", "choose the file itself"),
}

RELEASE = {
    no_right: ("cannot be opened (Permission denied)", "expected a file that this user may read", "rights"),
    folder: ("is not a plain file", "name the model's file"),
    dangling: ("cannot be opened (No such file or directory)", "check its name"),
    pipe: ("is not a plain file", "name the model's file"),
}


def place(tmp_path: Path, argv: list[str]) -> tuple[list[str], Path]:
    """-> the command with its paths, and that of the file in question."""
    sound = save(tmp_path / "sound.safetensors", tiny(blocks=1))
    names = {"FILE": "x.safetensors", "PROMPT": "prompt.json", "SOUND": sound.name, "NEW": "new.safetensors"}
    paths = {word: str(tmp_path / name) for word, name in names.items()} | {"FOLDER": str(tmp_path / "folder")}
    if "MADE" in argv:
        paths["MADE"] = str(tmp_path / "made.safetensors")
        assert main(["quantize", paths["SOUND"], paths["MADE"], "--fast", "--device", "cpu"]) == 0
    asked = next(paths[word] for word in argv if word in ("FILE", "PROMPT"))
    return [paths.get(word, word) for word in argv], Path(asked)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(
    argv, way, tmp_path, monkeypatch, capsys, stub_comfy
):
    monkeypatch.setattr(doctor, "_connect", lambda: True)
    argv, path = place(tmp_path, argv)
    capsys.readouterr()
    content = json.dumps(clip()).encode() if path.suffix == ".json" else (tmp_path / "sound.safetensors").read_bytes()
    way(path, content, monkeypatch)
    assert within(PATIENCE, lambda: main(argv)) == 2
    shown = capsys.readouterr()
    text = " ".join(shown.err.split())
    assert text.startswith("error: ") and path.name in text
    assert "fault of the pack" not in text and "Traceback" not in shown.err + shown.out
    for words in RELEASE[way] if "--release" in argv else WAYS[way]:
        assert words in text
    assert not (tmp_path / "new.safetensors").exists()


SIDECAR = "hf_quant_config.json"
ASKS = {"inspect": ["inspect", "FILE"], "verify": ["verify", "FILE", "SOUND", "--device", "cpu"]}


@pytest.fixture
def declared_beside(tmp_path) -> Path:
    """A checkpoint whose dialect a file beside it declares -> that file."""
    synthetic.write(tmp_path / "x.safetensors", "modelopt", *synthetic.small_ltx23(), sidecar=True)
    return tmp_path / SIDECAR


@pytest.mark.parametrize("argv", ASKS.values(), ids=ASKS)
def test_a_sidecar_without_the_right_to_read_it_is_not_passed_over(
    argv, declared_beside, tmp_path, monkeypatch, capsys
):
    argv, _ = place(tmp_path, argv)
    refuse(monkeypatch, declared_beside)
    assert main(argv) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert f"{SIDECAR}: it cannot be read (" in text and text.endswith("check rights and disk")


@pytest.mark.parametrize("way", [folder, dangling, pipe], ids=lambda way: way.__name__)
@pytest.mark.parametrize("argv", ASKS.values(), ids=ASKS)
def test_what_is_no_file_in_a_sidecar_s_place_is_as_none(argv, way, declared_beside, tmp_path, capsys):
    argv, _ = place(tmp_path, argv)
    declared_beside.unlink()
    without = main(argv), capsys.readouterr()
    way(declared_beside)
    assert (within(PATIENCE, lambda: main(argv)), capsys.readouterr()) == without
    assert "set --dialect" in " ".join(without[1].out.split() + without[1].err.split())


def test_what_needs_no_sidecar_does_not_ask_for_it(declared_beside, tmp_path, monkeypatch, capsys):
    argv, _ = place(tmp_path, ["plan", "FILE", "--gpu", "RTX 5090"])
    refuse(monkeypatch, declared_beside)
    assert main(argv) == 0
