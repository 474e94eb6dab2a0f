# SPDX-License-Identifier: Apache-2.0
"""The small model that the ComfyUI under test can build."""

from __future__ import annotations

import pytest
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real.harness import ComfyUI, small_model


def small_model_of(host: ComfyUI) -> tuple[dict, dict, dict]:
    """State, config and packed layers of that model; skips the test where there is none."""
    name = small_model(host.path)
    if name is None:
        pytest.skip(f"ComfyUI {host.version} builds the embeddings connectors in their released size only")
    state, config = getattr(synthetic, f"small_{name}")()
    return state, config, synthetic.quantize_layers(state, config)
