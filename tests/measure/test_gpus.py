# SPDX-License-Identifier: Apache-2.0
"""The table of GPUs: names as people and drivers write them, NVIDIA's own rates, and what to do without a card."""

from __future__ import annotations

import re
import types

import pytest
import torch
from nvfp4_video.measure.gpus import GIB, GPUS, NoGpuError, detect_gpu, find_gpu, pick_gpu


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("5090", "RTX 5090"),
        ("NVIDIA GB10", "GB10"),
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB PCIe"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server"),
        ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", "RTX PRO 4000 Blackwell SFF"),
        ("NVIDIA RTX PRO 5000 72GB Blackwell", "RTX PRO 5000 Blackwell 72 GB"),
        ("NVIDIA RTX PRO 3000 Blackwell Generation Laptop GPU", "RTX PRO 3000 Blackwell Laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX 5000 Ada Generation Laptop GPU", "RTX 5000 Ada Laptop"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "RTX 5090 Laptop"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "RTX 2080"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
        ("NVIDIA GeForce GTX 1660 Ti", "GTX 1660 Ti"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA Thor", "Jetson AGX Thor"),
        ("NVIDIA GeForce RTX 9090", None),
        ("NVIDIA RTX 6000", None),
        ("AMD Radeon RX 7900 XTX", None),
    ],
)
def test_a_driver_s_name_finds_its_row_and_a_stranger_none(spelled, name):
    found = find_gpu(spelled)
    assert (found and found.name) == name


def test_a_card_of_two_sizes_is_told_by_its_memory_and_taken_small_without():
    assert find_gpu("NVIDIA GeForce RTX 3060").name == "RTX 3060 8 GB"
    assert find_gpu("NVIDIA GeForce RTX 3060", 12.6e9).name == "RTX 3060 12 GB"
    assert find_gpu("RTX 5060 Ti", 17.1e9).name == "RTX 5060 Ti 16 GB"
    assert find_gpu("3080").name == "RTX 3080 10 GB"
    assert find_gpu("NVIDIA GeForce RTX 5070 Laptop GPU", 12.8e9).name == "RTX 5070 Laptop 12 GB"
    assert pick_gpu("RTX 3080", memory=12).name == "RTX 3080 12 GB"


@pytest.mark.parametrize(
    ("name", "taken", "others"),
    [
        ("RTX 3060", "RTX 3060 8 GB", ["RTX 3060 12 GB"]),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10 GB", ["RTX 3080 12 GB"]),
        ("2060", "RTX 2060 6 GB", ["RTX 2060 12 GB"]),
        ("rtx 4060 ti", "RTX 4060 Ti 8 GB", ["RTX 4060 Ti 16 GB"]),
        ("5060 Ti", "RTX 5060 Ti 8 GB", ["RTX 5060 Ti 16 GB"]),
        ("RTX 5070 Laptop GPU", "RTX 5070 Laptop 8 GB", ["RTX 5070 Laptop 12 GB"]),
        ("RTX 3080 Laptop", "RTX 3080 Laptop 8 GB", ["RTX 3080 Laptop 16 GB"]),
        ("RTX 3050 Laptop", "RTX 3050 Laptop 4 GB", ["RTX 3050 Laptop 6 GB"]),
        ("RTX PRO 5000 Blackwell", "RTX PRO 5000 Blackwell 48 GB", ["RTX PRO 5000 Blackwell 72 GB"]),
        ("H100", "H100 80 GB", ["H100 PCIe (80 GB)", "H100 NVL (94 GB)"]),
        ("A100", "A100 40 GB", ["A100 80 GB", "A100 80 GB PCIe (80 GB)"]),
        ("Jetson AGX Orin", "Jetson AGX Orin 32 GB", ["Jetson AGX Orin 64 GB"]),
    ],
)
def test_a_name_of_several_cards_is_said_to_be_one(name, taken, others):
    found = pick_gpu(name)
    assert found.name == taken and f"these are the numbers of {taken}" in found.choice
    assert all(other in found.choice for other in others)
    assert not pick_gpu(name, memory=12).choice, "the memory tells which"


def test_no_name_of_the_table_is_silently_one_of_several():
    """Each name without its size is either a card's own or said to be that of several."""
    bare = {re.sub(r" (\d+ GB|PCIe)", "", name) for name in GPUS} - {*GPUS}
    alone = {name for name in bare if not pick_gpu(name).choice}
    assert alone == {"Jetson Orin NX"}, "sold in one size here"
    assert not any(pick_gpu(name).choice for name in GPUS)


def test_an_unknown_number_is_answered_with_the_names_that_have_it():
    with pytest.raises(NoGpuError, match="'RTX 6000' is not in the table.*Quadro RTX 6000.*set `memory_gib`"):
        pick_gpu("RTX 6000")


@pytest.mark.parametrize("name", GPUS)
def test_every_name_of_the_table_finds_its_own_row(name):
    assert find_gpu(name) is GPUS[name]
    assert find_gpu(f"NVIDIA GeForce {name}") is GPUS[name]


