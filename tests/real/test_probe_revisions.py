# SPDX-License-Identifier: Apache-2.0
"""The probe inside real ComfyUI checkouts of different ages, against what their source says.

``COMFYUI_REVISIONS`` names the checkouts, separated as in PATH; the host of COMFYUI_PATH is asked in any case.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from nvfp4_video.tests.real import probe_child
from nvfp4_video.tests.real.harness import comfyui_path, comfyui_python, host_environment

NAMED = [Path(name) for name in os.environ.get("COMFYUI_REVISIONS", "").split(os.pathsep) if name]
NONE_NAMED = pytest.param(None, marks=pytest.mark.skip(reason="COMFYUI_REVISIONS names no further checkouts"))


@pytest.fixture(params=["COMFYUI_PATH", *(NAMED or [NONE_NAMED])], ids=lambda one: getattr(one, "name", str(one)))
def checkout(request: pytest.FixtureRequest) -> Path:
    return comfyui_path() if request.param == "COMFYUI_PATH" else request.param.resolve()


@cache
def found_in(checkout: Path) -> dict:
    """What probe_child.py says in this checkout."""
    command = [comfyui_python(checkout), str(Path(probe_child.__file__).resolve())]
    done = subprocess.run(
        command, cwd=checkout, env=host_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(probe_child.MARK)]
    assert lines, f"the host's Python ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(lines[-1].removeprefix(probe_child.MARK))


def source(checkout: Path, name: str) -> str:
    path = checkout / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_the_prefetch_is_vulnerable_where_the_source_waits_without_asking_for_a_stream(checkout):
    prefetch = source(checkout, "comfy/model_prefetch.py")
    waits = re.search(r"\n( +)offload_stream\.wait_stream\(", prefetch)
    asks = re.search(r"\n( +)if offload_stream is not None:\n +offload_stream\.wait_stream\(", prefetch)
    found = found_in(checkout)
    assert found["facts"]["prefetch_crash"][0] is bool(waits and not asks)
    assert found["queues_left"] == 0


def test_ltx2_needs_audio_where_the_source_lets_torch_guess_a_dimension_of_nothing(checkout):
    rotary = source(checkout, "comfy/ldm/lightricks/model.py").partition("def freqs_cis_matrix")[2][:1500]
    expected = "num_attention_heads, -1)" in rotary
    assert found_in(checkout)["facts"]["ltxav_needs_audio"][0] is expected


def test_what_every_host_can_tell_is_known(checkout):
    facts = found_in(checkout)["facts"]
    version = re.search(r'__version__ = "(.+)"', source(checkout, "comfyui_version.py"))[1]
    assert facts["comfyui_version"] == [version, version]
    told = ("torch_version", "async_offload_streams", "pinned_memory", "mmap", "known_flags", "memory_available")
    for fact_id in told:
        assert facts[fact_id][0] is not None, facts[fact_id]
    assert facts["capability"] == [None, "unknown: ComfyUI computes on the CPU here"]
    assert facts["launch_flags"][0] is None  # main.py did not run
    has_dynamic_vram = (checkout / "comfy/memory_management.py").is_file()
    assert facts["dynamic_vram"][0] is (None if has_dynamic_vram else False)


def test_the_known_flags_are_those_of_its_command_line(checkout):
    flags = set(found_in(checkout)["facts"]["known_flags"][0])
    written = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source(checkout, "comfy/cli_args.py")))
    assert written
    assert flags - {"--help"} == written


def test_neither_importing_nor_asking_touches_the_gpu_of_a_host_on_the_cpu(checkout):
    found = found_in(checkout)
    assert found["imported_with_the_probe"] == []
    assert found["cuda_initialised"] is False


def test_the_launch_profile_says_about_the_folklore_flags_what_the_probe_found(checkout):
    found = found_in(checkout)
    note = found["launch_with_nvidia"]["note"]
    assert ("are not needed" in note) == (found["facts"]["prefetch_crash"][0] is False)
    on_the_cpu = found["launch"]
    assert on_the_cpu["flags"] == [] and "ComfyUI computes on the CPU here" in on_the_cpu["note"]
