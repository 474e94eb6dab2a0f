# SPDX-License-Identifier: Apache-2.0
"""What a real ComfyUI does with the wrong joint graphs that the guard knows, as JSON; run by test_joint_host.py.

usage: <the host's python> joint_in_process.py <empty folder> [<case> ...], in the folder of a ComfyUI checkout

A case is a call of the host's own nodes with scaled-down models. What becomes of it is "stops: <error>", or
"makes: <what>": shapes of pictures and latents, and how far they are from those of the right graph.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import small_files

_LONGEST = 300


def run(kind: str, **inputs: Any) -> Any:
    """The outputs of one of the host's nodes."""
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[kind]
    if hasattr(node, "execute"):
        found = node.execute(**inputs)
        return getattr(found, "result", found)
    return getattr(node(), node.FUNCTION)(**inputs)


class Scene:
    """The small models, and latents of 64 x 64 pixels and 17 frames."""

    def __init__(self, folder: Path):
        self.torch = importlib.import_module("torch")
        self.models = in_process.Scene(folder)
        self.model = self.models.stock("bf16_decoded")
        self.filler = small_files.Filler()
        self.config = small_files.small_config()
        parts = small_files.vaes(self.config, self.filler)
        self.metadata = {"config": json.dumps(self.config)}
        self.video_weights = {k.removeprefix("vae."): v for k, v in parts.items() if k.startswith("vae.")}
        self.vae = self.vae_of(self.video_weights)
        self.audio_vae = self.vae_of({k: v for k, v in parts.items() if not k.startswith("vae.")})
        self.picture = self.torch.rand(1, 64, 64, 3, generator=self.torch.Generator().manual_seed(2))

    def vae_of(self, weights: dict, metadata: dict | None = None):
        return comfy("sd").VAE(sd=dict(weights), metadata=self.metadata if metadata is None else metadata)

    def tae(self):
        """A preview decoder of the true structure."""
        keys = json.loads(small_files.gzip.decompress((small_files.DATA / "ltx_vae_keys.json.gz").read_bytes()))
        weights = {name: self.filler.fill(name, self.torch.empty(shape)) for name, shape in keys["taehv_ltx2"].items()}
        return self.vae_of(weights, {})

    def old_vae(self, seed: int):
        """The same structure with other numbers: what another version's VAE of the same shapes is."""
        filler = small_files.Filler()
        filler.generator.manual_seed(seed)
        return self.vae_of({name: filler.fill(name, tensor) for name, tensor in self.video_weights.items()})

    def shifted(self):
        """The same VAE with other statistics of its latents, as another version has."""
        weights = dict(self.video_weights)
        name = "per_channel_statistics.std-of-means"
        return self.vae_of(weights | {name: weights[name] * 2})

    def video(self, length: int = 17, batch: int = 1, size: int = 64) -> dict:
        return run("EmptyLTXVLatentVideo", width=size, height=size, length=length, batch_size=batch)[0]

    def noisy(self, length: int = 17, size: int = 64) -> dict:
        latent = self.video(length, 1, size)
        noise = self.torch.randn(latent["samples"].shape, generator=self.torch.Generator().manual_seed(3))
        return latent | {"samples": noise}

    def audio(self, length: int = 17, batch: int = 1) -> dict:
        return run("LTXVEmptyLatentAudio", frames_number=length, frame_rate=25.0, batch_size=batch,
                   audio_vae=self.audio_vae)[0]  # fmt: skip

    def joint(self, video: dict | None = None, audio: dict | None = None) -> dict:
        return run("LTXVConcatAVLatent", video_latent=video or self.video(), audio_latent=audio or self.audio())[0]

    def text(self) -> list:
        width = importlib.import_module("nvfp4_video.tests.real.graphs").context_width(self.models.config)
        return [[self.torch.randn(1, 32, width, generator=self.torch.Generator().manual_seed(1)), {}]]

    def sampled(self, latent: dict, model=None, conditioning: list | None = None) -> dict:
        """Two distilled steps at cfg 1, through the host's own nodes."""
        text = self.text() if conditioning is None else conditioning
        guider = run("CFGGuider", model=model or self.model, positive=text, negative=text, cfg=1.0)[0]
        return run("SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=1)[0], guider=guider,
                   sampler=run("KSamplerSelect", sampler_name="euler")[0],
                   sigmas=run("ManualSigmas", sigmas="1.0, 0.9, 0.0")[0], latent_image=latent)[0]  # fmt: skip


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def shapes(value: Any) -> list:
    """Of a latent, a picture, a sound."""
    value = value.get("samples", value.get("waveform")) if isinstance(value, dict) else value
    streams = value.unbind() if getattr(value, "is_nested", False) else [value]
    return [list(one.shape) for one in streams]


