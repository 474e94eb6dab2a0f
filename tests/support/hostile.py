# SPDX-License-Identifier: Apache-2.0
"""Names and notes as somebody may write them who wants more than to be read, and a checkpoint that has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from nvfp4_video.tests.support.files import save

SCRIPT = "<img src=/fetched-by-a-name onerror=\"window.ran='a name'\"><script>window.ran='a name'</script>"
ESCAPE = "\x1b]0;pwned\x07\x1b[31m\x1b[2J\u202egnp\u2066\x9b1A"  # title, colour, wipe, direction, eight-bit CSI
SHOWN = "\\x1b]0;pwned\\x07\\x1b[31m\\x1b[2J\\u202egnp\\u2066\\x9b1A"


def checkpoint(path: Path, layer: str, metadata: dict[str, str] | None = None) -> Path:
    """A small ModelOpt file with a BF16 block beside an NVFP4 layer of this name, which errors name."""
    tensors = {
        f"{layer}.weight": torch.zeros(16, 8, dtype=torch.uint8),
        f"{layer}.weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale_2": torch.tensor(0.5),
        "blocks.0.a.weight": torch.zeros(16, 16, dtype=torch.bfloat16),
    }
    modelopt = {"quantization_config": json.dumps({"producer": {"name": "modelopt"}})}
    return save(path, tensors, modelopt | (metadata or {}))
