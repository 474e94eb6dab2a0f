# SPDX-License-Identifier: Apache-2.0
"""What the guard says about a prompt, on which facts, and when it keeps silent."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from nvfp4_video.host.doctor.facts import Fact
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import files as guard_files
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.host.guard.values import schedules
from nvfp4_video.measure import ltx
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.host.guard.test_prompt_graph import PROMPTS
from nvfp4_video.tests.support import containers
from nvfp4_video.tests.support.guard_prompts import DISTILLED, HEALTHY, VULNERABLE, clip, facts, ids, node, only
from safetensors.torch import load_file, save_file

TILED = "VAEDecodeTiled"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A small LTX-2.3 in NVFP4: alone (False), and as a full checkpoint (True)."""
    folder = tmp_path_factory.mktemp("small")
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    files = {full: folder / f"{full}.safetensors" for full in (False, True)}
    for full, path in files.items():
        synthetic.write(path, "comfy_markers", state, config, packed, full=full)
    return files


@pytest.fixture
def models(stub_comfy: types.ModuleType, tmp_path: Path, small: dict[bool, Path]) -> Path:
    """Model folders with what ``clip`` names: a distilled and a plain LTX-2.3 in NVFP4, VAEs of all kinds."""
    folder = tmp_path / "models"
    stub_comfy.folder_names_and_paths["vae_approx"] = ([str(folder / "vae_approx")], {".safetensors"})
    (folder / "vae_approx").mkdir()
    for name in ("ltx-2.3-distilled", "ltx-2.3-dev"):
        shutil.copy(small[False], folder / "diffusion_models" / f"{name}.safetensors")
    shutil.copy(small[True], folder / "checkpoints" / "full-distilled.safetensors")
    synthetic.write_vae(folder / "vae" / "ltx_vae.safetensors")
    save_file({"decoder.22.bias": torch.zeros(1), "decoder.1.weight": torch.zeros(1, 128, 1, 1)},
              folder / "vae_approx" / "taeltx_2.safetensors")  # fmt: skip
    save_file({"decoder.22.bias": torch.zeros(1), "decoder.1.weight": torch.zeros(1, 128, 1, 1)},
              folder / "vae" / "looks_full.safetensors")  # fmt: skip
    save_file({"decoder.conv_in.weight": torch.zeros(1, 16, 3, 3)}, folder / "vae" / "ae.safetensors")
    return folder


def test_a_sound_prompt_on_a_healthy_host_gives_nothing(models):
    assert guard.check(clip(), HEALTHY) == []
    assert guard.check_host(HEALTHY) == []


def test_nothing_is_said_about_what_is_not_known(stub_comfy):
    unknown = {name: Fact(name, "", name, None, "unknown: why", "made") for name in HEALTHY}
    assert guard.check(clip(), unknown) == [] == guard.check(clip(), {})
    assert guard.check_host(unknown) == [] == guard.check_host({})


def test_joint_sampling_on_a_vulnerable_host_is_an_error_at_the_sampler(stub_comfy):
    finding = only(clip(), VULNERABLE)
    assert (finding.id, finding.severity, finding.nodes) == ("prefetch_crash", "error", ("sampler", "guider", "model"))
    assert "wait_stream" in finding.why
    assert "--disable-async-offload" in finding.remedy and "cure" in finding.remedy
    assert "--disable-dynamic-vram" not in finding.remedy


@pytest.mark.parametrize("off", [{"dynamic_vram": False}, {"async_offload_streams": 0}, {"prefetch_crash": False}])
def test_each_of_the_crash_s_conditions_is_needed(off: dict, stub_comfy):
    assert ids(clip(), VULNERABLE | facts(**off)) == {}
    assert guard.check_host(VULNERABLE | facts(**off)) == []


def test_a_condition_that_is_unknown_makes_the_crash_a_warning(stub_comfy):
    host = {name: fact for name, fact in VULNERABLE.items() if name != "dynamic_vram"}
    assert ids(clip(), host) == {"prefetch_crash": "warning"}
    assert [finding.id for finding in guard.check_host(host)] == ["prefetch_crash"]