def differs(one: Any, other: Any) -> float:
    """How far one picture or latent is from another, as a share of the other's size."""
    one, other = one.float(), other.float()
    return round(((one - other).norm() / other.norm()).item(), 4)


def audio_vae_at_picture_nodes(scene: Scene) -> dict[str, Callable[[], Any]]:
    guide = {
        "positive": scene.text(),
        "negative": scene.text(),
        "image": scene.picture,
        "frame_idx": 0,
        "strength": 1.0,
    }
    audio = scene.audio_vae
    return {
        "VAEDecode": lambda: run("VAEDecode", vae=audio, samples=scene.video())[0],
        "VAEDecodeTiled": lambda: run("VAEDecodeTiled", vae=audio, samples=scene.video(), tile_size=512)[0],
        "VAEEncode": lambda: run("VAEEncode", vae=audio, pixels=scene.picture)[0],
        "LTXVImgToVideo": lambda: run(
            "LTXVImgToVideo", positive=scene.text(), negative=scene.text(), vae=audio, image=scene.picture, width=64,
            height=64, length=17, batch_size=1, strength=1.0,
        )[2],
        "LTXVImgToVideoInplace": lambda: run(
            "LTXVImgToVideoInplace", vae=audio, image=scene.picture, latent=scene.video(), strength=1.0
        )[0],
        "LTXVAddGuide": lambda: run("LTXVAddGuide", vae=audio, latent=scene.video(), **guide)[2],
        "LTXVLatentUpsampler": lambda: run(
            "LTXVLatentUpsampler", vae=audio, samples=scene.noisy(), upscale_model=upscaler(scene)
        )[0],
    }  # fmt: skip


def upscaler(scene: Scene):
    weights, config = small_files.upscaler(scene.filler)
    model = comfy("ldm.lightricks.latent_upsampler").LatentUpsampler.from_config(
        config, operations=comfy("ops").disable_weight_init
    )
    model.load_state_dict(weights)
    cpu = scene.torch.device("cpu")
    return comfy("model_patcher").ModelPatcher(model.bfloat16(), load_device=cpu, offload_device=cpu)


def video_vae_at_sound_nodes(scene: Scene) -> dict[str, Callable[[], Any]]:
    wave = {"waveform": scene.torch.randn(1, 2, 16000), "sample_rate": 16000}
    return {
        "LTXVEmptyLatentAudio": lambda: run(
            "LTXVEmptyLatentAudio", frames_number=17, frame_rate=25.0, batch_size=1, audio_vae=scene.vae
        )[0],
        "LTXVAudioVAEDecode": lambda: run("LTXVAudioVAEDecode", samples=scene.audio(), audio_vae=scene.vae)[0],
        "LTXVAudioVAEEncode": lambda: run("LTXVAudioVAEEncode", audio=wave, audio_vae=scene.vae)[0],
        "LTXVAudioVAELoader of a file without one": lambda: scene.vae_of({}).throw_exception_if_invalid(),
    }


