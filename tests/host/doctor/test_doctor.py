# SPDX-License-Identifier: Apache-2.0
"""The host report, the verdict on a loaded model, the page cache, and the command that shows all three."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import pytest
import torch
from nvfp4_video.host.compute import attention
from nvfp4_video.host.compute.linear import weight_only_operations
from nvfp4_video.host.doctor import page_cache
from nvfp4_video.host.doctor import report as doctor
from nvfp4_video.host.doctor.facts import GIB, Fact

ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages of a file are cached")


def facts(**changes: object) -> dict[str, Fact]:
    values = {"own_backend": "triton", "nvfp4_compute": "emulated eager", "prefetch_crash": False} | changes
    return {
        name: Fact(name, "Group", name, value, f"unknown: {name}" if value is None else f"text of {name}", "test")
        for name, value in values.items()
    }


@dataclass(frozen=True)
class FoundFault:
    """As guard.py's findings are."""

    id: str = "old_cuda"

    def as_dict(self) -> dict:
        words = {"severity": "warning", "title": "It is old.", "why": "Because.", "remedy": "Renew it."}
        return {"id": self.id, **words, "nodes": ["5", "12:3"]}


class Patcher:
    """A loaded model as the host's list of them holds it."""

    def __init__(self, model: torch.nn.Module, loaded: float = 1.0, dynamic: bool = True):
        self.model, self.share, self.dynamic = model, loaded, dynamic

    def is_dynamic(self) -> bool:
        return self.dynamic

    def model_size(self) -> int:
        return 16 * GIB

    def loaded_size(self) -> int:
        return int(self.share * 16 * GIB)


class Loaded:
    def __init__(self, model: Patcher | None):
        self.model = model


class LTXAV(torch.nn.Module):
    """Four NVFP4 Linears, ours or the host's, beside a plain one."""

    def __init__(self, linear: type[torch.nn.Module], **attributes: object):
        super().__init__()
        self.plain = torch.nn.Linear(16, 16)
        self.layers = torch.nn.ModuleList(linear(16, 16) for _ in range(4))
        for layer in self.layers:
            layer.quant_format = "nvfp4"
            vars(layer).update(attributes)


OURS = weight_only_operations(torch.bfloat16, torch.device("cpu")).Linear


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch):
    """loaded(*patchers) -> what the report says about these models."""

    def load(*patchers: Patcher | None, **changes: object) -> list[dict[str, str]]:
        monkeypatch.setattr(
            comfy.model_management, "current_loaded_models", [Loaded(one) for one in patchers], raising=False
        )
        return doctor.models(facts(**changes))

    return load


def test_a_model_of_ours_is_fast_with_triton_and_slow_without(loaded):
    (model,) = loaded(Patcher(LTXAV(OURS)))
    assert (model["name"], model["verdict"]) == ("LTXAV", "fast")
    assert model["text"] == "4 of 5 layers in NVFP4, DynamicVRAM on, 16.0 GiB of 16.0 GiB on the GPU"
    assert "text of own_backend" in model["why"]
    assert loaded(Patcher(LTXAV(OURS)), own_backend="torch")[0]["verdict"] == "slow"
    assert loaded(Patcher(LTXAV(OURS)), own_backend=None)[0]["verdict"] == "unknown"


@pytest.mark.parametrize(
    ("note", "name"),
    [
        ((print, ("/models/unet/a.safetensors", {})), "a.safetensors (LTXAV)"),
        ((print, (["/models/te/a.safetensors", "/models/b.gguf"], None), 0), "a.safetensors + b.gguf (LTXAV)"),
        ((print, (Path("/models/vae/v.safetensors"),)), "v.safetensors (LTXAV)"),
        *((odd, "LTXAV") for odd in (None, (), (print,), (print, ()), (print, {}), (print, (None,)), (print, ([],)))),
    ],
)
def test_a_model_is_called_by_the_files_it_came_from(loaded, note, name):
    patcher = Patcher(LTXAV(OURS))
    patcher.cached_patcher_init = note
    (model,) = loaded(patcher)
    assert model["name"] == name


def test_a_model_without_nvfp4_says_so_and_what_its_layers_are(loaded):
    model = LTXAV(OURS)
    for layer in model.layers:
        layer.quant_format = "float8_e4m3fn"
    (found,) = loaded(Patcher(model))
    assert (found["verdict"], found["why"]) == (
        "none", "there is no NVFP4 weight to dequantize: 4 float8_e4m3fn, 1 not quantized"
    )  # fmt: skip
    assert found["text"].startswith("0 of 5 layers in NVFP4")
    assert "LTXAV: no NVFP4 (0 of 5" in doctor.text(doctor.report(facts()) | {"models": [found]})


