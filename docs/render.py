# SPDX-License-Identifier: Apache-2.0
"""Queue a workflow of workflows/api/ on a running ComfyUI and fetch the film: render.py WORKFLOW.json ["a prompt"]"""

import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

HOST = os.environ.get("COMFYUI_URL", "http://127.0.0.1:8188")


def ask(path: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(HOST + path, data) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:  # a prompt that cannot run: the body says which node, and why
        sys.exit(error.read().decode())


graph = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
if len(sys.argv) > 2:  # the text of the prompt: the first CLIPTextEncode of these graphs
    next(node for node in graph.values() if node["class_type"] == "CLIPTextEncode")["inputs"]["text"] = sys.argv[2]
job = json.loads(ask("/prompt", {"prompt": graph}))["prompt_id"]
while not (history := json.loads(ask(f"/history/{job}"))):
    time.sleep(1)
status, outputs = history[job]["status"], history[job]["outputs"]
if status["status_str"] != "success":
    sys.exit(json.dumps(status["messages"][-1][1], indent=2))
for output in outputs.values():
    for file in output.get("images", []) if "animated" in output else []:  # SaveVideo files its clips under "images"
        Path(file["filename"]).write_bytes(ask("/view?" + urllib.parse.urlencode(file)))
        print(file["filename"])