def test_every_gpu_has_a_source_and_either_rates_that_agree_with_its_capability_or_a_reason_for_none():
    assert len(GPUS) > 120
    for gpu in GPUS.values():
        assert gpu.source.startswith("https://") and gpu.memory > 3.5 * GIB, gpu.name
        if not gpu.known:
            assert gpu.note and gpu.bf16 is None and gpu.fp8 is None and gpu.fp4 is None, gpu.name
            continue
        assert (gpu.fp8 is not None) == (gpu.capability >= (8, 9)), gpu.name
        assert (gpu.fp4 is not None) == (gpu.capability >= (10, 0)), gpu.name
        assert 2 == pytest.approx((gpu.fp8 or 2 * gpu.bf16) / gpu.bf16, rel=0.02), gpu.name
        assert 0 < gpu.bandwidth <= 8e12 and 10e12 < gpu.bf16 <= 2.5e15, gpu.name


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("RTX 5090", (209.5, 419, 1676)),
        ("RTX 5080", (112.6, 225.1, 900.4)),
        ("RTX 5070 Ti", (87.9, 175.8, 703.1)),
        ("RTX 4090", (165.2, 330.3, None)),
        ("RTX 3090", (71, None, None)),
    ],
)
def test_rates_from_sms_and_clocks_are_those_that_the_whitepapers_print(name, rates):
    gpu = GPUS[name]
    for found, printed in zip((gpu.bf16, gpu.fp8, gpu.fp4), rates, strict=True):
        assert found == (printed and pytest.approx(printed * 1e12, rel=0.003))


@pytest.mark.parametrize(
    ("name", "what", "sparse"),
    [
        ("RTX A6000", "bf16", 309.7),
        ("RTX A5000", "bf16", 222.2),
        ("RTX A4500", "bf16", 189.2),
        ("RTX A4000", "bf16", 153.4),
        ("RTX 6000 Ada", "fp8", 1457.0),
        ("RTX 5000 Ada", "fp8", 1044.4),
        ("RTX 4000 SFF Ada", "fp8", 306.8),
        ("RTX PRO 6000 Blackwell Max-Q", "fp4", 3511),
        ("RTX PRO 5000 Blackwell 48 GB", "fp4", 2064),
        ("RTX PRO 4500 Blackwell", "fp4", 1687),
        ("RTX PRO 4000 Blackwell SFF", "fp4", 770),
        ("H100 NVL", "bf16", 1671),
        ("H200 NVL", "fp8", 3341),
        ("H200", "fp8", 3958),
        ("GB300", "bf16", 5000),
        ("B200", "fp4", 18_000),
        ("Jetson AGX Thor", "fp4", 2070),
        ("Jetson T4000", "fp4", 1200),
    ],
)
def test_a_rate_is_half_of_the_sparse_one_that_the_sheet_prints(name, what, sparse):
    assert getattr(GPUS[name], what) == pytest.approx(sparse / 2 * 1e12, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [("B300", 7700), ("B200", 7700), ("GB300", 8000), ("GB200", 8000), ("RTX 2000 Ada", 224), ("H100 PCIe", 2000),
     ("RTX PRO 6000 Blackwell Server", 1597), ("RTX 5090", 1792), ("RTX 4070", 504), ("L4", 300)],
)  # fmt: skip
def test_a_bandwidth_is_that_of_nvidia_s_sheet(name, bandwidth):
    assert GPUS[name].bandwidth == bandwidth * 1e9


def test_a_card_without_a_figure_of_nvidia_s_has_memory_and_the_reason_and_no_times():
    gpu = GPUS["RTX 5880 Ada"]
    assert not gpu.known and gpu.bandwidth is None and "bandwidth" in gpu.note


def test_what_the_owners_of_each_generation_ask_about_is_there():
    asked = "RTX 5070|RTX 5060|RTX 4080|RTX 4070|RTX 4060|RTX 3070|RTX 3050|RTX 2080 Ti|RTX 2070|RTX 2060|RTX A4000"
    asked += "|RTX PRO 5000 Blackwell|RTX PRO 4500 Blackwell|L4|L40|A10|A40|H100|H200|B200|GB200|GB10|Jetson AGX Thor"
    assert [name for name in asked.split("|") if find_gpu(name) is None] == []


def test_an_unlisted_gpu_is_refused_with_the_way_out_and_taken_with_its_numbers():
    with pytest.raises(NoGpuError, match="'RTX 9999' is not in the table of GPUs; choose a card.*set `memory_gib`"):
        pick_gpu("RTX 9999")
    memory_only = pick_gpu("RTX 9999", memory=16)
    assert not memory_only.known and memory_only.memory == pytest.approx(16 * GIB, rel=0.02)
    assert pick_gpu("RTX 9999", memory=16, bandwidth=700, tflops=90).known
    faster = pick_gpu("5090", tflops=419)
    assert (faster.bf16, faster.fp8, faster.source.endswith("values of the user")) == (419e12, 838e12, True)
    with pytest.raises(ValueError, match="must be above 0"):
        pick_gpu("5090", bandwidth=-1)


def test_the_card_in_the_machine_is_told_from_its_twin_by_the_memory_it_shows(monkeypatch):
    shown = types.SimpleNamespace(name="NVIDIA GeForce RTX 5060 Ti", total_memory=17_000_000_000, major=12, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: shown)
    assert (detect_gpu().name, detect_gpu().memory) == ("RTX 5060 Ti 16 GB", 17e9)
