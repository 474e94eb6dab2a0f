# SPDX-License-Identifier: Apache-2.0
"""Facts about a host: what is asked, what an answer means, and that no host, however odd, makes it fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.utils
import pytest
import server
import torch
from nvfp4_video.host.doctor import machine, probe
from nvfp4_video.host.doctor.facts import GIB, Unknown, why
from nvfp4_video.tests.support.modules import offer, withhold

ROOT = Path(__file__).resolve().parents[3]
# What guard.py, profiles.py and the web panel read.
AGREED = {
    *("comfyui_version", "frontend_version", "kitchen_version", "aimdo_version", "torch_version", "torch_cuda"),
    *("triton_version", "capability", "gpu_name", "gpu_memory", "unified_memory", "async_offload_streams"),
    *("dynamic_vram", "compiler", "prefetch_crash", "ltxav_needs_audio", "kitchen_backends", "nvfp4_compute"),
    *("memory_available", "page_cache", "pinned_memory", "mmap", "launch_flags"),
}
ALONE = """
import json, sys, types
package = types.ModuleType("nvfp4_video")
package.__path__ = [sys.argv[1]]
sys.modules["nvfp4_video"] = package
from nvfp4_video.host.doctor import machine, probe
from nvfp4_video.host.doctor.facts import GIB, Unknown, why
imported = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "comfy", "comfy_kitchen", "triton"})
facts = probe.probe()
print(json.dumps([imported, {fact.id: [fact.known, fact.text, fact.source] for fact in facts.values()}]))
"""


@pytest.fixture
def not_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.PromptServer, "instance", None)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.PromptServer, "instance", server.PromptServer(None))


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str = "RTX 5090", free: int = 30, **own: object) -> None:
    """Give this process a GPU, as far as its properties go."""
    properties = {"name": name, "major": 12, "minor": 0, "total_memory": 32 * GIB, "is_integrated": 0} | own
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, properties["total_memory"]))


def test_a_process_without_comfyui_learns_what_it_can_and_why_the_rest_is_unknown():
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(ROOT)], capture_output=True, text=True, timeout=120, check=True
    )
    imported, facts = json.loads(done.stdout)
    assert imported == []
    assert AGREED <= facts.keys()
    known, text, _ = facts["torch_version"]
    assert known and text == torch.__version__
    for fact_id in ("comfyui_version", "prefetch_crash", "dynamic_vram", "async_offload_streams", "mmap"):
        assert facts[fact_id][:2] == [False, "unknown: there is no ComfyUI in this process"]
    assert all(source for _, _, source in facts.values())
    assert "triton" in facts["kitchen_backends"][1] or not facts["kitchen_backends"][0]


def test_ids_are_those_agreed_on_and_an_unknown_fact_says_so():
    facts = probe.probe()
    assert AGREED <= facts.keys()
    assert all(fact.id == fact_id for fact_id, fact in facts.items())
    assert all(fact.text.startswith("unknown: ") == (not fact.known) for fact in facts.values())


@pytest.mark.parametrize(
    ("streams", "option", "expected"),
    [(2, None, 2), (0, None, 0), (1, False, 0), (2, True, 2), (1, 1, 1)],
    ids=["default", "off", "off before 0.3.76", "on before 0.3.76", "one stream asked for"],
)
def test_offload_streams_are_counted_as_the_host_counts_them(monkeypatch, running, streams, option, expected):
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", streams)
    offer(monkeypatch, "comfy.cli_args", args=SimpleNamespace(async_offload=option))
    fact = probe.probe()["async_offload_streams"]
    assert (fact.value, fact.text) == (expected, f"on, {expected} streams" if expected else "off")


def test_dynamic_vram_is_off_only_once_main_py_has_decided(monkeypatch, not_running):
    offer(monkeypatch, "comfy.memory_management", aimdo_enabled=False)
    assert probe.probe()["dynamic_vram"].value is None
    monkeypatch.setattr(server.PromptServer, "instance", server.PromptServer(None))
    assert probe.probe()["dynamic_vram"].value is False


@pytest.mark.parametrize(
    ("memory", "expected"),
    [({"aimdo_enabled": True}, True), ({"aimdo_allocator": object()}, True), ({"aimdo_allocator": None}, False)],
    ids=["since 0.15", "0.12 to 0.14, on", "0.12 to 0.14, off"],
)
def test_dynamic_vram_is_read_where_each_host_keeps_it(monkeypatch, running, memory, expected):
    offer(monkeypatch, "comfy.memory_management", **memory)
    assert probe.probe()["dynamic_vram"].value is expected


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ({}, True, "on"),
        ({"disable_cuda_graphs": True}, True, "without CUDA graphs (--disable-cuda-graphs)"),
        ({"assert_graph_breaks": True}, True, "(--assert-graph-breaks)"),
        ({"disable_comfy_compiler": True, "disable_cuda_graphs": True}, False, "off, by --disable-comfy-compiler"),
        ({"aimdo_enabled": False}, False, "off, it needs DynamicVRAM"),
        ({"device": "cpu"}, False, "off, it needs CUDA and ComfyUI computes on cpu here"),
        ({"says": False}, False, "off, ComfyUI does not say why"),
        ({"names": ()}, False, "no, this ComfyUI has none"),
    ],
)
def test_the_compiler_is_on_or_says_why_not(monkeypatch, running, change, value, words):
    names = ("malloc_graph_enabled",)
    state = {"device": "cuda", "says": True, "aimdo_enabled": True, "names": names} | change
    offer(monkeypatch, "comfy.model_prefetch", **{name: lambda device: state["says"] for name in state["names"]})
    offer(monkeypatch, "comfy.memory_management", aimdo_enabled=state["aimdo_enabled"])
    offer(monkeypatch, "comfy.cli_args", args=SimpleNamespace(**change))
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(state["device"]))
    compiler = probe.probe()["compiler"]
    assert compiler.value is value and words in compiler.text


def test_a_host_without_the_prefetch_has_no_compiler_and_one_not_started_does_not_know(monkeypatch, not_running):
    withhold(monkeypatch, "comfy.model_prefetch")
    assert probe.probe()["compiler"].value is False
    offer(monkeypatch, "comfy.model_prefetch", malloc_graph_enabled=lambda device: True)
    offer(monkeypatch, "comfy.cli_args", args=SimpleNamespace())
    offer(monkeypatch, "comfy.memory_management", aimdo_enabled=False)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
    assert "its main.py decides" in probe.probe()["compiler"].text


def test_a_host_before_dynamic_vram_has_it_off(monkeypatch, not_running):
    withhold(monkeypatch, "comfy.memory_management")
    assert probe.probe()["dynamic_vram"].value is False


def command_line(*words: str) -> dict[str, object]:
    """A small cousin of the host's comfy.cli_args after it has read ``words``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base-directory")
    parser.add_argument("--reserve-vram", type=float)
    parser.add_argument("--lowvram", action="store_true")
    parser.add_argument("--async-offload", nargs="?", const=2, type=int)
    parser.add_argument("--fast-disk", action="store_true")
    parser.add_argument("--fast", nargs="*")
    parser.add_argument("--front-end-version", default="someone/frontend@latest")
    return {"parser": parser, "args": parser.parse_args(words)}


