# SPDX-License-Identifier: Apache-2.0
"""The pictures on nodes: as wide as nodes are, twice, no higher than a node gives them, and of the record's numbers."""

from __future__ import annotations

import numpy as np
import pytest
from nvfp4_video.checkpoint.identify.components import find_components
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.draw.canvas import BLUE, ORANGE, RED
from nvfp4_video.draw.compact import compact_comparison, compact_inspection, compact_plan, compact_sharpness
from nvfp4_video.draw.inspect import COMPONENT_COLOURS, FORMAT_COLOURS
from nvfp4_video.measure.compare import compare_clips
from nvfp4_video.measure.gpus import GPUS
from nvfp4_video.measure.plan import make_plan
from nvfp4_video.measure.roofline import Clip
from nvfp4_video.measure.sharpness import measure_sharpness
from nvfp4_video.tests.support import full_size

# Width and least ratio of width to height that front ends show at the width of a node, 310, under a text.
WIDTH, LEAST_RATIO = 620, 1.3


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has that colour, (H, W) bool."""
    return np.abs(picture.astype(int) - colour).max(-1) < 8


def clip(frames: int = 3, height: int = 96, width: int = 160) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def plan(gpu: str):
    header = full_size.checkpoint("NVFP4")
    return make_plan("ltx.safetensors", header.tensors, find_components(header), Clip(1280, 704, 121, 24.0), GPUS[gpu])


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "full.safetensors"
    return inspect_checkpoint(full_size.write(path, full_size.checkpoint("NVFP4")))


def test_every_picture_fits_a_node(inspection):
    found = compare_clips(clip(), clip()[::-1].copy())
    pictures = [
        compact_inspection(inspection), compact_plan(plan("RTX 5090")), compact_sharpness(measure_sharpness(clip())),
        compact_comparison(found, clip(), clip()[::-1]),
    ]  # fmt: skip
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.shape[1:] == (WIDTH, 3)
        assert WIDTH / picture.shape[0] > LEAST_RATIO


def test_the_bar_gives_each_component_its_share_and_the_columns_show_the_formats(inspection):
    picture = compact_inspection(inspection)
    bar = picture[24:26, 20:-20]
    total = sum(part.nbytes for part in inspection.parts)
    for part in inspection.parts:
        share = pixels(bar, COMPONENT_COLOURS[part.name]).mean()
        assert share == pytest.approx(part.nbytes / total, abs=0.01), part.title
    columns = picture[-130:-45, 20:-20]
    assert pixels(columns, FORMAT_COLOURS["NVFP4"]).sum() > pixels(columns, FORMAT_COLOURS["BF16"]).sum() > 0


def test_the_plan_of_a_small_card_crosses_the_line_where_its_memory_ends():
    for gpu, crosses in (("RTX 5090", False), ("RTX 4090", False), ("RTX 5080", True)):
        picture = compact_plan(plan(gpu))
        rows = slice(60, 180)
        line = np.flatnonzero(pixels(picture[rows], RED).sum(0) > 60)
        work = np.flatnonzero(pixels(picture[rows], BLUE).any(0) | pixels(picture[rows], ORANGE).any(0))
        assert (work.max() > line.max()) == crosses, gpu


@pytest.mark.parametrize("frames", [1, 2, 60])
def test_any_number_of_frames_is_drawn(frames):
    assert pixels(compact_sharpness(measure_sharpness(clip(frames))), BLUE).sum() > 50


def test_a_warning_is_red():
    flat = np.full((2, 96, 160, 3), 128, np.uint8)
    picture = clip(1).repeat(4, axis=1).repeat(4, axis=2)
    assert pixels(compact_sharpness(measure_sharpness(picture, 1.0))[:50], RED).sum() == 0
    for bad, reference in ((flat, 500.0), (flat, None), (clip(), 1.0)):
        assert pixels(compact_sharpness(measure_sharpness(bad, reference))[:50], RED).sum() > 50


def test_upright_clips_are_shown_whole():
    tall = clip(2, 160, 96)
    picture = compact_comparison(compare_clips(tall, tall), tall, tall)
    assert WIDTH / picture.shape[0] > LEAST_RATIO
