# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tensors in memory: written, and read back whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from nvfp4_video.checkpoint.file.container import TensorReader, planned, write_checkpoint
from nvfp4_video.checkpoint.file.header import read_header


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    write_checkpoint(path, planned(tensors), metadata)
    return path


def load(path: Path) -> dict[str, torch.Tensor]:
    with TensorReader(path) as reader:
        return {name: reader.get(name).clone() for name in reader.header.tensors}


def metadata(path: Path) -> dict[str, str]:
    return read_header(path).metadata
