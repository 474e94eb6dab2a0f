# SPDX-License-Identifier: Apache-2.0
"""The model files that the shipped workflows choose: (name, address, folder below models/), and how large they are.

Names, addresses and sizes are those of public pages and of ComfyUI's own templates; none was opened where this was
written. That the official LTX-2.3 file in NVFP4 has VAEs and text projection in it follows from its size, 21.7 GB: the
transformer alone is 17.6 (counted from its shapes), both VAEs 1.8, the projection 2.3. Published graphs use it so.
"""

from __future__ import annotations

from dataclasses import dataclass

HUB = "https://huggingface.co"
File = tuple[str, str, str]


def _at(repository: str, name: str, folder: str, path: str = "") -> File:
    return name, f"{HUB}/{repository}/resolve/main/{path}{name}", folder


DEV_NVFP4 = _at("Lightricks/LTX-2.3-nvfp4", "ltx-2.3-22b-dev-nvfp4.safetensors", "checkpoints")
DISTILLED_LORA = _at("Lightricks/LTX-2.3", "ltx-2.3-22b-distilled-lora-384-1.1.safetensors", "loras")
DISTILLED_FP8 = _at("Lightricks/LTX-2.3-fp8", "ltx-2.3-22b-distilled-fp8.safetensors", "checkpoints")
GEMMA_3 = _at(
    "Comfy-Org/ltx-2", "gemma_3_12B_it_fp4_mixed.safetensors", "text_encoders", "split_files/text_encoders/"
)
UPSCALER_23 = _at("Lightricks/LTX-2.3", "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "latent_upscale_models")


def _ltx25(folder: str, name: str) -> File:
    return _at("Lightricks/LTX-2.5", name, folder, f"{folder}/")


NVFP4_25 = _ltx25("diffusion_models", "ltx-2.5-22b-distilled-transformer-nvfp4.safetensors")
GEMMA_4 = _ltx25("text_encoders", "gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors")
VIDEO_VAE_25 = _ltx25("vae", "ltx-2.5-video-vae-bf16.safetensors")
AUDIO_VAE_25 = _ltx25("vae", "ltx-2.5-audio-vae-bf16.safetensors")
UPSCALER_25 = _ltx25("latent_upscale_models", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors")

GIGABYTES = {
    DEV_NVFP4: 21.7, DISTILLED_LORA: 7.6, DISTILLED_FP8: 29.5, GEMMA_3: 8.8, UPSCALER_23: 1.0, NVFP4_25: 18.7,
    GEMMA_4: 15.4, VIDEO_VAE_25: 1.5, AUDIO_VAE_25: 0.4, UPSCALER_25: 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What a clip is made with. ``lora``: what makes an undistilled model a distilled one.

    ``vaes``: the files of video and audio VAE; in LTX-2.3 the first has the text projection as well. ``make``: one
    checkpoint that is not NVFP4 has all but the text encoder, and is made into NVFP4 when it is first loaded.
    """

    model: File
    vaes: tuple[File, File]
    encoder: File
    upscaler: File
    lora: File | None = None
    make: bool = False
    version: str = "2.3"


LTX_23 = Choice(DEV_NVFP4, (DEV_NVFP4, DEV_NVFP4), GEMMA_3, UPSCALER_23, DISTILLED_LORA)
LTX_23_FP8 = Choice(DISTILLED_FP8, (DISTILLED_FP8, DISTILLED_FP8), GEMMA_3, UPSCALER_23, make=True)
TO_CALIBRATE = Choice(DISTILLED_FP8, (DISTILLED_FP8, DISTILLED_FP8), GEMMA_3, UPSCALER_23, DISTILLED_LORA, make=True)
LTX_25 = Choice(NVFP4_25, (VIDEO_VAE_25, AUDIO_VAE_25), GEMMA_4, UPSCALER_25, version="2.5")

STEM = DISTILLED_FP8[0].removesuffix(".safetensors")
CALIBRATION = f"{STEM}_calibration.safetensors"  # what NVFP4 Calibrate writes for it
