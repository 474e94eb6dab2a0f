# SPDX-License-Identifier: Apache-2.0
"""Write locales/en/nodeDefs.json from the schemas of the nodes; the other languages are translated from it by hand.

usage: python tests/record_locales.py

ComfyUI's front end looks a node's texts up under ``nodeDefs.<node id>``: ``display_name``, ``description``,
``inputs.<input id>.name`` and ``.tooltip``, ``outputs.<index>.name`` and ``.tooltip``. A dot in an id becomes "_". An
output that is named after its type has no name here, since the front end takes its own word for the type.
test_locales.py compares every language with what this file finds.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LOCALES = TESTS.parent / "locales"
LANGUAGES = ("en", "ja", "zh", "zh-TW")
FILE = "nodeDefs.json"


def _texts(**texts: str | None) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text}


def node_texts(schema) -> dict[str, dict]:
    """A node's schema -> all that is to be translated in it."""
    inputs = {
        port.id.replace(".", "_"): _texts(name=port.display_name or port.id, tooltip=port.tooltip)
        for port in schema.inputs
    }
    outputs = {
        str(index): _texts(name=port.display_name, tooltip=port.tooltip) for index, port in enumerate(schema.outputs)
    }
    found = {"display_name": schema.display_name, "description": schema.description}
    found |= {"inputs": inputs, "outputs": {index: texts for index, texts in outputs.items() if texts}}
    return {name: part for name, part in found.items() if part}


def english(nodes: Iterable) -> dict[str, dict]:
    """Node classes -> the content of locales/en/nodeDefs.json."""
    schemas = [node.GET_SCHEMA() for node in nodes]
    return {schema.node_id: node_texts(schema) for schema in schemas}


def main() -> None:
    """Write the English file."""
    sys.path.insert(0, str(TESTS))
    importlib.import_module("conftest")  # makes this repository importable as nvfp4_video, over the stubbed host
    texts = english(importlib.import_module("nvfp4_video.nodes").NODES)
    target = LOCALES / "en" / FILE
    target.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