def swapped(scene: Scene) -> dict[str, Callable[[], Any]]:
    video, audio = run("LTXVSeparateAVLatent", av_latent=scene.joint())
    model = upscaler(scene)
    return {
        "VAEDecode of the sound": lambda: run("VAEDecode", vae=scene.vae, samples=audio)[0],
        "VAEDecodeTiled of the sound": lambda: run("VAEDecodeTiled", vae=scene.vae, samples=audio, tile_size=512)[0],
        "LTXVAudioVAEDecode of the picture": lambda: run(
            "LTXVAudioVAEDecode", samples=video, audio_vae=scene.audio_vae
        )[0],
        "LTXVLatentUpsampler of the sound": lambda: run(
            "LTXVLatentUpsampler", vae=scene.vae, samples=audio, upscale_model=model
        )[0],
        "LTXVCropGuides of the sound": lambda: run(
            "LTXVCropGuides", positive=scene.text(), negative=scene.text(), latent=audio
        )[2],
        "LTXVConcatAVLatent, then sampled": lambda: scene.sampled(scene.joint(audio, video)),
        "LTXVConcatAVLatent of two pictures, sampled": lambda: scene.sampled(scene.joint(video, video)),
        "LTXVImgToVideoInplace of the sound": lambda: run(
            "LTXVImgToVideoInplace", vae=scene.vae, image=scene.picture, latent=audio, strength=1.0
        )[0],
    }


def joint_whole(scene: Scene) -> dict[str, Callable[[], Any]]:
    """A joint latent where one of its parts is meant."""
    joint = scene.sampled(scene.joint())
    return {
        "VAEDecode": lambda: run("VAEDecode", vae=scene.vae, samples=joint)[0],
        "LTXVAudioVAEDecode": lambda: run("LTXVAudioVAEDecode", samples=joint, audio_vae=scene.audio_vae)[0],
        "LTXVLatentUpsampler": lambda: run(
            "LTXVLatentUpsampler", vae=scene.vae, samples=joint, upscale_model=upscaler(scene)
        )[0],
        "LTXVCropGuides": lambda: run(
            "LTXVCropGuides", positive=scene.text(), negative=scene.text(), latent=joint
        )[2],
        "LTXVImgToVideoInplace": lambda: run(
            "LTXVImgToVideoInplace", vae=scene.vae, image=scene.picture, latent=joint, strength=1.0
        )[0],
        "LTXVAddGuide": lambda: run(
            "LTXVAddGuide", positive=scene.text(), negative=scene.text(), vae=scene.vae, latent=joint,
            image=scene.picture, frame_idx=0, strength=1.0,
        )[2],
        "LTXVSeparateAVLatent of a video latent": lambda: run("LTXVSeparateAVLatent", av_latent=scene.video())[0],
    }  # fmt: skip


def batches(scene: Scene) -> dict[str, Callable[[], Any]]:
    return {
        "video 2, sound 1": lambda: scene.sampled(scene.joint(scene.video(batch=2))),
        "video 1, sound 2": lambda: scene.sampled(scene.joint(audio=scene.audio(batch=2))),
        "video 2, sound 2": lambda: scene.sampled(scene.joint(scene.video(batch=2), scene.audio(batch=2))),
    }


def guides(scene: Scene) -> dict[str, Callable[[], Any]]:
    def guided(crop: bool, frames: int = 1) -> Any:
        picture = scene.picture.expand(frames, -1, -1, -1)
        positive, negative, video = run("LTXVAddGuide", positive=scene.text(), negative=scene.text(), vae=scene.vae,
                                        latent=scene.video(), image=picture, frame_idx=0, strength=1.0)  # fmt: skip
        video = run("LTXVSeparateAVLatent", av_latent=scene.sampled(scene.joint(video), None, positive))[0]
        if crop:
            video = run("LTXVCropGuides", positive=positive, negative=negative, latent=video)[2]
        return run("VAEDecode", vae=scene.vae, samples=video)[0]

    return {
        "cropped": lambda: guided(True),
        "one picture, not cropped": lambda: guided(False),
        "nine pictures, not cropped": lambda: guided(False, 9),
    }


