# SPDX-License-Identifier: Apache-2.0
"""Launch profiles: what is recommended to whom, on what evidence, and nothing that the host would not take."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_video.host.doctor.facts import GIB, Fact
from nvfp4_video.host.doctor.profiles import FOLKLORE, SWITCHES_DYNAMIC_OFF, launch_profile

FLAGS = frozenset(
    (*FOLKLORE, *SWITCHES_DYNAMIC_OFF, "--reserve-vram", "--vram-headroom", "--disable-pinned-memory", "--lowvram")
)
EVIDENCE = re.compile(r"(measured by us, \w+|reported, thread \d{5} \(.+\).*)")
HEALTHY = {
    "comfyui_version": "0.33.0",
    "known_flags": FLAGS,
    "launch_flags": [],
    "gpu_name": "NVIDIA GeForce RTX 5090",
    "gpu_memory": 32 * GIB - 10**9,
    "unified_memory": False,
    "dynamic_vram": True,
    "async_offload_streams": 2,
    "prefetch_crash": False,
}
SPARK = {"gpu_name": "NVIDIA GB10", "gpu_memory": 121 * GIB, "unified_memory": True}
ORIN = {"gpu_name": "Orin", "gpu_memory": 30 * GIB, "unified_memory": True}


def facts(**changes: object) -> dict[str, Fact]:
    """A healthy host with a 32 GB card, but for these values; None is unknown."""
    values = HEALTHY | changes
    return {name: Fact(name, "", name, value, f"unknown: {name}", "test") for name, value in values.items()}


def flags(**changes: object) -> list[str]:
    return [flag for flag, _, _ in launch_profile(facts(**changes)).flags]


@pytest.mark.parametrize(
    ("gibibytes", "name", "expected"),
    [
        (139, "40 GB and more", []),
        (47.5, "40 GB and more", []),
        (31.4, "32 GB", []),
        (23.5, "24 GB", ["--vram-headroom 1"]),
        (15.9, "less than 20 GB", ["--vram-headroom 0.5"]),
        (7.6, "less than 20 GB", ["--vram-headroom 0.5"]),
    ],
)
def test_a_healthy_host_needs_few_flags_on_any_card(gibibytes, name, expected):
    profile = launch_profile(facts(gpu_memory=int(gibibytes * GIB)))
    assert (profile.name, [flag for flag, _, _ in profile.flags]) == (name, expected)
    assert profile.command == " ".join(["python main.py", *expected])


def test_unified_memory_keeps_a_reserve_and_is_told_about_the_page_cache():
    profile = launch_profile(facts(**SPARK))
    assert (profile.name, profile.command) == ("unified memory", "python main.py --reserve-vram 16")
    assert "page cache" in profile.note and "--release FILE" in profile.note
    assert "scaled" not in profile.flags[0][2]


def test_a_small_unified_memory_keeps_a_smaller_reserve_and_says_that_it_was_scaled():
    profile = launch_profile(facts(**ORIN))
    assert [flag for flag, _, _ in profile.flags] == ["--reserve-vram 4", "--disable-dynamic-vram"]
    assert "scaled from 16 of 121 GiB" in profile.flags[0][2]


def test_flags_that_nobody_recommends_are_explained_where_the_host_knows_them():
    known = FLAGS - {"--disable-pinned-memory"}
    profile = launch_profile(facts(known_flags=known | {"--disable-comfy-compiler", "--offline"}))
    assert [flag for flag, _ in profile.others] == ["--disable-comfy-compiler", "--offline"]
    assert "`aimdo memory compile error`, and for nothing else" in profile.others[0][1]
    assert "--disable-comfy-compiler" not in profile.command + profile.note
    assert launch_profile(facts(known_flags=known)).others == ()


def test_a_host_without_its_compiler_is_told_when_that_is_worth_it():
    note = launch_profile(facts(launch_flags=["--disable-comfy-compiler"])).note
    assert "leave that out, unless prompts stop with `aimdo memory compile error`" in note


def test_on_a_fixed_host_the_two_folklore_flags_are_said_to_be_needless():
    for hardware in ({}, SPARK, {"gpu_memory": 8 * GIB}, {"gpu_memory": None}):
        profile = launch_profile(facts(**hardware))
        assert "`--disable-async-offload --disable-dynamic-vram` are not needed" in profile.note
        assert not {flag for flag, _, _ in profile.flags} & set(FOLKLORE)


def test_a_vulnerable_host_gets_the_one_flag_that_was_measured_and_two_ways_without():
    profile = launch_profile(facts(prefetch_crash=True))
    assert profile.command == "python main.py --disable-async-offload"
    assert profile.flags[0][2] == "measured by us, H200"
    assert "13703" in profile.note and "NVFP4LaunchGuard" in profile.note
    assert "are not needed" not in profile.note


def test_a_vulnerable_host_that_was_started_with_the_flag_keeps_it():
    started = {"async_offload_streams": 0, "launch_flags": ["--disable-async-offload"]}
    assert flags(prefetch_crash=True, **started) == ["--disable-async-offload"]
    assert "leave that out" not in launch_profile(facts(prefetch_crash=True, **started)).note


def test_a_vulnerable_host_without_dynamic_vram_is_not_in_danger():
    profile = launch_profile(facts(prefetch_crash=True, dynamic_vram=False, gpu_memory=80 * GIB))
    assert profile.flags == ()
    assert "cannot happen on this machine" in profile.note


def test_on_a_vulnerable_host_the_line_stays_safe_without_the_flags_it_drops():
    assert flags(prefetch_crash=True, dynamic_vram=False, launch_flags=list(FOLKLORE), async_offload_streams=0) == [
        "--disable-async-offload"
    ]


def test_a_system_on_a_chip_that_needs_dynamic_vram_off_is_not_told_the_opposite():
    note = launch_profile(facts(**ORIN, launch_flags=["--disable-dynamic-vram"], dynamic_vram=False)).note
    assert "`--disable-async-offload` is not needed" in note
    assert "leave that out" not in note


def test_where_the_crash_is_unknown_the_note_says_so_and_why():
    profile = launch_profile(facts(prefetch_crash=None))
    assert "is not known: prefetch_crash." in profile.note
    assert not {flag for flag, _, _ in profile.flags} & set(FOLKLORE)


def test_needless_flags_of_the_running_host_are_named():
    note = launch_profile(facts(launch_flags=[*FOLKLORE, "--lowvram"], dynamic_vram=False)).note
    assert "It was started with --disable-async-offload and --disable-dynamic-vram: leave that out." in note
    note = launch_profile(facts(launch_flags=["--highvram"], dynamic_vram=False)).note
    assert "started with --highvram, which switches DynamicVRAM off" in note


def test_no_advice_rests_on_a_version_number():
    versions = ("0.29.0", "0.30.1", "0.33.0", None)
    assert len({launch_profile(facts(comfyui_version=version)) for version in versions}) == 1


def test_a_workaround_for_one_error_is_explained_and_not_recommended():
    profile = launch_profile(facts())
    assert "`HostBuffer.read_file_slice failed`" in dict(profile.others)["--disable-pinned-memory"]
    assert "--disable-pinned-memory" not in profile.command


def test_a_host_without_dynamic_vram_gets_other_advice_than_one_with_or_one_whose_flags_switched_it_off():
    assert flags(dynamic_vram=False) == ["--reserve-vram 8"]
    assert flags(dynamic_vram=False, launch_flags=["--gpu-only"]) == []
    profile = launch_profile(facts(dynamic_vram=False, gpu_memory=24 * GIB))
    assert profile.flags == ()
    assert "DynamicVRAM is off here" in profile.note


def test_a_flag_that_the_host_does_not_know_is_not_recommended():
    old = FLAGS - {"--vram-headroom", "--disable-async-offload"}
    assert flags(gpu_memory=24 * GIB, known_flags=old) == []
    assert flags(prefetch_crash=True, known_flags=old) == []


def test_without_comfyui_nothing_is_recommended_and_the_note_says_why():
    profile = launch_profile(facts(**dict.fromkeys(HEALTHY), **{}))
    assert (profile.command, profile.flags) == ("python main.py", ())
    assert "no flag could be checked" in profile.note


def test_no_facts_at_all_make_a_profile_too():
    assert launch_profile({}).command == "python main.py"


TRUTH = st.sampled_from([True, False, None])


@given(
    memory=st.one_of(st.none(), st.integers(2 * GIB, 200 * GIB)),
    unified=TRUTH,
    name=st.sampled_from([None, "NVIDIA GB10", "Orin", "NVIDIA GeForce RTX 4090"]),
    dynamic=TRUTH,
    crash=TRUTH,
    streams=st.sampled_from([None, 0, 2]),
    known=st.one_of(st.none(), st.frozensets(st.sampled_from(sorted(FLAGS)))),
    started=st.one_of(st.none(), st.lists(st.sampled_from(sorted(FLAGS)), unique=True)),
    version=st.sampled_from([None, "0.5.1", "0.20.1", "0.30.0", "0.33.0"]),
)
def test_every_flag_is_known_to_the_host_and_has_a_reason_and_its_evidence(
    memory, unified, name, dynamic, crash, streams, known, started, version
):
    profile = launch_profile(
        facts(
            gpu_memory=memory, unified_memory=unified, gpu_name=name, dynamic_vram=dynamic, prefetch_crash=crash,
            async_offload_streams=streams, known_flags=known, launch_flags=started, comfyui_version=version,
        )  # fmt: skip
    )
    for flag, why, evidence in profile.flags:
        assert flag.split()[0] in (known or ())
        assert why
        assert EVIDENCE.fullmatch(evidence), evidence
    assert profile.command.split("python main.py")[1].split() == " ".join(f[0] for f in profile.flags).split()
    names = [flag.split()[0] for flag, _, _ in profile.flags]
    assert len(set(names)) == len(names)
    assert profile.note and profile.note[-1] == "."
    assert (" not needed: this ComfyUI" in profile.note) == (crash is False)
