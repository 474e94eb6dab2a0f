# SPDX-License-Identifier: Apache-2.0
"""The card presets against the planner: LTX-2.3 in NVFP4 on the slowest card of that memory that is in wide use."""

from __future__ import annotations

import itertools

import pytest
from nvfp4_video.checkpoint.identify.components import find_components
from nvfp4_video.measure.fit import PARTLY, RESIDENT, SWAPPING
from nvfp4_video.measure.gpus import pick_gpu
from nvfp4_video.measure.ltx import SIGMAS, SIGMAS_STAGE_2
from nvfp4_video.measure.plan import make_plan
from nvfp4_video.measure.roofline import Clip
from nvfp4_video.measure.settings import CARDS, ONE_STAGE, STAGES, TWO_STAGES
from nvfp4_video.tests.support import full_size

SLOWEST = {
    "12 GB": "RTX 3060 12 GB", "16 GB": "RTX 5060 Ti 16 GB", "24 GB": "RTX 3090", "32 GB": "RTX 5090", "Spark": "GB10",
}  # fmt: skip
# Of 17.6 GB a card of 12 or 16 GB cannot hold all: the rest crosses the bus in every step.
VERDICTS = {"12 GB": {PARTLY}, "16 GB": {PARTLY}}
FITS = {RESIDENT, SWAPPING}
LONGEST = 120  # seconds of sampling


@pytest.fixture(scope="module")
def header():
    return full_size.checkpoint("NVFP4")


def planned(header, card: str, width: int, height: int, frames: int):
    clip = Clip(width, height, frames, 24.0)
    return make_plan(header.path.name, header.tensors, find_components(header), clip, pick_gpu(SLOWEST[card]))


def seconds(header, card: str, stages: str) -> float:
    """Of all steps."""
    width, height, frames = CARDS[card][stages]
    first, second = len(SIGMAS) - 1, len(SIGMAS_STAGE_2["2.3"]) - 1
    if stages == ONE_STAGE:
        return first * planned(header, card, width, height, frames).seconds
    half = planned(header, card, width // 2, height // 2, frames)
    return first * half.seconds + second * planned(header, card, width, height, frames).seconds


@pytest.mark.parametrize(("card", "stages"), list(itertools.product(CARDS, STAGES)))
def test_the_planner_says_that_it_runs_and_is_sampled_within_two_minutes(header, card: str, stages: str):
    plan = planned(header, card, *CARDS[card][stages])
    assert plan.fit.verdict in VERDICTS.get(card, FITS)
    assert all(phase.alone for phase in plan.fit.phases if phase.name == "decode")
    assert seconds(header, card, stages) < LONGEST


def test_two_stages_make_the_larger_clip_and_more_memory_no_smaller_one():
    areas = {card: {stages: size[0] * size[1] for stages, size in sizes.items()} for card, sizes in CARDS.items()}
    assert all(sizes[TWO_STAGES] > sizes[ONE_STAGE] for sizes in areas.values())
    by_memory = [areas[card][ONE_STAGE] for card in ("12 GB", "16 GB", "24 GB", "32 GB")]
    assert by_memory == sorted(set(by_memory))