def conditioning(scene: Scene) -> dict[str, Callable[[], Any]]:
    def rated(rate: float | None) -> Any:
        text = scene.text()
        if rate is not None:
            text = run("LTXVConditioning", positive=text, negative=text, frame_rate=rate)[0]
        return scene.sampled(scene.joint(), None, text)["samples"].unbind()[0]

    bare, at_25, at_50 = rated(None), rated(25.0), rated(50.0)
    return {
        "without, against 25": lambda: f"a difference of {differs(bare, at_25)}",
        "without, against 50": lambda: f"a difference of {differs(bare, at_50)}",
    }


def rates(scene: Scene) -> dict[str, Callable[[], Any]]:
    """Sound of another length than the picture, and a film at another rate than its sound was made for."""

    def film(rate: float) -> str:
        wave = run("LTXVAudioVAEDecode", samples=scene.audio(), audio_vae=scene.audio_vae)[0]
        pictures = run("VAEDecode", vae=scene.vae, samples=scene.noisy())[0]
        made = run("CreateVideo", images=pictures, audio=wave, fps=rate)[0].get_components()
        heard = made.audio["waveform"].shape[-1] / made.audio["sample_rate"]
        return f"{len(made.images) / float(made.frame_rate):.2f} s of picture, {heard:.2f} s of sound"

    return {
        "sound of 9 frames, picture of 17": lambda: scene.sampled(scene.joint(audio=scene.audio(9))),
        "a film at 25": lambda: film(25.0),
        "a film at 50": lambda: film(50.0),
    }


def old_model(scene: Scene) -> dict[str, Callable[[], Any]]:
    """LTX-Video's class, which knows no sound, with few blocks."""
    torch = scene.torch
    made = comfy("ldm.lightricks.model").LTXVModel(
        num_layers=2, cross_attention_dim=64, attention_head_dim=8, num_attention_heads=8, caption_channels=64,
        dtype=torch.float32, operations=comfy("ops").disable_weight_init,
    )  # fmt: skip
    config = {"num_layers": 2, "cross_attention_dim": 64, "attention_head_dim": 8, "num_attention_heads": 8,
              "caption_channels": 64}  # fmt: skip
    weights = {name: tensor.bfloat16() for name, tensor in scene.filler.state(made).items()}
    model = comfy("sd").load_diffusion_model_state_dict(
        weights, metadata={"config": json.dumps({"transformer": config})}
    )
    told = {"attention_mask": torch.ones(1, 32, dtype=torch.long)}
    text = [[torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(1)), told]]
    return {
        "its class": lambda: type(model.model).__name__,
        "video alone": lambda: scene.sampled(scene.video(), model, text),
        "joint": lambda: scene.sampled(scene.joint(), model, text),
    }


def other_vaes(scene: Scene) -> dict[str, Callable[[], Any]]:
    """Another version's VAE: the same shapes of latents, other numbers."""
    right = run("VAEDecode", vae=scene.vae, samples=scene.noisy())[0]
    other = scene.old_vae(5)

    def decoded() -> str:
        wrong = run("VAEDecode", vae=other, samples=scene.noisy())[0]
        return f"{shapes(wrong)[0]}, a difference of {differs(wrong, right)}"

    def upscaled() -> str:
        model = upscaler(scene)
        two = [run("LTXVLatentUpsampler", vae=vae, samples=scene.noisy(), upscale_model=model)[0]
               for vae in (scene.vae, scene.shifted())]  # fmt: skip
        return f"{shapes(two[1])[0]}, a difference of {differs(two[1]['samples'], two[0]['samples'])}"

    return {"decode": decoded, "upscaled with another VAE's statistics": upscaled}


