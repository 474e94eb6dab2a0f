# SPDX-License-Identifier: Apache-2.0
"""What the guard says about joint graphs: swapped streams, batches, guides left in, an old model, an untold rate.

What a real ComfyUI does with each of these is in tests/real/test_joint_host.py.
"""

from __future__ import annotations

import types

import pytest
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.host.guard.files import FileFacts
from nvfp4_video.tests.support.guard_prompts import clip, ids, node, only


@pytest.fixture(autouse=True)
def files(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old = FileFacts("ltxv.safetensors", "LTX-Video", None, False, False, None)
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: old if name == old.name else None)


def sounding(**changes: dict) -> dict:
    hear = node("LTXVAudioVAEDecode", samples=["separate", 1], audio_vae=["av", 0])
    return clip(hear=hear, create={"audio": ["hear", 0]}, **changes)


@pytest.mark.parametrize(
    ("node_id", "name", "wrong", "right"),
    [
        ("decode", "samples", 1, 0),
        ("hear", "samples", 0, 1),
        ("up", "samples", 1, 0),
        ("crop", "latent", 1, 0),
    ],
)
def test_the_two_outputs_of_a_separate_node_are_told_apart(node_id: str, name: str, wrong: int, right: int):
    prompt = sounding(up=node("LTXVLatentUpsampler", samples=["separate", 0]),
                      crop=node("LTXVCropGuides", latent=["separate", 0]))  # fmt: skip
    assert ids(prompt) == {}
    prompt[node_id]["inputs"][name] = ["separate", wrong]
    finding = only(prompt)
    assert (finding.id, finding.severity, finding.nodes) == ("swapped_streams", "error", (node_id, "separate"))
    assert f"output {right + 1} of Separate AV Latent" in finding.remedy


def test_a_concat_whose_inputs_are_swapped_is_two_errors():
    prompt = sounding(latent={"video_latent": ["audio", 0], "audio_latent": ["video", 0]})
    assert ids(prompt) == {"swapped_streams": "error"}


@pytest.mark.parametrize(("kind", "name"), [("LTXVLatentUpsampler", "samples"), ("LTXVCropGuides", "latent")])
def test_a_joint_latent_has_to_be_separated_for_nodes_that_do_not_do_it_themselves(kind: str, name: str):
    finding = only(sounding(more=node(kind, **{name: ["sampler", 0]})))
    assert finding.id == "swapped_streams" and "Separate AV Latent" in finding.remedy
    assert ids(sounding(more=node(kind, **{name: ["separate", 0]}))) == {}


def test_decodes_and_a_concat_find_their_stream_in_a_joint_latent():
    prompt = sounding(decode={"samples": ["sampler", 0]})
    prompt["hear"]["inputs"]["samples"] = ["sampler", 0]
    prompt["again"] = node("LTXVConcatAVLatent", video_latent=["sampler", 0], audio_latent=["audio", 0])
    assert ids(prompt) == {}


def test_a_video_latent_cannot_be_separated():
    prompt = sounding(sampler={"latent_image": ["video", 0]})
    finding = only(prompt)
    assert (finding.id, finding.severity, finding.nodes) == ("swapped_streams", "error", ("separate", "sampler"))
    prompt["decode"]["inputs"]["samples"] = ["sampler", 0]
    prompt["create"]["inputs"].pop("audio")
    prompt.pop("hear")
    assert ids(prompt) == {}


def test_what_another_pack_s_node_puts_out_is_not_judged_by_its_name():
    mask = node("SomebodysAudioVideoMask", video=["video", 0])
    assert ids(sounding(mask=mask, latent={"video_latent": ["mask", 0], "audio_latent": ["mask", 1]})) == {}


@pytest.mark.parametrize(("video", "audio", "right"), [(1, 2, False), (2, 1, False), (2, 2, True), (2, None, True)])
def test_both_streams_have_one_batch_size(video: int, audio: int | None, right: bool):
    count = audio if audio is not None else ["unheard", 0]
    prompt = sounding(video={"batch_size": video}, audio={"batch_size": count})
    assert ids(prompt) == ({} if right else {"batches": "error"})


