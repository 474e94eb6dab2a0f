# SPDX-License-Identifier: Apache-2.0
"""What the guard says about VAEs: previews and other families' at every node, sound for picture, other versions.

What a real ComfyUI does with each of these is in tests/real/test_joint_host.py.
"""

from __future__ import annotations

import types

import pytest
from nvfp4_video.checkpoint.identify.vae_signatures import AUDIO, IMAGE, LTX, PREVIEW, VIDEO, Vae
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.host.guard.files import FileFacts
from nvfp4_video.tests.support.guard_prompts import clip, ids, node, only


def vae_file(name: str, kind: str, family: str, version: str = "") -> FileFacts:
    vae = Vae(kind, family, version, 128 if family.startswith("LTX") else 16, "", {}, ())
    if kind == AUDIO:
        return FileFacts(name, None, None, False, False, None, vae)
    return FileFacts(name, None, vae, kind == VIDEO and family == LTX, False, None)


def model_file(name: str, family: str) -> FileFacts:
    return FileFacts(name, family, None, False, False, None)


FILES = {
    "ltx-2.3.safetensors": model_file("ltx-2.3.safetensors", "LTX-2.3"),
    "ltx-2.safetensors": model_file("ltx-2.safetensors", "LTX-2"),
    "ltxv.safetensors": model_file("ltxv.safetensors", "LTX-Video"),
    "full.safetensors": vae_file("full.safetensors", VIDEO, LTX, "2.3"),
    "vae-2.0.safetensors": vae_file("vae-2.0.safetensors", VIDEO, LTX, "2.0"),
    "vae-0.9.safetensors": vae_file("vae-0.9.safetensors", VIDEO, LTX, "0.9.1"),
    "vae-0.9.8.safetensors": vae_file("vae-0.9.8.safetensors", VIDEO, LTX, "0.9.5 to 0.9.8, or 2.0"),
    "vae-2.5.safetensors": vae_file("vae-2.5.safetensors", VIDEO, LTX, "2.5 (diffusion decoder)"),
    "sound.safetensors": vae_file("sound.safetensors", AUDIO, LTX, "2.3"),
    "tae.safetensors": vae_file("tae.safetensors", PREVIEW, "LTX-2"),
    "ae.safetensors": vae_file("ae.safetensors", IMAGE, "FLUX or SD3"),
}


@pytest.fixture(autouse=True)
def files(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: FILES.get(name))


def with_vae(name: str = "full.safetensors", model: str = "ltx-2.3.safetensors", **changes: dict) -> dict:
    return clip(**{"model": {"unet_name": model}, "vae": {"vae_name": name}} | changes)


def taking_picture(kind: str) -> dict:
    """A node that puts a picture into the empty latent, between it and the sampler."""
    given = {"vae": ["own", 0], "image": ["picture", 0], "latent": ["video", 0]}
    sides = {"positive": ["conditioning", 0], "negative": ["conditioning", 1]}
    slot = 0
    if kind in ("LTXVAddGuide", "LTXVImgToVideo"):
        given, slot = given | sides, 2
    if kind == "LTXVImgToVideo":
        given |= {"width": 768, "height": 512, "length": 121, "batch_size": 1}
    crop = node("LTXVCropGuides", positive=["taking", 0], negative=["taking", 1], latent=["separate", 0])
    guided = {"crop": crop, "decode": {"samples": ["crop", 2]}} if kind == "LTXVAddGuide" else {}
    return {"taking": node(kind, **given), "latent": {"video_latent": ["taking", slot]}, **guided}


STOCK = node("VAELoader", vae_name="tae.safetensors")
OURS = node("NVFP4VAELoader", vae_name="tae.safetensors", kind="auto", allow_preview=True)
FULL = node("VAELoader", vae_name="full.safetensors")


@pytest.mark.parametrize("kind", ["LTXVImgToVideoInplace", "LTXVAddGuide"])
@pytest.mark.parametrize("loader", [STOCK, OURS], ids=["stock", "ours"])
def test_a_preview_vae_stops_where_it_puts_a_picture_into_a_latent(kind: str, loader: dict):
    prompt = with_vae(own=loader, **taking_picture(kind))
    finding = only(prompt)
    assert (finding.id, finding.severity, finding.nodes) == ("preview_vae", "error", ("taking", "own"))
    prompt["own"] = FULL
    assert ids(prompt) == {}


