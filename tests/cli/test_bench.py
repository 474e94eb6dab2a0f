# SPDX-License-Identifier: Apache-2.0
"""The `bench` command over faked rows: arguments, turns, failures, and what the table, JSON and picture say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nvfp4_video.checkpoint.file.header import read_header
from nvfp4_video.cli import bench_child, main
from nvfp4_video.measure import bench, clip_quality, ltx
from nvfp4_video.samples import released
from nvfp4_video.tests.support.quantize_sources import save, tiny
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "fake_bench_row.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The scaled-down model in three formats, and its VAEs."""
    return released.write_all(tmp_path_factory.mktemp("files"), small=True)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch) -> Path:
    """Rows are fakes; the file that notes which ran, with their process ids."""
    path = tmp_path / "calls"
    monkeypatch.setenv("BENCH_CALLS", str(path))
    monkeypatch.setattr(bench_child, "COMMAND", (sys.executable, str(FAKE)))
    return path


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "sd.py").touch()
    return folder


@pytest.fixture
def run(files, comfyui: Path, tmp_path: Path):
    """``run(words...)`` with the three files and a result folder -> exit code, folder."""

    def call(*words: object, kinds: tuple[str, ...] = ("bf16", "fp8", "nvfp4")) -> tuple[int, Path]:
        out = tmp_path / "out"
        named = [word for kind in kinds for word in (f"--{kind}", files[kind])]
        named += ["--vae", files["video_vae"], "--audio-vae", files["audio_vae"]]
        return main(["bench", *map(str, (*named, "--comfyui", comfyui, "--out", out, *words))]), out

    return call


def stored(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text("utf-8"))


def by_key(result: dict) -> dict[str, dict]:
    return {row["key"]: row for row in result["rows"]}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--size", "100x64"], "multiples of 32"),
        (["--frames", "120"], "8k + 1"),
        (["--steps", "9"], "8 distilled sigmas"),
        (["--steps", "1"], "expected 2 or more"),
        (["--reps", "0"], "expected a whole number, 1 or more"),
        (["--rows", "bf16,fp16"], "--rows names fp16"),
        (["--rows", ""], "--rows names nothing"),
        (["--small"], "--synthetic"),
        (["--layers", "12"], "--synthetic"),
    ],
)
def test_arguments_that_cannot_be_met_end_with_2_and_start_nothing(words, reason, run, calls, capsys):
    code, out = run(*words)
    assert code == 2
    assert reason in capsys.readouterr().err
    assert not calls.exists() and not (out.exists() and any(out.iterdir()))