def test_launch_flags_are_those_typed_without_paths_and_ports(monkeypatch, running):
    words = "--port 9000 --base-dir=/srv/secret --reserve-vram 0 --lowvram --async-offload --fast".split()
    offer(monkeypatch, "comfy.cli_args", **command_line(*words))
    monkeypatch.setattr(sys, "argv", ["main.py", *words, "--unheard-of"])
    fact = probe.probe()["launch_flags"]
    expected = ["--port", "--base-directory", "--reserve-vram 0.0", "--lowvram", "--async-offload 2", "--fast"]
    assert fact.value == expected
    assert fact.text == " ".join(expected)
    assert "--fast-disk" in probe.probe()["known_flags"].value


def test_what_the_host_sets_for_itself_is_no_launch_flag(monkeypatch, running):
    contents = command_line()
    contents["args"].lowvram = True
    offer(monkeypatch, "comfy.cli_args", **contents)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    fact = probe.probe()["launch_flags"]
    assert (fact.value, fact.text) == ([], "none")


def test_a_host_that_was_not_started_has_no_known_launch_flags(monkeypatch, not_running):
    offer(monkeypatch, "comfy.cli_args", **command_line())
    assert not probe.probe()["launch_flags"].known


def test_a_front_end_chosen_by_a_flag_is_not_the_installed_package(monkeypatch):
    offer(monkeypatch, "comfy.cli_args", **command_line("--front-end-version", "someone/frontend@1.2.3"))
    assert probe.probe()["frontend_version"].text.startswith("unknown: a launch flag")


