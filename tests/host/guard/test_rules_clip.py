# SPDX-License-Identifier: Apache-2.0
"""What the guard says about size, length, frame rates and sound of a clip, and how much work a large prompt is."""

from __future__ import annotations

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.tests.support.guard_prompts import HEALTHY, VULNERABLE, clip, ids, node, only


@pytest.mark.parametrize(("length", "made"), [(120, 113), (122, 121), (8, 1), (2, 1)])
def test_frames_that_are_not_8k_plus_1_name_both_neighbours(length: int, made: int, stub_comfy):
    finding = next(f for f in guard.check(clip(video={"length": length}), HEALTHY) if f.id == "frames")
    assert (finding.severity, finding.nodes) == ("warning", ("video",))
    assert f"ComfyUI makes {made} of them" in finding.title
    assert f"{made} or {made + 8}" in finding.remedy


@pytest.mark.parametrize("length", [1, 9, 121, ["math", 0], None])
def test_frames_that_fit_or_are_not_known_give_no_finding(length: object, stub_comfy):
    prompt = clip(video={"length": length}, audio={"frames_number": length}, math=node("ComfyMathExpression"))
    assert "frames" not in ids(prompt)


def test_a_size_that_is_no_multiple_of_32_is_named_with_its_neighbours(stub_comfy):
    finding = only(clip(video={"width": 1280, "height": 720}))
    assert (finding.id, finding.nodes) == ("size", ("video",))
    assert finding.title == "1280 x 720 is not a multiple of 32; ComfyUI makes 1280 x 704 of it."
    assert "720 -> 704 or 736" in finding.remedy and "64" not in finding.why
    prompt = clip(video={"width": 1280, "height": 720})
    prompt["up"] = node("LTXVLatentUpsampler", samples=["separate", 0])
    finding = only(prompt)
    assert "makes 2560 x 1408 of that" in finding.why and "multiple of 64, not of 32 as 1440 is" in finding.why
    assert "720 -> 704 or 736, for 1408 or 1472 in the end" in finding.remedy


@pytest.mark.parametrize(
    ("name", "said"), [("ltx-2.3-spatial-upscaler-x1.5-1.0", "1920 x 1056"), ("ltx-2.3-temporal-upscaler-x2-1.0", "")]
)
def test_the_final_size_is_that_of_the_upscaler_in_question(name: str, said: str, stub_comfy):
    prompt = clip(video={"width": 1280, "height": 720})
    prompt["loader"] = node("LatentUpscaleModelLoader", model_name=f"{name}.safetensors")
    prompt["up"] = node("LTXVLatentUpsampler", samples=["separate", 0], upscale_model=["loader", 0])
    assert said in only(prompt).why and ("upscaler" in only(prompt).why) == bool(said)


def test_sizes_of_what_is_not_sampled_do_not_matter(stub_comfy):
    assert ids(clip(lonely=node("EmptyLTXVLatentVideo", width=100, height=100, length=100))) == {}


def test_different_frame_rates_are_named_with_their_places(stub_comfy):
    finding = only(clip(create={"fps": 25}))
    assert (finding.id, finding.severity) == ("fps", "warning")
    assert set(finding.nodes) == {"conditioning", "audio", "create"}
    assert "25 in CreateVideo" in finding.title and "24 in LTXVConditioning" in finding.title
    assert ids(clip(conditioning={"frame_rate": 25.0}, create={"fps": 25}))["fps"] == "warning"
    rate = {"rate": node("PrimitiveFloat", value=24.0)}
    assert ids(clip(create={"fps": ["rate", 0]}, conditioning={"frame_rate": ["rate", 0]}, **rate)) == {}


@pytest.mark.parametrize("kind", ["RIFE VFI", "FrameInterpolate", "VHS_SelectEveryNthImage",
                                  "ImageBatchRepeatInterleaving", "ImageExpandBatch+"])  # fmt: skip
def test_a_frame_rate_behind_a_node_that_changes_the_number_of_frames_may_differ(kind: str, stub_comfy):
    prompt = clip(create={"fps": 48, "images": ["more", 0]}, more=node(kind, images=["decode", 0]))
    assert ids(prompt) == {}
    prompt["more"]["class_type"] = "ImageUpscaleWithModel"
    assert ids(prompt) == {"fps": "warning"}


def test_two_clips_in_one_prompt_may_have_different_frame_rates(stub_comfy):
    prompt = clip()
    for name, entry in clip(conditioning={"frame_rate": 30}, audio={"frame_rate": 30}, create={"fps": 30}).items():
        links = {key: [f"b:{v[0]}", v[1]] if isinstance(v, list) else v for key, v in entry["inputs"].items()}
        prompt[f"b:{name}"] = {"class_type": entry["class_type"], "inputs": links}
    prompt["b:guider"]["inputs"]["model"] = ["model", 0]
    assert ids(prompt) == {}


