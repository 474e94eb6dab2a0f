# SPDX-License-Identifier: Apache-2.0
"""What fits where: the article's two verdicts, the measured working memory, and the plan as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.identify.components import find_components
from nvfp4_video.measure.fit import (
    PARTLY,
    RESIDENT,
    STREAMING,
    SWAPPING,
    TOO_LARGE,
    advice,
    decode_bytes,
    fit,
    kept_free,
    sampling_bytes,
)
from nvfp4_video.measure.gpus import GIB, GPUS
from nvfp4_video.measure.plan import make_plan
from nvfp4_video.measure.roofline import Clip, read_model
from nvfp4_video.tests.support import full_size

CLIP = Clip(768, 512, 121)
# The article's files: everything but the text encoder, of about 9 GB, is in the checkpoint.
REST = {"text_projection": 2.31e9, "video_vae": 1.45e9, "audio_vae": 0.36e9}
ARTICLE = {name: REST | {"diffusion_model": size - sum(REST.values())} for name, size in
           (("FP8", 29.2e9), ("NVFP4", 19.5e9))}  # fmt: skip


def plan_of(stored: str, gpu: str, mode: str = "bf16", clip: Clip = CLIP, **changes):
    header = full_size.checkpoint(stored)
    chosen = replace(GPUS[gpu], **changes)
    return make_plan(header.path.name, header.tensors, find_components(header), clip, chosen, mode)


@pytest.fixture(scope="module")
def models():
    return {stored: read_model(full_size.transformer(stored)) for stored in ("BF16", "FP8", "NVFP4")}


@pytest.mark.parametrize("memory", [32e9, 32 * 2**30])
def test_the_article_s_fp8_checkpoint_does_not_fit_32_gb_with_its_text_encoder_and_its_nvfp4_one_does(models, memory):
    gpu = replace(GPUS["RTX 5090"], memory=memory)
    found = {name: fit(sizes, CLIP, gpu, model=models[name]) for name, sizes in ARTICLE.items()}
    assert found["FP8"].total == pytest.approx(38.2e9) and found["NVFP4"].total == pytest.approx(28.5e9)
    assert found["FP8"].verdict == SWAPPING
    assert found["NVFP4"].verdict == RESIDENT
    assert "while it samples" in advice(found["NVFP4"])[0]
    assert "`--highvram` and `--gpu-only` would run out of memory" in advice(found["FP8"])[0]


def test_the_synthetic_checkpoints_have_the_article_s_size_and_the_same_verdicts():
    plans = {stored: plan_of(stored, "RTX 5090") for stored in ("FP8", "NVFP4")}
    in_file = {stored: sum(plan.fit.sizes.values()) - 9e9 for stored, plan in plans.items()}
    assert in_file["FP8"] == pytest.approx(29.2e9, rel=0.01)
    assert (plans["FP8"].fit.verdict, plans["NVFP4"].fit.verdict) == (SWAPPING, RESIDENT)
    assert plans["NVFP4"].fit.assumed == ("text_encoder",)


def test_working_memory_of_a_step_is_that_measured_on_an_h200(models):
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "step.json").read_text())["memory"]
    clip = Clip(1280, 704, 121, 25.0, 256)
    for stored, row in (("BF16", "bf16"), ("NVFP4", "ours")):
        assert sampling_bytes(models[stored], clip) == pytest.approx(1e9 * measured[row]["torch peak GB"], rel=0.05)


def test_only_what_a_mode_rewrites_needs_room_for_the_largest_layer(models):
    plain = sampling_bytes(models["BF16"], CLIP)
    largest = 16384 * 4096
    extra = [sampling_bytes(models["NVFP4"], CLIP, mode) - plain for mode in ("bf16", "fp8", "fp4")]
    assert extra == [2 * largest, largest, 0]


def test_the_decode_needs_what_was_measured_and_less_on_smaller_cards_with_smaller_chunks():
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "decode.json").read_text())
    assert decode_bytes(CLIP, 139.8 * GIB) == pytest.approx(1e9 * measured["rows"][0]["peak_gb"])
    large = decode_bytes(CLIP, 24 * GIB)
    assert decode_bytes(CLIP, 6 * GIB) == decode_bytes(CLIP, 4 * GIB) == pytest.approx(large / 4)
    assert decode_bytes(CLIP, 15 * GIB) == pytest.approx(large * 80 / 128)
    assert decode_bytes(Clip(768, 512, 241), 24 * GIB) == large  # chunks of time: length costs nothing
    assert decode_bytes(Clip(2560, 1440, 121), 6 * GIB) > decode_bytes(CLIP, 6 * GIB)  # one frame at least
    assert decode_bytes(CLIP, 24 * GIB, "2.5") == 1700 * 16 * 16 * 24 * 8**3 * 2


@pytest.mark.parametrize("gpu", ["RTX 4070 Ti SUPER", "RTX 5060", "RTX 3060 12 GB", "RTX 2060 6 GB", "RTX 5090"])
@pytest.mark.parametrize("clip", [CLIP, Clip(1344, 864, 121), Clip(2560, 1440, 121)])
def test_no_card_is_sent_to_the_tiled_decode(models, gpu, clip):
    for version in ("", "2.5"):
        found = fit(ARTICLE["NVFP4"], clip, GPUS[gpu], model=models["NVFP4"], vae_version=version)
        lines = advice(found)
        assert not any("Tiled" in line for line in lines)
        said = [line for line in lines if line.startswith("VAE Decode is the node to use")]
        assert bool(said) == (not found.phases[2].alone)


def test_the_host_keeps_400_mib_free_and_at_least_0_8_gib_to_work_in():
    assert kept_free(0.0) == pytest.approx(0.8 * GIB + 400 * 2**20)
    assert kept_free(0.5 * GIB) == pytest.approx(0.3 * GIB + 400 * 2**20)
    assert kept_free(3 * GIB) == 400 * 2**20


def test_small_cards_keep_part_of_the_diffusion_model_and_stream_the_rest(models):
    found = fit(ARTICLE["NVFP4"], Clip(1280, 704, 121), GPUS["RTX 5070"], model=models["NVFP4"])
    assert found.verdict == PARTLY
    sample = found.phases[1]
    assert found.streamed == pytest.approx(sample.needs - found.memory)
    assert found.stream_seconds == pytest.approx(found.streamed / 31.5e9)
    line = advice(found)[0]
    assert "not `--disable-dynamic-vram`" in line and "of the diffusion model stay on the GPU" in line
    assert "of RAM free" in line


def test_a_card_with_no_room_beside_the_working_memory_streams_all_of_it(models):
    clip = Clip(1280, 704, 121)
    tight = replace(GPUS["RTX 5080"], memory=sampling_bytes(models["NVFP4"], clip) + 0.6 * GIB)
    found = fit(ARTICLE["NVFP4"], clip, tight, model=models["NVFP4"])
    assert found.verdict == STREAMING
    assert "The diffusion model, " in advice(found)[0] and "crosses the bus in every step" in advice(found)[0]
    less = fit(ARTICLE["NVFP4"], clip, replace(tight, memory=tight.memory - 0.5 * GIB), model=models["NVFP4"])
    assert less.verdict == TOO_LARGE


def test_memory_below_the_working_memory_is_too_little_whatever_the_flags(models):
    found = fit(ARTICLE["NVFP4"], CLIP, replace(GPUS["RTX 3090"], memory=0.7e9), model=models["NVFP4"])
    assert found.verdict == TOO_LARGE
    assert advice(found)[0].startswith("no launch flag makes this fit")


def test_on_unified_memory_the_file_s_page_cache_is_counted_and_nothing_can_be_moved_out(models):
    sizes = ARTICLE["NVFP4"]
    found = fit(sizes, CLIP, GPUS["GB10"], model=models["NVFP4"])
    assert found.verdict == RESIDENT
    assert found.with_page_cache > found.total + sum(sizes.values())
    assert any("cached pages count as used" in line for line in advice(found))
    small = fit(sizes, CLIP, replace(GPUS["GB10"], memory=14e9), model=models["NVFP4"])
    assert small.verdict == TOO_LARGE
    turns = fit(sizes, CLIP, replace(GPUS["GB10"], memory=24e9), model=models["NVFP4"])
    assert turns.verdict == SWAPPING and "read from the disk again" in advice(turns)[0]
    assert any("more than there is" in line for line in advice(turns))
    assert fit(sizes, CLIP, GPUS["RTX 5090"], model=models["NVFP4"]).with_page_cache is None


def test_a_stated_text_encoder_replaces_the_assumed_one(models):
    found = fit(ARTICLE["NVFP4"], CLIP, GPUS["RTX 5090"], model=models["NVFP4"], text_encoder=24e9)
    assert (found.sizes["text_encoder"], found.assumed, found.verdict) == (24e9, (), SWAPPING)


def test_a_diffusion_model_alone_gets_the_other_parts_assumed():
    header = full_size.checkpoint("NVFP4")
    alone = {name: info for name, info in header.tensors.items() if name.startswith("model.")}
    parts = {"diffusion_model": find_components(header)["diffusion_model"]}
    plan = make_plan("dit.safetensors", alone, parts, CLIP, GPUS["RTX 5090"])
    assert plan.fit.assumed == ("text_encoder", "text_projection", "video_vae", "audio_vae")
    whole = plan_of("NVFP4", "RTX 5090")
    assert plan.fit.total == pytest.approx(whole.fit.total, rel=0.001)
    assert str(plan).count("assumed: not in this file") == 4


def test_the_plan_says_size_for_weight_only_and_speed_where_products_get_narrower():
    plan = plan_of("NVFP4", "GB10")
    assert [line.partition(" (")[0] for line in plan.changes] == [
        "bf16 compute: size, not speed",
        "fp8 compute: size and speed",
        "fp4 compute: size and speed",
    ]
    assert "58% smaller than BF16, 30% than FP8" in plan.changes[0]
    assert "what NVFP4 changes here:" in str(plan)
    older = plan_of("NVFP4", "RTX 3090")
    assert [line.partition(":")[0] for line in older.changes] == ["bf16 compute"]
    assert "BF16 has to be streamed in every step" in older.changes[0]
    assert "fp4 compute: needs compute capability 10.0, RTX 3090's is 8.6" in str(older)


def test_a_slow_bus_turns_smaller_into_faster(monkeypatch):
    monkeypatch.setattr("nvfp4_video.measure.fit.PCIE_BANDWIDTH", 1e9)
    plan = plan_of("BF16", "RTX 3090")
    rows = {(one.stored, one.mode): one for one in plan.choices}
    assert rows["BF16", "bf16"].bound == "bound by the bus"
    assert rows["BF16", "bf16"].seconds == pytest.approx(plan.fit.stream_seconds) == plan.seconds
    assert rows["NVFP4", "bf16"].bound == "math-bound in Linears"
    assert plan.changes[0].startswith("bf16 compute: size and speed")
    assert not plan.runs


@pytest.mark.parametrize("stored", ["BF16", "FP8", "NVFP4"])
def test_the_formats_beside_each_other_are_the_same_whichever_file_is_read(stored):
    reference = plan_of("NVFP4", "RTX 5090")
    for ours, theirs in zip(plan_of(stored, "RTX 5090").choices, reference.choices, strict=True):
        assert (ours.stored, ours.mode, ours.verdict, ours.bound) == (
            theirs.stored, theirs.mode, theirs.verdict, theirs.bound
        )  # fmt: skip
        assert ours.size == pytest.approx(theirs.size, rel=0.001)
        assert ours.seconds == pytest.approx(theirs.seconds)


def test_an_unknown_gpu_gets_the_fit_without_times_and_the_reason():
    plan = plan_of("NVFP4", "RTX 5090", name="some card", bandwidth=None, bf16=None, fp8=None, fp4=None, note="")
    assert plan.step is None and plan.choices == ()
    assert plan.fit.verdict == RESIDENT
    assert "no times for some card: it is not in the table. State its bandwidth and TFLOP/s for them" in str(plan)


def test_a_card_without_bf16_gets_the_fit_and_the_reason_why_no_times():
    plan = plan_of("NVFP4", "RTX 2080 Ti")
    assert plan.step is None and plan.fit.verdict == PARTLY
    assert "no times for RTX 2080 Ti: it has no BF16 tensor cores" in str(plan)
    assert plan.fit.phases[1].working == 2 * plan_of("NVFP4", "RTX 3090").fit.phases[1].working
    laptop = plan_of("NVFP4", "RTX 4090 Laptop")
    assert "no times for RTX 4090 Laptop: laptops run at clocks of their own" in str(laptop)


def test_memory_is_told_in_gib():
    text = str(plan_of("NVFP4", "RTX 5090"))
    assert "31.7 GiB of memory" in text and " GB" not in text.partition("values of")[0]


def test_another_family_gets_sizes_only():
    names = {"double_blocks.0.img_attn.qkv.weight": full_size.entry("BF16", 9216, 3072)}
    part = type("Part", (), {"names": {name: name for name in names}})
    plan = make_plan("flux.safetensors", names, {"diffusion_model": part}, CLIP, GPUS["RTX 5090"])
    assert plan.step is None
    assert plan.fit.sizes["diffusion_model"] == 2 * 9216 * 3072
    assert "not an LTX transformer: sizes only" in str(plan)


def test_files_and_clips_that_cannot_be_planned_are_refused_in_words():
    with pytest.raises(ValueError, match="vae.safetensors: no diffusion model is in it; choose a full checkpoint"):
        make_plan("vae.safetensors", {}, {}, CLIP, GPUS["RTX 5090"])
    with pytest.raises(ValueError, match="31x512, 121 frames at 24 fps is no clip"):
        plan_of("NVFP4", "RTX 5090", clip=Clip(31, 512, 121))
    with pytest.raises(ValueError, match="fp4 compute: needs compute capability 10.0.*choose bf16"):
        plan_of("NVFP4", "RTX 4090", "fp4")


def test_the_record_of_a_plan_is_json():
    record = json.loads(json.dumps(plan_of("NVFP4", "GB10").as_dict(), allow_nan=False))
    assert record["fit"]["verdict"] == RESIDENT
    assert record["clip"]["tokens"]["video"] == 6144
    assert {row["mode"] for row in record["choices"]} == {"bf16", "fp8", "fp4"}
    assert record["gpu"]["source"].startswith("https://")