def test_a_curing_guard_anywhere_on_the_model_s_way_ends_the_crash_and_a_warning_one_does_not(stub_comfy):
    way = {
        "guard": node("NVFP4LaunchGuard", model=["model", 0], policy="cure"),
        "lora": node("LoraLoaderModelOnly", model=["guard", 0], lora_name="style.safetensors", strength_model=1.0),
        "guider": {"model": ["lora", 0]},
    }
    assert ids(clip(**way), VULNERABLE) == {}
    way["guard"]["inputs"]["policy"] = "warn"
    assert ids(clip(**way), VULNERABLE) == {"prefetch_crash": "error"}


def test_joint_latents_are_followed_through_reroutes_samplers_upscalers_and_subgraphs(stub_comfy):
    prompt = clip()
    prompt["12:1"] = {"class_type": "Reroute", "inputs": {"": ["latent", 0]}}
    prompt["sampler"]["inputs"]["latent_image"] = ["12:1", 0]
    prompt["12:34"] = node("SamplerCustomAdvanced", guider=["guider", 0], latent_image=["sampler", 0])
    findings = guard.check(prompt, VULNERABLE)
    assert [finding.nodes[0] for finding in findings if finding.id == "prefetch_crash"] == ["sampler", "12:34"]


def test_a_stage_that_samples_the_separated_video_alone_is_no_joint_one(stub_comfy):
    prompt = clip(model={"unet_name": "missing.safetensors"})
    prompt["up"] = node("LTXVLatentUpsampler", samples=["separate", 0])
    prompt["second"] = node("SamplerCustomAdvanced", guider=["guider", 0], latent_image=["up", 0])
    assert [finding.nodes[0] for finding in guard.check(prompt, VULNERABLE)] == ["sampler"]


def test_another_family_s_joint_latent_is_none_of_the_crash_s_business(models):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1), "img_in.weight": torch.zeros(1)},
              models / "diffusion_models" / "flux.safetensors")  # fmt: skip
    assert ids(clip(model={"unet_name": "flux.safetensors"}), VULNERABLE) == {}


def test_video_alone_does_not_crash_but_fails_where_the_host_needs_an_audio_latent(models):
    prompt = clip(sampler={"latent_image": ["video", 0]}, decode={"samples": ["sampler", 0]})
    assert ids(prompt, VULNERABLE) == {}
    assert ids(prompt, HEALTHY | facts(ltxav_needs_audio=True)) == {"no_audio_latent": "error"}
    assert ids(clip(), HEALTHY | facts(ltxav_needs_audio=True)) == {}
    prompt["model"]["inputs"]["unet_name"] = "missing.safetensors"
    assert ids(prompt, VULNERABLE | facts(ltxav_needs_audio=True)) == {}


@pytest.mark.parametrize(
    ("host", "word"),
    [({"torch_cuda": (12, 8)}, "CUDA 12.8"), ({"kitchen_backends": {"cuda": "its library is missing"}}, "is missing")],
)
def test_nvfp4_through_the_host_s_loaders_is_slow_without_kitchen_s_cuda_kernels(host: dict, word: str, models):
    finding = only(clip(), HEALTHY | facts(**host))
    assert (finding.id, finding.severity, finding.nodes) == ("slow_nvfp4", "warning", ("model",))
    assert word in finding.why and "NVFP4 Model Loader" in finding.remedy
    ours = clip(model=node("NVFP4ModelLoader", model_name="ltx-2.3-distilled.safetensors"))
    assert ids(ours, HEALTHY | facts(**host)) == {}
    assert ids(clip(), HEALTHY | facts(**host) | facts(capability=None)) == {}


@pytest.mark.parametrize("name", ["taeltx_2.safetensors", "looks_full.safetensors"])
def test_a_preview_vae_is_told_by_its_tensors_where_the_result_is_saved(name: str, models):
    prompt = clip(vae={"vae_name": name})
    finding = only(prompt)
    assert (finding.id, finding.severity, finding.nodes) == ("preview_vae", "warning", ("decode", "vae"))
    assert name in finding.why and "NVFP4 Split Checkpoint" in finding.remedy
    prompt["decode"]["class_type"] = TILED
    assert ids(prompt) == {"preview_vae": "error"}
    shown = {**prompt, "decode": prompt["decode"] | {"class_type": "VAEDecode"}}
    shown["save"] = shown["create"] = node("PreviewImage", images=["decode", 0])
    assert ids(shown) == {}


