# SPDX-License-Identifier: Apache-2.0
"""LTX latents keep their size, length, batch and guides through whatever changes them."""

from __future__ import annotations

import pytest
from nvfp4_video.host.guard.links import Link
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.host.guard.values.latents import Conditioning, Joint, Sound, Video
from nvfp4_video.host.guard.values.pictures import Picture
from nvfp4_video.tests.support.guard_prompts import node

PROMPT = {
    "t": node("CLIPTextEncode", clip=["c", 0], text="x"),
    "cond": node("LTXVConditioning", positive=["t", 0], negative=["t", 0], frame_rate=24),
    "one": node("EmptyImage", width=64, height=64, batch_size=1),
    "film": node("EmptyImage", width=64, height=64, batch_size=25),
    "v": node("EmptyLTXVLatentVideo", width=770, height=512, length=120, batch_size=2),
    "a": node("LTXVEmptyLatentAudio", frames_number=121, frame_rate=24, batch_size=1, audio_vae=["av", 0]),
    "av_latent": node("LTXVConcatAVLatent", video_latent=["v", 0], audio_latent=["a", 0]),
    "s": node("SamplerCustomAdvanced", latent_image=["av_latent", 0]),
    "sep": node("LTXVSeparateAVLatent", av_latent=["s", 1]),
    "dec": node("VAEDecode", samples=["sep", 0], vae=["x", 0]),
}
VIDEO, SOUND = Video(768, 512, 113, 2), Sound(126, 1, 121, 24)


def at(node_id: str, slot: int = 0, **more: dict) -> object:
    return PromptGraph(PROMPT | more).output(Link(node_id, slot))


def guide(name: str, latent: list, image: str = "one", frame_idx: int = 0, cond: str = "cond") -> dict:
    return {name: node("LTXVAddGuide", positive=[cond, 0], negative=[cond, 1], latent=latent, image=[image, 0],
                       frame_idx=frame_idx, strength=1.0, vae=["x", 0])}  # fmt: skip


def crop(cond: str, latent: list) -> dict:
    return {"crop": node("LTXVCropGuides", positive=[cond, 0], negative=[cond, 1], latent=latent)}


def test_an_empty_latent_is_what_the_host_makes_of_the_wish():
    assert at("v") == VIDEO
    assert at("a") == SOUND
    assert at("v", v=node("EmptyLTXVLatentVideo", width=["?", 0], height=512, length=9)) == Video(None, 512, 9, 1)
    assert at("v", v=node("EmptyLTXVLatentVideo", width=0, height=512, length=9)) is None


def test_joint_latents_part_again_behind_the_sampler():
    assert at("s", 0) == at("s", 1) == Joint(VIDEO, SOUND)
    assert (at("sep", 0), at("sep", 1)) == (VIDEO, SOUND)
    swapped = {"again": node("LTXVConcatAVLatent", video_latent=["s", 0], audio_latent=["?", 0])}
    assert at("again", **swapped) == Joint(VIDEO, None)


def test_a_decode_gives_as_many_pictures_as_the_latent_holds():
    assert at("dec") == Picture(768, 512, 226)
    assert at("size", 1, size=node("GetImageSize", image=["dec", 0])) == 512


@pytest.mark.parametrize(
    ("image", "place", "frames"),
    [("one", 0, 1), ("one", 48, 1), ("one", -1, 1), ("film", 0, 4), ("film", 8, 3), ("film", -8, None), ("?", 0, None)],
)
def test_a_guide_adds_as_many_latent_frames_as_the_host_encodes(image: str, place: int, frames: int | None):
    latent = at("g", 2, **guide("g", ["v", 0], image, place))
    assert latent.length == 113 and [given.frames for given in latent.guides] == [frames]
    assert at("g", 0, **guide("g", ["v", 0], image, place)).guides == latent.guides


def test_guides_that_are_cropped_are_gone_and_others_stay():
    two = guide("g", ["v", 0]) | guide("h", ["g", 2], "?", cond="g")
    assert at("crop", 2, **two, **crop("h", ["h", 2])) == VIDEO
    assert [left.node for left in at("crop", 2, **two, **crop("g", ["h", 2])).guides] == ["h"]
    assert at("crop", 0, **two, **crop("h", ["h", 2])) == Conditioning(24.0, ())
    assert at("crop", 2, **guide("g", ["v", 0]), **crop("?", ["g", 2])).guides is None
    assert at("dec", dec=node("VAEDecode", samples=["g", 2]), **guide("g", ["v", 0])) == Picture(768, 512, 242)


def test_a_crop_where_no_guides_are_cuts_the_clip():
    assert at("crop", 2, **guide("g", ["v", 0]), **crop("g", ["v", 0])) == VIDEO._replace(length=105)


def test_a_latent_scaled_by_a_number_is_known_and_one_by_a_model_is_not():
    assert at("up", up=node("LatentUpscaleBy", samples=["v", 0], scale_by=1.5)).width == 1152
    assert at("up", up=node("LTXVLatentUpsampler", samples=["v", 0], upscale_model=["m", 0])) is None


def test_latents_are_counted_for_a_scheduler():
    assert at("v").tokens == 24 * 16 * 15
    assert at("g", 2, **guide("g", ["v", 0])).tokens == 24 * 16 * 16
    assert Video(None, 512, 9, 1).tokens is None


def test_a_chain_of_very_many_guides_is_not_followed_for_ever():
    prompt = dict(PROMPT)
    before, cond = ["v", 0], "cond"
    for i in range(2000):
        prompt |= guide(f"g{i}", before, cond=cond)
        before, cond = [f"g{i}", 2], f"g{i}"
    assert PromptGraph(prompt).output(Link("g1999", 2)) == VIDEO._replace(guides=None)


def test_a_director_s_guide_keeps_the_size_unless_it_scales_or_snaps():
    def directed(**inputs: object) -> object:
        more = {"d": node("LTXDirectorGuide", latent=["v", 0], positive=["cond", 0], **inputs)}
        return at("d", 2, **more)

    assert directed(scale_by=1.0) == directed(scale_by=1, model=["m", 0], auto_snap_ic_grid=False)
    assert directed(scale_by=1.0) == VIDEO._replace(guides=None), "put behind the clip by some versions of the node"
    assert directed(scale_by=1.0, model=["m", 0], ic_lora_name="None") == VIDEO._replace(guides=None)
    unknown = VIDEO._replace(width=None, height=None, guides=None)
    for inputs in ({}, {"scale_by": 0.5}, {"scale_by": 1.0, "model": ["m", 0], "ic_lora_name": "x.safetensors"}):
        assert directed(**inputs) == unknown
