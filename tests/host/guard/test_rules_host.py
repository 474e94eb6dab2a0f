# SPDX-License-Identifier: Apache-2.0
"""What other packs and launch flags do to a sound prompt, and that nothing is said where they do not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.tests.support.guard_prompts import HEALTHY, clip, facts, ids, node, only

NOISE = "comfy.sample.prepare_noise"
REPLACED = HEALTHY | facts(joint_noise_crash=True, replaced_sampling=((NOISE, "ComfyUI_Old/modules/rng.py"),))


def encoding(loader: str = "LTXVAudioVAELoader", kind: str = "LTXVAudioVAEEncode", name: str = "audio_vae") -> dict:
    """A sound prompt in which a sound is encoded, too."""
    nodes = {
        "av": node(loader, ckpt_name="a.safetensors"),
        "encode": node(kind, audio=["load", 0], **{name: ["av", 0]}),
    }
    return clip(**nodes, keep=node("SaveLatent", samples=["encode", 0]))


def test_noise_for_one_latent_only_stops_a_joint_prompt_and_its_pack_is_named():
    found = only(clip(), REPLACED)
    assert (found.id, found.severity, found.nodes) == ("replaced_noise", "error", ("sampler",))
    assert found.title.startswith("ComfyUI_Old has replaced") and "ComfyUI_Old/modules/rng.py" in found.why
    assert "Update ComfyUI_Old, or disable it" in found.remedy
    assert "another pack has replaced" in only(clip(), HEALTHY | facts(joint_noise_crash=True)).title


@pytest.mark.parametrize(
    ("changes", "host"),
    [
        ({}, HEALTHY | facts(joint_noise_crash=False, replaced_sampling=((NOISE, "New/rng.py"),))),
        ({}, HEALTHY | facts(joint_noise_crash=None)),
        ({"sampler": {"latent_image": ["video", 0]}}, REPLACED),
        ({"sampler": {"noise": ["none", 0]}, "none": node("DisableNoise")}, REPLACED),
    ],
    ids=["takes both", "unknown", "no sound", "no noise"],
)
def test_nothing_is_said_of_noise_that_is_not_in_the_way(changes, host):
    assert "replaced_noise" not in ids(clip(**changes), host)


def test_the_host_s_own_findings_name_the_pack_once_whatever_is_open():
    (found,) = guard.check_host(REPLACED)
    assert (found.id, found.severity) == ("replaced_noise", "warning") and "ComfyUI_Old" in found.title
    assert guard.check_host(HEALTHY) == []


GUIDER, EULER = "comfy.samplers.CFGGuider.sample", "comfy.k_diffusion.sampling.sample_euler"


def sampling(*names: str) -> dict:
    return HEALTHY | facts(joint_sampling_crash=tuple((name, "ComfyUI_Old/sampling.py") for name in names))


def test_a_sampling_function_that_stops_on_joint_latents_is_named_where_one_is_sampled():
    found = only(clip(), sampling(GUIDER))
    assert (found.id, found.severity, found.nodes) == ("replaced_sampling", "error", ("sampler",))
    assert GUIDER in found.why and "Update ComfyUI_Old, or disable it" in found.remedy
    assert "replaced_sampling" not in ids(clip(sampler={"latent_image": ["video", 0]}), sampling(GUIDER))
    assert ids(clip(), sampling()) == ids(clip(), HEALTHY | facts(joint_sampling_crash=None)) == {}
    (open_,) = guard.check_host(sampling(GUIDER))
    assert (open_.id, open_.severity) == ("replaced_sampling", "warning") and "ComfyUI_Old" in open_.title


@pytest.mark.parametrize(("name", "heard"), [("euler", True), ("dpmpp_2m", False)])
def test_the_function_of_one_sampler_is_in_the_way_of_that_sampler_alone(name, heard):
    prompt = clip(sampler={"sampler": ["choice", 0]}, choice=node("KSamplerSelect", sampler_name=name))
    assert ("replaced_sampling" in ids(prompt, sampling(EULER))) is heard


@pytest.mark.parametrize("flag", ["--bf16-vae", "--fp16-vae"])
def test_a_flag_that_stops_the_audio_encoder_is_named_with_the_loader_that_does_not_mind(flag):
    host = HEALTHY | facts(launch_flags=[flag])
    for prompt in (encoding(), encoding("VAELoader"), encoding(kind="VAEEncodeAudio", name="vae")):
        found = only(prompt, host)
        assert (found.id, found.severity, found.nodes) == ("audio_dtype", "error", ("encode", "av"))
        assert flag in found.title and flag in found.remedy and "NVFP4 VAE Loader" in found.remedy


@pytest.mark.parametrize(
    ("prompt", "started"),
    [
        (encoding("NVFP4VAELoader"), ["--bf16-vae"]),
        (encoding("VAELoader", "VAEEncodeAudio", "vae"), ["--bf16-vae"]),
        (encoding(), ["--fp32-vae"]),
        (encoding(), None),
        (clip(), ["--bf16-vae"]),
    ],
    ids=["ours", "another sound", "FP32", "not started", "no sound is encoded"],
)
def test_nothing_is_said_of_sound_that_is_encoded_in_fp32_or_not_at_all(prompt, started):
    assert ids(prompt, HEALTHY | facts(launch_flags=started)) == {}


@pytest.mark.parametrize(("name", "gpu"), [("AMD", "AMD Radeon RX 7900 XTX"), (None, "AMD Radeon RX 7900 XTX")])
def test_owners_of_amd_s_gpus_are_not_told_to_install_cuda(monkeypatch, name, gpu):
    off = {"kitchen_backends": {"cuda": "CUDA not available on this system", "eager": True}, "torch_cuda": None}
    host = HEALTHY | facts(gpu_maker=name, gpu_name=gpu, capability=(11, 0), **off)
    packed = SimpleNamespace(
        name="a.safetensors", family="LTX-2.3", nvfp4=True, vae=None, full_vae=False, distilled=None
    )
    monkeypatch.setattr("nvfp4_video.host.guard.view.file_facts", lambda *_: packed)
    assert "slow_nvfp4" not in ids(clip(), host)
    assert "slow_nvfp4" in ids(clip(), HEALTHY | facts(gpu_maker="NVIDIA", **off))
    assert guard.check_host(host | facts(torch_cuda=(12, 8))) == []


def test_nodes_are_called_by_names_that_comfyui_shows(stub_comfy):
    swapped = only(clip(decode={"samples": ["separate", 1]}))
    assert "output 1 of Separate AV Latent" in swapped.remedy
    silent = clip(sampler={"latent_image": ["video", 0]}, decode={"samples": ["separate", 0]})
    assert "with Concat AV Latent before the sampler" in only(silent).remedy


def test_a_node_is_called_as_the_running_host_calls_it(monkeypatch):
    host = SimpleNamespace(NODE_DISPLAY_NAME_MAPPINGS={"LTXVEmptyLatentAudio": "Empty LTXV Latent Audio"})
    assert "`frames_number` in LTXV Empty Latent Audio to 121" in only(clip(audio={"frames_number": 97})).remedy
    monkeypatch.setitem(sys.modules, "nodes", host)
    assert "`frames_number` in Empty LTXV Latent Audio to 121" in only(clip(audio={"frames_number": 97})).remedy