def test_our_vae_loader_tiles_a_preview_rightly_and_refuses_it_unless_told(models):
    prompt = clip(vae=node("NVFP4VAELoader", vae_name="looks_full.safetensors", kind="auto", allow_preview=True))
    prompt["decode"]["class_type"] = TILED
    assert ids(prompt) == {"preview_vae": "warning"}
    prompt["vae"]["inputs"]["allow_preview"] = False
    assert ids(prompt) == {"preview_vae": "error"}


def test_a_flux_vae_cannot_decode_ltx_latents_and_is_right_elsewhere(models):
    prompt = clip(vae={"vae_name": "ae.safetensors"})
    finding = only(prompt)
    assert (finding.id, finding.severity) == ("foreign_vae", "error")
    assert "16 latent channels, LTX has 128" in finding.why
    prompt["decode"]["inputs"]["samples"] = ["flux", 0]
    prompt["flux"] = node("KSampler", model=["x", 0], latent_image=["empty", 0])
    prompt["empty"] = node("EmptySD3LatentImage", width=64)
    assert ids(prompt) == {}


def test_the_vae_inside_a_full_checkpoint_is_seen(models):
    prompt = clip(vae=node("CheckpointLoaderSimple", ckpt_name="full-distilled.safetensors"))
    prompt["decode"]["inputs"]["vae"] = ["vae", 2]
    assert ids(prompt) == {}


def test_a_distilled_model_wants_cfg_1(models):
    finding = only(clip(guider={"cfg": 3.5}))
    assert (finding.id, finding.severity, finding.nodes) == ("distilled_cfg", "warning", ("guider", "model"))
    assert "3.5" in finding.title and "its file name" in finding.why
    assert finding.fixes == (("guider", "cfg", 1.0),)
    assert ids(clip(guider={"cfg": 3.5}, model={"unet_name": "ltx-2.3-dev.safetensors"})) == {}
    assert ids(clip(guider={"cfg": ["math", 0]}, math=node("ComfyMathExpression"))) == {}
    linked = clip(guider={"cfg": ["f", 0]}, f=node("PrimitiveFloat", value=4.0))
    assert ids(linked) == {"distilled_cfg": "warning"}


def test_the_header_can_say_that_a_model_is_distilled(models):
    path = models / "diffusion_models" / "ltx-2.3-dev.safetensors"
    metadata = {"config": json.dumps({"transformer": {}}), "modelspec.title": "LTX-2.3 22B Distilled"}
    save_file(load_file(path), path, metadata)
    finding = only(clip(guider={"cfg": 2}, model={"unet_name": path.name}))
    assert "its header entry `modelspec.title`" in finding.why


def test_a_distilling_lora_wants_cfg_1_and_leaves_the_sigmas_free(models):
    lora = node("LoraLoaderModelOnly", model=["model", 0], lora_name="x/LTX-Distilled-lora.safetensors",
                strength_model=0.6)  # fmt: skip
    way = {"lora": lora, "model": {"unet_name": "ltx-2.3-dev.safetensors"}, "guider": {"model": ["lora", 0], "cfg": 3}}
    prompt = clip(**way, sigmas=node("LTXVScheduler", steps=8))
    assert ids(prompt) == {"distilled_cfg": "warning"}
    lora["inputs"]["strength_model"] = 0
    assert ids(prompt) == {}


@pytest.mark.parametrize(
    ("sigmas", "right"),
    [
        (DISTILLED, True),
        ("0.909375, 0.725, 0.421875, 0.0", True),
        ("0.85, 0.7250, 0.4219, 0.0", True),
        ("1.0,0.9937,.9875,0.9812,0.975,0.9094,0.725,0.4219,0", True),
        ("1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0", False),
        (DISTILLED + ", 0.0", False),
        ("", False),
    ],
)
def test_a_distilled_model_wants_one_of_its_schedules(sigmas: str, right: bool, models):
    assert ids(clip(sigmas={"sigmas": sigmas})) == ({} if right else {"distilled_sigmas": "warning"})


