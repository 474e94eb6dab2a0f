# SPDX-License-Identifier: Apache-2.0
"""Sampling, collecting, quantising, verifying and loading again, all in a real ComfyUI, on a scaled-down LTX."""

from __future__ import annotations

import pytest
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.calibration import read_calibration
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import graphs
from nvfp4_video.tests.real.harness import ComfyUI
from nvfp4_video.tests.real.models import small_model_of

SOURCE = "to_calibrate.safetensors"
SIZE = {"width": 64, "height": 64, "frames": 17}


@pytest.fixture(scope="module")
def config(host: ComfyUI) -> dict:
    """Config of the small model, of which SOURCE is the BF16 file."""
    state, config, packed = small_model_of(host)
    synthetic.write(host.base / "models" / "diffusion_models" / SOURCE, "bf16_decoded", state, config, packed)
    return config


def sampled(host: ComfyUI, loader: dict, config: dict, seed: int, calibrate: bool = False) -> list[dict]:
    prompt = graphs.sampling(loader, config, seed=seed, **SIZE)
    if calibrate:
        widgets = {"file_name": SOURCE, "memory_gb": 1.0, "name": "", "overwrite": False}
        prompt |= {
            "loader": loader,
            graphs.MODEL: {"class_type": "NVFP4Calibrate", "inputs": {"model": ["loader", 0]} | widgets},
        }
    stats = graphs.stats_of(host.queue(prompt)["outputs"])
    assert all(stream["finite"] for stream in stats)
    return stats


def test_two_jobs_are_collected_and_the_file_made_by_them_is_loaded_by_stock_and_by_ours(host: ComfyUI, config):
    stock = graphs.stock_loader(SOURCE)
    plain = sampled(host, stock, config, seed=1)
    target = host.base / "output" / "diffusion_models" / "to_calibrate_calibration.safetensors"
    tokens = []
    for seed in (1, 2):
        stats = sampled(host, stock, config, seed, calibrate=True)
        assert stats == plain or seed == 2, "collecting must not change what is sampled"
        tokens.append(read_calibration(target).tokens)
        assert read_calibration(target).prompts == seed
    assert tokens[1] == 2 * tokens[0]
    # With cross-attention protected GPTQ has 72 layers, audio among them, instead of 168, which take a CPU minutes.
    widgets = {
        "file_name": SOURCE, "contents": "diffusion model only", "quality": "calibrated", "name": "calibrated",
        "protect_audio": False, "protect_cross_attention": True, "estimate_only": False, "overwrite": False,
        "calibration": target.name,
    }  # fmt: skip
    shown = host.queue({"1": {"class_type": "NVFP4Quantize", "inputs": widgets}})["outputs"]["1"]["text"][0]
    assert "layers took GPTQ" in shown and "too few" not in shown
    made = host.base / "output" / "diffusion_models" / "calibrated_nvfp4.safetensors"
    assert verify(made, host.base / "models" / "diffusion_models" / SOURCE).ok
    ours = graphs.nvfp4_loader(made.name)
    assert sampled(host, ours, config, seed=3) == sampled(host, graphs.stock_loader(made.name), config, seed=3)
