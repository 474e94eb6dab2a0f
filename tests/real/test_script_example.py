# SPDX-License-Identifier: Apache-2.0
"""docs/render.py, the example for scripts, against a real ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nvfp4_video.tests.real.harness import PACK, ComfyUI

CLIP = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 255}},
    "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 24.0}},
    "3": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["2", 0], "filename_prefix": "video/example", "format": "auto", "codec": "auto"},
    },
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}},  # nothing needs it, so it is not validated
}


def run(host: ComfyUI, graph: dict, folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    command = [sys.executable, str(PACK / "docs" / "render.py"), "graph.json", *words]
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
    graph = json.loads(json.dumps(CLIP))
    graph["2"]["inputs"]["images"] = ["5", 0]
    graph["5"] = {"class_type": "ImageFromBatch", "inputs": {"image": ["6", 0], "batch_index": 0, "length": 1}}
    graph["6"] = {"class_type": "NVFP4Sharpness", "inputs": {"images": ["1", 0], "reference": -1.0}}
    done = run(host, graph, tmp_path)
    assert done.returncode == 1 and "NVFP4Sharpness" in done.stderr, done.stderr