def test_a_scheduler_s_sigmas_are_wrong_where_they_differ_and_unknown_where_nobody_can_compute_them(
    models, monkeypatch
):
    def computed(scheduler: str, steps: int, sampler: str) -> tuple[float, ...]:
        return ltx.SIGMAS if scheduler == "linear_quadratic" and steps == 8 else (1.0, 0.5, 0.0)

    basic = node("BasicScheduler", steps=8, scheduler="simple", denoise=1.0, model=["model", 0])
    assert ids(clip(sigmas=basic)) == {}
    monkeypatch.setattr(schedules, "_calculated", computed)
    finding = only(clip(sigmas=basic))
    assert (finding.id, finding.nodes) == ("distilled_sigmas", ("sigmas", "sampler"))
    assert DISTILLED in finding.remedy and "0.85, 0.725, 0.4219, 0.0" in finding.remedy
    assert "BasicScheduler are 1, 0.5, 0" in finding.why
    basic["inputs"]["scheduler"] = "linear_quadratic"
    assert ids(clip(sigmas=basic)) == {}
    basic["inputs"] |= {"steps": 3, "denoise": 0.375}
    assert ids(clip(sigmas=basic)) == {}
    split = clip(sampler={"sigmas": ["split", 1]}, split=node("SplitSigmas", sigmas=["sigmas", 0], step=3))
    assert ids(split) == {}
    assert ids(clip(sigmas=node("SomebodysSigmas"))) == {}


def test_a_scheduler_behind_a_node_that_changes_the_sampling_is_unknown(models, monkeypatch):
    monkeypatch.setattr(schedules, "_calculated", lambda *_: (1.0, 0.5, 0.0))
    basic = node("BasicScheduler", steps=2, scheduler="simple", denoise=1.0, model=["shift", 0])
    shift = node("ModelSamplingLTXV", model=["model", 0], max_shift=2.05, base_shift=0.95)
    assert ids(clip(sigmas=basic, shift=shift)) == {}
    basic["inputs"]["model"] = ["model", 0]
    assert ids(clip(sigmas=basic)) == {"distilled_sigmas": "warning"}


@pytest.mark.parametrize(
    ("inputs", "right"),
    [({"steps": 8}, True), ({"steps": 8, "denoise": 0.5}, False), ({"steps": 4, "denoise": 0.5}, True),
     ({"steps": ["?", 0]}, True)],
)  # fmt: skip
def test_the_schedule_of_a_ksampler_is_computed_too(inputs: dict, right: bool, models, monkeypatch):
    monkeypatch.setattr(schedules, "_calculated", lambda _, steps, __: ltx.SIGMAS if steps == 8 else (1.0, 0.5, 0.0))
    given = {"scheduler": "linear_quadratic", "sampler_name": "euler", "denoise": 1.0, "cfg": 1.0}
    sampler = node("KSampler", model=["model", 0], latent_image=["latent", 0], **given | inputs)
    assert ids(clip(sampler=sampler)) == ({} if right else {"distilled_sigmas": "warning"})
    advanced = node("KSamplerAdvanced", model=["model", 0], latent_image=["latent", 0], **given, steps=8,
                    start_at_step=5, end_at_step=10000)  # fmt: skip
    assert ids(clip(sampler=advanced)) == {}


def test_errors_come_first_and_every_finding_is_one_sentence_with_why_and_remedy(models):
    prompt = clip(video={"length": 120, "width": 770}, audio={"frames_number": 477}, guider={"cfg": 3},
                  create={"fps": 8}, sigmas={"sigmas": "1, 0"}, vae={"vae_name": "ae.safetensors"})  # fmt: skip
    host = VULNERABLE | facts(torch_cuda=(12, 6))
    findings = guard.check(prompt, host)
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert {finding.id for finding in findings} == {
        "prefetch_crash", "foreign_vae", "slow_nvfp4", "distilled_cfg", "distilled_sigmas", "frames", "size", "fps",
        "audio_length",
    }  # fmt: skip
    for finding in findings:
        assert finding.title.endswith(".") and finding.why.endswith(".") and finding.remedy.endswith(".")
        assert set(finding.nodes) <= prompt.keys() and finding.nodes
        assert json.loads(json.dumps(finding.as_dict()))["nodes"] == list(finding.nodes)
        assert str(models) not in guard.one_line(finding) and "\n" not in guard.one_line(finding)
    assert guard.describe(findings).count("\n") == 3 * len(findings) - 1
    assert guard.describe([]) == "nothing found"