@pytest.mark.parametrize(
    ("frames", "count", "rate", "seconds"), [(121, 97, 24, "4.04"), (121, 481, 25, "19.24"), (249, 121, 24, "5.04")]
)
def test_sound_of_another_length_than_the_picture_is_told_in_seconds(frames, count, rate, seconds, stub_comfy):
    prompt = clip(video={"length": frames}, audio={"frames_number": count, "frame_rate": rate},
                  conditioning={"frame_rate": rate}, create={"fps": rate})  # fmt: skip
    finding = only(prompt)
    assert (finding.id, finding.severity, finding.nodes) == ("audio_length", "warning", ("audio", "video"))
    assert f"The sound lasts {seconds} s" in finding.title
    assert f"to {frames}" in finding.remedy
    assert ("mel frames" in finding.why) == (count == 4 * frames - 3)


@pytest.mark.parametrize("kind", ["LTXVAddGuide", "LTXVAddLatentGuide"])
def test_the_picture_s_length_is_that_of_the_latent_a_guide_is_pinned_onto(kind: str, stub_comfy):
    guide = node(kind, latent=["video", 0], positive=["conditioning", 0], negative=["conditioning", 1])
    crop = node("LTXVCropGuides", latent=["separate", 0], positive=["guide", 0], negative=["guide", 1])
    prompt = clip(guide=guide, latent={"video_latent": ["guide", 2]}, audio={"frames_number": 97}, crop=crop,
                  decode={"samples": ["crop", 2]})  # fmt: skip
    assert only(prompt).nodes == ("audio", "video")


def test_sound_for_the_snapped_number_of_frames_fits(stub_comfy):
    assert ids(clip(video={"length": 125}, audio={"frames_number": 121})) == {"frames": "warning"}


def test_a_thousand_nodes_visit_each_node_a_bounded_number_of_times(stub_comfy, monkeypatch):
    prompt = {}
    for copy in range(75):
        for name, entry in clip(video={"length": 120}).items():
            links = {key: [f"{copy}:{v[0]}", v[1]] if isinstance(v, list) else v for key, v in entry["inputs"].items()}
            prompt[f"{copy}:{name}"] = {"class_type": entry["class_type"], "inputs": links}
    chained = {"0": node("UNETLoader")}
    for i in range(1, 1000):
        chained[str(i)] = node("LoraLoaderModelOnly", model=[str(i - 1), 0], lora_name="x", strength_model=1.0)
    for i in range(300):
        chained[f"k{i}"] = node("KSampler", model=["999", 0], latent_image=[f"k{i - 1}" if i else "x", 0], cfg=1.0)
    calls = []
    original = PromptGraph.source
    monkeypatch.setattr(PromptGraph, "source", lambda *given: calls.append(given) or original(*given))
    for graph in (prompt, chained):
        calls.clear()
        guard.check(graph, VULNERABLE)
        assert len(calls) < 6 * len(graph)


@pytest.mark.parametrize(
    ("kind", "rate"), [("VHS_VideoCombine", "frame_rate"), ("SaveWEBM", "fps"), ("SaveAnimatedWEBP", "fps")]
)
def test_every_node_that_makes_a_film_is_told_the_same_frame_rate(kind: str, rate: str, stub_comfy):
    prompt = clip(create=node(kind, images=["decode", 0], **{rate: 25.0}))
    finding = only(prompt)
    assert finding.id == "fps" and f"25 in {kind}" in finding.title
    prompt["create"]["inputs"][rate] = 24
    assert ids(prompt) == {}


def test_a_silent_clip_may_be_shown_at_another_rate(stub_comfy):
    silent = {"sampler": {"latent_image": ["video", 0]}, "decode": {"samples": ["sampler", 0]}}
    assert ids(clip(**silent, create={"fps": 25})) == {}
    assert ids(clip(**silent, create={"fps": 25, "audio": ["song", 0]})) == {"fps": "warning"}


def test_sizes_lengths_and_rates_are_judged_through_arithmetic(stub_comfy):
    def math(expression: str, **values: object) -> dict:
        return node("ComfyMathExpression", expression=expression, **{f"values.{k}": v for k, v in values.items()})

    prompt = clip(video={"width": ["w", 1], "length": ["n", 1]}, audio={"frames_number": ["n", 1]},
                  w=math("a/2", a=["side", 0]), n=math("a * b + c", a=["s", 0], b=["r", 0], c=1),
                  side=node("PrimitiveInt", value=1440), s=node("PrimitiveInt", value=5),
                  r=node("PrimitiveInt", value=24))  # fmt: skip
    assert ids(prompt) == {"size": "warning"}
    prompt["side"]["inputs"]["value"] = 1536
    assert ids(prompt) == {}
    prompt["n"]["inputs"]["values.c"] = 2
    assert ids(prompt) == {"frames": "warning", "audio_length": "warning"}
    prompt["r"]["inputs"]["value"] = ["unheard", 0]
    assert ids(prompt) == {}
