# SPDX-License-Identifier: Apache-2.0
"""The NVFP4 layout of format.py in numbers: block, largest values, shapes. No torch: headers are read without it."""

from __future__ import annotations

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """(N, K) -> shape of ``packed``."""
    return round_up(shape[0], 16), round_up(shape[1], BLOCK) // 2


def block_scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """(N, K) -> shape of the swizzled, padded ``block_scale``."""
    return round_up(shape[0], 128), round_up(round_up(shape[1], BLOCK) // BLOCK, 4)
