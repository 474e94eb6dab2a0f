# SPDX-License-Identifier: Apache-2.0
"""The roofline against hand-counted layers and against the measured steps of an H200."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from nvfp4_video.measure.gpus import GPUS
from nvfp4_video.measure.roofline import (
    GRAPHS,
    MODES,
    STEP_ERROR,
    TEXT_ENCODER_PARAMETERS,
    VAE_FLOPS_PER_LATENT,
    Clip,
    decode_work,
    modes_of,
    multiplied_as,
    read_model,
    step,
)
from nvfp4_video.tests.support import full_size

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
H200 = GPUS["H200"]
# The prompt of host/bench/session.py has 256 tokens, its clips 121 frames at 25 fps.
BENCHMARK = {"768x512": Clip(768, 512, 121, 25.0, 256), "1280x704": Clip(1280, 704, 121, 25.0, 256)}
ROWS = {
    "stock BF16": ("BF16", "bf16", "BF16"),
    "stock NVFP4": ("NVFP4", "bf16", "QuantizedTensor"),
    "ours NVFP4": ("NVFP4", "bf16", GRAPHS),
    "ours NVFP4, fp8, attention auto": ("NVFP4", "fp8", GRAPHS),
}


@pytest.fixture(scope="module")
def models():
    return {stored: read_model(full_size.transformer(stored)) for stored in ("BF16", "FP8", "NVFP4")}


def measured_rows() -> list:
    """Of the first file all but ``fp8``, as that was then; of the second ``fp8``: stock waited for a slow CPU in it."""
    found, (*others, fp8) = [], ROWS
    for file, names in (("step.json", others), ("step_fp8.json", [fp8])):
        for size, run in json.loads((RESULTS / file).read_text())["sizes"].items():
            rows = [row for row in run["rows"] if row["row"] in names]
            found += [pytest.param(size, row, id=f"{row['row']} {size}") for row in rows]
    return found


@pytest.mark.parametrize(("size", "row"), measured_rows())
def test_a_predicted_step_is_as_near_to_the_measured_one_as_the_planner_says(models, size, row):
    stored, mode, launch = ROWS[row["row"]]
    found = step(models[stored], BENCHMARK[size], H200, mode, launch)
    assert BENCHMARK[size].tokens["video"] == row["tokens"]
    assert found.seconds == pytest.approx(row["step s"], rel=STEP_ERROR)


def test_small_clips_are_bound_by_the_cpu_on_an_h200_without_graphs_and_large_ones_by_arithmetic(models):
    small, large = (step(models["NVFP4"], BENCHMARK[size], H200, "bf16", "QuantizedTensor") for size in BENCHMARK)
    assert step(models["NVFP4"], BENCHMARK["768x512"], H200).cpu_seconds < small.gpu_seconds
    assert small.bound == "bound by the CPU's launches"
    assert small.seconds == small.cpu_seconds > small.gpu_seconds
    assert "bound" in large.bound and "CPU" not in large.bound and "memory" not in large.bound
    assert large.seconds == large.gpu_seconds


def test_nvfp4_and_fp8_files_take_the_same_step_on_a_gb10_as_the_article_found(models):
    # "8.0 s either way": weight-only formats do the same products. The clip's size is not known, so only the ratio is.
    steps = [step(models[stored], Clip(768, 512, 121), GPUS["GB10"]).seconds for stored in ("NVFP4", "FP8")]
    assert steps[0] == pytest.approx(steps[1], rel=0.02)


def test_a_long_clip_is_attention_bound_and_a_single_frame_is_not(models):
    assert step(models["NVFP4"], Clip(1280, 704, 257), H200).bound == "attention-bound"
    assert step(models["NVFP4"], Clip(768, 512, 121), GPUS["RTX 5090"]).bound == "math-bound in Linears"


def test_a_handful_of_tokens_is_memory_bound_where_the_cpu_is_fast_enough(models, monkeypatch):
    monkeypatch.setattr("nvfp4_video.measure.roofline.OTHER_SECONDS_PER_BLOCK", 0.0)
    clip = Clip(64, 64, 9, text_tokens=64)
    assert step(models["NVFP4"], clip, GPUS["GB10"]).bound == "memory-bound"


def test_tokens_are_those_of_the_latents():
    assert Clip(768, 512, 121).tokens == {"video": 6144, "audio": 126, "text": 1024, "one": 1}
    assert Clip(1280, 704, 121, 25).tokens["video"] == 14_080
    assert Clip(768, 512, 121, audio=False).tokens["audio"] == 0


def test_every_linear_of_the_released_model_is_counted_but_the_connectors(models):
    model = models["NVFP4"]
    assert (model.blocks, model.width) == (48, 4096)
    assert sum(model.linears.values()) == 1772 - 112
    assert sum(count for one, count in model.linears.items() if one.stored == "NVFP4") == 1496
    parameters = sum(count * one.rows * one.cols for one, count in model.linears.items())
    assert parameters == 20_992_491_520 - 2_014_838_784
    streams = {one.label: one.tokens for one in model.linears}
    assert streams["attn2.to_k"] == "text"
    assert streams["audio_to_video_attn.to_q"] == "video"
    assert streams["audio_to_video_attn.to_k"] == "audio"
    assert streams["video_to_audio_attn.to_v"] == "video"
    assert streams["adaln_single.linear"] == "one"
    assert model.attention["video", "text", 4096] == 48


def test_flops_of_the_feed_forward_are_two_for_each_weight_and_token(models):
    found = step(models["BF16"], Clip(768, 512, 121), GPUS["RTX 4090"])
    work = {one.label: one for one in found.work}
    assert work["video 16384x4096"].flops == 2 * 6144 * 16384 * 4096 * 48
    assert work["attention video to video"].flops == 4 * 6144**2 * 4096 * 48
    assert work["video 16384x4096"].floor == pytest.approx(2 * 6144 * 16384 * 4096 * 48 / 165.2e12)


@pytest.mark.parametrize("name", [name for name, gpu in GPUS.items() if gpu.known][::4])
def test_nothing_is_predicted_to_be_faster_than_its_floor(models, name):
    for model in models.values():
        for mode in (mode for mode in MODES if not modes_of(GPUS[name])[mode]):
            found = step(model, Clip(768, 512, 121), GPUS[name], mode)
            assert found.seconds >= found.floor > 0
            assert all(one.seconds >= one.floor for one in found.work)
            assert sum(found.shares.values()) == pytest.approx(found.gpu_seconds)


def test_weight_only_formats_cannot_beat_bf16_and_narrow_products_do(models):
    gpu, clip = GPUS["RTX 5090"], Clip(768, 512, 121)
    plain = step(models["BF16"], clip, gpu).seconds
    assert plain <= step(models["NVFP4"], clip, gpu).seconds < 1.05 * plain
    by_mode = [step(models["NVFP4"], clip, gpu, mode).seconds for mode in MODES]
    assert by_mode == sorted(by_mode, reverse=True)
    assert by_mode[2] < 0.5 * plain


def test_a_mode_that_the_gpu_lacks_names_the_capability(models):
    assert modes_of(GPUS["RTX 4090"]) == {
        "bf16": "", "fp8": "", "fp4": "needs compute capability 10.0, RTX 4090's is 8.9"
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="no prediction for fp8 compute: needs compute capability 8.9, RTX 3090's is 8.6"
    ):
        step(models["NVFP4"], Clip(768, 512, 121), GPUS["RTX 3090"], "fp8")


def test_the_same_model_in_another_format_changes_only_what_may_be_quantised(models):
    for stored in ("FP8", "NVFP4"):
        again = models["NVFP4"].stored_as(stored)
        assert again.weight_bytes == pytest.approx(models[stored].weight_bytes)
        assert sum(again.linears.values()) == 1660
    made = models["BF16"].stored_as("NVFP4")
    assert sum(count for one, count in made.linears.items() if one.stored == "NVFP4") == 1496
    assert made.weight_bytes == pytest.approx(models["NVFP4"].weight_bytes)
    assert models["NVFP4"].stored_as("BF16").weight_bytes == models["BF16"].weight_bytes


def test_a_stored_weight_is_multiplied_as_the_mode_allows():
    assert [multiplied_as("NVFP4", mode) for mode in MODES] == ["bf16", "fp8", "fp4"]
    assert [multiplied_as("FP8", mode) for mode in MODES] == ["bf16", "fp8", "fp8"]
    assert {multiplied_as(stored, mode) for stored in ("BF16", "INT8") for mode in MODES} == {"bf16"}


def test_another_architecture_is_no_model_of_the_roofline():
    assert read_model({"double_blocks.0.img_attn.qkv.weight": full_size.entry("BF16", 9216, 3072)}) is None


def test_the_vae_s_arithmetic_is_that_of_its_convolutions():
    upsampling = {"1": 8, "3": 8, "5": 2, "7": 4}  # positions a compress block of the decoder makes of one
    flops, positions = 0, 1
    for name, shape in full_size.recorded("ltx_vae_keys")["video_vae"].items():
        if name.startswith("decoder.") and len(shape) == 5:
            flops += 2 * math.prod(shape) * positions
            if name.endswith(".conv.conv.weight") and name.startswith("decoder.up_blocks."):
                positions *= upsampling[name.split(".")[2]]
    assert positions * 4 * 4 == 8 * 32 * 32
    assert flops == VAE_FLOPS_PER_LATENT


def test_writing_a_token_is_memory_bound_on_every_gpu_of_the_table():
    layer = 2 * 3840 * 4096 + 2 * 3840 * 2048 + 3 * 3840 * 15360
    assert TEXT_ENCODER_PARAMETERS == 48 * layer
    for gpu in (gpu for gpu in GPUS.values() if gpu.known):
        assert decode_work(gpu, 9e9).floor == pytest.approx(9e9 / gpu.bandwidth)
