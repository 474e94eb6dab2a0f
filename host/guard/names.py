# SPDX-License-Identifier: Apache-2.0
"""What the host calls a node: its display name changes between versions, the class does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping

# As of ComfyUI 0.33, for where no host tells.
_NAMES = {
    "LTXVEmptyLatentAudio": "LTXV Empty Latent Audio",
    "LTXVConcatAVLatent": "Concat AV Latent",
    "LTXVSeparateAVLatent": "Separate AV Latent",
    "LTXVAudioVAELoader": "Load LTXV Audio VAE",
}


def shown(kind: str) -> str:
    """Class -> the name under which the running host shows the node."""
    names = getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", None)
    name = names.get(kind) if isinstance(names, Mapping) else None
    return name if isinstance(name, str) and name else _NAMES.get(kind, kind)
