# SPDX-License-Identifier: Apache-2.0
"""The dtypes of safetensors that this torch can hold. Beside dtypes.py, since a header is read without torch."""

from __future__ import annotations

import torch

from .dtypes import TORCH_NAMES

# Older torch lacks some of them.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, of) for name, (of, _) in TORCH_NAMES.items() if hasattr(torch, of)
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