def test_a_model_of_the_host_s_loader_is_fast_only_on_fp4_tensor_cores(loaded):
    host = LTXAV(torch.nn.Linear)
    assert loaded(Patcher(host), nvfp4_compute="fp4")[0]["verdict"] == "fast"
    (model,) = loaded(Patcher(host))
    assert model["verdict"] == "slow" and "NVFP4 Model Loader" in model["why"]
    assert loaded(Patcher(host), nvfp4_compute=None)[0]["verdict"] == "unknown"
    (model,) = loaded(Patcher(LTXAV(torch.nn.Linear, _full_precision_mm=True)), nvfp4_compute="fp4")
    assert model["verdict"] == "slow" and "4 layers" in model["why"]


def test_a_lora_computed_in_every_step_is_the_reason_of_a_slow_model(loaded):
    for attributes in ({"weight_function": [abs]}, {"weight_lowvram_function": abs}):
        (model,) = loaded(Patcher(LTXAV(OURS, **attributes)))
        assert model["verdict"] == "slow" and "LoRA" in model["why"] and "4 of 4" in model["why"]


def test_a_lora_beside_packed_weights_leaves_a_model_fast_and_is_told(loaded):
    (model,) = loaded(Patcher(LTXAV(OURS, nvfp4_lora=types.SimpleNamespace(nbytes=500_000_000, packed=False))))
    assert model["verdict"] == "fast"
    assert model["why"].endswith("; a LoRA is computed beside the packed weight in 4 layers, 2.00 GB")
    (model,) = loaded(Patcher(LTXAV(OURS, nvfp4_lora=types.SimpleNamespace(nbytes=750_000_000, packed=True))))
    assert model["why"].endswith("in 4 layers, 3.00 GB, 4 in 8 bits")


def test_a_lora_that_went_the_host_s_way_is_told_with_the_reason(loaded):
    (model,) = loaded(Patcher(LTXAV(OURS, nvfp4_lora_refused="it is a DoRA")))
    assert model["verdict"] == "fast" and "ComfyUI packed a LoRA into 4 layers (it is a DoRA)" in model["why"]
    waiting = {"weight_lowvram_function": abs, "nvfp4_lora_refused": "it is a DoRA"}
    (model,) = loaded(Patcher(LTXAV(OURS, **waiting)))
    assert model["verdict"] == "slow" and model["why"].endswith("(it is a DoRA)") and "4 of 4" in model["why"]


def test_a_model_that_lies_partly_in_system_memory_is_slow_and_one_that_has_not_run_is_not(loaded):
    (model,) = loaded(Patcher(LTXAV(OURS), loaded=0.75, dynamic=False))
    assert model["verdict"] == "slow" and model["why"].startswith("4.0 GiB lie outside")
    assert "DynamicVRAM off" in model["text"]
    assert loaded(Patcher(LTXAV(OURS), loaded=0.0))[0]["verdict"] == "fast"


def test_models_without_nvfp4_dead_ones_and_odd_ones_do_no_harm(loaded):
    class Odd(Patcher):
        def model_size(self):
            raise RuntimeError("at /srv/secret")

    found = loaded(None, Patcher(torch.nn.Linear(4, 4)), Odd(LTXAV(OURS)))
    assert [(model["name"], model["verdict"]) for model in found] == [("Linear", "none"), ("LTXAV", "unknown")]
    assert found[0]["text"].startswith("0 of 1 layers in NVFP4")
    assert found[1]["why"] == "RuntimeError"


def test_a_host_that_keeps_no_list_of_models_has_none(monkeypatch):
    monkeypatch.delattr(comfy.model_management, "current_loaded_models", raising=False)
    assert doctor.models(facts()) == []


def test_the_first_line_of_the_report_counts_findings_and_models():
    plain = doctor.report(facts())
    assert doctor.text(plain | {"models": [], "findings": []}).startswith("nothing found; models: none loaded\n\n")
    findings = [{"severity": severity} for severity in ("error", "warning", "warning")]
    models = [{"verdict": verdict} for verdict in ("fast", "fast", "slow", "unknown", doctor.NO_NVFP4)]
    counted = "2 on the fast path, 1 on a slow path, 1 on an unknown path, 1 without NVFP4"
    found = doctor.headline({"findings": findings, "models": models})
    assert found == f"1 error, 2 warnings found; models: {counted}"


def test_the_report_is_json_of_the_agreed_shape(loaded):
    loaded(Patcher(LTXAV(OURS)))
    report = doctor.report(facts(), [FoundFault()])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report) == ["schema", "facts", "models", "findings", "launch"]
    assert report["schema"] == 1
    assert {tuple(fact) for fact in report["facts"]} == {("id", "group", "label", "text", "known", "source")}
    assert {tuple(model) for model in report["models"]} == {("name", "verdict", "text", "why")}
    assert list(report["launch"]) == ["name", "command", "flags", "note", "others"]
    assert report["findings"] == [FoundFault().as_dict()]


def test_the_report_of_this_process_is_json_and_holds_no_paths():
    text = json.dumps(doctor.report())
    places = {str(ROOT), str(Path.home()), sys.prefix, os.path.dirname(torch.__file__), str(Path.cwd())} - {"/"}
    assert not [place for place in places if place in text]


