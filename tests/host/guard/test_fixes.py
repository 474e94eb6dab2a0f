# SPDX-License-Identifier: Apache-2.0
"""Cures that are values: which widgets they name, that they cure, and when there is none."""

from __future__ import annotations

import types

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.tests.host.guard.test_rules_vae import FILES
from nvfp4_video.tests.support.guard_prompts import HEALTHY, clip, facts, ids, node


@pytest.fixture(autouse=True)
def files(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: FILES.get(name))


def tiled(vae: str = "full.safetensors", **sizes: int) -> dict:
    decode = node("VAEDecodeTiled", vae=["vae", 0], samples=["separate", 0], overlap=64, temporal_overlap=8, **sizes)
    return clip(vae={"vae_name": vae}, decode=decode)


CURED = {
    "frames": (clip(video={"length": 120}, audio={"frames_number": 120}), {("video", 121), ("audio", 121)}),
    "frames, the lower number": (clip(video={"length": 115}, audio={"frames_number": 113}), {("video", 113)}),
    "size": (clip(video={"width": 770, "height": 500}), {("video", 768), ("video", 512)}),
    "frame rate, of most nodes": (clip(create={"fps": 30}), {("create", 24)}),
    "frame rate, of the first": (clip(create={"fps": 30}, audio={"frame_rate": 30}), {("conditioning", 30)}),
    "sound": (clip(audio={"frames_number": 97}), {("audio", 121)}),
    "batches": (clip(video={"batch_size": 2}), {("audio", 2)}),
    "tiles of time": (tiled(tile_size=768, temporal_size=64), {("decode", 128)}),
    "a primitive": (
        clip(video={"length": ["n", 0]}, audio={"frames_number": ["n", 0]}, n=node("PrimitiveInt", value=120)),
        {("n", 121)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "values"), CURED.values(), ids=CURED)
def test_the_values_of_a_fix_cure_the_finding(prompt: dict, values: set):
    fixes = [fix for finding in guard.check(prompt, HEALTHY) for fix in finding.fixes]
    assert {(fix.node, fix.value) for fix in fixes} == values
    for fix in fixes:
        assert fix.input in prompt[fix.node]["inputs"]
        prompt[fix.node]["inputs"][fix.input] = fix.value
    assert ids(prompt) == {}


def test_a_tile_that_is_too_large_is_made_one_that_fits():
    host = HEALTHY | facts(gpu_memory=8 * 2**30)
    prompt = tiled("vae-2.5.safetensors", tile_size=768, temporal_size=4096)
    (large,) = [finding for finding in guard.check(prompt, host) if finding.id == "large_tiles"]
    (fix,) = large.fixes
    assert (fix.node, fix.input) == ("decode", "tile_size") and fix.value < 768
    prompt["decode"]["inputs"]["tile_size"] = fix.value
    assert "large_tiles" not in ids(prompt, host)


@pytest.mark.parametrize(
    "prompt",
    [
        clip(create={"fps": ["math", 0]}, math=node("ComfyMathExpression", expression="a", **{"values.a": 30})),
        clip(create={"fps": "30"}),
    ],
    ids=["computed", "text"],
)
def test_a_value_that_no_widget_holds_has_no_fix(prompt: dict):
    assert all(finding.fixes == () for finding in guard.check(prompt, HEALTHY))




def test_a_finding_as_json_names_node_input_and_value():
    finding = guard.check(clip(video={"length": 120}, audio={"frames_number": 120}), HEALTHY)[0]
    assert finding.as_dict()["fixes"] == [
        {"node": "video", "input": "length", "value": 121},
        {"node": "audio", "input": "frames_number", "value": 121},
    ]