KITCHEN = {
    "cuda": {"available": True, "disabled": True, "unavailable_reason": None},
    "triton": {"available": True, "disabled": True, "unavailable_reason": None},
    "eager": {"available": True, "disabled": False, "unavailable_reason": None},
    "hip": {"available": False, "disabled": False, "unavailable_reason": "/opt/lib/libhip.so: not found"},
}


def kitchen(state: dict[str, dict], capable: str = "eager") -> SimpleNamespace:
    """comfy_kitchen with a registry in this state."""
    registry = SimpleNamespace(list_backends=lambda: state, get_capable_backend=lambda name: capable)
    return SimpleNamespace(registry=registry)


def test_each_of_kitchen_s_backends_is_on_or_says_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen(KITCHEN))
    fact = probe.probe()["kitchen_backends"]
    assert fact.value["eager"] is True
    assert "CUDA 13.0" in fact.value["cuda"] and "12.8" in fact.value["cuda"]
    assert "--enable-triton-backend" in fact.value["triton"]
    assert fact.value["hip"] == "its library cannot be loaded"
    assert "eager on" in fact.text and "cuda off (" in fact.text


@pytest.mark.parametrize(
    ("supported", "capable", "value"),
    [
        (True, "cuda", "fp4"),
        (True, "eager", "fp4 eager"),
        (False, "cuda", "emulated cuda"),
        (False, "eager", "emulated eager"),
    ],
)
def test_how_the_host_computes_follows_from_its_gpu_and_kitchen_s_backends(monkeypatch, supported, capable, value):
    on_gpu(monkeypatch)
    monkeypatch.setattr(comfy.model_management, "supports_nvfp4_compute", lambda device=None: supported)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen(KITCHEN, capable))
    assert probe.probe()["nvfp4_compute"].value == value


def test_a_host_without_kitchen_or_nvfp4_says_so(monkeypatch):
    withhold(monkeypatch, "comfy_kitchen")
    assert probe.probe()["kitchen_backends"].text == "unknown: there is no module comfy_kitchen"
    monkeypatch.delattr(comfy.model_management, "supports_nvfp4_compute")
    assert probe.probe()["nvfp4_compute"].value == "none"


def test_a_host_on_the_cpu_has_no_gpu_facts():
    facts = probe.probe()
    assert {facts[name].text for name in ("gpu_name", "capability", "gpu_memory", "unified_memory")} == {
        "unknown: ComfyUI computes on the CPU here"
    }


@pytest.mark.parametrize(
    ("properties", "unified"),
    [
        ({}, False),
        ({"is_integrated": 1}, True),
        ({"name": "NVIDIA GB10"}, True),
        ({"name": "NVIDIA GB10", "is_integrated": 1}, True),
        ({"name": "NVIDIA GB200"}, False),
        ({"name": "NVIDIA GB100"}, False),
    ],
)
def test_unified_memory_is_told_by_the_driver_or_the_name(monkeypatch, properties, unified):
    on_gpu(monkeypatch, **properties)
    assert probe.probe()["unified_memory"].value is unified


@pytest.mark.parametrize(
    ("name", "hip", "maker"),
    [("NVIDIA GeForce RTX 5090", None, "NVIDIA"), ("AMD Radeon RX 7900 XTX", "7.14", "AMD"),
     ("AMD Radeon RX 6800 [ZLUDA]", None, "AMD")],
)  # fmt: skip
def test_an_amd_gpu_is_told_from_one_of_nvidia_and_has_no_compute_capability(monkeypatch, name, hip, maker):
    on_gpu(monkeypatch, name=name, gcnArchName="gfx1100")
    monkeypatch.setattr(torch.version, "hip", hip)
    found = probe.probe()
    assert (found["gpu_maker"].value, found["gpu_name"].value) == (maker, name)
    assert found["capability"].value == ((12, 0) if maker == "NVIDIA" else None)
    assert "gfx1100" in found["capability"].text or maker == "NVIDIA"


