# SPDX-License-Identifier: Apache-2.0
"""comfy-lint, which checks prompts against /object_info, finds nothing in those of workflows/api/.

It runs without a server: the host's nodes as recorded, the pack's own from their schemas. Three things it cannot read
are written so that it can: files have no list of choices, a socket that takes several types takes any, and what a
choice brings along (SaveVideo's `format.codec`) is an input like the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.support.source import ROOT
from nvfp4_video.tests.workflows import workflow_format as form

lint = pytest.importorskip("comfy_lint.cli", reason="comfy-lint is not installed")
PROMPTS = sorted((ROOT / "workflows" / "api").glob("*.json"))


def readable(prompts: list[dict]) -> dict[str, dict]:
    """/object_info of the nodes, with the inputs that these prompts give them, as comfy-lint reads it."""
    known = {kind: form.matched(node, "*") for kind, node in form.node_info(NODES).items()}
    for prompt in prompts:
        for entry in prompt.values():
            inputs = known[entry["class_type"]]["input"]
            for part, specs in inputs.items():
                inputs[part] = {name: spec(name, *given) for name, given in specs.items()}
            choices = tuple(f"{name}." for name in dynamic(inputs))
            brought = {name: ["*", {}] for name in entry["inputs"] if name.startswith(choices)}
            inputs["optional"] = inputs.get("optional", {}) | brought
    return known


def spec(name: str, kind: str | list, settings: dict | None = None) -> list:
    if name in form.FILE_INPUTS:
        return ["COMBO", {}]
    return ["*" if isinstance(kind, str) and "," in kind else kind, settings or {}]


def dynamic(inputs: dict) -> Iterator[str]:
    """Names of the inputs whose choice brings along others."""
    for specs in inputs.values():
        yield from (name for name, (kind, *_) in specs.items() if kind == "COMFY_DYNAMICCOMBO_V3")


def found(paths: list[Path], folder: Path, capsys) -> tuple[int, str]:
    """Exit code and text of ``comfy-lint --strict``."""
    prompts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    (folder / "object_info.json").write_text(json.dumps(readable(prompts)), encoding="utf-8")
    code = lint.main(["--strict", "--schema-cache", str(folder / "object_info.json"), *map(str, paths)])
    return code, capsys.readouterr().out


def test_comfy_lint_finds_nothing_in_the_prompts(tmp_path: Path, capsys):
    assert len(PROMPTS) >= 8
    code, said = found(PROMPTS, tmp_path, capsys)
    assert code == 0, said


@pytest.mark.parametrize(
    ("class_type", "name", "value"),
    [
        ("NVFP4ModelLoader", "compute", "fp5"), ("KSamplerSelect", "sampler_name", None),
        ("SaveVideo", "quality", 5), ("SamplerCustomAdvanced", "latent_image", ["1", 0]),
    ],
)  # fmt: skip
def test_comfy_lint_would_see_a_wrong_choice_a_missing_input_one_too_many_and_a_wrong_link(
    class_type: str, name: str, value: object, tmp_path: Path, capsys
):
    prompt = json.loads(PROMPTS[0].read_text(encoding="utf-8"))
    inputs = next(entry["inputs"] for entry in prompt.values() if entry["class_type"] == class_type)
    if value is None:
        del inputs[name]
    else:
        inputs[name] = value
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(prompt), encoding="utf-8")
    code, said = found([path], tmp_path, capsys)
    assert code == 1 and name in said
