# SPDX-License-Identifier: Apache-2.0
"""Schedules are cut as the host cuts them; what the host alone can compute is asked of it, and unknown without it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
from nvfp4_video.host.guard.links import Link
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.host.guard.values import schedules
from nvfp4_video.host.guard.values.schedules import Sigmas
from nvfp4_video.measure.ltx import SIGMAS, SIGMAS_STAGE_2, sigmas_text
from nvfp4_video.tests.support.guard_prompts import node

TEXT = sigmas_text(SIGMAS)


def at(entry: dict, slot: int = 0, **more: dict) -> object:
    manual = {"m": node("ManualSigmas", sigmas=TEXT)}
    return PromptGraph(manual | more | {"it": entry}).output(Link("it", slot))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A host whose schedulers make steps + 1 numbers; what it was asked for."""
    asked: list[tuple] = []

    def made(scheduler: str, steps: int, sampler: str) -> tuple[float, ...]:
        asked.append((scheduler, steps, sampler))
        return tuple(float(steps - step) for step in range(steps + 1))

    monkeypatch.setattr(schedules, "_calculated", made)
    return asked


def test_a_written_schedule_is_its_numbers():
    assert at(node("ManualSigmas", sigmas=TEXT)) == Sigmas(SIGMAS)
    assert at(node("ManualSigmas", sigmas="1., .5,0")) == Sigmas((1.0, 0.5, 0.0))
    assert at(node("ManualSigmas", sigmas="1..5")) is None
    assert at(node("ManualSigmas", sigmas="1," * 900)) is None


def test_a_split_schedule_is_its_parts():
    split = node("SplitSigmas", sigmas=["m", 0], step=5)
    assert (at(split, 0).values, at(split, 1).values) == (SIGMAS[:6], SIGMAS[5:])
    by = node("SplitSigmasDenoise", sigmas=["m", 0], denoise=0.375)
    assert (at(by, 0).values, at(by, 1).values) == (SIGMAS[:-3], SIGMAS[-4:])
    assert at(node("SetFirstSigma", sigmas=["m", 0], sigma=0.85)).values == (0.85, *SIGMAS[1:])
    assert at(node("SplitSigmas", sigmas=["m", 0], step=-1)) is None


def test_a_scheduler_is_asked_for_what_it_would_run_and_the_end_is_taken(computed: list[tuple]):
    found = at(node("BasicScheduler", scheduler="linear_quadratic", steps=3, denoise=0.375, model=["x", 0]))
    assert computed == [("linear_quadratic", 8, "")] and found == Sigmas((3.0, 2.0, 1.0, 0.0), of_model=True)


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 9999}, {"denoise": 0.0}, {"denoise": 0.001},
                                    {"scheduler": ["x", 0]}])  # fmt: skip
def test_a_schedule_that_cannot_be_asked_for_is_unknown(change: dict, computed: list[tuple]):
    assert at(node("BasicScheduler", **({"scheduler": "simple", "steps": 8, "denoise": 1.0} | change))) is None
    assert computed == []


def test_without_a_host_a_scheduler_is_unknown(stub_comfy: types.ModuleType):
    schedules._calculated.cache_clear()
    assert at(node("BasicScheduler", scheduler="simple", steps=8, denoise=1.0)) is None
    schedules._calculated.cache_clear()


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[dict]]:
    """Gives the running ComfyUI a scheduler class of this name and module, which notes what it is asked."""

    def add(kind: str, module: str) -> list[dict]:
        asked: list[dict] = []

        class Scheduler:
            RELATIVE_PYTHON_MODULE = module

            @staticmethod
            def execute(**inputs: object) -> types.SimpleNamespace:
                asked.append(inputs)
                return types.SimpleNamespace(result=[types.SimpleNamespace(tolist=lambda: [1.0, 0.0])])

        monkeypatch.setitem(sys.modules, "nodes", types.SimpleNamespace(NODE_CLASS_MAPPINGS={kind: Scheduler}))
        schedules._by_node.cache_clear()
        return asked

    yield add
    schedules._by_node.cache_clear()


LTXV = {"steps": 20, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}


def test_a_node_of_comfyui_is_run_and_another_pack_s_is_not(classes: Callable[[str, str], list[dict]]):
    asked = classes("LTXVScheduler", "comfy_extras.nodes_lt")
    assert at(node("LTXVScheduler", **LTXV)) == Sigmas((1.0, 0.0)) and asked == [LTXV]
    asked = classes("LTXVScheduler", "custom_nodes.somebody")
    assert at(node("LTXVScheduler", **LTXV)) is None and asked == []


def test_a_scheduler_that_asks_for_a_model_gets_its_sampling(
    classes: Callable[[str, str], list[dict]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(schedules, "_sampling", lambda: "LTX-2's")
    options = {"steps": 8, "alpha": 0.6, "beta": 0.6}
    asked = classes("BetaSamplingScheduler", "comfy_extras.nodes_custom_sampler")
    assert at(node("BetaSamplingScheduler", model=["x", 0], **options)) == Sigmas((1.0, 0.0), of_model=True)
    model = asked[0].pop("model")
    assert asked == [options] and model.get_model_object("model_sampling") == "LTX-2's"


def test_a_schedule_with_steps_put_in_between_is_made_by_the_host(classes: Callable[[str, str], list[dict]]):
    asked = classes("ExtendIntermediateSigmas", "comfy_extras.nodes_custom_sampler")
    options = {"steps": 2, "start_at_sigma": -1.0, "end_at_sigma": 0.5, "spacing": "linear"}
    assert at(node("ExtendIntermediateSigmas", sigmas=["m", 0], **options)) == Sigmas((1.0, 0.0))
    assert asked[0].pop("sigmas").tolist() == pytest.approx(SIGMAS) and asked == [options]


def test_the_latent_s_size_counts_for_the_shift(classes: Callable[[str, str], list[dict]]):
    asked = classes("LTXVScheduler", "comfy_extras.nodes_lt")
    video = {"v": node("EmptyLTXVLatentVideo", width=768, height=512, length=121)}
    at(node("LTXVScheduler", latent=["v", 0], **LTXV), **video)
    tokens = 24 * 16 * 16
    assert asked[0]["max_shift"] == pytest.approx(2.05 + (2.05 - 0.95) / 3072 * (tokens - 4096))
    assert at(node("LTXVScheduler", latent=["?", 0], **LTXV | {"stretch": False})) is None


def test_trained_schedules_are_known_in_whole_and_in_part(computed: list[tuple]):
    from nvfp4_video.host.guard.rules_model import _known_schedule

    for known in (SIGMAS, SIGMAS_STAGE_2["2.0"], SIGMAS_STAGE_2["2.3"], SIGMAS_STAGE_2["2.3"][1:]):
        assert _known_schedule(known)
    assert not _known_schedule((1.0, 0.5, 0.0)) and not _known_schedule(())
