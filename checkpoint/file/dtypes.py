# SPDX-License-Identifier: Apache-2.0
"""The dtypes of safetensors: how many bits each takes, and what torch calls those that it may hold.

A header may use all of BITS. A tensor whose dtype is not in torch_dtypes.py's DTYPES can be described and copied, not
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

TORCH_NAMES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "F32": ("float32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}
# The shape counts numbers, not bytes, and the bytes hold them without padding, so torch has no such tensors.
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS = {name: bits for name, (_, bits) in TORCH_NAMES.items()} | PACKED
ITEM_BYTES = {name: bits // 8 for name, (_, bits) in TORCH_NAMES.items()}


def bytes_of(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor, None if its numbers do not fill whole bytes."""
    bytes_, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    return None if rest else bytes_
