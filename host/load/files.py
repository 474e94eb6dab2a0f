# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint as the host reads them, of all its files."""

from __future__ import annotations

import logging

import comfy.utils
import torch

from ...checkpoint.file.container import TensorReader
from ...checkpoint.file.header import CheckpointError, Header, quote
from ...checkpoint.file.shards import Checkpoint
from ...checkpoint.file.torch_dtypes import DTYPES

logger = logging.getLogger(__name__)

_READ_BY_HOST = (".safetensors", ".sft")  # whatever else a file is called, the host would unpickle it


def read_tensors(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Checkpoint -> (tensor name -> tensor, the header's metadata). Tensors stay slices of the mapped files."""
    if checkpoint.sharded:
        logger.info("%s is one of %d files, which are loaded together", checkpoint.header.path, len(checkpoint.files))
    state_dict: dict[str, torch.Tensor] = {}
    for header in checkpoint.files:
        state_dict |= _of_file(header)
    return state_dict, dict(checkpoint.header.metadata)


def _of_file(header: Header) -> dict[str, torch.Tensor]:
    odd = next((name for name, info in header.tensors.items() if info.dtype not in DTYPES), None)
    if odd is not None:  # the host would say no more than that it does not understand it
        found, remedy = f"tensor {quote(odd)} is {header.tensors[odd].dtype}", "take another version of the model"
        raise CheckpointError(found, where=header.path.name, expected=f"one of {', '.join(DTYPES)}", remedy=remedy)
    named = header.path.suffix.lower() in _READ_BY_HOST
    if named and not header.trailing:
        return comfy.utils.load_torch_file(str(header.path), return_metadata=True)[0]
    if header.trailing:
        # safetensors, through which the host reads without DynamicVRAM, refuses such a file whole.
        text = "%s: %d bytes follow its last tensor and are left out; NVFP4 Repair writes a file without them"
        logger.warning(text, header.path.name, header.trailing)
    with TensorReader(header) as reader:
        return {name: reader.get(name) for name in header.tensors}
