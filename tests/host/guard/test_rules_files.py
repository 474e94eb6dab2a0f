# SPDX-License-Identifier: Apache-2.0
"""What the guard says of an NVFP4 file that is not there: it is made from a checkpoint that is, by one button."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.tests.support.guard_prompts import HEALTHY, clip, node
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny

WANTED, SOURCE = "ltx-2.3-22b-dev-nvfp4.safetensors", "ltx-2.3-22b-dev-fp8.safetensors"


@pytest.fixture
def checkpoints(stub_comfy, tmp_path: Path) -> Path:
    return tmp_path / "models" / "checkpoints"


def wanting(**loader: object) -> dict:
    """A prompt whose model, video VAE and text projection are in WANTED, its audio VAE in a file of its own."""
    given = {"model_name": WANTED, "make_nvfp4": False} | loader
    return clip(
        model=node("NVFP4ModelLoader", **given), vae=node("NVFP4VAELoader", vae_name=WANTED),
        av=node("NVFP4VAELoader", vae_name="sound.safetensors"),
        text=node("NVFP4TextEncoderLoader", text_encoder="gemma.safetensors", projection=WANTED),
    )  # fmt: skip


def unmade(prompt: dict) -> list[guard.Finding]:
    return [finding for finding in guard.check(prompt, HEALTHY) if finding.id == "unmade"]


def test_a_file_that_is_missing_is_made_of_the_same_model_in_another_format(checkpoints: Path):
    save(checkpoints / SOURCE, {name: tensor for name, tensor in tiny().items() if name.startswith(PREFIX)})
    (finding,) = unmade(wanting())
    assert finding.severity == guard.ERROR and finding.nodes == ("model",) and finding.action == "make"
    assert finding.title == f"{WANTED} is not there, but {SOURCE} is, the same model by its name."
    assert [tuple(fix) for fix in finding.fixes] == [("model", "model_name", SOURCE), ("model", "make_nvfp4", True)]
    assert finding.as_dict()["fixes"][1] == {"node": "model", "input": "make_nvfp4", "value": True}


def test_vae_and_projection_come_from_the_same_checkpoint_where_it_has_them(checkpoints: Path):
    save(checkpoints / SOURCE, tiny())
    (finding,) = unmade(wanting())
    assert {tuple(fix) for fix in finding.fixes} == {
        ("model", "model_name", SOURCE), ("model", "make_nvfp4", True), ("vae", "vae_name", SOURCE),
        ("text", "projection", SOURCE),
    }  # fmt: skip


@pytest.mark.parametrize("there", [WANTED, SOURCE.replace("dev", "distilled"), SOURCE.replace("fp8", "mxfp4")])
def test_nothing_is_said_of_a_file_that_is_there_or_cannot_be_made(checkpoints: Path, there: str):
    save(checkpoints / there, tiny())
    assert unmade(wanting()) == []


def test_a_name_that_comes_over_a_link_is_nobody_s_to_set(checkpoints: Path):
    save(checkpoints / SOURCE, tiny())
    assert unmade(wanting(model_name=["somewhere", 0])) == []
    (finding,) = unmade(wanting(make_nvfp4=["somewhere", 0]))
    assert finding.fixes == ()
