# SPDX-License-Identifier: Apache-2.0
"""The shipped workflows as descriptions; make_workflows.py writes the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import workflow_notes as notes
from .workflow_builder import Sheet, Subgraph
from .workflow_notes import flow
from .workflow_parts import (
    AUDIO_ROW,
    FP8_23,
    LANE,
    LATENTS,
    MODEL_ROW,
    POSITIVE,
    POSITIVE_I2V,
    POSITIVE_SILENT,
    SAMPLING,
    SIZE_ROW,
    VIDEO_ROW,
    clip,
    files,
    latents,
    prompts,
    up,
)


def ltx23_nvfp4_t2v_audio(info: Mapping[str, Mapping]) -> Sheet:
    """One stage, picture and sound."""
    return clip("ltx23_nvfp4_t2v_audio", info, notes.T2V)


def ltx23_nvfp4_t2v_audio_two_stage(info: Mapping[str, Mapping]) -> Sheet:
    """Half size, latent upscaler, three more steps."""
    return clip("ltx23_nvfp4_t2v_audio_two_stage", info, notes.TWO_STAGE, size=(1280, 704), stages="two stages")


def ltx23_nvfp4_i2v_audio(info: Mapping[str, Mapping]) -> Sheet:
    """The first frame is a picture."""
    return clip("ltx23_nvfp4_i2v_audio", info, notes.I2V, image=True, positive=POSITIVE_I2V)


def ltx23_nvfp4_t2v_video_only(info: Mapping[str, Mapping]) -> Sheet:
    """Without an audio latent."""
    return clip("ltx23_nvfp4_t2v_video_only", info, notes.VIDEO_ONLY, audio=False, positive=POSITIVE_SILENT)


def ltx25_nvfp4_t2v_audio(info: Mapping[str, Mapping]) -> Sheet:
    """LTX-2.5, whose parts are files of their own."""
    return clip("ltx25_nvfp4_t2v_audio", info, notes.LTX25, version="2.5", sampler="euler_ancestral")


def make_nvfp4(info: Mapping[str, Mapping]) -> Sheet:
    """From the downloaded checkpoint to an NVFP4 file and VAEs of their own."""
    sheet = Sheet("make_nvfp4", info)
    sheet.note((-640, 0), (560, 760), notes.MAKE[0], flow(notes.MAKE[1]))
    source = {"models": [FP8_23], "file_name": FP8_23[0]}
    look = sheet.add("NVFP4Inspect", (0, 0), 440, room=460, **source)
    sheet.group("1. Look: what is in the file", look)
    plan = sheet.add("NVFP4Planner", (0, 830), 440, room=320, **source)
    sheet.group("2. Plan: does it fit, what will NVFP4 change", plan)
    made = sheet.add("NVFP4Quantize", (540, 0), 440, room=120, name="ltx-2.3-22b-distilled", **source)
    report = sheet.add("PreviewAny", (1040, 0), 440, "Report", room=460, source=made["report"])
    sheet.group("3. Quantise", made, report)
    parts = sheet.add(
        "NVFP4Split", (540, 830), 440, room=60, audio_vae=True, name="ltx-2.3-22b-distilled", **source
    )
    files = sheet.add("PreviewAny", (1040, 830), 440, "Files", room=130, source=parts["files"])
    sheet.group("4. Split: the full VAEs as files of their own", parts, files)
    return sheet


def ab_fp8_vs_nvfp4(info: Mapping[str, Mapping]) -> Sheet:
    """The same prompt, sigmas and seed through both formats, three seeds, a card each."""
    sheet = Sheet("ab_fp8_vs_nvfp4", info)
    sheet.note((-640, MODEL_ROW - 240), (560, 760), notes.COMPARE[0], flow(notes.COMPARE[1]))
    build = files(sheet, "2.3", True, (768, 512), "one stage", False, rival=FP8_23)
    positive, negative = prompts(build, POSITIVE)
    video, sound = latents(build)
    x, wide = SAMPLING
    guiders = [
        sheet.add(
            "CFGGuider", (x, y), wide, title, model=model, positive=positive, negative=negative,
            cfg=build.settings["cfg"].via((LATENTS[0] - 30, LANE), (x - 50, LANE)),
        )  # fmt: skip
        for y, title, model in ((-330, "A: FP8", build.rival), (-120, "B: NVFP4", build.model))
    ]
    choice = sheet.add("KSamplerSelect", (x, 80), wide, sampler_name="euler")
    joined = sheet.add("LTXVConcatAVLatent", (x, SIZE_ROW + 220), wide, video_latent=video, audio_latent=sound)
    build.frame("The same for both, but the model", *guiders, choice, joined)
    kind = _one_seed(info).define(sheet)
    x += 600
    seeds, cards = [], []
    for number, y in enumerate((-500, 60, 620)):
        sources = {
            "guider A": guiders[0]["GUIDER"], "guider B": guiders[1]["GUIDER"], "sampler": choice["SAMPLER"],
            "sigmas": build.settings["sigmas"].via((LATENTS[0] - 30, LANE + 25), (x - 120, LANE + 25)),
            "latent": joined["latent"], "vae": build.video_vae.via(*up(x - 100, VIDEO_ROW + 14, y + 210)),
            "audio_vae": build.audio_vae.via(*up(x - 80, AUDIO_ROW + 14, y + 230)),
        }  # fmt: skip
        seeds.append(sheet.add(kind, (x, y), 300, f"Seed {number + 1}", noise_seed=42 + number, **sources))
        cards.append(
            sheet.add(
                "SaveImage", (x + 400, y), 620, f"Card {number + 1}", room=400, images=seeds[-1]["card"],
                filename_prefix=f"nvfp4/fp8_vs_nvfp4_{number + 1}",
            )  # fmt: skip
        )
    build.frame("Three seeds", *seeds)
    build.frame("Comparison cards", *cards)
    return sheet


def _one_seed(info: Mapping[str, Mapping]) -> Subgraph:
    """Both formats sampled with one seed, decoded, compared."""
    seed = Subgraph("One seed, both formats", info)
    noise = seed.add("RandomNoise", (0, -400), 280, noise_seed=seed.enter("noise_seed", "INT"))
    guiders = [seed.enter("guider A", "GUIDER"), seed.enter("guider B", "GUIDER")]
    sampler, sigmas = seed.enter("sampler", "SAMPLER"), seed.enter("sigmas", "SIGMAS")
    latent, vae = seed.enter("latent", "LATENT"), seed.enter("vae", "VAE").via((960, 90))
    audio_vae = seed.enter("audio_vae", "VAE").via((980, 115))
    clips = []
    for y, guider, title in ((-220, guiders[0], "A: FP8"), (300, guiders[1], "B: NVFP4")):
        steps = seed.add(
            "SamplerCustomAdvanced", (360, y), 260, title, noise=noise["NOISE"], guider=guider, sampler=sampler,
            sigmas=sigmas, latent_image=latent,
        )  # fmt: skip
        parts = seed.add("LTXVSeparateAVLatent", (680, y), 240, av_latent=steps["output"])
        images = seed.add("VAEDecode", (1040, y - 40), 240, samples=parts["video_latent"], vae=vae)
        sound = seed.add(
            "LTXVAudioVAEDecode", (1040, y + 90), 240, samples=parts["audio_latent"], audio_vae=audio_vae
        )
        clips.append((images["IMAGE"], sound["Audio"]))
    (images_a, audio_a), (images_b, audio_b) = clips
    card = seed.add(
        "NVFP4Compare", (1380, -60), 340, room=260, images_a=images_a, images_b=images_b, audio_a=audio_a,
        audio_b=audio_b,
    )  # fmt: skip
    seed.leave("card", card["card"])
    return seed


WORKFLOWS: tuple[Callable[[Mapping[str, Mapping]], Sheet], ...] = (
    ltx23_nvfp4_t2v_audio,
    ltx23_nvfp4_t2v_audio_two_stage,
    ltx23_nvfp4_i2v_audio,
    ltx23_nvfp4_t2v_video_only,
    ltx25_nvfp4_t2v_audio,
    make_nvfp4,
    ab_fp8_vs_nvfp4,
)
