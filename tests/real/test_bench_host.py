# SPDX-License-Identifier: Apache-2.0
"""`bench` in a real ComfyUI on the CPU: the scaled-down model and VAEs, made on the spot, two steps, every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.measure import bench
from nvfp4_video.tests.real.harness import comfyui_path, run_in_host, small_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> tuple[dict, Path]:
    """The result of one run, and its folder."""
    if small_model(comfyui_path()) != "ltx23":
        pytest.skip("this ComfyUI cannot build the scaled-down LTX-2.3")
    out = tmp_path_factory.mktemp("bench") / "out"
    words = ["--synthetic", "--small", "--cpu", "--reps", "1", "--steps", "2", "--json", "--out", str(out)]
    done = run_in_host(ROOT, "bench", "--comfyui", str(comfyui_path()), *words, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + "".join(p.read_text("utf-8") for p in out.glob("logs/*"))[-6000:]
    return json.loads(done.stdout), out


def test_every_row_runs_or_says_why_not(rendered):
    rows = {row["key"]: row for row in rendered[0]["rows"]}
    assert list(rows) == list(bench.ROWS)
    assert [row["status"] for row in rows.values()] == ["ok"] * 4 + ["refused"] * 2
    assert all("NVIDIA" in rows[key]["reason"] for key in ("ours-fp8", "ours-fp4"))
    assert all(row["notes"] == [] for row in rows.values())


def test_ours_gives_stock_s_latents_to_the_last_bit_in_half_the_file(rendered):
    rows = {row["key"]: row for row in rendered[0]["rows"]}
    assert rows["ours-bf16"]["same_latents_as"] == "nvfp4"
    assert rows["nvfp4"]["same_latents_as"] is None and rows["fp8"]["same_latents_as"] is None
    assert all(row["summary"]["repeats_itself"] for row in rows.values() if row["summary"])
    assert rows["ours-bf16"]["runs"][0]["report"].startswith("ltx23-nvfp4.safetensors: LTX-2.3")
    sizes = [rows[key]["file_bytes"] for key in ("bf16", "fp8", "nvfp4")]
    assert sizes[0] > sizes[1] > sizes[2] > 0.25 * sizes[0]


def test_errors_are_finite_and_grow_with_the_bits_that_are_missing(rendered):
    rows = {row["key"]: row for row in rendered[0]["rows"]}
    assert rendered[0]["reference"] == "bf16" and rows["bf16"]["quality"] is None
    for error in ("video_error", "audio_error", "sound_error"):
        fp8, nvfp4, ours = (rows[key]["quality"][error] for key in ("fp8", "nvfp4", "ours-bf16"))
        assert 0 < fp8 < nvfp4 < 1
        assert ours == nvfp4
    assert rows["fp8"]["quality"]["psnr_db"] > rows["nvfp4"]["quality"]["psnr_db"] > 20
    assert 0.5 < rows["nvfp4"]["quality"]["ssim"] <= rows["fp8"]["quality"]["ssim"] <= 1


def test_times_and_memory_are_those_of_a_clip(rendered):
    for row in (row for row in rendered[0]["rows"] if row["summary"]):
        summary = row["summary"]
        assert 0 < summary["step_s"]["median"] < summary["warm_clip_s"]["median"]
        assert summary["warm_clip_s"]["median"] >= summary["sampling_s"]["median"] + summary["decode_s"]["median"]
        assert summary["cold_clip_s"]["median"] > summary["load_s"]["median"] > 0
        assert 0.1 < summary["own_host_gb"] <= summary["peak_host_gb"] < 20
        assert summary["peak_gpu_gb"] == 0


def test_nothing_is_left_but_the_result(rendered):
    result, out = rendered
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png", "logs"]
    assert json.loads((out / "bench.json").read_text("utf-8")) == result
    assert bench.RANDOM_NOTE in (out / "bench.md").read_text("utf-8")
    assert result["comfyui"] and result["complete"]
