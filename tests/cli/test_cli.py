# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: a process of its own, exit codes, one line for each error, JSON that parses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nvfp4_video.checkpoint.file.header import read_header
from nvfp4_video.cli import COMMANDS, main
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support import full_size

ROOT = Path(__file__).resolve().parents[2]
# What the pack consists of without its tests, as ComfyUI's registry hands it out.
FOLDERS = ("checkpoint", "cli", "draw", "host", "kernels", "measure", "nodes", "samples")
PUBLISHED = ("__init__.py", "__main__.py", *FOLDERS)


def run(*words: object, pack: Path = ROOT, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """``python <pack> <words>`` without a ComfyUI."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COMFYUI_", "PYTHON"))}
    env["COLUMNS"] = "80"
    command = [sys.executable, str(pack), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8", timeout=240)


@pytest.fixture(scope="module")
def renamed_pack(tmp_path_factory) -> Path:
    """The published part of the pack under a name that is no Python identifier."""
    pack = tmp_path_factory.mktemp("custom_nodes") / "my nodes, nvfp4-video (2)"
    pack.mkdir()
    for name in PUBLISHED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, pack / name)
    return pack


@pytest.fixture(scope="module")
def demo(renamed_pack: Path, tmp_path_factory) -> tuple[dict, Path]:
    """The record of one demo run from another folder, and the files it kept."""
    kept = tmp_path_factory.mktemp("demo") / "kept"
    done = run("demo", "--json", "--keep", kept, pack=renamed_pack, cwd=kept.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), kept


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """sharp: noise smoothed a little, with detail on every scale; soft: the same, reduced to a quarter and enlarged."""
    import cv2

    random = np.random.default_rng(7)
    sharp = np.zeros((256, 256, 3), np.float32)
    for scale in (1, 2, 4, 8):
        octave = random.normal(0, 18, (256 // scale, 256 // scale, 3)).astype(np.float32)
        sharp += cv2.resize(octave, (256, 256), interpolation=cv2.INTER_CUBIC)
    sharp = (sharp + 128).clip(0, 255).astype(np.uint8)
    small = cv2.resize(sharp, (64, 64), interpolation=cv2.INTER_AREA)
    paths = {name: tmp_path / f"{name}.png" for name in ("sharp", "soft")}
    cv2.imwrite(str(paths["sharp"]), sharp)
    cv2.imwrite(str(paths["soft"]), cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC))
    return paths


def test_the_demo_finds_the_same_weights_in_every_dialect(demo):
    record, _ = demo
    assert [file["kind"] for file in record["files"]] == [kind for kind in synthetic.KINDS if kind != "bf16_decoded"]
    assert all(file["identical"] for file in record["files"])
    packed = [file for file in record["files"] if file["nvfp4_layers"]]
    assert {file["dialect"] for file in packed} == {
        *("comfy", "modelopt", "modelopt_swizzled", "compressed_tensors", "lightx2v"),
    }
    assert all(0.09 < file["relative_error"] < 0.1 for file in packed)
    assert all(0.25 < file["ratio_to_bf16"] < 0.35 for file in packed)
    assert record["identical"] and record["ok"]


def test_the_demo_shows_that_a_wrong_dialect_gives_noise_and_no_error(demo):
    errors = {(row["kind"], row["read_as"]): row["relative_error"] for row in demo[0]["misreadings"]}
    assert errors["modelopt_swizzled", "modelopt_swizzled"] == pytest.approx(0.095, abs=0.002)
    assert errors["modelopt_swizzled", "comfy"] == pytest.approx(2**0.5, abs=0.05)
    assert errors["modelopt", "modelopt_swizzled"] == pytest.approx(0.35, abs=0.05)


def test_the_demo_shows_the_refusals_and_that_stating_the_dialect_helps(demo):
    undeclared, cut = demo[0]["refusals"]
    assert "set `dialect`" in undeclared["message"] and undeclared["identical_when_stated"]
    assert "cut short" in cut["message"]


def test_the_demo_quantises_verifies_and_splits_a_whole_checkpoint(demo):
    record, kept = demo
    whole = record["whole"]
    assert whole["ok"] and whole["errors"]["mse"] < 0.9 * whole["errors"]["amax"] < 0.09
    assert all((kept / name).is_file() for name in whole["files"])
    assert whole["settings"] == {"width": 768, "height": 512, "frames": 121, "audio": 126}


def test_the_demo_keeps_its_files_where_asked_and_says_why_comfyui_was_left_out(demo):
    record, kept = demo
    for file in record["files"]:
        assert (kept / f"{file['kind']}.safetensors").stat().st_size == file["file_bytes"]
    assert "No tests/ folder" in record["comfyui"]["skipped"]


def test_the_demo_does_not_write_into_a_folder_that_is_in_use(demo, capsys):
    _, kept = demo
    assert main(["demo", "--keep", str(kept)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "not an empty folder" in said.err
    assert said.out == ""


def test_the_demo_s_text_fits_80_columns_and_it_leaves_pictures(tmp_path: Path):
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("identical") >= len(synthetic.KINDS) - 2
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert {path.name for path in (tmp_path / "nvfp4-demo").iterdir()} == {"inspect.png", "verify.png"}
    (way,) = [line for line in done.stdout.splitlines() if "COMFYUI_PATH" in line]
    assert way.endswith("for a clip with sound, sampled there."), "one line says how to get a clip"
    assert "\033" not in done.stdout and "\r" not in done.stderr, "no terminal, no control codes"


def test_help_names_every_command_and_each_has_help_of_its_own(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert name in text.split() and "--json" in text


def test_every_help_fits_80_columns_and_breaks_no_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["nvfp4-video"])
    for words in ([], *([name] for name in COMMANDS)):
        assert main([*words, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80 or line.endswith("-")] == [], words


@pytest.mark.parametrize("words", [["--help"], ["inspect", "FILE"], ["plan", "FILE", "--gpu", "RTX 5090"]])
def test_help_and_what_reads_headers_come_without_loading_torch(words: list[str], tmp_path: Path):
    file = full_size.write(tmp_path / "ltx-2.3.safetensors", full_size.checkpoint("FP8"))
    words = [str(file) if word == "FILE" else word for word in words]
    code = f"""
import runpy, sys
sys.argv = ["pack", *{words!r}]
try:
    runpy.run_path({str(ROOT)!r}, run_name="__main__")
except SystemExit:
    sys.exit(7 if {"torch", "numpy"} & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("sharpness" if words == ["--help"] else "ltx-2.3") in done.stdout.lower()


def test_the_folder_is_taken_off_the_module_path(renamed_pack: Path):
    probe = renamed_pack / "cli" / "probe.py"
    probe.write_text(
        "import sys\n"
        "def probe(parser):\n"
        "    parser.set_defaults(run=lambda args, console: ({'path': sys.path}, True))\n"
    )
    init = renamed_pack / "cli" / "__init__.py"
    original = init.read_text("utf-8")
    init.write_text(original.replace("COMMANDS = {", 'COMMANDS = {\n    "probe": ("probe", "show sys.path"),'), "utf-8")
    try:
        done = run("probe", "--json", pack=renamed_pack)
    finally:
        init.write_text(original, "utf-8")
        probe.unlink()
    assert str(renamed_pack) not in json.loads(done.stdout)["path"]


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["compare", "only-one.png"], ["sharpness", "x", "--max-frames", "0"]]
)
def test_wrong_usage_exits_with_2_and_says_what_is_expected(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and "error: " in said.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sharpness", "absent.png"], "found nothing at"),
        (["compare", "absent.png", "absent.png"], "found nothing at"),
        (["inspect", "absent.safetensors"], "does not exist"),
        (["inspect", "cut.safetensors"], "cut.safetensors"),
        (["split", "cut.safetensors", "out"], "cut.safetensors"),
        (["repair", "cut.safetensors", "new.safetensors"], "cut.safetensors"),
    ],
)
def test_a_file_that_cannot_be_used_gives_exit_2_one_line_and_its_reason_as_json(
    words, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    assert main([*words, "--json"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert reason in said.err
    assert reason in json.loads(said.out)["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_an_error_of_a_process_has_no_traceback(tmp_path: Path):
    done = run("inspect", tmp_path / "nothing here.safetensors")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_sharpness_tells_sharp_from_soft_and_plots_both(pictures, tmp_path: Path, capsys):
    out = tmp_path / "plots"
    out.mkdir()
    assert main(["sharpness", str(pictures["sharp"]), "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["files"]
    assert main(["sharpness", *map(str, pictures.values()), "--json", "--picture", str(out)]) == 1
    sharp, soft = json.loads(capsys.readouterr().out)["files"]
    assert (sharp["verdict"], soft["verdict"]) == ("sharp", "preview-like")
    assert sharp["median"] == alone["median"] > 4 * soft["median"]
    for record in (sharp, soft):
        assert Path(record["picture"]).parent == out
        assert Path(record["picture"]).read_bytes().startswith(b"\x89PNG")


def test_sharpness_takes_a_number_or_a_clip_as_reference(pictures, capsys):
    path = str(pictures["soft"])
    assert main(["sharpness", path, "--json", "--reference", str(pictures["sharp"])]) == 1
    (by_clip,) = json.loads(capsys.readouterr().out)["files"]
    assert main(["sharpness", path, "--json", "--reference", str(by_clip["median"])]) == 0
    (by_number,) = json.loads(capsys.readouterr().out)["files"]
    assert by_clip["reference_ratio"] < 0.25
    assert by_number["reference_ratio"] == pytest.approx(1.0)


def test_an_input_is_never_overwritten_by_a_picture(pictures, capsys):
    before = pictures["sharp"].read_bytes()
    path = str(pictures["sharp"])
    assert main(["sharpness", path, "--picture", path]) == 2
    assert main(["compare", path, str(pictures["soft"]), "--picture", path]) == 2
    assert pictures["sharp"].read_bytes() == before
    other = ["sharpness", str(pictures["soft"]), "--reference", path, "--picture", path]
    assert main(other) == 2
    assert pictures["sharp"].read_bytes() == before
    assert capsys.readouterr().err.count("is an input") == 3


def test_no_picture_is_put_among_the_frames_that_are_measured(pictures, capsys):
    folder = pictures["sharp"].parent
    count = len([*folder.iterdir()])
    for out in (folder / "plot.png", pictures["soft"]):
        assert main(["sharpness", str(folder), "--picture", str(out)]) == 2
        assert main(["compare", str(folder), str(folder), "--picture", str(out)]) == 2
    assert capsys.readouterr().err.count("would be a frame of") == 4 and len([*folder.iterdir()]) == count


def test_one_plot_file_for_two_pictures_is_refused(pictures, tmp_path: Path, capsys):
    assert main(["sharpness", *map(str, pictures.values()), "--picture", str(tmp_path / "one.png")]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_compare_of_a_clip_with_itself_finds_no_difference(pictures, capsys):
    assert main(["compare", str(pictures["sharp"]), str(pictures["sharp"]), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["identical"] and record["psnr_db"] is None and record["ssim"] == pytest.approx(1.0)
    assert main(["compare", str(pictures["sharp"]), str(pictures["sharp"])]) == 0
    assert ": 1 frame of " in " ".join(capsys.readouterr().out.split())


def test_compare_of_a_sharp_with_a_soft_picture_exits_with_1_and_writes_card_and_numbers(pictures, tmp_path, capsys):
    card, numbers = tmp_path / "card.png", tmp_path / "numbers.json"
    words = ["compare", str(pictures["sharp"]), str(pictures["soft"]), "--picture", str(card), "--out", str(numbers)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "Sharpness ratio B / A" in said and str(card) in said
    assert card.read_bytes().startswith(b"\x89PNG")
    record = json.loads(numbers.read_text("utf-8"))
    assert record["sharpness_ratio"] < 0.5 and not record["identical"]


def test_inspect_repair_and_split_work_on_files_of_the_demo(demo, tmp_path: Path, capsys):
    kept = demo[1]
    assert main(["inspect", str(kept / "modelopt.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "modelopt"
    assert main(["inspect", str(kept / "undeclared.safetensors"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["dialect"] is None

    repaired = tmp_path / "repaired.safetensors"
    assert main(["repair", str(kept / "modelopt.safetensors"), str(repaired), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == 68
    assert main(["inspect", str(repaired), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "comfy"

    assert main(["split", str(repaired), str(tmp_path / "out"), "--only", "diffusion_model", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["files"]
    assert Path(part["path"]).name == "repaired_diffusion_model.safetensors"
    assert read_header(part["path"]).tensors.keys() == read_header(repaired).tensors.keys()


def test_an_output_in_a_folder_that_is_not_there_is_refused(demo, tmp_path: Path, capsys):
    words = ["inspect", str(demo[1] / "modelopt.safetensors"), "--picture", str(tmp_path / "typo" / "x.png")]
    assert main(words) == 2
    assert "is not there" in capsys.readouterr().err and not (tmp_path / "typo").exists()


def test_noise_ends_sharpness_with_1_and_compare_names_what_is_wrong(pictures, tmp_path, capsys):
    import cv2

    noise = tmp_path / "noise.png"
    cv2.imwrite(str(noise), np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    assert main(["sharpness", str(noise)]) == 1
    assert "Verdict: noise." in capsys.readouterr().out
    assert main(["compare", str(pictures["sharp"]), str(noise)]) == 1
    said = capsys.readouterr().out
    assert "The pictures are not the same: SSIM 0." in said and "B is noise, A is not." in said
    assert "preview" not in said