def guided(crop: bool, conditioning: str = "guide") -> dict:
    guide = node("LTXVAddGuide", positive=["conditioning", 0], negative=["conditioning", 1], vae=["vae", 0],
                 latent=["video", 0], image=["picture", 0], frame_idx=0, strength=1.0)  # fmt: skip
    prompt = sounding(guide=guide, latent={"video_latent": ["guide", 2]}, guider={"positive": ["guide", 0]},
                      picture=node("EmptyImage", width=768, height=512, batch_size=9),
                      p=node("CLIPTextEncode", text="", clip=["te", 0]))  # fmt: skip
    if crop:
        prompt["crop"] = node("LTXVCropGuides", positive=[conditioning, 0], negative=[conditioning, 1],
                              latent=["separate", 0])  # fmt: skip
        prompt["decode"]["inputs"]["samples"] = ["crop", 2]
    return prompt


def test_guides_that_nobody_crops_are_counted():
    finding = only(guided(crop=False))
    assert (finding.id, finding.severity, finding.nodes) == ("uncropped_guides", "warning", ("decode", "guide"))
    assert "16 frames of its guides" in finding.title


def test_cropped_guides_and_a_crop_with_the_wrong_conditioning():
    assert ids(guided(crop=True)) == {}
    assert ids(guided(crop=True, conditioning="conditioning")) == {"uncropped_guides": "warning"}
    assert ids(guided(crop=True, conditioning="unheard")) == {}


def test_guides_of_a_clip_that_is_only_looked_at_do_not_matter():
    prompt = guided(crop=False)
    for look in (node("PreviewImage", images=["decode", 0]),
                 node("VHS_VideoCombine", images=["decode", 0], frame_rate=24, save_output=False)):  # fmt: skip
        prompt["create"] = prompt["save"] = look
        assert ids(prompt) == {}
    look["inputs"]["save_output"] = True
    assert ids(prompt) == {"uncropped_guides": "warning"}


def test_a_model_without_sound_stops_on_a_joint_latent():
    prompt = sounding(model={"unet_name": "ltxv.safetensors"})
    finding = only(prompt)
    assert (finding.id, finding.severity) == ("old_model", "error")
    assert finding.nodes == ("sampler", "model", "latent")
    alone = clip(model={"unet_name": "ltxv.safetensors"}, sampler={"latent_image": ["video", 0]},
                 decode={"samples": ["sampler", 0]})  # fmt: skip
    assert ids(alone) == {}


def untold(rate: float) -> dict:
    text = node("CLIPTextEncode", text="", clip=["te", 0])
    prompt = sounding(text=text, guider={"positive": ["text", 0], "negative": ["text", 0]}, audio={"frame_rate": rate})
    prompt["create"]["inputs"]["fps"] = rate
    prompt.pop("conditioning")
    return prompt


def test_a_model_that_is_told_no_rate_takes_25_which_is_wrong_for_another():
    finding = only(untold(24))
    assert (finding.id, finding.severity, finding.nodes) == ("untold_rate", "warning", ("guider", "audio"))
    assert ids(untold(25)) == {}
    assert ids(sounding()) == {}


@pytest.mark.parametrize(("kind", "name"), [("BasicGuider", "conditioning"), ("DualCFGGuider", "cond1")])
def test_guiders_that_call_the_conditioning_otherwise_are_told_no_rate_either(kind: str, name: str):
    prompt = untold(24)
    prompt["guider"] = node(kind, model=["model", 0], **{name: ["text", 0]})
    assert only(prompt).id == "untold_rate" and only(prompt).nodes == ("guider", "audio")
    prompt |= {"told": node("LTXVConditioning", positive=["text", 0], negative=["text", 0], frame_rate=24)}
    prompt["guider"]["inputs"][name] = ["told", 0]
    assert ids(prompt) == {}


def test_a_conditioning_that_is_not_known_may_have_a_rate():
    prompt = untold(24)
    prompt["text"] = node("SomebodysConditioning")
    assert ids(prompt) == {}
    prompt = untold(24) | {"told": node("LTXVConditioning", positive=["text", 0], frame_rate=["unheard", 0])}
    prompt["guider"]["inputs"]["positive"] = ["told", 0]
    assert ids(prompt) == {}
