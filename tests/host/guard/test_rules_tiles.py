# SPDX-License-Identifier: Apache-2.0
"""What the guard says about decodes in tiles, and what it leaves alone."""

from __future__ import annotations

import types

import pytest
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.measure.fit import decode_bytes
from nvfp4_video.measure.roofline import Clip
from nvfp4_video.tests.host.guard.test_rules_vae import FILES
from nvfp4_video.tests.support.guard_prompts import HEALTHY, clip, facts, ids, node, only

GIB = 2**30


@pytest.fixture(autouse=True)
def files(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_view, "file_facts", lambda name, _: FILES.get(name))


def tiled(kind: str = "VAEDecodeTiled", vae: str = "full.safetensors", **sizes: object) -> dict:
    latents = "samples" if kind == "VAEDecodeTiled" else "latents"
    return clip(vae={"vae_name": vae}, decode=node(kind, vae=["vae", 0], **{latents: ["separate", 0]}, **sizes))


def test_tiles_of_time_are_a_warning_and_name_the_node_that_needs_none():
    finding = only(tiled(tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8))
    assert (finding.id, finding.severity, finding.nodes) == ("temporal_tiles", "warning", ("decode",))
    assert "16 latent frames 8 at a time" in finding.title
    assert "VAE Decode" in finding.remedy and "`temporal_size`" in finding.remedy


def test_the_node_s_own_defaults_count_where_nothing_is_given():
    assert ids(tiled()) == {"temporal_tiles": "warning"}


@pytest.mark.parametrize("temporal", [128, 4096])
def test_tiles_of_the_picture_alone_are_told_for_information(temporal: int):
    finding = only(tiled(tile_size=512, overlap=64, temporal_size=temporal, temporal_overlap=8))
    assert (finding.id, finding.severity) == ("tiled_decode", "info")


def test_one_tile_that_holds_the_whole_clip_is_not_mentioned():
    assert ids(tiled(tile_size=768, overlap=64, temporal_size=4096, temporal_overlap=8)) == {}


@pytest.mark.parametrize("vae", ["vae-2.5.safetensors", "not-there.safetensors"])
def test_tiles_of_a_decoder_without_chunks_or_of_an_unknown_one_are_right(vae: str):
    assert ids(tiled(vae=vae, tile_size=512, temporal_size=64)) == {}


def test_a_length_that_is_not_known_gives_no_finding():
    prompt = tiled(tile_size=768, temporal_size=64)
    prompt["video"]["inputs"]["length"] = prompt["audio"]["inputs"]["frames_number"] = ["unheard", 0]
    assert ids(prompt) == {}
    prompt = tiled(tile_size=["unheard", 0], temporal_size=["unheard", 0])
    assert ids(prompt) == {}


def test_plain_vae_decode_is_never_mentioned():
    assert ids(clip(vae={"vae_name": "full.safetensors"})) == {}


@pytest.mark.parametrize(("length", "found"), [(8, {"temporal_tiles": "warning"}), (16, {})])
def test_lightricks_temporal_tiles_are_counted_in_latent_frames(length: int, found: dict):
    prompt = tiled("LTXVSpatioTemporalTiledVAEDecode", spatial_tiles=1, spatial_overlap=1,
                   temporal_tile_length=length, temporal_overlap=1)  # fmt: skip
    assert ids(prompt) == found


@pytest.mark.parametrize(("across", "found"), [(2, {"tiled_decode": "info"}), (1, {})])
def test_lightricks_tiles_of_the_picture_are_counted(across: int, found: dict):
    prompt = tiled("LTXVTiledVAEDecode", horizontal_tiles=across, vertical_tiles=1, overlap=1)
    assert ids(prompt) == found


@pytest.mark.parametrize(("memory", "large"), [(8 * GIB, True), (24 * GIB, False)])
def test_a_tile_that_a_small_card_cannot_hold_is_named_with_what_it_takes(memory: int, large: bool):
    prompt = tiled(vae="vae-2.5.safetensors", tile_size=768, temporal_size=4096)
    needs = decode_bytes(Clip(768, 512, 121), memory, "2.5")
    assert (needs > memory) == large
    found = ids(prompt, HEALTHY | facts(gpu_memory=memory))
    assert found == ({"large_tiles": "warning"} if large else {})


def test_smaller_tiles_fit():
    prompt = tiled(vae="vae-2.5.safetensors", tile_size=256, temporal_size=64)
    assert ids(prompt, HEALTHY | facts(gpu_memory=8 * GIB)) == {}
