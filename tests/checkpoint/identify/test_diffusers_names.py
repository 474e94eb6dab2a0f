# SPDX-License-Identifier: Apache-2.0
"""Models with the names of diffusers are called that by inspect, repair and quantize, and never taken for ComfyUI's."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.identify.signatures import diffusers_names, find_model
from nvfp4_video.checkpoint.write.plan import QuantizeSettings, plan_quantization
from nvfp4_video.checkpoint.write.repair import repair
from nvfp4_video.tests.support.files import save

FLUX = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", "x_embedder")
CONVERTED = {
    "FLUX": FLUX,
    "SD3": ("transformer_blocks.0.attn.add_q_proj", "pos_embed.proj"),
    "Z-Image": ("noise_refiner.0.attention.to_k", "noise_refiner.0.attention.norm_k"),
    "UNet": ("conv_in", "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"),
}
UNKNOWN_TO_COMFYUI = {
    "FLUX.2": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "x_embedder"),
    "Wan": ("condition_embedder.time_embedder.linear_1", "blocks.0.attn1.to_q"),
    "LTX-Video": ("time_embed.emb.timestep_embedder.linear_1", "transformer_blocks.0.attn1.to_q", "proj_in"),
}


def write(path, layers, prefix="", dtype=torch.bfloat16):
    weight = torch.ones(32, 32).to(dtype)
    tensors = {f"{prefix}{layer}.weight": weight for layer in layers}
    if dtype != torch.bfloat16:
        tensors |= {f"{prefix}{layer}.weight_scale": torch.ones(()) for layer in layers}
    return save(path, tensors)


@pytest.mark.parametrize(("family", "layers"), (CONVERTED | UNKNOWN_TO_COMFYUI).items())
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_no_tool_takes_them_for_a_model_of_comfyui_s(tmp_path, family, layers, prefix):
    path = write(tmp_path / "m.safetensors", layers, prefix)
    words = rf"diffusers names \({family}\)"
    with pytest.raises(CheckpointError, match=words):
        find_model(read_header(path))
    with pytest.raises(CheckpointError, match=words):
        plan_quantization(path, QuantizeSettings())
    found = inspect_checkpoint(path)
    assert f"diffusers names ({family})" in found.kind
    assert "NVFP4 Model Loader" not in str(found)
    converted = family in CONVERTED
    assert found.loaders == ({"diffusion_model": "Load Diffusion Model"} if converted else {})
    stock = "loads it with Load Diffusion Model" if converted else "does not load it"
    assert found.stock["diffusion_model"].startswith(stock)
    assert bool(found.missing) != converted


def test_quantised_layers_under_these_names_are_no_file_for_stock_either(tmp_path):
    path = write(tmp_path / "m.safetensors", FLUX, dtype=torch.float8_e4m3fn)
    found = inspect_checkpoint(path)
    assert found.loaders == {}
    assert "leaves their scales behind" in found.stock["diffusion_model"]
    assert "diffusers" in [fault.code for fault in repair(path, tmp_path / "r.safetensors").remaining]


def test_a_prefix_that_comfyui_does_not_strip_is_not_converted(tmp_path):
    names = diffusers_names(read_header(write(tmp_path / "m.safetensors", FLUX, "transformer.")))
    assert (names.family, names.converts) == ("FLUX", False)


def test_a_model_that_shares_names_with_diffusers_stays_comfyui_s(tmp_path):
    layers = ("transformer_blocks.0.img_mod.1", "txt_norm", "transformer_blocks.0.attn.add_q_proj", "pos_embed.proj")
    header = read_header(write(tmp_path / "m.safetensors", layers))
    assert find_model(header).family == "Qwen-Image"
    assert diffusers_names(header) is None
