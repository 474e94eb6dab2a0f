# SPDX-License-Identifier: Apache-2.0
"""The parts of which the shipped workflows are made, each a few nodes at their places.

What a user sees is a note, one subgraph whose widgets are all that has to be chosen, and the video. Inside, all clips
have one layout: files, seed and size on the left, then conditioning and latents, sampling, decoding. Long links run in
lanes and in a bus below the latents, so that none passes behind a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from .workflow_builder import Node, Out, Subgraph
from .workflow_files import Choice
from .workflow_format import ALWAYS, BYPASSED

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

# What stands on the canvas: width of note, subgraph and video, side by side, GAP apart; a picture is below the note.
NOTE_WIDE, CHOICES_WIDE, VIDEO_WIDE, GAP = 430, 480, 440, 40
TALL = 680
# In the subgraph, columns: x and width of their nodes. What stands right of the latents moves on where a picture comes
# in between.
FILES, CHOICES, LATENTS = (0, 380), (470, 420), (990, 320)
SAMPLING, SAMPLER, DECODE = (1410, 320), (1830, 260), (2550, 260)
COLUMN = 420
WRITER = 2 * COLUMN  # what the columns right of the files move for what writes the prompt
# Rows: y of their first nodes. VAEs and decoders share rows, so that the links between them run straight.
MODEL_ROW, SEED_ROW, TEXT_ROW, SIZE_ROW, PICTURE_ROW, VIDEO_ROW, AUDIO_ROW = -990, -220, -180, 240, 980, 1000, 1290
PICTURE = 500  # height of the row that a picture takes
LANE = 225  # between the conditioning and the latents
BUS = 828  # below the latents


@dataclass
class Build:
    """A clip while it is built: what the files give, the settings, and where things stand.

    ``audio_vae`` is None where the clip does without; ``right`` and ``down`` move what follows a picture, ``aside`` all
    but the files, to make room for what writes the prompt.
    """

    sheet: Subgraph
    model: Out
    text: Out
    video_vae: Out
    audio_vae: Out | None
    upscaler: Out | None
    settings: Node
    noise: Out
    prompt: Out
    report: Out
    picture: Out | None = None
    enhance: Out | None = None
    rival: Out | None = None
    right: int = 0
    down: int = 0
    aside: int = 0
    group: int = 0

    def column(self, place: tuple[int, int]) -> tuple[int, int]:
        """CHOICES or LATENTS -> x and width there."""
        return place[0] + self.aside, place[1]

    def frame(self, title: str, *nodes: Node) -> None:
        """The next group, numbered."""
        self.group += 1
        self.sheet.group(f"{self.group}. {title}", *nodes)


def up(x: int, *rows: int) -> tuple[tuple[int, int], ...]:
    """Points of a link that runs upright through a gap between columns."""
    return tuple((x, y) for y in rows)


def files(
    sheet: Subgraph, choice: Choice, audio: bool, size: tuple[int, int], stages: str, image: bool, positive: str,
    rival: bool = False, collect: bool = False,
) -> Build:  # fmt: skip
    """Loaders, guard, seed, settings, and the picture to start from; what a user chooses comes in from outside.

    ``rival``: the same checkpoint is loaded once more, as it is. ``collect``: it is loaded as it is, with a bypassed
    LoRA, and calibrated.
    """
    prompt = sheet.enter("prompt", "STRING", positive, multiline=True)
    # As in ComfyUI's own templates, off until it is wanted; those of 2.5 have a second, smaller text encoder for it.
    enhance = sheet.enter("enhance prompt", "BOOLEAN", False) if choice.version == "2.5" else None
    aside = WRITER if enhance else 0
    picture = sheet.enter("image", "IMAGE") if image else None
    card = sheet.enter("card", "COMBO", "as set")
    wishes = {name: sheet.enter(name, "INT", value) for name, value in zip(("width", "height"), size, strict=True)}
    wishes |= {name: sheet.enter(name, "FLOAT", value) for name, value in (("seconds", 5.0), ("fps", 24.0))}
    seed = sheet.enter("seed", "INT", 42)
    compute = "bf16" if collect else sheet.enter("compute", "COMBO", "bf16")
    name = sheet.enter("checkpoint" if choice.make else "model", "COMBO", choice.model[0])
    lora_name = sheet.enter("LoRA", "COMBO", choice.lora[0]) if choice.lora and not collect else None
    memory = sheet.enter("memory_gb", "FLOAT", 2.0) if collect else None
    loaders = [_model(sheet, choice, MODEL_ROW, name, compute, choice.make and not collect)]
    text, vae_names = _text_encoder(sheet, choice, name)
    loaders.append(text)
    upscaler = None
    if stages == "two stages":
        chosen = sheet.enter("upscaler", "COMBO", choice.upscaler[0])
        loaders.append(
            sheet.add(
                "LatentUpscaleModelLoader", (FILES[0], text.bottom + 50), FILES[1], models=[choice.upscaler],
                model_name=chosen,
            )
        )  # fmt: skip
        upscaler = loaders[-1]["LATENT_UPSCALE_MODEL"]
    down = PICTURE if image else 0
    rows = [(VIDEO_ROW, "Video VAE (full)", "video"), (AUDIO_ROW, "Audio VAE", "audio")][: 2 if audio else 1]
    vaes = [
        sheet.add("NVFP4VAELoader", (FILES[0], y + down), FILES[1], title, models=[file], vae_name=chosen, kind=kind)
        for (y, title, kind), file, chosen in zip(rows, choice.vaes, vae_names, strict=False)
    ]
    noise = sheet.add("RandomNoise", (FILES[0], SEED_ROW), FILES[1], noise_seed=seed)
    settings = sheet.add(
        "NVFP4DistilledSettings", (FILES[0], SIZE_ROW), FILES[1], room=100, stages=stages, version=choice.version,
        card=card, **wishes,
    )  # fmt: skip
    x, wide = CHOICES[0] + aside, CHOICES[1]
    report = sheet.add(
        "PreviewAny", (x, MODEL_ROW), wide, "Model report", room=110, source=loaders[0]["report"]
    )  # fmt: skip
    used, checks, lora, lane = loaders[0]["MODEL"], [report], None, MODEL_ROW + 270
    if choice.lora:
        lora = sheet.add(
            "LoraLoaderModelOnly", (x, lane + 40), wide, "LoRA to fold in" if collect else "Distilled LoRA",
            models=[choice.lora], model=used, strength_model=0.5, mode=BYPASSED if collect else ALWAYS,
            lora_name=choice.lora[0] if collect else lora_name.via(*((to, lane) for to in (-60, x - 40))),
        )  # fmt: skip
        used, (x, wide) = lora["MODEL"], (LATENTS[0] + aside, LATENTS[1])
    if collect:
        guard = sheet.add(
            "NVFP4Calibrate", (x, lane + 40), wide, room=80, models=[choice.model], model=used,
            file_name=name.via(*((to, lane) for to in (-60, x - 40))),
            memory_gb=memory.via(*((to, lane) for to in (-60, x - 40))),
        )  # fmt: skip
    else:
        guard = sheet.add("NVFP4LaunchGuard", (x, lane + 40), wide, room=100, model=used)
    told = guard["report"] if collect else loaders[0]["report"]
    build = Build(
        sheet, guard["MODEL"], text["CLIP"], vaes[0]["VAE"], vaes[1]["VAE"] if audio else None, upscaler, settings,
        noise["NOISE"], prompt, told, right=aside, down=down, aside=aside, enhance=enhance,
    )  # fmt: skip
    guards = [guard]
    if rival:
        y = MODEL_ROW - 350
        loaders.insert(0, _model(sheet, choice, y, name, compute, False))
        guards.append(sheet.add("NVFP4LaunchGuard", (x, y), wide, room=80, model=loaders[0]["MODEL"]))
        build.rival = guards[-1]["MODEL"]
    build.frame("Models and text encoder" if rival else "Model and text encoder", *loaders)
    if lora:
        build.frame("A LoRA to fold in (bypassed)" if collect else "What makes it a distilled model", lora)
    build.frame("Seed", noise)
    build.frame("Size, length, frame rate", settings)
    if picture:
        build.right += COLUMN
        pressed = sheet.add(
            "LTXVPreprocess", (CHOICES[0], PICTURE_ROW), CHOICES[1], img_compression=18,
            image=picture.via(*((to, PICTURE_ROW + 14) for to in (-60, CHOICES[0] - 40))),
        )  # fmt: skip
        build.picture = pressed["output_image"]
        build.frame("First frame", pressed)
    build.frame("VAEs" if audio else "VAE", *vaes)
    if lora:
        build.frame("Report", *checks)
        build.frame("Collect" if collect else "Check", *guards)
    else:
        build.frame("Report, check", *checks, *guards)
    return build


def _model(sheet: Subgraph, choice: Choice, y: int, name: Out, compute: Out, make: bool) -> Node:
    """The model loader."""
    return sheet.add(
        "NVFP4ModelLoader", (FILES[0], y), FILES[1], models=[choice.model], model_name=name, compute=compute,
        make_nvfp4=make,
    )  # fmt: skip


def _text_encoder(sheet: Subgraph, choice: Choice, checkpoint: Out) -> tuple[Node, list[Out]]:
    """-> the text encoder's loader, and the names of the VAEs."""
    x, wide = FILES
    if choice.version == "2.5":
        names = [
            sheet.enter(name, "COMBO", file[0])
            for name, file in zip(("video VAE", "audio VAE"), choice.vaes, strict=True)
        ]
        encoder = sheet.enter("text encoder", "COMBO", choice.encoder[0])
        node = sheet.add(
            "CLIPLoader", (x, MODEL_ROW + 330), wide, models=[choice.encoder], clip_name=encoder, type="ltxv"
        )
        return node, names
    parts = checkpoint if choice.make else sheet.enter("VAEs, projection", "COMBO", choice.vaes[0][0])
    encoder = sheet.enter("text encoder", "COMBO", choice.encoder[0])
    node = sheet.add(
        "NVFP4TextEncoderLoader", (x, MODEL_ROW + 330), wide, models=[choice.encoder, choice.vaes[0]],
        text_encoder=encoder, projection=parts,
    )  # fmt: skip
    return node, [parts, parts]


