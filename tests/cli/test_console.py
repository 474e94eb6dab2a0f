# SPDX-License-Identifier: Apache-2.0
"""What the commands write to a screen: tables within its width, progress that wipes itself, silence where asked."""

from __future__ import annotations

import io

from nvfp4_video.cli.console import Console, Progress, size


def test_a_table_wraps_its_last_column_and_stays_within_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    Console().table(["name", "text"], [("a", "word " * 20), ("longer name", "short")], "><")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert lines[1].startswith("            a  word word")
    assert lines[2].startswith(" " * 15 + "word"), "a wrapped cell stays in its column"


def test_a_name_that_is_too_long_for_its_column_stands_above_its_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "transformer_blocks.2.video_to_audio_attn"
    Console().table(["layer", "error", "allowed"], [(name, "0.08", "0.11")], "<>>", indent=0)
    assert capsys.readouterr().out.splitlines() == ["layer", "  error  allowed", name, "   0.08     0.11"]
    Console().table(["layer", "what it is", "error"], [(name, "an attention of sound", "0.08")], "<<>", indent=0)
    below = capsys.readouterr().out.splitlines()[1::2]
    assert below == ["  what it is             error", "  an attention of sound   0.08"], "the rest in its columns"


def test_headings_wrap_before_numbers_leave_the_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "18")
    Console().table(["video latents", "audio latents", "s"], [("0.00318", "0.00440", "1")], ">>>", indent=0)
    assert capsys.readouterr().out.splitlines() == [
        "  video    audio  s", "latents  latents", "0.00318  0.00440  1",
    ]  # fmt: skip


def test_a_quiet_console_writes_nothing_but_errors(capsys):
    console = Console(quiet=True)
    console.say("text")
    console.title("title")
    console.table(["a"], [("b",)], "<")
    console.error("a\nb")
    assert capsys.readouterr() == ("", "error: a b\n")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_shows_bar_amount_and_note_and_wipes_itself():
    terminal = Terminal()
    with Progress(terminal, "Copying", 4_000_000, size) as progress:
        progress.update(1_000_000, "a.safetensors")
        line = progress.line()
    assert line.startswith("Copying  " + "━" * 6 + "─" * 18 + "  1.00 MB / 4.00 MB  a.safetensors  ")
    assert "/s" in line
    assert terminal.getvalue().endswith("\r\033[K")


def test_progress_keeps_its_numbers_where_there_is_too_little_room(monkeypatch):
    title = "Quantizing to a-model-with-a-rather-long-name-for-a-terminal_nvfp4.safetensors"
    progress = Progress(io.StringIO(), title, 29_140_000_000, size)
    progress.update(12_340_000_000, "transformer_blocks.17.audio_to_video_attn.to_out.0.weight")
    progress._started -= 60
    line = progress.line(80)
    assert len(line) <= 80
    assert line.startswith("Quantizing to a-") and "12.34 GB / 29.14 GB" in line
    assert line.endswith(" s left") and " MB/s  60.0 s  " in line
    assert "==========-----" in progress.line(), "with room enough there is a bar"


def test_a_line_with_columns_wraps_below_its_last_column_and_keeps_words_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    Console().say("format   bound\nNVFP4    math-bound in Linears and attention-bound")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "NVFP4    math-bound in Linears and",
        "         attention-bound",
    ]
    Console().say("words and https://example.org/a-very-long-address-of-a-file.safetensors")
    assert "https://example.org/a-very-long-address-of-a-file.safetensors" in capsys.readouterr().out


def test_progress_of_a_short_step_writes_nothing_into_a_log():
    log = io.StringIO()
    with Progress(log, "Copying", 2, str) as progress:
        progress.update(2)
    assert log.getvalue() == ""
