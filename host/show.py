# SPDX-License-Identifier: Apache-2.0
"""What a node shows besides its outputs: its report and pictures, on the node and in the history; and its progress.

The web extension (web/reports.js) draws a report from the ``ui`` of the node's output, and once more from the host's
history where a workflow is opened anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from server import PromptServer

from ..measure.escape import html, visible
from ..measure.text import size_text

# Key in a node's ``ui``: [query of /view], the large picture that belongs to the compact one in "images".
PICTURE = "nvfp4_picture"
FILES_WRITTEN = "nvfp4.files"  # event of the websocket
_SHOWN = ("text", PICTURE)
OURS = "NVFP4"  # what the classes of this pack's nodes begin with


def to_image(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 RGB -> (1, H, W, 3) float32 in 0..1, the host's IMAGE."""
    return torch.from_numpy(picture.astype(np.float32) / 255.0).unsqueeze(0)


def show(
    node: type[io.ComfyNode], text: str, compact: torch.Tensor | None = None, large: torch.Tensor | None = None
) -> dict:
    """-> the ``ui`` of a NodeOutput: a report, a picture legible at the width of a node, and one that a link opens."""
    shown = dict(ui.PreviewText(visible(text)).as_dict())
    if compact is not None:
        shown |= ui.PreviewImage(compact, cls=node).as_dict()
    if large is not None:
        # As text: what looks like a file, front ends show as one more picture.
        (saved,) = ui.PreviewImage(large, cls=node).as_dict()["images"]
        shown[PICTURE] = [urlencode({name: saved[name] for name in ("filename", "subfolder", "type")})]
    return shown


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Show how far a running node is, as HTML; the front end takes it off when the node has its report."""
    server = getattr(PromptServer, "instance", None)
    node_id = getattr(node.hidden, "unique_id", None)
    if server is not None and node_id is not None:
        server.send_progress_text(html(text), node_id)


def tell_files() -> None:
    """Tell open front ends that model files were written, so that they read the lists on their widgets anew."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(FILES_WRITTEN, {})


def telling(node: type[io.ComfyNode], on_step: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """-> ``on_step``, and once a second a line of text on the node: how far, how fast, how long still; in bytes."""
    started = shown = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal shown
        on_step(done, total)
        now = time.monotonic()
        if done and now - shown > 1:
            shown, rate = now, done / (now - started)
            left = (total - done) / rate
            tell(node, f"{size_text(done)} of {size_text(total)}, {size_text(int(rate))}/s, {left:.0f} s left")

    return step


def reports(
    history: Mapping[str, Mapping[str, Any]], workflow: str, nodes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The host's history, oldest first -> node id -> what that node of ``workflow`` last reported, as in its ``ui``.

    ``nodes``: id -> class of the nodes to report on, all that ``workflow`` has. A prompt belongs to the workflow whose
    id the front end put beside it. Front ends give none, or zeros, to a workflow made from a script's prompt, and
    another one when it is opened again: such a prompt belongs to it if it has these nodes of this pack and no others.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in history.values():
        _, _, prompt, extra = entry["prompt"][:4]
        saved = (extra.get("extra_pnginfo") or {}).get("workflow")
        if not isinstance(saved, dict):
            continue
        classes = {node: str(content.get("class_type")) for node, content in prompt.items()}
        ours = {node for node in entry["outputs"] if classes.get(node, "").startswith(OURS)}
        here = {node for node in ours if nodes.get(node) == classes[node]}
        named = str(saved.get("id") or "").strip("0-")
        if (saved["id"] == workflow) if named else (here == ours):
            outputs = {node: entry["outputs"][node] for node in here}
            found |= {node: _shown(output) for node, output in outputs.items() if output.get("text")}
    return found


def _shown(output: Mapping[str, Any]) -> dict[str, Any]:
    return {key: output[key] for key in _SHOWN if key in output}
