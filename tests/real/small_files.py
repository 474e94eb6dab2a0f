# SPDX-License-Identifier: Apache-2.0
"""Every file that the LTX-2.3 workflows name, scaled down, written with a real ComfyUI's own classes.

usage: <the host's python> small_files.py <models folder>, in the folder of a ComfyUI checkout

The VAEs and the latent upscaler are the host's classes with LTX-2.3's config and fewer channels, filled with seeded
random numbers; the diffusion model is that of samples/synthetic.py. One file has it in NVFP4, one in FP8, both are
full checkpoints with both VAEs.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "samples" / "data"
NVFP4, FP8 = "ltx-2.3-22b-distilled_nvfp4.safetensors", "ltx-2.3-22b-distilled-fp8.safetensors"
UPSCALER = "ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
MODEL_PREFIX = "model.diffusion_model."


def small_config() -> dict:
    """LTX-2.3's config with narrow VAEs, as record_keys.py records them."""
    config, narrow = (
        json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
        for name in ("ltx23_config", "ltx23_small_vae")
    )
    return config | narrow["config"]


class Filler:
    """Seeded numbers of a size that neither dies out nor overflows over the depth of a network."""

    def __init__(self):
        self.torch = importlib.import_module("torch")
        self.generator = self.torch.Generator().manual_seed(0)

    def fill(self, name: str, tensor):
        """A tensor like this one; statistics and norms are the neutral ones."""
        torch, shape = self.torch, tensor.shape
        if name.endswith("std-of-means") or (len(shape) == 1 and "norm" in name and name.endswith("weight")):
            return torch.ones(shape, dtype=torch.bfloat16)
        gain = 1.2 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
        return (torch.randn(shape, generator=self.generator) * gain).to(torch.bfloat16)

    def state(self, module, prefix: str = "") -> dict:
        """The weights of a module under a prefix."""
        return {prefix + name: self.fill(name, tensor) for name, tensor in module.state_dict().items()}


def vaes(config: dict, filler: Filler) -> dict:
    """Both VAEs under the names of a full checkpoint."""
    video = comfy("ldm.lightricks.vae.causal_video_autoencoder").VideoVAE(version=2, config=config["vae"])
    audio = comfy("ldm.lightricks.vae.audio_vae").AudioVAE({"config": json.dumps(config)})
    sound = filler.state(audio)
    renamed = {name.replace("autoencoder.", "audio_vae.", 1): tensor for name, tensor in sound.items()}
    return filler.state(video, "vae.") | renamed


def upscaler(filler: Filler) -> tuple[dict, dict]:
    """Weights and config of a small latent upscaler."""
    config = {"_class_name": "LatentUpsampler", "in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1}
    config |= {"dims": 3, "spatial_upsample": True, "temporal_upsample": False}
    model = comfy("ldm.lightricks.latent_upsampler").LatentUpsampler.from_config(
        config, operations=comfy("ops").disable_weight_init
    )
    return filler.state(model), config


def fp8_layer(layer: str, weight, torch) -> dict:
    """One Linear as ComfyUI writes FP8: E4M3, a scale, a marker."""
    scale = weight.abs().amax().float() / 448
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    stored = {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "comfy_quant": marker}
    return {f"{layer}.{name}": tensor for name, tensor in stored.items()}


def models(folder: Path) -> tuple[dict, dict, dict]:
    """-> the diffusion model's tensors in NVFP4 and in FP8, and its config."""
    synthetic = importlib.import_module("nvfp4_video.samples.synthetic")
    torch = importlib.import_module("torch")
    state, config = synthetic.small_ltx23()
    path = folder / "model.safetensors"
    synthetic.write(path, "comfy_markers", state, config)
    packed = dict(importlib.import_module("safetensors.torch").load_file(path))
    path.unlink()
    fp8 = dict(state)
    for layer in synthetic.quantised_layers(state, config):
        fp8 |= fp8_layer(layer, fp8.pop(f"{layer}.weight"), torch)
    return packed, fp8, config


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def main(folder: Path) -> None:
    """Write all files below a models folder."""
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    importlib.import_module("in_process").bring_up_host()
    save = importlib.import_module("safetensors.torch").save_file
    for name in ("checkpoints", "latent_upscale_models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    filler = Filler()
    packed, fp8, transformer = models(folder)
    config = small_config() | {"transformer": transformer}
    parts = vaes(config, filler)
    for name, model in ((NVFP4, packed), (FP8, fp8)):
        tensors = {f"{MODEL_PREFIX}{key}": tensor.contiguous() for key, tensor in model.items()} | parts
        save(tensors, folder / "checkpoints" / name, {"config": json.dumps(config)})
    tensors, own = upscaler(filler)
    save(tensors, folder / "latent_upscale_models" / UPSCALER, {"config": json.dumps(own)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