@pytest.mark.parametrize("kind", ["LTXVImgToVideo", "VAEEncode"])
def test_where_a_preview_vae_makes_latents_of_the_right_size_nothing_is_said(kind: str):
    taking = taking_picture(kind)
    if kind == "VAEEncode":
        taking["taking"] = node(kind, vae=["own", 0], pixels=["picture", 0])
        taking["latent"] = {"video_latent": ["taking", 0]}
    assert ids(with_vae(own=STOCK, **taking)) == {}


@pytest.mark.parametrize("loader", [STOCK, OURS], ids=["stock", "ours"])
@pytest.mark.parametrize("kind", ["LTXVTiledVAEDecode", "LTXVSpatioTemporalTiledVAEDecode"])
def test_nodes_that_tile_by_themselves_stop_on_a_preview_vae_whoever_loads_it(kind: str, loader: dict):
    prompt = with_vae(vae=loader, decode=node(kind, vae=["vae", 0], latents=["separate", 0]))
    finding = only(prompt)
    assert (finding.id, finding.severity) == ("preview_vae", "error") and kind in finding.title
    prompt["vae"] = FULL
    assert ids(prompt) == {}


@pytest.mark.parametrize(("kind", "name"), [("LTXVLatentUpsampler", "preview_vae"), ("VAEEncodeTiled", "preview_vae")])
def test_an_upscaler_and_a_tiled_encode_stop_on_a_preview_vae(kind: str, name: str):
    more = node(kind, samples=["separate", 0], pixels=["picture", 0], vae=["own", 0])
    assert ids(with_vae(own=STOCK, more=more)) == {name: "error"}
    assert ids(with_vae(own=FULL, more=more)) == {}


def test_another_family_s_vae_cannot_make_ltx_latents_and_may_encode_for_its_own_model():
    prompt = with_vae(own=node("VAELoader", vae_name="ae.safetensors"), **taking_picture("LTXVImgToVideoInplace"))
    finding = only(prompt)
    assert (finding.id, finding.severity) == ("foreign_vae", "error") and "make LTX latents" in finding.title
    other = node("VAEEncode", pixels=["picture", 0], vae=["own", 0])
    assert ids(with_vae(own=node("VAELoader", vae_name="ae.safetensors"), more=other)) == {}


SOUNDS = {
    "the host's loader": node("LTXVAudioVAELoader", ckpt_name="sound.safetensors"),
    "of little memory": node("LowVRAMAudioVAELoader", ckpt_name="sound.safetensors", dependencies=["model", 0]),
    "a file of sound": node("VAELoader", vae_name="sound.safetensors"),
    "ours": node("NVFP4VAELoader", vae_name="full.safetensors", kind="audio", allow_preview=False),
}


@pytest.mark.parametrize("loader", SOUNDS.values(), ids=SOUNDS)
@pytest.mark.parametrize("kind", ["VAEDecode", "VAEDecodeTiled", "LTXVImgToVideoInplace", "LTXVLatentUpsampler"])
def test_the_audio_vae_at_a_node_for_pictures_is_an_error(kind: str, loader: dict):
    if "Decode" in kind:
        whole = {"tile_size": 1024, "temporal_size": 4096}
        prompt = with_vae(own=loader, decode=node(kind, samples=["separate", 0], vae=["own", 0], **whole))
    elif kind == "LTXVLatentUpsampler":
        prompt = with_vae(own=loader, more=node(kind, samples=["separate", 0], vae=["own", 0]))
    else:
        prompt = with_vae(own=loader, **taking_picture(kind))
    finding = only(prompt)
    assert (finding.id, finding.severity) == ("confused_vae", "error")
    assert kind in finding.title and "own" in finding.nodes
    prompt["own"] = FULL
    assert ids(prompt) == {}


