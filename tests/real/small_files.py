# SPDX-License-Identifier: Apache-2.0
"""Every file that the LTX workflows name but the text encoders, scaled down, written with a real ComfyUI's own classes.

usage: <the host's python> small_files.py <models folder>, in the folder of a ComfyUI checkout

The VAEs and the latent upscaler are the host's classes with their config and fewer channels, filled with seeded
random numbers; the diffusion model is that of samples/synthetic.py, also for LTX-2.5. For LTX-2.3 one full checkpoint
with both VAEs has it in NVFP4, one in FP8, and there is a LoRA for it; for LTX-2.5 each part is a file of its own.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "samples" / "data"
NVFP4, FP8 = "ltx-2.3-22b-dev-nvfp4.safetensors", "ltx-2.3-22b-distilled-fp8.safetensors"
LORA, RANK = "loras/ltx-2.3-22b-distilled-lora-384-1.1.safetensors", 4
UPSCALER = "latent_upscale_models/ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
MODEL_25 = "diffusion_models/ltx-2.5-22b-distilled-transformer-nvfp4.safetensors"
VIDEO_VAE_25, AUDIO_VAE_25 = "vae/ltx-2.5-video-vae-bf16.safetensors", "vae/ltx-2.5-audio-vae-bf16.safetensors"
UPSCALER_25 = "latent_upscale_models/ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors"
MODEL_PREFIX = "model.diffusion_model."
# LTX-2.5's diffusion decoder with fewer channels and blocks, and smaller neighbourhoods.
DECODER = {
    "head_dim": 16, "stage_channels": [128, 64, 32, 32, 16], "stage_depths": [1] * 5, "t_emb_dim": 32,
    "stage_kernels": [[3, 3, 3]] * 5, "stage5_kernel": [3, 3, 3],
}  # fmt: skip


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


def diffusion_vae(filler: Filler) -> tuple[dict, dict]:
    """Weights and config of LTX-2.5's video VAE."""
    module = comfy("ldm.lightricks.vae.na_diffusion_decoder")
    config = module.LTX_24_VAE_CONFIG | {"decoder": module.LTX_24_VAE_CONFIG["decoder"] | DECODER}
    config["encoder"] = config["encoder"] | {"base_channels": 8}
    return filler.state(module.CausalDiffusionVAE(config)), {"vae": config}


def lora(state: dict, layers: list[str], filler: Filler) -> dict:
    """A LoRA for these layers of the diffusion model."""
    tensors = {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        for name, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
            key = f"diffusion_model.{layer}.{name}.weight"
            tensors[key] = filler.fill(key, filler.torch.empty(shape))
    return tensors


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


def models(folder: Path, filler: Filler) -> tuple[dict, dict, dict, dict]:
    """-> the diffusion model's tensors in NVFP4 and in FP8, its config, a LoRA; writes LTX-2.5's, without a mark."""
    synthetic = importlib.import_module("nvfp4_video.samples.synthetic")
    torch = importlib.import_module("torch")
    state, config = synthetic.small_ltx23()
    path = folder / "model.safetensors"
    synthetic.write(path, "comfy_markers", state, config)
    packed = dict(importlib.import_module("safetensors.torch").load_file(path))
    path.unlink()
    synthetic.write(folder / MODEL_25, "metadata_less", state, config)
    fp8, layers = dict(state), synthetic.quantised_layers(state, config)
    for layer in layers:
        fp8 |= fp8_layer(layer, fp8.pop(f"{layer}.weight"), torch)
    return packed, fp8, config, lora(state, layers, filler)


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def main(folder: Path) -> None:
    """Write all files below a models folder."""
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    importlib.import_module("in_process").bring_up_host()
    save = importlib.import_module("safetensors.torch").save_file
    for name in ("checkpoints", "latent_upscale_models", "diffusion_models", "loras", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    filler = Filler()
    packed, fp8, transformer, adapter = models(folder, filler)
    config = small_config() | {"transformer": transformer}
    parts = vaes(config, filler)
    for name, model in ((NVFP4, packed), (FP8, fp8)):
        tensors = {f"{MODEL_PREFIX}{key}": tensor.contiguous() for key, tensor in model.items()} | parts
        save(tensors, folder / "checkpoints" / name, {"config": json.dumps(config)})
    tensors, own = upscaler(filler)
    for name in (UPSCALER, UPSCALER_25):
        save(tensors, folder / name, {"config": json.dumps(own)})
    save(adapter, folder / LORA)
    sound = {name: tensor for name, tensor in parts.items() if not name.startswith("vae.")}
    save(sound, folder / AUDIO_VAE_25, {"config": json.dumps(config)})
    tensors, own = diffusion_vae(filler)
    save(tensors, folder / VIDEO_VAE_25, {"config": json.dumps(own)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
