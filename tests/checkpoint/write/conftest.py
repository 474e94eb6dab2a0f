# SPDX-License-Identifier: Apache-2.0
"""The source that most tests of the quantiser take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvfp4_video.tests.support.quantize_sources import save, tiny


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return tiny()


@pytest.fixture
def source(tmp_path, tensors) -> Path:
    return save(tmp_path / "source.safetensors", tensors)
