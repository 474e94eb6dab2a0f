# SPDX-License-Identifier: Apache-2.0
"""A small NVFP4 model in containers that are not one plain file."""

from __future__ import annotations

import json
from pathlib import Path

from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.files import load, metadata, save


def whole(path: Path, kind: str = "comfy_markers") -> Path:
    state, config = synthetic.small_ltx23()
    synthetic.write(path, kind, state, config, synthetic.quantize_layers(state, config))
    return path


def in_two(source: Path, first: Path, second: Path) -> Path:
    """Split a file by the middle of its names -> the second part, which lacks what the first declares."""
    tensors, about = load(source), metadata(source)
    names = list(tensors)
    half = len(names) // 2
    save(first, {name: tensors[name] for name in names[:half]}, about)
    save(second, {name: tensors[name] for name in names[half:]})
    return second


def numbered(source: Path, folder: Path) -> Path:
    """Two shards that their names tell."""
    return in_two(source, *(folder / f"m-{number:05}-of-00002.safetensors" for number in (1, 2)))


def indexed(source: Path, folder: Path) -> Path:
    """Two shards that only an index tells."""
    second = in_two(source, folder / "upper.safetensors", folder / "lower.safetensors")
    parts = {name: part.name for part in (folder / "upper.safetensors", second) for name in load(part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return second


def trailing(source: Path, folder: Path) -> Path:
    """Six bytes behind the last tensor."""
    path = folder / "trailing.safetensors"
    path.write_bytes(source.read_bytes() + b"\1\2\3\4\5\6")
    return path
