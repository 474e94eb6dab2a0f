# SPDX-License-Identifier: Apache-2.0
"""NVFP4DistilledSettings and NVFP4Planner on the stubbed host: outputs, types, texts, refusals."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from nvfp4_video.host import planning as host_settings
from nvfp4_video.measure.gpus import GPUS
from nvfp4_video.measure.ltx import SIGMAS, SIGMAS_STAGE_2
from nvfp4_video.nodes.plan import NVFP4DistilledSettings, NVFP4Planner
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support import full_size

NAMES = ["width", "height", "frames", "fps", "frame_rate", "sigmas", "sigmas_stage_2", "cfg", "audio_latents",
         "final_width", "final_height", "text"]  # fmt: skip


def defaults(node) -> dict:
    spec = node.INPUT_TYPES()
    options = {**spec["required"], **spec.get("optional", {})}
    return {name: values["default"] for name, (_, values) in options.items() if "default" in values}


def settings(**changes) -> dict:
    result = NVFP4DistilledSettings.execute(**(defaults(NVFP4DistilledSettings) | changes))
    return dict(zip(NAMES, result.args, strict=True)) | {"ui": result.ui}


@pytest.fixture
def model(stub_comfy, tmp_path: Path) -> str:
    path = tmp_path / "models" / "diffusion_models" / "ltx.safetensors"
    full_size.write(path, full_size.checkpoint("NVFP4"))
    return path.name


def plan(model: str, **changes):
    return NVFP4Planner.execute(**(defaults(NVFP4Planner) | {"file_name": model, "gpu": "RTX 5090"} | changes))


def test_outputs_are_named_and_typed_as_the_workflows_connect_them(stub_comfy):
    outputs = NVFP4DistilledSettings.GET_SCHEMA().outputs
    assert [output.id for output in outputs] == NAMES
    kinds = [output.io_type for output in outputs]
    assert kinds == ["INT", "INT", "INT", "FLOAT", "INT", "SIGMAS", "SIGMAS", "FLOAT", "INT", "INT", "INT", "STRING"]


def test_the_defaults_are_the_article_s_clip(stub_comfy):
    found = settings()
    assert [found[name] for name in ("width", "height", "frames", "fps", "frame_rate", "cfg", "audio_latents")] == [
        768, 512, 121, 24.0, 24, 1.0, 126
    ]  # fmt: skip
    assert torch.equal(found["sigmas"], torch.tensor(SIGMAS))
    assert found["sigmas"].dtype == torch.float32
    assert torch.equal(found["sigmas_stage_2"], torch.tensor(SIGMAS_STAGE_2["2.3"]))
    assert found["ui"]["text"] == (found["text"],)


def test_wishes_are_moved_and_the_text_says_so(stub_comfy):
    found = settings(width=1920, height=1080, seconds=5.0, fps=25.0, stages="two stages", version="2.0")
    assert (found["width"], found["height"]) == (960, 544)
    assert (found["final_width"], found["final_height"], found["frames"]) == (1920, 1088, 121)
    assert found["sigmas_stage_2"][0] == pytest.approx(0.909375)
    assert "1920x1080 -> 1920x1088" in found["text"] and "125 frames -> 121" in found["text"]


def test_the_host_s_own_count_of_audio_latents_is_used_where_it_has_one(stub_comfy, monkeypatch):
    assert host_settings.audio_latents(121, 24.0) == 126
    asked = []

    class AudioVAE:
        def num_of_latents_from_frames(self, frames, rate):
            asked.append((frames, rate, self.latents_per_second))
            return 127

    module = types.SimpleNamespace(AudioVAE=AudioVAE)
    monkeypatch.setitem(__import__("sys").modules, "comfy.ldm.lightricks.vae.audio_vae", module)
    assert settings()["audio_latents"] == 127
    assert asked == [(121, 24.0, 25.0)]
    assert "audio: 127 latents" in settings()["text"]


def test_the_planner_shows_its_text_and_picture(model):
    result = plan(model)
    text, picture = result.args
    assert text.startswith("fits all at once (")
    assert "\nltx.safetensors on RTX 5090, bf16 compute\n768x512, 121 frames at 24 fps: 6,144 video tokens" in text
    assert "fp4 compute: size and speed" in text
    assert picture.shape == (1, 900, 1600, 3) and picture.dtype == torch.float32
    assert 0.0 <= float(picture.min()) < float(picture.max()) <= 1.0
    assert result.ui["text"] == (text,) and result.ui["images"][0]["size"][1] == 620


def test_the_picture_is_another_for_another_gpu_or_compute(model):
    pictures = [plan(model, **changes).args[1] for changes in ({}, {"gpu": "GB10"}, {"compute": "fp8"})]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_the_text_encoder_s_size_counts(model):
    assert "fits all at once" not in plan(model, text_encoder_gb=24.0).args[0]


def test_every_gpu_of_the_table_and_this_machine_s_can_be_chosen(model):
    assert NVFP4Planner.INPUT_TYPES()["required"]["gpu"][1]["options"] == ["detected", *GPUS]
    for name in ("RTX 3090", "B200"):
        assert f"on {name}, bf16 compute" in plan(model, gpu=name).args[0]


def test_a_machine_without_a_gpu_asks_for_a_card_and_stops_no_prompt(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = plan(model, gpu="detected")
    text, picture = result.args
    assert "No NVIDIA GPU was found" in text and "`gpu`" in text and "`memory_gib`" in text
    assert picture.shape[-1] == 3 and result.ui["text"] == (text,)
    assert "unlisted GPU" in plan(model, gpu="detected", memory_gib=16.0).args[0]


def test_a_memory_size_that_is_typed_replaces_the_card_s(model):
    assert "fits all at once" in plan(model).args[0]
    text = plan(model, memory_gib=12.0).args[0]
    assert "partly resident" in text and "11.9 GiB of memory" in text


def test_the_detected_gpu_counts_with_the_memory_it_shows(model, monkeypatch):
    shown = types.SimpleNamespace(name="NVIDIA GeForce RTX 5090", total_memory=20_000_000_000, major=12, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: shown)
    text = plan(model, gpu="detected").args[0]
    assert "on RTX 5090" in text and "18.6 GiB of memory" in text
    shown.name, shown.major, shown.minor = "NVIDIA Thing", 9, 9
    text, picture = plan(model, gpu="detected").args
    assert "no times for NVIDIA Thing: not in the table" in text and "a step:" not in text
    assert picture.shape == (1, 900, 1600, 3)


def test_a_file_without_a_diffusion_model_and_a_mode_the_gpu_lacks_are_refused(model, tmp_path):
    vae = full_size.checkpoint()
    only = {name: info for name, info in vae.tensors.items() if name.startswith("vae.")}
    path = tmp_path / "models" / "checkpoints" / "vae.safetensors"
    full_size.write(path, type(vae)(path, only, {}, 0))
    with pytest.raises(ValueError, match="no diffusion model is in it"):
        plan("vae.safetensors")
    with pytest.raises(ValueError, match="fp8 compute: needs compute capability 8.9, RTX 3090's is 8.6"):
        plan(model, gpu="RTX 3090", compute="fp8")


def test_a_scaled_down_model_of_any_dialect_can_be_planned(stub_comfy, tmp_path):
    state, config = synthetic.small_ltx23()
    for kind in ("comfy_markers", "modelopt", "compressed_tensors", "mixed"):
        synthetic.write(tmp_path / "models" / "diffusion_models" / f"{kind}.safetensors", kind, state, config)
        text = plan(f"{kind}.safetensors").args[0]
        assert "a step:" in text and "bound by the CPU's launches" in text


def test_a_changed_file_or_option_is_noticed(model, tmp_path):
    options = defaults(NVFP4Planner)
    before = NVFP4Planner.fingerprint_inputs(file_name=model, **options)
    assert NVFP4Planner.fingerprint_inputs(file_name=model, **options) == before
    assert NVFP4Planner.fingerprint_inputs(file_name=model, **(options | {"gpu": "GB10"})) != before
    with (tmp_path / "models" / "diffusion_models" / model).open("ab") as file:
        file.write(b" ")
    assert NVFP4Planner.fingerprint_inputs(file_name=model, **options) != before
