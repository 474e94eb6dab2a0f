# SPDX-License-Identifier: Apache-2.0
"""Write web/docs/images/doctor.png: NVFP4 Doctor beside a workflow with two mistakes, in the real front end.

usage: python tests/make_doctor_picture.py

The host is the stubbed one of tests/web, its answers are the sample in tests/web/answers.json: the picture shows how
the panel looks, no machine. Needs Playwright, a Chromium on the PATH and comfyui-frontend-package, or COMFYUI_FRONTEND.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

TESTS = Path(__file__).resolve().parent
TARGET = TESTS.parent / "web" / "docs" / "images" / "doctor.png"
VIEW = {"width": 1400, "height": 860}
VUE = {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False}
MISTAKE = "10"  # the node with a wrong number of frames


def main() -> None:
    """Open the panel, go to the node that a finding names, and take the picture."""
    sys.path.insert(0, str(TESTS))
    importlib.import_module("conftest")  # makes this repository importable as nvfp4_video, over the stubbed host
    frontend = importlib.import_module("nvfp4_video.tests.web.frontend_server")
    pages = importlib.import_module("nvfp4_video.tests.web.doctor_page")
    files = (TESTS / "web" / name for name in ("answers.json", "workflow.json"))
    answers, workflow = (json.loads(file.read_text("utf-8")) for file in files)
    static = frontend.static_folder()
    if static is None:
        sys.exit("comfyui-frontend-package is not installed")
    with (
        frontend.FrontendServer(static, frontend.node_definitions(workflow), VUE) as server,
        pages.chromium() as browser,
        tempfile.TemporaryDirectory() as folder,
    ):
        server.routes |= {"/nvfp4/report": answers["report"], "/nvfp4/check": {"findings": answers["findings"]}}
        page = pages.DoctorPage(browser, server.url, Path(folder))
        page.page.set_viewport_size(VIEW)
        page.load(workflow)
        page.open_panel()
        page.panel.get_by_role("button", name=f"({MISTAKE})").click()
        page.page.wait_for_function("() => app.canvas.selectedItems.size === 1")
        page.settle()
        # A palette, whose colours are spread evenly so that wires keep theirs, makes the file several times smaller.
        seen = Image.open(page.shot("doctor")).convert("RGB")
        seen.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(TARGET, optimize=True)
        page.close()


if __name__ == "__main__":
    main()