def test_the_text_has_every_fact_model_finding_and_flag(loaded):
    loaded(Patcher(LTXAV(OURS)))
    launch = {"gpu_memory": 24 * GIB, "known_flags": frozenset({"--vram-headroom"}), "dynamic_vram": True}
    report = doctor.report(facts(**launch), [FoundFault()])
    text = doctor.text(report)
    for fact in report["facts"]:
        assert f"{fact['label']}: {fact['text']}" in text
    for words in ("LTXAV: fast", "warning: It is old.", "Renew it.", "nodes: 5, 12:3", "--vram-headroom 1: "):
        assert words in text
    assert "reported, thread 14396" in text and report["launch"]["note"] in text


@pytest.fixture
def cached_file(tmp_path: Path) -> Path:
    """Sixty-four pages and a byte, all of them in the page cache and on the disk."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(64 * mmap.PAGESIZE + 1))
        file.flush()
        os.fsync(file.fileno())
    path.read_bytes()
    return path


@linux
def test_a_file_just_read_is_in_the_page_cache_to_its_last_byte(cached_file):
    assert page_cache.cached_bytes(cached_file) == 64 * mmap.PAGESIZE + 1


@linux
def test_releasing_a_file_leaves_it_unchanged_and_out_of_the_cache(cached_file):
    content = cached_file.read_bytes()
    done = page_cache.release(cached_file)
    assert (done.size, done.before) == (len(content), len(content))
    if done.after == done.before:
        pytest.skip("this file system keeps its files in memory")
    assert (done.after, done.released) == (0, len(content))
    assert page_cache.cached_bytes(cached_file) == 0
    assert cached_file.read_bytes() == content


@linux
def test_pages_that_a_process_has_mapped_stay(cached_file):
    with cached_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[:: mmap.PAGESIZE]
        assert page_cache.release(cached_file).after > 0


@linux
def test_files_larger_than_one_look_and_empty_ones_are_counted(cached_file, monkeypatch):
    monkeypatch.setattr(page_cache, "_WINDOW", 16 * mmap.PAGESIZE)
    assert page_cache.cached_bytes(cached_file) == 64 * mmap.PAGESIZE + 1
    cached_file.write_bytes(b"")
    assert page_cache.release(cached_file) == page_cache.Released(0, 0, 0)
    assert page_cache.offer(cached_file) == ""


@linux
def test_a_file_of_somebody_else_is_refused_since_linux_would_call_all_of_it_cached(cached_file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: cached_file.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(page_cache.PageCacheError, match=r"model\.safetensors.*only its owner"):
        page_cache.cached_bytes(cached_file)


@linux
def test_after_a_load_the_cached_file_is_offered_for_release(cached_file):
    text = page_cache.offer(cached_file)
    assert "model.safetensors" in text and "doctor --release" in text
    assert str(cached_file.parent) not in text


def test_where_the_cache_cannot_be_asked_the_error_says_so_and_nothing_is_offered(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache.sys, "platform", "win32")
    page_cache._mincore.cache_clear()
    with pytest.raises(page_cache.PageCacheError, match="win32.*only Linux"):
        page_cache.release(tmp_path / "x")
    assert page_cache.offer(tmp_path / "x") == ""


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COMFYUI_", "PYTHON"))}
    command = [sys.executable, str(ROOT), "doctor", *map(str, words)]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=240)


def test_the_command_reports_without_a_comfyui():
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["schema"] == 1 and report["models"] == [] and report["launch"]["flags"] == []
    by_id = {fact["id"]: fact for fact in report["facts"]}
    assert by_id["torch_version"]["text"] == torch.__version__
    assert not by_id["prefetch_crash"]["known"]


@linux
def test_the_command_releases_a_file_and_says_how_much_was_cached(cached_file):
    done = run("--release", cached_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model.safetensors, ") and "were cached" in done.stdout
    record = json.loads(run("--release", cached_file, "--json").stdout)
    assert list(record) == ["file", "size", "before", "after"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "set COMFYUI_PATH"),
        ("{}", "set COMFYUI_PATH"),
    ],
)
def test_a_prompt_that_cannot_be_checked_is_one_line_of_error(tmp_path, content, words):
    prompt = tmp_path / "prompt.json"
    prompt.write_text(content)
    done = run(prompt)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_comfyui_path_is_named(tmp_path):
    done = run(COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 2 and "expected the folder of a ComfyUI" in done.stderr


def test_a_models_attention_is_told_with_what_trials_have_found(monkeypatch):
    found = {number: attention.Trial("a shape", name) for number, name in enumerate(["host", "sdpa", "sdpa"])}
    monkeypatch.setattr(attention, "_trials", found)
    options = {"transformer_options": {attention.OVERRIDE: attention.Attention(attention.AUTO)}}
    patcher = types.SimpleNamespace(model_options=options)
    assert doctor._attention(patcher) == ", attention auto: host for 1 shape, sdpa for 2 shapes"
    options["transformer_options"][attention.OVERRIDE] = print
    assert doctor._attention(patcher) == ""
