# SPDX-License-Identifier: Apache-2.0
"""From how many tokens on a layer in FP8 or INT8 mode computes so, by the numbers of the card it is on.

The planner's table of cards knows bandwidth and rates; of a card that is not in it, or without rates, both follow from
what the driver says: two transfers a clock over the whole bus, and the FLOP that each SM of the slowest cards of its
architecture does a clock.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from ...kernels.backends import FP8_CAPABILITY
from ...kernels.reference import MAX_TOKENS
from ...measure.gpu_table import GEFORCE, GEFORCE_CARDS
from ...measure.gpus import Gpu, find_gpu
from ...measure.roofline import BANDWIDTH_SHARE, MATMUL_SHARE

# CPU seconds by which queueing a Linear in FP8 takes longer than in BF16: 56.2 - 37.0 microseconds, `launch_us` of
# benchmarks/results/fp8.json.
FP8_LAUNCH_SECONDS = 19.2e-6
# The same for INT8: 70.1 - 27.3 microseconds, and the share of its peak that `torch._int_mm` has on an H200: 857 of
# 1,979 TFLOP/s (benchmarks/results/int8.json).
INT8_LAUNCH_SECONDS = 42.8e-6
INT8_SHARE = 0.43
_FOURFOLD = frozenset(name for cards in GEFORCE_CARDS.values() for name, *_ in cards)
_UNKNOWN = 256  # where nothing is known of the card


def min_tokens(shape: tuple[int, int], gpu: Gpu | None, mode: str = "fp8") -> int:
    """(N, K), card -> tokens from which FP8 or INT8 saves at least the time its further launches keep the CPU.

    For T tokens it saves one byte an element of the weight that is written, N K / bandwidth, and of the product
    2 T N K (1 / rate BF16 - 1 / rate FP8); it moves 3 T K bytes more, to quantise the input, INT8 8 T N too, since its
    sums are written and read. Rates and bandwidth are the shares of their peaks that roofline.py documents; INT8's peak
    is four times that of BF16 on GeForce cards, twice on others. ``MAX_TOKENS`` and fewer are the fused kernel's. Where
    the further bytes cost more than the product saves, no number of tokens is enough.
    """
    if gpu is None or not (gpu.bandwidth and gpu.bf16 and (gpu.fp8 or mode == "int8")):
        return _UNKNOWN
    peak = gpu.fp8 if mode == "fp8" else gpu.bf16 * (4 if gpu.name in _FOURFOLD else 2)
    rows, cols = shape
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    rates = gpu.bf16 * MATMUL_SHARE["bf16"], peak * (MATMUL_SHARE["fp8"] if mode == "fp8" else INT8_SHARE)
    moved = 3 * cols if mode == "fp8" else 3 * cols + 8 * rows
    each = 2 * rows * cols * (1 / rates[0] - 1 / rates[1]) - moved / bandwidth
    missing = (FP8_LAUNCH_SECONDS if mode == "fp8" else INT8_LAUNCH_SECONDS) - rows * cols / bandwidth
    return max(MAX_TOKENS + 1, math.ceil(missing / each)) if each > 0 else 1 << 62


@functools.cache
def gpu_of(device: torch.device) -> Gpu | None:
    """An NVIDIA device -> its row of the table, with what the driver says for numbers that are missing; else None."""
    if device.type != "cuda" or not torch.version.cuda:
        return None
    return gpu_from(torch.cuda.get_device_properties(device))


def gpu_from(found: Any) -> Gpu:
    """``torch.cuda.get_device_properties`` -> Gpu."""
    capability, memory = (found.major, found.minor), float(found.total_memory)
    gpu = find_gpu(found.name, memory) or Gpu(found.name, memory, None, None, None, None, capability, "torch")
    if gpu.known and (gpu.fp8 or capability < FP8_CAPABILITY):
        return gpu
    # In kHz, and in bits; older torch does not say.
    clock, bus = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    cycles = getattr(found, "clock_rate", 0) * 1e3 * found.multi_processor_count
    family = "Blackwell" if capability >= (10, 0) else "Ada" if capability >= FP8_CAPABILITY else "Ampere"
    bf16, fp8, _ = GEFORCE[family][0]
    bandwidth = gpu.bandwidth or 2e3 * clock * bus / 8 or None
    return replace(
        gpu, bandwidth=bandwidth, bf16=gpu.bf16 or cycles * bf16 or None, fp8=gpu.fp8 or (fp8 and cycles * fp8) or None
    )