def prompts(build: Build) -> tuple[Out, Out]:
    """-> positive and negative conditioning with the frame rate."""
    x, wide = build.column(CHOICES)
    positive = build.prompt.via((-60, -100), (x - 40, -100))
    clip = build.text
    if build.enhance:
        positive, clip = written(build), clip.via((CHOICES[0] - 40, -190), (x - 40, -190))
    prompts = [
        build.sheet.add(
            "CLIPTextEncode", (x, TEXT_ROW + y), wide, title, colors=colors, text_height=tall, clip=clip,
            text=text,
        )  # fmt: skip
        for y, title, colors, tall, text in (
            (0, "Positive prompt", GREEN, 150, positive),
            (230, "Negative prompt (unused at cfg 1)", RED, 70, NEGATIVE),
        )
    ]
    build.frame("Prompt", *prompts)
    x, wide = build.column(LATENTS)
    rated = build.sheet.add(
        "LTXVConditioning", (x, TEXT_ROW + 120), wide, positive=prompts[0]["CONDITIONING"],
        negative=prompts[1]["CONDITIONING"], frame_rate=build.settings["fps"].via((x - 60, LANE - 25)),
    )  # fmt: skip
    build.frame("Frame rate", rated)
    return rated["positive"], rated["negative"]


def written(build: Build) -> Out:
    """The user's prompt, or the one that the text encoder makes of it where that is switched on."""
    sheet, (x, wide), y = build.sheet, CHOICES, -640
    # The numbers of ComfyUI's own template for LTX-2.5.
    mode = {"max_length": 600, "sampling_mode": "on", "sampling_mode.repetition_penalty": 1.15}
    writer = sheet.add(
        "TextGenerateLTX2Prompt", (x, y), wide, clip=build.text,
        prompt=build.prompt.via(*((to, -100) for to in (-60, x - 30))), **mode,
    )  # fmt: skip
    x += wide + 80
    chosen = sheet.add(
        "ComfySwitchNode", (x, -320), 240, match="STRING", on_true=writer["generated_text"],
        switch=build.enhance.via((-60, -80), (x - 30, -80)), on_false=build.prompt.via((-60, -100), (x - 40, -100)),
    )  # fmt: skip
    build.frame("Prompt enhancer", writer, chosen)
    x, wide = build.column(CHOICES)
    seen = sheet.add("PreviewAny", (x, -410), wide, "Prompt as used", room=96, source=chosen["output"])
    build.frame("Prompt as used", seen)
    return chosen["output"]