def test_only_what_the_chosen_outputs_need_is_checked(stub_comfy):
    prompt = clip(video={"length": 120})
    prompt["other"] = node("PreviewAny", source="text")
    assert guard.check(prompt, VULNERABLE, targets=["other"]) == []
    assert "prefetch_crash" in {finding.id for finding in guard.check(prompt, VULNERABLE, targets=["save"])}


def test_the_strictest_policy_of_the_guards_in_a_prompt_counts():
    assert guard.policy_in_graph(PromptGraph(clip())) is None
    for policies, strictest in ((["warn"], "warn"), (["cure", "warn"], "cure"), (["warn", "block"], "block")):
        nodes = {str(i): node("NVFP4LaunchGuard", policy=policy) for i, policy in enumerate(policies)}
        assert guard.policy_in_graph(nodes) == strictest
    assert guard.policy_in_graph(PromptGraph({"1": node("NVFP4LaunchGuard", policy=["x", 0])})) == "warn"


def test_an_old_torch_on_a_gpu_with_fp4_cores_is_a_matter_of_the_host():
    assert [f.id for f in guard.check_host(HEALTHY | facts(torch_cuda=(12, 8)))] == ["old_cuda"]
    assert guard.check_host(HEALTHY | facts(torch_cuda=(12, 8), capability=(9, 0))) == []


def test_a_file_is_read_once_and_again_when_it_changes(models, monkeypatch):
    read = []
    original = guard_files.open_checkpoint
    monkeypatch.setattr(guard_files, "open_checkpoint", lambda path: read.append(path) or original(path))
    path = models / "diffusion_models" / "ltx-2.3-dev.safetensors"
    first = [guard_files.file_facts(path.name, ("diffusion_models",)) for _ in range(3)]
    assert len(read) == 1 and first[0] == first[2]
    assert (first[0].family, first[0].nvfp4, first[0].distilled) == ("LTX-2.3", True, None)
    save_file({"x": torch.zeros(1)}, path)
    assert guard_files.file_facts(path.name, ("diffusion_models",)).family is None
    assert len(read) == 2


@pytest.mark.parametrize("make", [containers.numbered, containers.indexed])
def test_a_shard_of_a_checkpoint_is_known_by_the_whole_and_read_again_when_another_changes(models, tmp_path, make):
    folder = models / "diffusion_models"
    shard = make(containers.whole(tmp_path / "whole.safetensors"), folder)
    found = guard_files.file_facts(shard.name, ("diffusion_models",))
    assert (found.family, found.nvfp4) == ("LTX-2.3", True)
    for other in ("m-00001-of-00002.safetensors", "upper.safetensors"):
        (folder / other).unlink(missing_ok=True)
    assert guard_files.file_facts(shard.name, ("diffusion_models",)) is None


def test_an_index_that_appears_beside_a_remembered_file_makes_it_a_shard(models, tmp_path):
    folder = models / "diffusion_models"
    shard = containers.indexed(containers.whole(tmp_path / "whole.safetensors"), folder)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    alone = guard_files.file_facts(shard.name, ("diffusion_models",))
    index.write_text(text)
    assert guard_files.file_facts(shard.name, ("diffusion_models",)).family == "LTX-2.3" != alone.family


@pytest.mark.parametrize("name", [None, 3, "", "no.safetensors", "../vae/ae.safetensors", "a\0b", ["x", 0], "t.txt"])
def test_a_name_that_leads_to_no_file_is_unknown(name: object, models):
    (models / "diffusion_models" / "t.txt").write_text("text")
    (models / "diffusion_models" / "torn.safetensors").write_bytes(b"\xff" * 40)
    assert guard_files.file_facts(name, ("diffusion_models", "no_such_folder")) is None
    assert guard_files.file_facts("torn.safetensors", ("diffusion_models",)) is None


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(PROMPTS)
def test_any_prompt_can_be_checked(stub_comfy, prompt: dict):
    for finding in guard.check(prompt, VULNERABLE | facts(ltxav_needs_audio=True, torch_cuda=(12, 1))):
        assert set(finding.nodes) <= prompt.keys()
