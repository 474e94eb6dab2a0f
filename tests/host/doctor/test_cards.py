# SPDX-License-Identifier: Apache-2.0
"""Owners of other GPUs than NVIDIA's get advice of their own, or none; and what small memory and WSL mean."""

from __future__ import annotations

import pytest
from nvfp4_video.host.doctor import cards
from nvfp4_video.host.doctor.facts import GIB, Fact
from nvfp4_video.host.doctor.profiles import FOLKLORE, launch_profile

FLAGS = frozenset((*FOLKLORE, "--disable-pinned-memory", "--vram-headroom", "--reserve-vram", "--cpu", "--fast-disk"))
NVIDIAS = ("leave that out", "matters more than any flag", "not needed", "No flag is needed", "CUDA 13", "GB10")
AMDS = "AMD GPU"
RADEON = {"gpu_maker": "AMD", "gpu_name": "AMD Radeon RX 7900 XTX", "gpu_memory": 24 * GIB}


def facts(**changes: object) -> dict[str, Fact]:
    values: dict[str, object] = {
        "known_flags": FLAGS, "launch_flags": [], "gpu_maker": "NVIDIA", "gpu_name": "NVIDIA GeForce RTX 3060",
        "gpu_memory": 12 * GIB, "unified_memory": False, "dynamic_vram": True, "async_offload_streams": 2,
        "prefetch_crash": False, "memory_total": 64 * GIB, "platform": "Linux x86_64",
    }  # fmt: skip
    values |= changes
    return {name: Fact(name, "", name, value, f"unknown: {name}", "test") for name, value in values.items()}


@pytest.mark.parametrize("started", [[], ["--disable-dynamic-vram", "--disable-pinned-memory"]])
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (RADEON, AMDS),
        (RADEON | {"gpu_maker": None}, AMDS),
        (RADEON | {"gpu_name": "AMD Radeon 8060S Graphics", "gpu_memory": 96 * GIB, "unified_memory": True}, AMDS),
        ({"gpu_maker": "Intel", "gpu_name": None, "gpu_memory": None}, "Intel GPU"),
        ({"gpu_maker": "Apple", "gpu_name": None, "gpu_memory": None}, "Apple GPU"),
        ({"gpu_maker": "CPU", "gpu_name": None, "gpu_memory": None}, "no GPU"),
    ],
)
def test_nothing_meant_for_nvidia_s_gpus_is_said_to_owners_of_others(changes, name, started):
    profile = launch_profile(facts(dynamic_vram=False, launch_flags=started, **changes))
    assert (profile.name, profile.command, profile.flags) == (name, "python main.py", ())
    assert not [words for words in NVIDIAS if words in profile.note]
    assert profile.note.endswith(".")


def test_an_amd_owner_is_told_which_flags_others_report_as_a_cure_and_by_whom():
    note = launch_profile(facts(**RADEON)).note
    assert "`--disable-dynamic-vram --disable-pinned-memory --disable-async-offload`" in note
    assert "thread 13730, Radeon RX 7900 XTX" in note and "was not run on GPUs of AMD" in note
    assert "`--disable-dynamic-vram" not in launch_profile(facts(**RADEON, known_flags=frozenset(["--cpu"]))).note


def test_a_cpu_that_was_asked_for_is_told_from_one_that_is_all_there_is():
    asked = {"gpu_maker": "CPU", "gpu_memory": None}
    assert "started with --cpu: leave that out" in launch_profile(facts(**asked, launch_flags=["--cpu"])).note
    assert "--cpu" not in launch_profile(facts(**asked)).note


@pytest.mark.parametrize(
    ("name", "maker"),
    [("NVIDIA GB10", "NVIDIA"), ("Orin", "NVIDIA"), ("Tesla T4", "NVIDIA"), ("AMD Instinct MI300X", "AMD"),
     ("Intel(R) Arc(TM) A770 Graphics", "Intel"), (None, None), (7, None)],
)  # fmt: skip
def test_a_name_tells_the_maker_where_nothing_else_does(name, maker):
    assert cards.maker_of({"gpu_name": name}.get) == maker


@pytest.mark.parametrize(("gpu", "system", "little"), [(12, 16, False), (12, 15, True), (8, 16, True), (24, 8, False)])
def test_where_gpu_and_system_together_are_too_small_the_disk_is_named(gpu, system, little):
    note = launch_profile(facts(gpu_memory=gpu * GIB, memory_total=system * GIB)).note
    assert ("hold together" in note, "--fast-disk" in note) == (little, little)


def test_how_much_memory_a_system_has_is_not_guessed():
    assert "hold together" not in launch_profile(facts(memory_total=None)).note


def test_wsl_is_told_about_its_memory_and_its_disks_and_other_systems_are_not():
    wsl = {"platform": "Linux x86_64 under WSL"}
    assert ".wslconfig" in launch_profile(facts(**wsl)).note
    assert ".wslconfig" not in launch_profile(facts()).note
    assert "WSL has it since 0.33" in launch_profile(facts(**wsl, dynamic_vram=False)).note
    assert "WSL" not in launch_profile(facts(dynamic_vram=False)).note


@pytest.mark.parametrize("flag", ["--bf16-vae", "--fp16-vae"])
def test_a_flag_that_stops_the_audio_encoder_is_named(flag):
    assert f"started with {flag}: ComfyUI's audio VAE" in launch_profile(facts(launch_flags=[flag])).note
    assert "audio VAE" not in launch_profile(facts(launch_flags=["--fp32-vae"])).note