def latents(build: Build) -> tuple[Out, Out | None]:
    """-> the empty latents of picture and sound."""
    (x, wide), settings = build.column(LATENTS), build.settings
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


def guided(build: Build, at: tuple[int, int], version: str, model: Out, positive: Out, negative: Out) -> Node:
    """The guider at cfg 1; LTX-2.5's has one for the picture and one for the sound."""
    x, wide = at[0], SAMPLING[1]
    cfg = build.settings["cfg"].via((build.column(LATENTS)[0] - 30, LANE), (x - 50, LANE))
    scales = {"video_cfg": cfg, "audio_cfg": cfg} if version == "2.5" else {"cfg": cfg}
    kind = "LTXVDualCFGGuider" if version == "2.5" else "CFGGuider"
    return build.sheet.add(kind, at, wide, model=model, positive=positive, negative=negative, **scales)


def noise(build: Build, x: int) -> Out:
    """The noise, led to a sampler at ``x``."""
    return build.noise.via(*((CHOICES[0] - 50, y) for y in (SEED_ROW + 80, LANE - 35)), (x - 50, LANE - 35))


def sampling(
    build: Build, positive: Out, negative: Out, video: Out, sound: Out | None, sampler: str, version: str
) -> tuple[Node, Out]:
    """-> the guider and the sampled latent."""
    sheet, settings = build.sheet, build.settings
    x, wide = SAMPLING[0] + build.right, SAMPLING[1]
    guider = guided(build, (x, -210), version, build.model, positive, negative)
    choice = sheet.add("KSamplerSelect", (x, 0), wide, sampler_name=sampler)
    latent, nodes = video, [guider, choice]
    if sound:
        joined = sheet.add("LTXVConcatAVLatent", (x, SIZE_ROW + 220), wide, video_latent=video, audio_latent=sound)
        latent = joined["latent"]
        nodes.append(joined)
    x, wide = SAMPLER[0] + build.right, SAMPLER[1]
    sigmas = settings["sigmas"].via((build.column(LATENTS)[0] - 30, LANE + 25))
    steps = sheet.add(
        "SamplerCustomAdvanced", (x, LANE - 49), wide, noise=noise(build, x), guider=guider["GUIDER"],
        sampler=choice["SAMPLER"], sigmas=sigmas, latent_image=latent,
    )  # fmt: skip
    build.frame("Sampling: 8 steps, cfg 1", *nodes, steps)
    return guider, steps["output"]


