# SPDX-License-Identifier: Apache-2.0
"""Write workflows/<name>.json and workflows/api/<name>.json from the descriptions in workflow_graphs.py.

usage: python tests/make_workflows.py
       COMFYUI_PATH=<checkout> python tests/make_workflows.py --record

``--record`` first boots that ComfyUI and writes anew what it says of the nodes in tests/data/core_nodes.json: types,
defaults, limits and choices, without the texts. A node that a workflow begins to use goes into that file by hand, as
``"<its name>": {}``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parent / "workflows"
# Only these settings of an input decide about a graph.
KEPT = ("default", "min", "max", "options", "widgetType", "control_after_generate", "image_upload", "multiline")


def bare(spec: list) -> list:
    """One input of /object_info without its texts; the choices of a dynamic one bring inputs along."""
    kind, *rest = spec
    settings = {name: value for name, value in (rest[0] if rest else {}).items() if name in KEPT}
    if kind == "COMFY_DYNAMICCOMBO_V3":
        settings["options"] = [
            {"key": option["key"], "inputs": bare_inputs(option["inputs"])} for option in settings["options"]
        ]
    return [kind, settings]


def bare_inputs(inputs: dict) -> dict:
    """The inputs that a graph can set."""
    parts = ("required", "optional")
    return {part: {name: bare(spec) for name, spec in inputs[part].items()} for part in parts if part in inputs}


def record(names: set[str]) -> dict[str, dict]:
    """Boot the ComfyUI that COMFYUI_PATH names -> these of its nodes."""
    harness = importlib.import_module("nvfp4_video.tests.real.harness")
    with harness.ComfyUI(pack=None) as host:
        info = host.get("/object_info")
    keys = ("output", "output_name", "display_name")
    return {
        name: {"input": bare_inputs(info[name]["input"])} | {key: info[name][key] for key in keys}
        for name in sorted(names & info.keys())
    }


def text_of(graph: dict) -> str:
    """The text of a file."""
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> None:
    """Write all files."""
    sys.path.insert(0, str(TESTS))
    importlib.import_module("conftest")  # makes this repository importable as nvfp4_video, over the stubbed host
    graphs = importlib.import_module("nvfp4_video.tests.workflows.workflow_graphs")
    form = importlib.import_module("nvfp4_video.tests.workflows.workflow_format")
    own = importlib.import_module("nvfp4_video.nodes").NODES
    if "--record" in arguments:
        found = record(set(form.recorded()))
        form.RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    info = form.node_info(own)
    for name, describe in graphs.WORKFLOWS.items():
        graph = describe(name, info).save()
        (FOLDER / f"{name}.json").write_text(text_of(graph), encoding="utf-8")
        twin = form.api_prompt(graph, info, titles=True)
        (FOLDER / "api" / f"{name}.json").write_text(text_of(twin), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
