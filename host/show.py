"""What a node shows besides its outputs: its text and pictures, on the node and in the history."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from server import PromptServer


def to_image(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 RGB -> (1, H, W, 3) float32 in 0..1, the host's IMAGE."""
    return torch.from_numpy(picture.astype(np.float32) / 255.0).unsqueeze(0)


def show(node: type[io.ComfyNode], text: str, image: torch.Tensor | None = None) -> dict:
    """-> the ``ui`` of a NodeOutput. The front end draws the image from it, and the text only if it is sent as well."""
    server = getattr(PromptServer, "instance", None)
    node_id = getattr(node.hidden, "unique_id", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
    shown = dict(ui.PreviewText(text).as_dict())
    if image is not None:
        shown |= ui.PreviewImage(image, cls=node).as_dict()
    return shown