@pytest.mark.parametrize(
    ("kind", "maker"), [("xpu", "Intel"), ("mps", "Apple"), ("cpu", "CPU"), ("privateuseone", "privateuseone")]
)
def test_a_device_that_is_not_cuda_s_has_a_maker_and_none_of_cuda_s_figures(monkeypatch, kind, maker):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: SimpleNamespace(type=kind))
    found = probe.probe()
    assert found["gpu_maker"].value == maker
    assert not any(found[name].known for name in ("gpu_name", "capability", "gpu_memory", "unified_memory"))


@pytest.mark.parametrize(
    ("release", "under"),
    [("5.15.167.4-microsoft-standard-WSL2", True), ("4.4.0-19041-Microsoft", True), ("6.8.0-45-generic", False)],
)
def test_wsl_is_told_by_its_kernel(monkeypatch, release, under):
    monkeypatch.setattr(machine.platform, "release", lambda: release)
    assert ("under WSL" in probe.probe()["platform"].value) is under


def test_on_unified_memory_the_system_s_figure_stands_beside_cuda_s(monkeypatch, tmp_path):
    # Figures of a GB10 after a 60 GB file was written, in the unit of /proc/meminfo.
    figures = {"MemTotal": 121.7, "MemFree": 41.5, "MemAvailable": 115.7, "Cached": 72.6}
    meminfo = tmp_path / "meminfo"
    lines = [f"{name}:{int(gigabytes * 2**20):>16} kB" for name, gigabytes in figures.items()]
    meminfo.write_text("\n".join([*lines, "HugePages_Total:       0", ""]))
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    on_gpu(monkeypatch, name="NVIDIA GB10", free=41, is_integrated=1, total_memory=121 * GIB)
    facts = probe.probe()
    assert facts["memory_available"].text == "115.7 GiB of 121.7 GiB"
    assert facts["memory_available"].value == int(115.7 * 2**20) * 1024
    assert facts["page_cache"].value == int(72.6 * 2**20) * 1024
    assert facts["gpu_memory"].text == "121.0 GiB, 41.0 GiB free, page cache counted as used (CUDA)"


def test_a_system_without_meminfo_has_no_page_cache_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "absent")
    available = SimpleNamespace(available=3 * GIB, total=8 * GIB)
    offer(monkeypatch, "psutil", virtual_memory=lambda: available)
    facts = probe.probe()
    assert facts["memory_available"].text == "3.0 GiB of 8.0 GiB"
    assert facts["memory_total"].value == 8 * GIB
    assert not facts["page_cache"].known


def test_how_this_pack_computes_is_asked_of_its_own_kernels(monkeypatch):
    on_gpu(monkeypatch)
    fact = probe.probe()["own_backend"]
    assert fact.value in ("triton", "torch"), fact.text


def test_pinned_memory_and_mapping_are_what_the_host_has_set(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 12.5 * GIB, raising=False)
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True, raising=False)
    facts = probe.probe()
    assert (facts["pinned_memory"].value, facts["pinned_memory"].text) == (True, "on, up to 12.5 GiB")
    assert facts["mmap"].value is False
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", -1, raising=False)
    assert probe.probe()["pinned_memory"].value is False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "there is no module x"),
        (ModuleNotFoundError("No module", name="/srv/custom_nodes/pack.part"), "there is no module pack.part"),
        (ImportError("cannot import y (/srv/comfy/z.py)", name="comfy.z"), "ImportError in comfy.z"),
        (FileNotFoundError("/srv/secret/file"), "FileNotFoundError"),
        (OSError(r"C:\Users\somebody\x"), "OSError"),
        (RuntimeError("no driver\n found"), "RuntimeError: no driver found"),
        (ValueError(), "ValueError"),
        (Unknown("nobody knows"), "nobody knows"),
    ],
)
def test_reasons_are_short_and_hold_no_paths(error, words):
    assert why(error) == words
