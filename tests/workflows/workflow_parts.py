# SPDX-License-Identifier: Apache-2.0
"""The parts of which the shipped workflows are made, each a few nodes at their places.

All clips have one layout: files, prompt and size on the left, then conditioning and latents, sampling, decoding, the
video. Long links run in lanes and in a bus below the latents, so that none passes behind a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .workflow_builder import Node, Out, Sheet
from .workflow_notes import flow

HUB = "https://huggingface.co"
NVFP4_23 = "ltx-2.3-22b-distilled_nvfp4.safetensors"
FP8_23 = (
    "ltx-2.3-22b-distilled-fp8.safetensors",
    f"{HUB}/Lightricks/LTX-2.3-fp8/resolve/main/ltx-2.3-22b-distilled-fp8.safetensors",
    "checkpoints",
)
GEMMA_3 = (
    "gemma_3_12B_it_fp4_mixed.safetensors",
    f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors",
    "text_encoders",
)
UPSCALER_23 = (
    "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
    f"{HUB}/Lightricks/LTX-2.3/resolve/main/ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
    "latent_upscale_models",
)


def _ltx25(folder: str, name: str) -> tuple[str, str, str]:
    return name, f"{HUB}/Lightricks/LTX-2.5/resolve/main/{folder}/{name}", folder


NVFP4_25 = _ltx25("diffusion_models", "ltx-2.5-22b-distilled-transformer-nvfp4.safetensors")
GEMMA_4 = _ltx25("text_encoders", "gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors")
VIDEO_VAE_25 = _ltx25("vae", "ltx-2.5-video-vae-bf16.safetensors")
AUDIO_VAE_25 = _ltx25("vae", "ltx-2.5-audio-vae-bf16.safetensors")

POSITIVE = (
    "A lighthouse keeper in a yellow raincoat stands on a rocky shore at dusk and lights an old brass lantern. Waves "
    "break on the rocks behind him and spray drifts through the warm light. The camera moves slowly towards his face "
    'while he looks up and says: "The light will hold until morning." Sound of waves, wind, and the click of the '
    "lantern's glass door."
)
POSITIVE_SILENT = POSITIVE.partition(" while he looks up")[0] + " while he looks up."
POSITIVE_I2V = (
    "The person in the picture turns towards the camera, smiles and waves. The camera stays still, hair and clothes "
    "move in a light breeze. Sound of leaves in the wind and a friendly voice that says: \"There you are.\""
)
NEGATIVE = "blurry, low quality, still frame, watermark, subtitles, distorted sound"
GREEN, RED = ("#232", "#353"), ("#322", "#533")

# Columns: x and width of their nodes. What stands right of the latents moves on where a picture comes in between.
FILES, CHOICES, LATENTS = (0, 380), (470, 420), (990, 320)
SAMPLING, SAMPLER, DECODE = (1410, 320), (1830, 260), (2550, 260)
COLUMN = 420
# Rows: y of their first nodes. VAEs and decoders share rows, so that the links between them run straight.
MODEL_ROW, TEXT_ROW, SIZE_ROW, PICTURE_ROW, VIDEO_ROW, AUDIO_ROW = -730, -180, 240, 980, 1000, 1260
PICTURE = 500  # height of the row that a picture takes
LANE = 225  # between the conditioning and the latents
BUS = 828  # below the latents


@dataclass
class Build:
    """A clip while it is built: what the files give, the settings, and where things stand.

    ``audio_vae`` is None where the clip does without; ``right`` and ``down`` move what follows a picture.
    """

    sheet: Sheet
    model: Out
    text: Out
    video_vae: Out
    audio_vae: Out | None
    settings: Node
    picture: Out | None = None
    rival: Out | None = None
    right: int = 0
    down: int = 0
    group: int = 0

    def frame(self, title: str, *nodes: Node) -> None:
        """The next group, numbered."""
        self.group += 1
        self.sheet.group(f"{self.group}. {title}", *nodes)


def up(x: int, *rows: int) -> tuple[tuple[int, int], ...]:
    """Points of a link that runs upright through a gap between columns."""
    return tuple((x, y) for y in rows)


def clip(
    name: str,
    info: Mapping[str, Mapping],
    note: tuple[str, str],
    *,
    version: str = "2.3",
    size: tuple[int, int] = (768, 512),
    stages: str = "one stage",
    audio: bool = True,
    image: bool = False,
    sampler: str = "euler",
    positive: str = POSITIVE,
) -> Sheet:
    """A whole workflow from files to the saved video."""
    sheet = Sheet(name, info)
    sheet.note((-640, MODEL_ROW), (560, 760), note[0], flow(note[1]))
    build = files(sheet, version, audio, size, stages, image)
    positive_out, negative_out = prompts(build, positive)
    video, sound = latents(build)
    if build.picture:
        video = first_frame(build, video)
    guider, steps = sampling(build, positive_out, negative_out, video, sound, sampler)
    x = DECODE[0] + build.right
    if stages == "two stages":
        steps = second_stage(build, guider, steps, sampler)
        x += 1500
    save(build, steps, x, f"video/{name.split('_t2v')[0].split('_i2v')[0]}")
    return sheet


def files(
    sheet: Sheet, version: str, audio: bool, size: tuple[int, int], stages: str, image: bool,
    rival: tuple[str, str, str] | None = None,
) -> Build:  # fmt: skip
    """Loaders, guard, settings, and the picture to start from."""
    x, wide = FILES
    y, down = MODEL_ROW + 270, PICTURE if image else 0
    vae_files = [(FP8_23, FP8_23), (VIDEO_VAE_25, AUDIO_VAE_25)][version == "2.5"]
    if version == "2.5":
        model = sheet.add("NVFP4ModelLoader", (x, MODEL_ROW), wide, models=[NVFP4_25], model_name=NVFP4_25[0])
        text = sheet.add("CLIPLoader", (x, y), wide, models=[GEMMA_4], clip_name=GEMMA_4[0], type="ltxv")
    else:
        model = sheet.add("NVFP4ModelLoader", (x, MODEL_ROW), wide, model_name=NVFP4_23)
        text = sheet.add(
            "LTXAVTextEncoderLoader", (x, y), wide, models=[GEMMA_3, FP8_23], text_encoder=GEMMA_3[0],
            ckpt_name=FP8_23[0],
        )  # fmt: skip
    rows = [(VIDEO_ROW, "Video VAE (full)", "video", vae_files[0]), (AUDIO_ROW, "Audio VAE", "audio", vae_files[1])]
    vaes = [
        sheet.add("NVFP4VAELoader", (x, y + down), wide, title, models=[file], vae_name=file[0], kind=kind)
        for y, title, kind, file in rows[: 2 if audio else 1]
    ]
    settings = sheet.add(
        "NVFP4DistilledSettings", (x, SIZE_ROW), wide, room=120, width=size[0], height=size[1], stages=stages,
        version=version,
    )  # fmt: skip
    x, wide = CHOICES
    report = sheet.add("PreviewAny", (x, MODEL_ROW), wide, "Model report", room=110, source=model["report"])
    guard = sheet.add("NVFP4LaunchGuard", (x, MODEL_ROW + 220), wide, room=100, model=model["MODEL"])
    audio_vae = vaes[1]["VAE"] if audio else None
    build = Build(sheet, guard["MODEL"], text["CLIP"], vaes[0]["VAE"], audio_vae, settings, down=down)
    loaders, checks = [model, text], [report, guard]
    if rival:
        y = MODEL_ROW - 270
        other = sheet.add("NVFP4ModelLoader", (FILES[0], y), FILES[1], models=[rival], model_name=rival[0])
        watched = sheet.add("NVFP4LaunchGuard", (x, y), wide, room=80, model=other["MODEL"])
        build.rival, loaders, checks = watched["MODEL"], [*loaders, other], [*checks, watched]
    build.frame("Models and text encoder" if rival else "Model and text encoder", *loaders)
    build.frame("Size, length, frame rate", settings)
    if image:
        build.right = COLUMN
        loaded = sheet.add("LoadImage", (FILES[0], PICTURE_ROW), FILES[1], room=260, image="example.png")
        pressed = sheet.add(
            "LTXVPreprocess", (CHOICES[0], PICTURE_ROW), CHOICES[1], image=loaded["IMAGE"], img_compression=18
        )
        build.picture = pressed["output_image"]
        build.frame("First frame", loaded, pressed)
    build.frame("VAEs" if audio else "VAE", *vaes)
    build.frame("Check", *checks)
    return build


def prompts(build: Build, positive: str) -> tuple[Out, Out]:
    """-> positive and negative conditioning with the frame rate."""
    x, wide = CHOICES
    prompts = [
        build.sheet.add(
            "CLIPTextEncode", (x, TEXT_ROW + y), wide, title, colors=colors, text_height=tall, clip=build.text,
            text=text,
        )  # fmt: skip
        for y, title, colors, tall, text in (
            (0, "Positive prompt", GREEN, 150, positive),
            (230, "Negative prompt (unused at cfg 1)", RED, 70, NEGATIVE),
        )
    ]
    build.frame("Prompt", *prompts)
    x, wide = LATENTS
    rated = build.sheet.add(
        "LTXVConditioning", (x, TEXT_ROW + 120), wide, positive=prompts[0]["CONDITIONING"],
        negative=prompts[1]["CONDITIONING"], frame_rate=build.settings["fps"].via((x - 60, LANE - 25)),
    )  # fmt: skip
    build.frame("Frame rate", rated)
    return rated["positive"], rated["negative"]


def latents(build: Build) -> tuple[Out, Out | None]:
    """-> the empty latents of picture and sound."""
    (x, wide), settings = LATENTS, build.settings
    video = build.sheet.add(
        "EmptyLTXVLatentVideo", (x, SIZE_ROW + 120), wide, width=settings["width"], height=settings["height"],
        length=settings["frames"],
    )  # fmt: skip
    nodes, sound = [video], None
    if build.audio_vae:
        sound = build.sheet.add(
            "LTXVEmptyLatentAudio", (x, SIZE_ROW + 340), wide, frames_number=settings["frames"],
            audio_vae=build.audio_vae.via(*up(x - 50, AUDIO_ROW + build.down + 14, BUS + 40)),
            frame_rate=settings["fps"],
        )  # fmt: skip
        nodes.append(sound)
    build.frame("Empty latents" if sound else "Empty latent", *nodes)
    return video["LATENT"], sound["Latent"] if sound else None


def first_frame(build: Build, video: Out) -> Out:
    """Empty latent of the picture -> the one that starts with the image."""
    x, wide = SAMPLING
    lane = VIDEO_ROW + build.down + 14
    latent = build.sheet.add(
        "LTXVImgToVideoInplace", (x, SIZE_ROW + 120), wide, latent=video,
        vae=build.video_vae.via(*up(x - 35, lane, BUS - 100, SIZE_ROW + 260)),
        image=build.picture.via(*up(x - 65, PICTURE_ROW + 14, BUS - 100, SIZE_ROW + 260)),
    )  # fmt: skip
    build.frame("Start from it", latent)
    return latent["latent"]


def sampling(
    build: Build, positive: Out, negative: Out, video: Out, sound: Out | None, sampler: str
) -> tuple[Node, Out]:
    """-> the guider and the sampled latent."""
    sheet, settings = build.sheet, build.settings
    x, wide = SAMPLING[0] + build.right, SAMPLING[1]
    noise = sheet.add("RandomNoise", (x, -400), wide, noise_seed=42)
    guider = sheet.add(
        "CFGGuider", (x, -210), wide, model=build.model, positive=positive, negative=negative,
        cfg=settings["cfg"].via((LATENTS[0] - 30, LANE), (x - 50, LANE)),
    )  # fmt: skip
    choice = sheet.add("KSamplerSelect", (x, 0), wide, sampler_name=sampler)
    latent, nodes = video, [noise, guider, choice]
    if sound:
        joined = sheet.add("LTXVConcatAVLatent", (x, SIZE_ROW + 220), wide, video_latent=video, audio_latent=sound)
        latent = joined["latent"]
        nodes.append(joined)
    x, wide = SAMPLER[0] + build.right, SAMPLER[1]
    steps = sheet.add(
        "SamplerCustomAdvanced", (x, LANE - 49), wide, noise=noise["NOISE"], guider=guider["GUIDER"],
        sampler=choice["SAMPLER"], sigmas=settings["sigmas"].via((LATENTS[0] - 30, LANE + 25)), latent_image=latent,
    )  # fmt: skip
    build.frame("Sampling: 8 steps, cfg 1", *nodes, steps)
    return guider, steps["output"]


def second_stage(build: Build, guider: Node, steps: Out, sampler: str) -> Out:
    """Latent of the first stage -> twice as wide and high, three more steps; the sound goes along."""
    sheet, x = build.sheet, SAMPLER[0] + 360
    parts = sheet.add("LTXVSeparateAVLatent", (x, LANE + 75), 260, av_latent=steps)
    upscaler = sheet.add(
        "LatentUpscaleModelLoader", (x, LANE - 160), 330, models=[UPSCALER_23], model_name=UPSCALER_23[0]
    )
    x += COLUMN
    larger = sheet.add(
        "LTXVLatentUpsampler", (x, LANE - 40), 260, samples=parts["video_latent"],
        upscale_model=upscaler["LATENT_UPSCALE_MODEL"],
        vae=build.video_vae.via(*up(x - 50, VIDEO_ROW + 14, LANE + 220)),
    )  # fmt: skip
    x += COLUMN - 80
    noise = sheet.add("RandomNoise", (x, -400), 320, noise_seed=43)
    choice = sheet.add("KSamplerSelect", (x, -100), 320, sampler_name=sampler)
    joined = sheet.add(
        "LTXVConcatAVLatent", (x, LANE + 115), 320, video_latent=larger["LATENT"], audio_latent=parts["audio_latent"]
    )
    x += COLUMN
    again = sheet.add(
        "SamplerCustomAdvanced", (x, LANE - 49), 260, noise=noise["NOISE"],
        guider=guider["GUIDER"].via((x - COLUMN - 50, -196), (x - 70, -196)), sampler=choice["SAMPLER"],
        sigmas=build.settings["sigmas stage 2"].via((FILES[0] + 450, BUS - 18), (x - 40, BUS - 18)),
        latent_image=joined["latent"],
    )  # fmt: skip
    build.frame("Second stage: twice the size, 3 steps", parts, upscaler, larger, noise, choice, joined, again)
    return again["output"]


def save(build: Build, steps: Out, x: int, prefix: str) -> None:
    """Decoders, the sharpness meter and the file."""
    sheet, wide = build.sheet, DECODE[1]
    y, nodes = VIDEO_ROW + build.down, []
    picture, linked = steps, {}
    if build.audio_vae:
        parts = sheet.add("LTXVSeparateAVLatent", (x - 360, y - 80), 260, av_latent=steps)
        picture = parts["video_latent"]
        heard = sheet.add(
            "LTXVAudioVAEDecode", (x, AUDIO_ROW + build.down - 20), wide, samples=parts["audio_latent"],
            audio_vae=build.audio_vae,
        )  # fmt: skip
        nodes, linked = [parts, heard], {"audio": heard["Audio"]}
    images = sheet.add("VAEDecode", (x, y - 20), wide, samples=picture, vae=build.video_vae)
    build.frame("Decode with the full VAE", images, *nodes)
    above = y - (530 if build.picture else 620)
    meter = sheet.add("NVFP4Sharpness", (x + 350, above), 340, room=300, images=images["IMAGE"])
    build.frame("Sharpness", meter)
    x += 780
    video = sheet.add(
        "CreateVideo", (x, y + 120), 280, images=meter["images"],
        fps=build.settings["fps"].via((FILES[0] + 430, BUS), *up(x - 65, BUS, y + 60)), **linked,
    )  # fmt: skip
    saved = sheet.add("SaveVideo", (x + 340, y + 120), 420, room=330, video=video["VIDEO"], filename_prefix=prefix)
    build.frame("Video with sound" if linked else "Video", video, saved)