@pytest.mark.parametrize("kind", ["LTXVEmptyLatentAudio", "LTXVAudioVAEDecode", "LTXVAudioVAEEncode"])
def test_a_video_vae_at_a_node_for_sound_is_an_error(kind: str):
    empty = {"frames_number": 121, "frame_rate": 24, "batch_size": 1}
    more = node(kind, samples=["separate", 1], audio=["song", 0], audio_vae=["own", 0], **empty)
    finding = only(with_vae(own=FULL, more=more))
    assert (finding.id, finding.severity, finding.nodes) == ("confused_vae", "error", ("more", "own"))
    for loader in SOUNDS.values():
        assert ids(with_vae(own=loader, more=more)) == {}


@pytest.mark.parametrize("kind", ["LTXVAudioVAELoader", "LowVRAMAudioVAELoader"])
def test_an_audio_vae_loader_of_a_file_without_one_is_an_error(kind: str):
    loader = node(kind, ckpt_name="full.safetensors")
    finding = only(with_vae(av=loader))
    assert (finding.id, finding.severity, finding.nodes) == ("no_audio_vae", "error", ("av",))
    loader["inputs"]["ckpt_name"] = "sound.safetensors"
    assert ids(with_vae(av=loader)) == {}
    loader["inputs"]["ckpt_name"] = "not-there.safetensors"
    assert ids(with_vae(av=loader)) == {}


@pytest.mark.parametrize(
    ("model", "vae"),
    [
        ("ltx-2.3.safetensors", "vae-2.0.safetensors"),
        ("ltx-2.3.safetensors", "vae-0.9.safetensors"),
        ("ltx-2.3.safetensors", "vae-0.9.8.safetensors"),
        ("ltx-2.safetensors", "full.safetensors"),
        ("ltx-2.safetensors", "vae-0.9.safetensors"),
    ],
)
def test_a_vae_of_another_version_than_the_model_is_named(model: str, vae: str):
    finding = only(with_vae(vae, model))
    assert (finding.id, finding.severity, finding.nodes) == ("other_version", "warning", ("decode", "vae"))
    assert vae in finding.title


@pytest.mark.parametrize(
    ("model", "vae"),
    [
        ("ltx-2.3.safetensors", "full.safetensors"),
        ("ltx-2.3.safetensors", "vae-2.5.safetensors"),  # LTX-2.5's model has 2.3's names
        ("ltx-2.safetensors", "vae-2.0.safetensors"),
        ("ltx-2.safetensors", "vae-0.9.8.safetensors"),  # may be 2.0's
        ("not-there.safetensors", "vae-0.9.safetensors"),
    ],
)
def test_a_vae_of_the_model_s_version_or_of_an_unknown_model_is_not(model: str, vae: str):
    assert ids(with_vae(vae, model)) == {}


def test_with_two_versions_in_one_prompt_nothing_is_said():
    other = node("KSampler", model=["old", 0], latent_image=["video", 0], cfg=3.0)
    prompt = with_vae("vae-2.0.safetensors", other=other, old=node("UNETLoader", unet_name="ltx-2.safetensors"))
    assert ids(prompt) == {}


@pytest.mark.parametrize(
    ("name", "model", "right"),
    [
        ("ltx-2-spatial-upscaler-x2-1.0.safetensors", "ltx-2.3.safetensors", False),
        ("LTX/ltxv-spatial-upscaler-0.9.7.safetensors", "ltx-2.3.safetensors", False),
        ("ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "ltx-2.safetensors", False),
        ("LTX-Video/ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "ltx-2.3.safetensors", True),
        ("ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors", "ltx-2.3.safetensors", True),
        ("ltx-2-spatial-upscaler-x2-1.0.safetensors", "ltx-2.safetensors", True),
        ("my-upscaler.safetensors", "ltx-2.3.safetensors", True),
    ],
)
def test_a_latent_upscaler_of_another_version_is_told_by_its_name(name: str, model: str, right: bool):
    vae = "vae-2.0.safetensors" if model == "ltx-2.safetensors" else "full.safetensors"
    for kind in ("LatentUpscaleModelLoader", "LowVRAMLatentUpscaleModelLoader"):
        prompt = with_vae(vae, model, loader=node(kind, model_name=name),
                          up=node("LTXVLatentUpsampler", samples=["separate", 0], upscale_model=["loader", 0],
                                  vae=["vae", 0]))  # fmt: skip
        assert ids(prompt) == ({} if right else {"other_version": "warning"})
