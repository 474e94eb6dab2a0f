# SPDX-License-Identifier: Apache-2.0
"""Write workflows/<name>.jpg: each graph as the real front end draws it, below its title.

usage: COMFYUI_PATH=<checkout> python tests/make_thumbnails.py [URL of a running ComfyUI with the pack]

Needs Playwright and a Chromium on the PATH. Files that the graphs name are put in place, empty, so that no loader is
marked; nothing is run, and no picture pretends to be a frame of a clip.
"""

from __future__ import annotations

import html
import importlib
import json
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parent / "workflows"
WIDTH, HEIGHT, QUALITY = 640, 400, 78
PAGE = """
<body style="margin:0;background:#17191d;color:#f2f2f2;font-family:sans-serif;width:{width}px;height:{height}px;
 overflow:hidden">
<div style="padding:18px 22px 0"><div style="font-size:30px;font-weight:600">{title}</div>
<div style="font-size:17px;color:#9fb6cc;padding-top:4px">{line}</div></div>
<div style="height:{below}px;display:flex;align-items:center;justify-content:center">
<img src="{image}" style="max-width:606px;max-height:{inside}px;filter:brightness(1.6)"></div>
"""
LINES = {
    "1 LTX-2.5 text to video": "Lightricks' NVFP4 file, latent upscaler, 8 + 3 steps",
    "2 LTX-2.3 text to video": "Lightricks' NVFP4 file and distilled LoRA, 8 + 3 steps",
    "3 LTX-2.3 image to video": "Lightricks' NVFP4 file and distilled LoRA, 8 steps",
    "4 LTX-2.3 small and quick": "Lightricks' NVFP4 file and distilled LoRA, 8 steps",
    "5 LTX-2.3 without sound": "Lightricks' NVFP4 file and distilled LoRA, 8 steps",
    "6 LTX-2.3 distilled, made from FP8": "quantized from the FP8 checkpoint on the first run",
    "7 Make an NVFP4 file": "inspect, plan, quantize, split",
    "8 FP8 against NVFP4": "same seeds, both formats, cards and films side by side",
    "9 Make a calibrated NVFP4 file": "sample, collect, quantize, verify",
}
# The graph without its note, on a canvas of its size, as a data URL.
DRAW = """async () => {
  const { canvas } = app;
  const boxes = app.graph.nodes.filter((node) => node.type !== 'MarkdownNote').map((node) => node.boundingRect);
  boxes.push(...app.graph.groups.map((group) => [...group.pos, ...group.size]));
  boxes.push(...[...app.graph.reroutes.values()].map(({ pos }) => [pos[0] - 8, pos[1] - 8, 16, 16]));
  canvas.show_info = false;
  const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  const frame = canvas.canvas.getBoundingClientRect(), margin = 10;
  canvas.ds.scale = Math.min(frame.width / (right - left + 2 * margin), frame.height / (bottom - top + 2 * margin));
  canvas.ds.offset[0] = margin - left;
  canvas.ds.offset[1] = margin - top;
  canvas.min_font_size_for_lod = 0;
  canvas.draw(true, true);
  const ratio = canvas.canvas.width / frame.width;
  const cut = document.createElement('canvas');
  cut.width = (right - left + 2 * margin) * canvas.ds.scale * ratio;
  cut.height = (bottom - top + 2 * margin) * canvas.ds.scale * ratio;
  cut.getContext('2d').drawImage(canvas.canvas, 0, 0);
  return cut.toDataURL('image/png');
}"""


def picture(browser, page, name: str) -> bytes:
    """A template -> the bytes of its thumbnail."""
    graph = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    image = page.evaluate(DRAW)
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    title = note["title"].removeprefix("NVFP4 Video: ")
    card = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    text = html.escape(title[0].upper() + title[1:])
    sizes = {"width": WIDTH, "height": HEIGHT, "below": HEIGHT - 90, "inside": HEIGHT - 110}
    card.set_content(PAGE.format(title=text, line=html.escape(LINES[name]), image=image, **sizes))
    card.wait_for_timeout(200)
    shot = card.screenshot(type="jpeg", quality=QUALITY)
    card.close()
    return shot


def main(url: str) -> None:
    """Write all thumbnails."""
    sync_api = importlib.import_module("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2400, "height": 1500})
        page.goto(url)
        page.wait_for_function("() => window.app?.extensionManager && window.app.graph")
        page.wait_for_timeout(3000)
        for name in LINES:
            (FOLDER / f"{name}.jpg").write_bytes(picture(browser, page, name))
        browser.close()


def stand_ins(models: Path) -> None:
    """Empty files under all names that the graphs choose."""
    for path in FOLDER.glob("*.json"):
        graph = json.loads(path.read_text("utf-8"))
        for node in [node for level in (graph, *graph["definitions"]["subgraphs"]) for node in level["nodes"]]:
            folders = {model["name"]: model["directory"] for model in node["properties"].get("models", [])}
            for value in node.get("widgets_values", []):
                if str(value).endswith(".safetensors"):
                    target = models / folders.get(value, "checkpoints") / value
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.touch()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        sys.path.insert(0, str(TESTS))
        importlib.import_module("conftest")
        with importlib.import_module("nvfp4_video.tests.real.harness").ComfyUI() as host:
            stand_ins(host.base / "models")
            (host.base / "input" / "example.png").touch()
            main(host.url)