def test_files_that_cannot_be_used_end_with_2(files, comfyui, tmp_path, calls, capsys):
    here = ["--comfyui", str(comfyui), "--out", str(tmp_path / "out")]
    text = tmp_path / "text.safetensors"
    save_file({"text": torch.zeros(1, 8, 100)}, text)
    poor = save(tmp_path / "poor.safetensors", tiny())  # its `config` says next to nothing
    for words, reason in (
        ([], "--bf16 or --nvfp4"),
        (["--fp8", files["fp8"]], "--bf16 or --nvfp4"),
        (["--bf16", files["video_vae"]], "this is a VAE"),
        (["--bf16", files["bf16"], "--vae", files["audio_vae"]], "no full video VAE"),
        (["--bf16", files["bf16"], "--rows", "nvfp4"], "the row nvfp4 needs a file"),
        (["--bf16", files["bf16"], "--conditioning", text], "expected one of (1, tokens, 192)"),
        (["--bf16", tmp_path / "absent.safetensors"], "does not exist"),
        (["--bf16", files["bf16"], "--scratch", tmp_path / "absent"], "is not a folder that is there"),
        (["--bf16", poor, "--conditioning", text], "poor.safetensors: its `config` gives the transformer no"),
    ):
        assert main(["bench", *here, *map(str, words)]) == 2, words
        assert reason in capsys.readouterr().err
    assert main(["bench", "--bf16", str(files["bf16"]), "--comfyui", str(tmp_path), "--out", here[3]]) == 2
    assert "is not a ComfyUI" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["bench", *here[:2], "--bf16", str(files["bf16"]), "--out", str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert not calls.exists()


def test_where_no_row_told_of_the_machine_none_is_named():
    assert "CPU" not in bench.machine_text({"facts": {}, "settings": {"cpu": False}, "comfyui": None})


def test_rows_take_turns_and_a_mode_that_cannot_run_is_a_row_with_its_reason(run, calls, capsys):
    code, out = run("--reps", "2")
    assert code == 0
    order = [line.split()[0] for line in calls.read_text().splitlines()]
    assert order == ["bf16", "fp8", "nvfp4", "ours", "ours", "nvfp4", "fp8", "bf16"]
    rows = by_key(stored(out))
    assert list(rows) == list(bench.ROWS)
    assert [row["status"] for row in rows.values()] == ["ok"] * 4 + ["refused"] * 2
    assert rows["ours-fp8"]["reason"] == "FP8 needs another GPU"
    assert "NVFP4, ours, fp4: refused, FP4 needs another GPU" in capsys.readouterr().out.replace("\n", " ")


def test_the_result_holds_size_times_memory_and_quality(run, files, calls):
    code, out = run("--reps", "3", "--warm", "2")
    assert code == 0
    result = stored(out)
    rows = by_key(result)
    assert result["complete"] and result["reference"] == "bf16" and result["comfyui"] == "0.0.0"
    assert rows["fp8"]["file_bytes"] == files["fp8"].stat().st_size
    summary = rows["nvfp4"]["summary"]
    assert summary["repetitions"] == 3 and summary["repeats_itself"]
    assert summary["step_s"] == {"median": 0.7, "lowest": 0.7, "highest": 0.7}
    assert summary["warm_clip_s"]["median"] == pytest.approx(8 * 0.7 + 1.25)
    assert summary["cold_clip_s"]["median"] == pytest.approx(2.5 + 8 * 0.7 + 1.25)
    assert (summary["peak_gpu_gb"], summary["peak_host_gb"]) == (18.0, 9.0)
    assert rows["bf16"]["quality"] is None
    for key, error in (("fp8", 0.01), ("nvfp4", 0.1), ("ours-bf16", 0.1)):
        quality = rows[key]["quality"]
        assert [quality[f"{part}_error"] for part in ("video", "audio")] == pytest.approx([error] * 2, rel=1e-4)
        assert quality["sound_error"] == pytest.approx(error, rel=1e-4)
        assert 0.9 < quality["ssim"] < 1 and quality["psnr_db"] > 20 and quality["sharpness_ratio"] > 1
    assert [rows[key]["same_latents_as"] for key in ("fp8", "nvfp4", "ours-bf16")] == [None, None, "nvfp4"]


def test_the_markdown_and_the_picture_show_every_row(run, calls):
    _, out = run("--reps", "1")
    text = (out / "bench.md").read_text("utf-8")
    for kind in bench.ROWS.values():
        assert f"| {kind.label} |" in text
    assert "| NVFP4, ours, fp4 | 3.92 MB | - | refused |" in text
    assert "| BF16, stock | reference |" in text
    assert "Errors are relative to BF16, stock" in text and "a GPU, torch 2.0, ComfyUI 0.0.0" in text
    import cv2

    picture = cv2.imdecode(np.frombuffer((out / "bench.png").read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[1] == 1800
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)[:, ::-1].tolist()}
    from nvfp4_video.draw.bench import COLOURS

    assert set(COLOURS.values()) <= colours


@pytest.mark.parametrize(("trouble", "reason"), [("error", "out of GPU memory"), ("kill", "ran out of memory")])
def test_a_row_that_fails_stops_no_other_and_is_shown_with_its_reason(trouble, reason, run, calls, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_FAKE", json.dumps({"fp8": trouble}))
    code, out = run("--reps", "2")
    assert code == 1
    rows = by_key(stored(out))
    assert rows["fp8"]["status"] == "failed" and reason in rows["fp8"]["reason"]
    assert [rows[key]["status"] for key in ("bf16", "nvfp4", "ours-bf16")] == ["ok"] * 3
    assert calls.read_text().count("fp8 ") == 1, "a row that failed is not tried again"
    assert "| FP8, stock | 4.86 MB | - | failed |" in (out / "bench.md").read_text("utf-8")
    assert "something of ComfyUI" in (out / "logs" / "fp8.log").read_text("utf-8")


def test_the_first_row_that_runs_is_the_reference(run, calls, monkeypatch):
    monkeypatch.setenv("BENCH_FAKE", json.dumps({"bf16": "error"}))
    _, out = run("--reps", "1")
    result = stored(out)
    assert result["reference"] == "fp8"
    assert by_key(result)["nvfp4"]["quality"]["video_error"] == pytest.approx(1.1 / 1.01 - 1, rel=1e-4)
    assert "relative to FP8, stock" in (out / "bench.md").read_text("utf-8")


def test_if_all_rows_fail_there_is_a_table_of_failures_and_exit_1(run, calls, monkeypatch):
    monkeypatch.setenv("BENCH_FAKE", json.dumps(dict.fromkeys(("bf16", "ours", "nvfp4"), "error")))
    code, out = run("--reps", "1", kinds=("bf16", "nvfp4"))
    assert code == 1
    assert stored(out)["reference"] is None and (out / "bench.png").is_file()


def test_a_limit_ends_the_repetitions_and_says_so(run, calls):
    _, out = run("--reps", "3", "--limit", "0.001", "--rows", "nvfp4")
    result = stored(out)
    assert len(result["rows"][0]["runs"]) == 1
    assert any("after 1 of 3 repetitions" in note for note in result["notes"])


def test_an_interrupt_leaves_no_process_and_no_unfinished_file(run, calls, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_FAKE", json.dumps({"fp8": "hang"}))
    from nvfp4_video.cli.console import Progress

    def stop(self, done: int, note: str = "") -> None:
        if "FP8, stock, 1 of 3: at work" in note:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", stop)
    started = time.monotonic()
    code, out = run()
    assert (code, time.monotonic() - started < 60) == (130, True)
    assert "the rows measured so far" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "logs"]
    result = stored(out)
    assert not result["complete"] and [row["status"] for row in result["rows"]][:2] == ["ok", "waiting"]
    for line in calls.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[1]), 0)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signal")
