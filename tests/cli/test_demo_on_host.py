# SPDX-License-Identifier: Apache-2.0
"""``demo`` with a real ComfyUI: every dialect samples alike, and a film is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nvfp4_video.measure.media import read_audio, read_frames

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.host
def test_the_demo_samples_every_dialect_alike_in_a_real_comfyui(tmp_path: Path):
    command = [sys.executable, str(ROOT), "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=400)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["comfyui"]
    if "skipped" in record:
        pytest.skip(record["skipped"])
    ours = [run for run in record["runs"] if run["loader"] == "NVFP4ModelLoader"]
    assert len(ours) == 6
    assert all(run["identical"] and run["finite"] for run in ours)
    assert all(f"{run['kind']}.safetensors: {record['family']}" in run["report"] for run in ours)
    clip = tmp_path / "nvfp4-demo" / "clip.mp4"
    frames, rate = read_frames(clip)
    assert frames.shape == (25, 160, 256, 3) and rate == 25
    assert len({frame.tobytes() for frame in frames}) == 25, "the picture stands still"
    assert read_audio(clip)[0].std() > 0.01, "silence"
