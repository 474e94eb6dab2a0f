# SPDX-License-Identifier: Apache-2.0
"""Commands on files whose names and notes want to command the terminal: it is shown them, and obeys nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.cli import main
from nvfp4_video.tests.support.files import load
from nvfp4_video.tests.support.hostile import ESCAPE, SCRIPT, SHOWN, checkpoint
from nvfp4_video.tests.support.quantize_sources import METADATA, save, tiny

COMMANDS = {
    "inspect": ["inspect", "SOURCE"],
    "inspect, stated": ["inspect", "SOURCE", "--dialect", "comfy"],
    "plan": ["plan", "SOURCE", "--gpu", "RTX 5090"],
    "split": ["split", "SOURCE", "FOLDER"],
    "repair": ["repair", "SOURCE", "FOLDER/r.safetensors", "--dialect", "compressed_tensors"],
    "quantize": ["quantize", "SOURCE", "FOLDER/q.safetensors", "--device", "cpu"],
    "verify": ["verify", "SOURCE", "OTHER", "--device", "cpu"],
}
LICENCE = f"{SCRIPT} ![seen](http://tracker/x.png)\n\n# Heading | cell\n{ESCAPE}" + "x" * 1_000_000


def obeyed(text: str) -> set[str]:
    """The characters in an output that a terminal would not simply show."""
    return {char for char in text if not char.isprintable() and char != "\n"}


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_no_command_sends_a_name_s_control_characters_to_the_terminal(argv, tmp_path: Path, capsys):
    source = checkpoint(tmp_path / "x.safetensors", f"{ESCAPE}\nerror: forged\n")
    other = checkpoint(tmp_path / "y.safetensors", f"{ESCAPE}\nerror: forged\n")
    places = {"SOURCE": str(source), "OTHER": str(other), "FOLDER/": f"{tmp_path}/", "FOLDER": str(tmp_path)}
    for key, value in places.items():
        argv = [word.replace(key, value) for word in argv]
    code = main(argv)
    shown = capsys.readouterr()
    assert code in (0, 1, 2) and "this is a fault of the pack" not in shown.err
    assert obeyed(shown.out + shown.err) == set()
    assert "\nerror: forged" not in shown.out + shown.err
    if code == 2 and argv[0] != "plan":
        assert SHOWN in shown.err
    assert json.loads(_json(argv, capsys)), "data stay data"


def _json(argv: list[str], capsys) -> str:
    main([*argv, "--json"])
    text = capsys.readouterr().out
    assert text.isascii()
    return text


def test_a_path_is_shown_and_not_obeyed(capsys):
    assert main(["inspect", f"/nowhere/{ESCAPE}"]) == 2
    shown = capsys.readouterr().err
    assert SHOWN in shown and obeyed(shown) == set()


def test_a_card_has_the_licence_as_text_in_one_cell_and_the_file_has_it_whole(tmp_path: Path):
    source = save(tmp_path / "_x_.safetensors", tiny(), METADATA | {"license": LICENCE})
    assert main(["quantize", str(source), str(tmp_path / "t.safetensors"), "--fast", "--device", "cpu"]) == 0
    card = (tmp_path / "t.md").read_text(encoding="utf-8")
    (cell,) = [line for line in card.splitlines() if line.startswith("| licence |")]
    assert cell.startswith("| licence | &lt;img src=/fetched-by-a-name onerror=") and len(cell) < 1000
    assert not {"<img", "<script", "![", "\x1b", "\u202e"} & {
        card[at : at + n] for n in (1, 2, 4, 7) for at in range(len(card))
    }
    assert "| made from | \\_x\\_.safetensors, sha256" in card
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        "# t.safetensors", "## Before you judge it", "## The file", "## Layers: 20 in NVFP4, 9 kept as they were",
    ]  # fmt: skip
    assert load(tmp_path / "t.safetensors")
    from nvfp4_video.tests.support.files import metadata

    assert metadata(tmp_path / "t.safetensors")["license"] == LICENCE


def test_a_file_name_that_is_no_text_is_quantised_and_its_card_shows_it(tmp_path: Path):
    source, target = save(tmp_path / "s.safetensors", tiny()), tmp_path / "t\udcff.safetensors"
    try:
        target.touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    target.unlink()
    assert main(["quantize", str(source), str(target), "--fast", "--device", "cpu"]) == 0
    assert target.with_suffix(".md").read_text(encoding="utf-8").startswith("# t\\\\udcff.safetensors\n")
    assert main(["verify", str(target), str(source), "--device", "cpu"]) == 0


def test_a_picture_does_not_replace_a_folder(tmp_path: Path, capsys):
    source = checkpoint(tmp_path / "x.safetensors", "a")
    (tmp_path / "out.png").mkdir()
    assert main(["inspect", str(source), "--picture", str(tmp_path / "out.png")]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