def test_a_request_to_end_leaves_no_made_files(run, calls, monkeypatch):
    monkeypatch.setenv("BENCH_FAKE", json.dumps({"bf16": "hang"}))
    from nvfp4_video.cli.console import Progress

    def stop(self, done: int, note: str = "") -> None:
        if "at work" in note:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", stop)
    before = signal.getsignal(signal.SIGTERM)
    code, out = run()
    assert (code, list(out.iterdir())) == (130, [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_row_s_process_ends_with_its_parent():
    code = f"""
import sys, threading, time, types
package = types.ModuleType("nvfp4_video")
package.__path__ = [{str(ROOT)!r}]
sys.modules["nvfp4_video"] = package
from nvfp4_video.host.bench.row import _end_with_parent
threading.Thread(target=_end_with_parent, daemon=True).start()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=30)
    assert done.returncode == 3


def test_a_row_s_process_leaves_the_import_of_torch_to_comfyui():
    code = f"""
import sys, types
package = types.ModuleType("nvfp4_video")
package.__path__ = [{str(ROOT)!r}]
sys.modules["nvfp4_video"] = package
import nvfp4_video.cli.bench, nvfp4_video.host.bench.row
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_a_vae_only_latents_are_compared_and_the_result_says_so(files, comfyui, tmp_path, calls):
    words = ["--nvfp4", files["nvfp4"], "--comfyui", comfyui, "--out", tmp_path / "out", "--reps", "1"]
    assert main(["bench", *map(str, words)]) == 0
    assert bench.NO_VAE_NOTE in stored(tmp_path / "out")["notes"]


def test_a_full_checkpoint_is_a_model_and_brings_its_vaes(files, comfyui, tmp_path, calls):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(files["bf16"]).items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in load_file(files["video_vae"]).items()}
    headers = [read_header(files[name]).metadata["config"] for name in ("video_vae", "bf16")]
    config = json.dumps(json.loads(headers[0]) | json.loads(headers[1]))
    whole = tmp_path / "whole-bf16.safetensors"
    save_file(tensors | load_file(files["audio_vae"]), whole, {"config": config})
    words = ["--bf16", whole, "--nvfp4", files["nvfp4"], "--comfyui", comfyui, "--out", tmp_path / "out", "--reps", "1"]
    assert main(["bench", *map(str, words)]) == 0
    result = stored(tmp_path / "out")
    assert result["settings"]["video_vae"] == result["settings"]["audio_vae"] == whole.name
    bf16, nvfp4 = (by_key(result)[key] for key in ("bf16", "nvfp4"))
    assert nvfp4["model_bytes"] < bf16["model_bytes"] < 0.5 * bf16["file_bytes"]
    assert f"{whole.name} holds more than the model" in (tmp_path / "out" / "bench.md").read_text("utf-8")


def test_without_opencv_psnr_is_left(tmp_path, monkeypatch):
    from nvfp4_video.tests.support import fake_bench_row

    for name, factor in (("a", 1.0), ("b", 1.1)):
        fake_bench_row.save(tmp_path / name, factor)
    full, _ = clip_quality.clip_quality(tmp_path / "a", tmp_path / "b")
    monkeypatch.setitem(sys.modules, "cv2", None)
    found, notes = clip_quality.clip_quality(tmp_path / "a", tmp_path / "b")
    assert found["psnr_db"] == pytest.approx(full["psnr_db"], rel=1e-5) and "ssim" not in found
    assert notes == [clip_quality.NO_OPENCV]


def test_latents_with_nan_have_no_error_number_but_a_note(tmp_path):
    from nvfp4_video.tests.support import fake_bench_row

    for name, factor in (("a", 1.0), ("b", 1.1)):
        fake_bench_row.save(tmp_path / name, factor)
    np.save(tmp_path / "b" / "video.npy", np.full((1, 8, 2, 4), np.nan, np.float32))
    found, notes = clip_quality.clip_quality(tmp_path / "a", tmp_path / "b")
    assert found["video_error"] is None and "NaN" in notes[0]


def test_the_three_files_hold_one_model_and_quantise_the_same_layers(files):
    from nvfp4_video.checkpoint.file.container import TensorReader
    from nvfp4_video.checkpoint.identify.dialects import detect
    from nvfp4_video.kernels.format import PackedWeight
    from nvfp4_video.kernels.reference import dequantize

    layers = {*detect(read_header(files["nvfp4"])).nvfp4}
    stored_fp8 = read_header(files["fp8"]).tensors
    assert {key.removesuffix(".weight") for key, info in stored_fp8.items() if info.dtype == "F8_E4M3"} == layers
    assert len(layers) > 20
    with TensorReader(files["bf16"]) as bf16, TensorReader(files["fp8"]) as fp8, TensorReader(files["nvfp4"]) as four:
        for layer in sorted(layers)[:3]:
            original = bf16.get(f"{layer}.weight").float()
            eight = fp8.get(f"{layer}.weight").float() * fp8.get(f"{layer}.weight_scale")
            parts = [four.get(f"{layer}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")]
            decoded = dequantize(PackedWeight(*parts, tuple(original.shape)), torch.float32)
            errors = [float((found - original).norm() / original.norm()) for found in (eight, decoded)]
            assert errors[0] < 0.03 < errors[1] < 0.1


def test_the_vaes_are_recognised_as_ltx_2_3_s_own(files):
    from nvfp4_video.checkpoint.identify.vae_signatures import find_vaes, refusal

    (video,) = find_vaes(read_header(files["video_vae"]))
    (audio,) = find_vaes(read_header(files["audio_vae"]))
    assert video.final_decoder and refusal(video) is None
    assert refusal(audio, audio=True) is None


def test_weights_depend_on_their_names_alone(tmp_path):
    one = released.random_weight("a.weight", (4, 8))
    assert torch.equal(one, released.random_weight("a.weight", [4, 8]))
    assert not torch.equal(one, released.random_weight("b.weight", (4, 8)))
    assert torch.equal(released.random_weight("norm.weight", (4,)), torch.ones(4, dtype=torch.bfloat16))


def test_fewer_steps_are_spread_over_the_schedule_and_end_in_a_finished_clip():
    assert ltx.whole_schedule(8) == ltx.SIGMAS
    assert ltx.whole_schedule(2) == (1.0, 0.975, 0.0)


def test_a_first_clip_unlike_the_later_ones_is_told_from_latents_that_do_not_repeat():
    def runs(*digests: str) -> list[dict]:
        clip = {"sampling_s": 1.0, "steps_s": [0.1], "decode_s": None, "sound_s": None, "peak_gpu_gb": 1.0}
        clip |= {"peak_torch_gb": 1.0, "sampling_gpu_gb": 1.0, "peak_host_gb": 1.0}
        clips = [clip | {"latents_sha256": digest} for digest in digests]
        return [{"load_s": 1.0, "vae_load_s": 0.0, "host_peak_gb": 1.0, "clips": clips}] * 2

    def facts(found: dict) -> tuple[bool, bool]:
        return found["repeats_itself"], found["cold_differs"]

    assert facts(bench.summarize(runs("a", "a", "a"))) == (True, False)
    assert facts(bench.summarize(runs("a", "b", "b"))) == (True, True)
    assert facts(bench.summarize(runs("a", "b", "c"))) == (False, True)
