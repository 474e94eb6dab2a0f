# SPDX-License-Identifier: Apache-2.0
"""The script in docs/scripts.md against a real ComfyUI."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from nvfp4_video.tests.real.harness import PACK, ComfyUI

PICTURE = {"width": 64, "height": 64, "batch_size": 3, "color": 255}
CLIP = {
    "1": {"class_type": "EmptyImage", "inputs": PICTURE},
    "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 24.0}},
    "3": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["2", 0], "filename_prefix": "video/example", "format": "auto", "codec": "auto"},
    },
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}},  # nothing needs it, so it is not validated
}


def run(host: ComfyUI, graph: dict, folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", (PACK / "docs" / "scripts.md").read_text("utf-8"), re.DOTALL)
    (folder / "render.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "render.py", "graph.json", *words]
    environment = os.environ | {"COMFYUI_URL": host.url}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_example_queues_a_graph_and_fetches_the_film(host: ComfyUI, tmp_path: Path):
    done = run(host, CLIP, tmp_path, "a new prompt")
    assert done.returncode == 0, done.stderr
    (name,) = done.stdout.split()
    assert (tmp_path / name).read_bytes()[4:8] == b"ftyp"
    queued = max(host.get("/history").values(), key=lambda entry: entry["prompt"][0])["prompt"][2]
    assert queued["4"]["inputs"]["text"] == "a new prompt"


def test_the_example_ends_with_the_message_of_a_node_that_fails(host: ComfyUI, tmp_path: Path):
    clips = {str(count): {"class_type": "EmptyImage", "inputs": PICTURE | {"batch_size": count}} for count in (3, 4)}
    compare = {"images_a": ["3", 0], "images_b": ["4", 0], "common_prefix": False}
    done = run(host, clips | {"5": {"class_type": "NVFP4Compare", "inputs": compare}}, tmp_path)
    assert done.returncode == 1 and "NVFP4Compare" in done.stderr and "common_prefix" in done.stderr, done.stderr


def test_the_example_ends_with_the_host_s_reason_for_a_refusal(host: ComfyUI, tmp_path: Path):
    graph = CLIP | {"1": {"class_type": "EmptyImage", "inputs": PICTURE | {"width": 0}}}
    done = run(host, graph, tmp_path)
    assert done.returncode == 1 and "width" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_example_ends_with_the_reason_where_the_host_runs_all_but_the_film(host: ComfyUI, tmp_path: Path):
    small = PICTURE | {"width": 0}
    graph = CLIP | {"1": {"class_type": "EmptyImage", "inputs": small}}
    graph |= {"5": {"class_type": "PreviewAny", "inputs": {"source": "a text"}}}
    done = run(host, graph, tmp_path)
    assert done.returncode == 1 and "width" in done.stderr and "Traceback" not in done.stderr, done.stderr