def previews(scene: Scene) -> dict[str, Callable[[], Any]]:
    tae, picture = scene.tae(), scene.torch.rand(1, 128, 128, 3)
    guide = {"positive": scene.text(), "negative": scene.text(), "image": picture, "frame_idx": 0, "strength": 1.0}
    return {
        "VAEDecode": lambda: run("VAEDecode", vae=tae, samples=scene.noisy(size=128))[0],
        "VAEDecodeTiled": lambda: run("VAEDecodeTiled", vae=tae, samples=scene.noisy(size=128), tile_size=512)[0],
        "VAEEncode": lambda: run("VAEEncode", vae=tae, pixels=picture)[0],
        "VAEEncodeTiled": lambda: run("VAEEncodeTiled", vae=tae, pixels=picture, tile_size=512, overlap=64)[0],
        "LTXVImgToVideo": lambda: run(
            "LTXVImgToVideo", positive=scene.text(), negative=scene.text(), vae=tae, image=picture, width=128,
            height=128, length=17, batch_size=1, strength=1.0,
        )[2],
        "LTXVImgToVideoInplace": lambda: run(
            "LTXVImgToVideoInplace", vae=tae, image=picture, latent=scene.video(size=128), strength=1.0
        )[0],
        "LTXVAddGuide": lambda: run("LTXVAddGuide", vae=tae, latent=scene.video(size=128), **guide)[2],
        "LTXVLatentUpsampler": lambda: run(
            "LTXVLatentUpsampler", vae=tae, samples=scene.noisy(size=128), upscale_model=upscaler(scene)
        )[0],
    }  # fmt: skip


def tiles(scene: Scene) -> dict[str, Callable[[], Any]]:
    """Plain in chunks of time and tiled decodes of 128 x 128 pixels and 97 frames, against one in one piece."""
    latent = scene.noisy(97, 128)
    module = importlib.import_module("comfy.ldm.lightricks.vae.causal_video_autoencoder")
    whole = run("VAEDecode", vae=scene.vae, samples=latent)[0]

    def chunked() -> str:
        before, module.get_max_chunk_size = module.get_max_chunk_size, lambda _: 64 * 1024
        try:
            return f"a difference of {differs(run('VAEDecode', vae=scene.vae, samples=latent)[0], whole)}"
        finally:
            module.get_max_chunk_size = before

    def tiled(**sizes: int) -> str:
        made = run("VAEDecodeTiled", vae=scene.vae, samples=latent, **sizes)[0]
        by_frame = [differs(one, other) for one, other in zip(made, whole, strict=True)]
        wrong = [place for place, one in enumerate(by_frame) if one > 1e-3]
        where = f"{len(wrong)} frames, {wrong[0]} to {wrong[-1]}" if wrong else "no frame"
        return f"a difference of {differs(made, whole)}, in {where}, at most {max(by_frame)}"

    return {
        "plain, in chunks": chunked,
        "one tile": lambda: tiled(tile_size=512, overlap=64, temporal_size=4096, temporal_overlap=8),
        "tiles of 64 pixels": lambda: tiled(tile_size=64, overlap=32, temporal_size=4096, temporal_overlap=8),
        "32 frames, overlap 8": lambda: tiled(tile_size=512, overlap=64, temporal_size=32, temporal_overlap=8),
        "64 frames, overlap 8": lambda: tiled(tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8),
        "64 frames, overlap 32": lambda: tiled(tile_size=512, overlap=64, temporal_size=64, temporal_overlap=32),
    }


TOPICS = (
    audio_vae_at_picture_nodes, video_vae_at_sound_nodes, swapped, joint_whole, batches, guides, conditioning, rates,
    old_model, other_vaes, previews, tiles,
)  # fmt: skip


def outcome(case: Callable[[], Any]) -> str:
    """What becomes of a case."""
    try:
        made = case()
    except Exception as error:
        text = " ".join(str(error).split())[:_LONGEST]
        return f"stops: {type(error).__name__}: {text}"
    return f"makes: {made if isinstance(made, str) else shapes(made)}"


def main(folder: Path, names: list[str]) -> None:
    facts: dict[str, Any] = {"version": in_process.bring_up_host()}
    asyncio.run(importlib.import_module("nodes").init_builtin_extra_nodes())
    importlib.import_module("logging").disable()
    with importlib.import_module("torch").inference_mode():
        scene = Scene(folder)
        for topic in TOPICS:
            if names and topic.__name__ not in names:
                continue
            try:
                facts[topic.__name__] = {name: outcome(case) for name, case in topic(scene).items()}
            except Exception:
                facts[topic.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write(f"\n{in_process.MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
