# SPDX-License-Identifier: Apache-2.0
"""From how many tokens on FP8 pays, by card. Only the H200 was measured; the others are what the formula gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.host.compute import matmul
from nvfp4_video.host.compute.card import gpu_from, gpu_of, min_tokens
from nvfp4_video.measure.gpus import GPUS

SHAPES = ((4096, 4096), (2048, 2048), (16384, 4096), (32, 4096))
NEVER = 1 << 62
LEAST = {
    # By hand, 4096 x 4096: 16.8 MB at 4.27 TB/s are 3.9 us of 19.2; a token saves 33.6 MFLOP at 663 instead of 1,286
    # TFLOP/s, 24.5 ns, and moves 12.3 KB more, 2.9 ns.
    "H200": (706, 3882, 37, NEVER),
    "RTX 5090": (81, 660, 17, NEVER),
    "GB10": (17, 84, 17, NEVER),
    "RTX 4090": (17, 487, 17, NEVER),
}


LEAST_INT8 = {
    # By hand, 4096 x 4096: 16.8 MB at 833 GB/s are 20.1 us of 42.8; a token saves 33.6 MFLOP at 47.7 instead of 122
    # TFLOP/s, 429 ns, and moves 45 KB more, 54 ns.
    "RTX 3090": (61, 471, 17, NEVER),
    "A100 80 GB": (3156, NEVER, 93, NEVER),
    "H200": (61212, NEVER, 2426, NEVER),
}


@pytest.mark.parametrize("name", LEAST_INT8)
def test_int8_begins_later_for_its_sums_are_written_and_read(name):
    assert tuple(min_tokens(shape, GPUS[name], "int8") for shape in SHAPES) == LEAST_INT8[name]
    assert min_tokens((8192, 256), GPUS[name], "int8") == NEVER, "the sums cost more than the product saves"


@pytest.mark.parametrize("name", LEAST)
def test_fp8_begins_where_it_saves_what_its_launches_cost(name):
    assert tuple(min_tokens(shape, GPUS[name]) for shape in SHAPES) == LEAST[name]


def test_a_card_without_fp8_or_of_which_nothing_is_known_has_the_number_for_unknown_ones():
    assert min_tokens((4096, 4096), GPUS["RTX 3060 12 GB"]) == 256, "it has no FP8 and is never asked"
    assert min_tokens((4096, 4096), None) == 256
    assert gpu_of(torch.device("cpu")) is None


def properties(name: str, **others) -> SimpleNamespace:
    given = {"total_memory": 24 << 30, "major": 8, "minor": 9, "multi_processor_count": 128} | others
    return SimpleNamespace(name=name, **given)


def test_a_listed_card_is_its_row_of_the_table():
    found = gpu_from(properties("NVIDIA GeForce RTX 4090", memory_clock_rate=1, memory_bus_width=1, clock_rate=1))
    assert found == GPUS["RTX 4090"]


def test_an_unlisted_card_has_the_numbers_of_its_clocks():
    """Those of an RTX 4090 under another name give that card's bandwidth and rates."""
    clocks = {"memory_clock_rate": 10_501_000, "memory_bus_width": 384, "clock_rate": 2_520_000}
    found, known = gpu_from(properties("NVIDIA Something", **clocks)), GPUS["RTX 4090"]
    assert found.bandwidth == pytest.approx(known.bandwidth, rel=1e-3)
    assert found.bf16 == pytest.approx(known.bf16, rel=1e-2) and found.fp8 == pytest.approx(known.fp8, rel=1e-2)
    assert min_tokens((4096, 4096), gpu_from(properties("NVIDIA Something"))) == 256, "a torch that does not say"


def test_a_layer_computes_in_fp8_from_its_card_s_number_of_tokens_on(monkeypatch):
    monkeypatch.setattr(matmul, "gpu_of", lambda device: GPUS["GB10"])
    matmul.least_rows.cache_clear()
    try:
        assert matmul.least_rows((2048, 2048), torch.device("cpu")) == LEAST["GB10"][1]
    finally:
        matmul.least_rows.cache_clear()
