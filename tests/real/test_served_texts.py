# SPDX-License-Identifier: Apache-2.0
"""What a real ComfyUI's front end gets of the pack beside the nodes: translations and help pages."""

from __future__ import annotations

import json
import urllib.request

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.real.harness import PACK_FOLDER, ComfyUI
from nvfp4_video.tests.record_locales import FILE, LANGUAGES, LOCALES

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def served(host: ComfyUI) -> dict:
    return host.get("/i18n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_host_serves_the_texts_of_every_node(language: str, served: dict):
    texts = json.loads((LOCALES / language / FILE).read_text(encoding="utf-8"))
    assert texts.keys() == {node.GET_SCHEMA().node_id for node in NODES}
    assert {node: served[language]["nodeDefs"][node] for node in texts} == texts


def test_the_keys_of_the_texts_are_the_ids_and_indices_that_the_host_shows(host: ComfyUI, served: dict):
    for node, texts in served["en"]["nodeDefs"].items():
        shown = host.object_info(node)
        assert (shown["display_name"], shown["description"]) == (texts["display_name"], texts["description"])
        inputs = {name for part in ("required", "optional") for name in shown["input"].get(part, {})}
        assert inputs == texts.get("inputs", {}).keys()
        for index, (kind, name) in enumerate(zip(shown["output"], shown["output_name"], strict=True)):
            # The front end has a word of its own for an output that is named after its type.
            assert texts["outputs"].get(str(index), {}).get("name", kind) == name


@pytest.mark.parametrize("node", [node.GET_SCHEMA().node_id for node in NODES])
def test_the_host_serves_the_help_page_where_the_front_end_asks_for_it(host: ComfyUI, node: str):
    with urllib.request.urlopen(f"{host.url}/extensions/{PACK_FOLDER}/docs/{node}.md", timeout=30) as answer:
        assert answer.read().decode("utf-8").startswith("# NVFP4 ")
