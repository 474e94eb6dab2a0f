# SPDX-License-Identifier: Apache-2.0
"""A model file that a node has written appears in the lists of an open front end, on the canvas and in subgraphs.

The host is stubbed (frontend_server.py); COMFYUI_FRONTEND names the folder of another front end than the installed one.
"""

from __future__ import annotations

import pytest
from nvfp4_video.host.show import FILES_WRITTEN
from nvfp4_video.tests.web.frontend_server import node_definitions
from nvfp4_video.tests.workflows.workflow_builder import Sheet, Subgraph

OLD, NEW = "ltx-2.3-22b-distilled-fp8.safetensors", "ltx-2.3-22b-distilled_nvfp4.safetensors"
LOADER = "NVFP4ModelLoader"
INFO = {
    LOADER: {"input": {"required": {"model_name": [[OLD], {}]}}, "output": ["MODEL"], "output_name": ["MODEL"]},
    "ModelEnd": {"input": {"required": {"model": ["MODEL", {}]}}, "output": [], "output_name": []},
}
# What the lists on both nodes offer: of the loader, and of the subgraph that has one inside.
OFFERED = """() => app.rootGraph.nodes.flatMap((node) => node.widgets ?? []).map(({ options: { values } }) =>
  typeof values === 'function' ? values() : values)"""


def graph() -> dict:
    """A loader on the canvas, and one in a subgraph whose widget is shown outside."""
    sheet, inner = Sheet("written files", INFO), Subgraph("inside", INFO)
    loader = inner.add(LOADER, (0, 0), 300, model_name=inner.enter("model", "COMBO", OLD))
    inner.leave("model", loader["MODEL"])
    outer = sheet.add(LOADER, (0, 0), 300, model_name=OLD)
    shown = inner.stand(sheet, (0, 200), 300)
    for y, out in ((0, outer["MODEL"]), (200, shown["model"])):
        sheet.add("ModelEnd", (400, y), 200, model=out)
    return sheet.save()


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_written_file_is_offered_without_reading_the_lists_by_hand(enter, vue: bool):
    workflow = graph()
    definitions = node_definitions({"nodes": [node for node in workflow["nodes"] if node["type"] in INFO]})
    page, _ = enter(definitions, {"Comfy.VueNodes.Enabled": vue}, {})
    page.load(workflow)
    assert page.page.evaluate(OFFERED) == [[OLD], [OLD]]
    definitions[LOADER]["input"]["required"]["model_name"][0].append(NEW)
    page.send(FILES_WRITTEN, {})
    page.page.wait_for_function(f"(name) => ({OFFERED})().every((names) => names.includes(name))", arg=NEW)
