# SPDX-License-Identifier: Apache-2.0
"""The dtypes of safetensors that this torch can hold. Beside dtypes.py, since a header is read without torch."""

from __future__ import annotations

import torch

from .dtypes import TORCH_NAMES
from .header import CheckpointError

# Older torch lacks some of them.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, of) for name, (of, _) in TORCH_NAMES.items() if hasattr(torch, of)
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """A dtype of safetensors -> torch's. CheckpointError where torch has none."""
    if name not in DTYPES:
        found, remedy = f"a tensor has the dtype {name}", "take a BF16, FP8 or NVFP4 version of the model"
        raise CheckpointError(found, expected=f"one of {', '.join(DTYPES)}", remedy=remedy)
    return DTYPES[name]
