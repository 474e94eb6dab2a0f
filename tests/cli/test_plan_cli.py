# SPDX-License-Identifier: Apache-2.0
"""The `plan` command: text, JSON, picture, exit codes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.cli import main
from nvfp4_video.tests.support import full_size
from PIL import Image


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plan")
    return {
        stored: full_size.write(folder / f"{stored.lower()}.safetensors", full_size.checkpoint(stored))
        for stored in ("FP8", "NVFP4")
    }


def record(capsys, *words: object) -> tuple[int, dict]:
    code = main(["plan", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_article_s_question_is_answered_in_text_and_json(files, capsys):
    assert main(["plan", str(files["NVFP4"]), "--gpu", "RTX 5090"]) == 0
    text = capsys.readouterr().out
    assert "fits all at once" in text and "launch flags: none." in text
    assert "what NVFP4 changes here:" in text
    code, found = record(capsys, files["FP8"], "--gpu", "5090")
    assert (code, found["fit"]["verdict"], found["runs"]) == (0, "swapping", True)
    assert found["gpu"]["name"] == "RTX 5090" and found["picture"] is None


@pytest.mark.parametrize("words", ["--text-encoder 1e300", "--memory 1e-300", "--fps inf", "--frames " + "9" * 400])
def test_numbers_beyond_all_cards_and_clips_are_refused_and_not_reckoned_with(files, capsys, words):
    code, found = record(capsys, files["NVFP4"], "--gpu", "RTX 5090", *words.split())
    assert code == 2 and f"argument {words.split()[0]}: found '" in found["error"]


def test_the_largest_numbers_that_are_taken_give_finite_ones(files, capsys):
    most, count = "1e12", str(2**63 - 1)
    words = f"--memory {most} --bandwidth 1e-12 --tflops 1e-12 --fps 1e-12 --text-encoder {most} --frames {count}"
    code, found = record(capsys, files["NVFP4"], "--gpu", "Foo", *words.split(), "--width", count, "--height", count)
    assert code == 1 and found["fit"]["verdict"] == "too large"


def test_a_model_that_has_to_be_streamed_ends_with_1(files, capsys):
    code, found = record(capsys, files["FP8"], "--gpu", "RTX 4070 Ti SUPER")
    assert (code, found["fit"]["verdict"], found["runs"]) == (1, "partly resident", False)


def test_the_clip_and_the_compute_mode_are_taken_from_the_arguments(files, capsys):
    words = "--gpu H200 --width 1280 --height 704 --frames 121 --fps 25 --compute fp8".split()
    _, found = record(capsys, files["NVFP4"], *words)
    assert found["clip"]["tokens"] == {"video": 14_080, "audio": 121, "text": 1024, "one": 1}
    assert found["step"]["mode"] == "fp8"
    assert found["seconds"] == pytest.approx(0.671, rel=0.1)  # measured: step_fp8.json


def test_an_unlisted_gpu_is_described_by_its_numbers(files, capsys):
    words = ["--gpu", "RTX 7080", "--memory", "16", "--bandwidth", "717", "--tflops", "97"]
    _, found = record(capsys, files["NVFP4"], *words)
    assert found["gpu"]["name"] == "RTX 7080" and found["gpu"]["source"] == "values of the user"
    assert found["step"]["mode"] == "bf16"
    _, sizes_only = record(capsys, files["NVFP4"], *words[:4])
    assert sizes_only["step"] is None and sizes_only["fit"]["verdict"] == "partly resident"


def test_the_picture_is_a_png_of_the_plan(files, capsys, tmp_path):
    target = tmp_path / "plan.png"
    _, found = record(capsys, files["NVFP4"], "--gpu", "GB10", "--picture", target)
    assert found["picture"] == str(target)
    with Image.open(target) as picture:
        assert picture.size == (1600, 900)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "RTX 9999"], "'RTX 9999' is not in the table of GPUs; choose a card by its name (GB10, RTX 5090"),
        (["--gpu", "RTX 3090", "--compute", "fp4"], "fp4 compute: needs compute capability 10.0, RTX 3090's is 8.6"),
        (["--gpu", "GB10", "--width", "8"], "8x512, 121 frames at 24 fps is no clip"),
        (["--gpu", "GB10", "--picture", "plan.jpg"], "does not end in .png"),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_2(files, capsys, words, message):
    assert main(["plan", str(files["NVFP4"]), *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_without_a_gpu_the_command_says_what_to_name(files, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", str(files["NVFP4"])]) == 2
    assert "no CUDA GPU was found" in capsys.readouterr().err


def test_the_gpus_can_be_listed(files, capsys):
    assert main(["plan", str(files["NVFP4"]), "--gpu", "list"]) == 0
    shown = capsys.readouterr().out
    assert "RTX 4090 Laptop" in shown and "H100 80 GB" in shown and shown.count("\n") > 120


def test_a_missing_and_a_damaged_file_are_errors_too(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "none.safetensors"), "--gpu", "GB10"]) == 2
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    assert main(["plan", str(tmp_path / "bad.safetensors"), "--gpu", "GB10"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_message_of_the_pack_names_flags_and_commands_here(files, capsys):
    assert main(["plan", str(files["NVFP4"]), "--gpu", "RTX 7080"]) == 2
    said = capsys.readouterr().err
    assert "set --memory to what its box says" in said and "memory_gib" not in said
    assert main(["inspect", str(files["NVFP4"])]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "set --dialect (comfy" in said
    assert main(["inspect", str(files["FP8"])]) == 1
    assert "(`repair` adds them)" in " ".join(capsys.readouterr().out.split())


def test_a_name_of_two_cards_is_said_in_text_and_json(files, capsys):
    main(["plan", str(files["NVFP4"]), "--gpu", "RTX 3060"])
    text = " ".join(capsys.readouterr().out.split())
    said = "RTX 3060 is the name of RTX 3060 12 GB, RTX 3060 8 GB: these are the numbers of RTX 3060 8 GB."
    assert f"{said} Name the one that you mean, or set --memory" in text
    _, found = record(capsys, files["NVFP4"], "--gpu", "RTX 3060")
    assert found["gpu"]["choice"].startswith(said) and found["notes"][0] == found["gpu"]["choice"]
    main(["plan", str(files["NVFP4"]), "--gpu", "RTX 3060", "--memory", "12"])
    assert "on RTX 3060 12 GB" in (text := capsys.readouterr().out) and "is the name of" not in text


def test_the_cards_are_listed_without_a_file_and_a_plan_without_one_is_refused(capsys):
    assert main(["plan", "--gpu", "list"]) == 0
    assert "RTX 5090\n" in capsys.readouterr().out
    assert main(["plan", "--gpu", "RTX 5090"]) == 2
    assert "no file was named" in capsys.readouterr().err