def second_stage(build: Build, guider: Node, steps: Out, sampler: str) -> Out:
    """Latent of the first stage -> twice as wide and high, three more steps; the sound goes along."""
    sheet, x = build.sheet, SAMPLER[0] + build.right + 360
    parts = sheet.add("LTXVSeparateAVLatent", (x, LANE + 75), 260, av_latent=steps)
    x += COLUMN
    larger = sheet.add(
        "LTXVLatentUpsampler", (x, LANE - 40), 260, samples=parts["video_latent"],
        upscale_model=build.upscaler.via(*up(FILES[0] + 405, MODEL_ROW + 680, BUS - 36), (x - 70, BUS - 36)),
        vae=build.video_vae.via(*up(x - 50, VIDEO_ROW + 14, LANE + 220)),
    )  # fmt: skip
    x += COLUMN - 80
    again = sheet.add("RandomNoise", (x, -400), 320, noise_seed=43)
    choice = sheet.add("KSamplerSelect", (x, -100), 320, sampler_name=sampler)
    joined = sheet.add(
        "LTXVConcatAVLatent", (x, LANE + 115), 320, video_latent=larger["LATENT"], audio_latent=parts["audio_latent"]
    )
    x += COLUMN
    refined = sheet.add(
        "SamplerCustomAdvanced", (x, LANE - 49), 260, noise=again["NOISE"],
        guider=guider["GUIDER"].via((x - COLUMN - 50, -196), (x - 70, -196)), sampler=choice["SAMPLER"],
        sigmas=build.settings["sigmas stage 2"].via((FILES[0] + 450, BUS - 18), (x - 40, BUS - 18)),
        latent_image=joined["latent"],
    )  # fmt: skip
    build.frame("Second stage: twice the size, 3 steps", parts, larger, again, choice, joined, refined)
    return refined["output"]


def decoded(build: Build, steps: Out, x: int) -> Node:
    """Decoders, the sharpness meter and the video, which is returned."""
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
    build.frame("Video with sound" if linked else "Video", video)
    return video
