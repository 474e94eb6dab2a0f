# SPDX-License-Identifier: Apache-2.0
"""The shipped workflows as descriptions, by the names that the gallery shows; make_workflows.py writes the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import workflow_notes as notes
from .workflow_builder import TITLE, Node, Sheet, Subgraph
from .workflow_files import CALIBRATION, DISTILLED_FP8, LTX_23, LTX_23_FP8, LTX_25, STEM, TO_CALIBRATE, Choice
from .workflow_format import ALWAYS, MUTED
from .workflow_notes import flow
from .workflow_parts import (
    AUDIO_ROW,
    BUS,
    CHOICES_WIDE,
    DECODE,
    GAP,
    LANE,
    LATENTS,
    NOTE_WIDE,
    POSITIVE,
    POSITIVE_I2V,
    POSITIVE_SILENT,
    SAMPLING,
    SIZE_ROW,
    TALL,
    VIDEO_ROW,
    VIDEO_WIDE,
    decoded,
    files,
    first_frame,
    guided,
    latents,
    noise,
    prompts,
    sampling,
    second_stage,
    up,
)

LARGE = (1280, 704)
LOWEST = 880  # of what is seen at once


def clip(
    name: str,
    info: Mapping[str, Mapping],
    note: tuple[str, str],
    choice: Choice,
    *,
    size: tuple[int, int] = (768, 512),
    stages: str = "one stage",
    audio: bool = True,
    image: bool = False,
    sampler: str = "euler",
    positive: str = POSITIVE,
) -> Sheet:
    """A whole workflow: the note, a subgraph from files to the video, the video that is saved."""
    sheet = Sheet(name, info)
    inner = Subgraph(note[0].removeprefix("NVFP4 Video: "), info)
    build = files(inner, choice, audio, size, stages, image, positive)
    positive_out, negative_out = prompts(build)
    video, sound = latents(build)
    if build.picture:
        video = first_frame(build, video)
    guider, steps = sampling(build, positive_out, negative_out, video, sound, sampler, choice.version)
    x = DECODE[0] + build.right
    if stages == "two stages":
        steps = second_stage(build, guider, steps, sampler)
        x += 1500
    inner.leave("video", decoded(build, steps, x)["VIDEO"])
    inner.leave("report", build.report)
    x, y, linked = NOTE_WIDE + GAP, 0, {}
    if image:  # above the note, which one of the front end's renderers draws as long as its text
        loaded = sheet.add("LoadImage", (0, 0), NOTE_WIDE, "First frame", room=300, image="example.png")
        y, linked = loaded.bottom + GAP + TITLE, {"image": loaded["IMAGE"]}
    sheet.note((0, y), (NOTE_WIDE, LOWEST - y if image else TALL), note[0], flow(note[1]))
    shown = inner.stand(sheet, (x, 0), CHOICES_WIDE, text_height=220, **linked)
    x += CHOICES_WIDE + GAP
    prefix = f"video/ltx{choice.version.replace('.', '')}_nvfp4"
    saved = sheet.add("SaveVideo", (x, 0), VIDEO_WIDE, room=350, video=shown["video"], filename_prefix=prefix)
    y = saved.bottom + GAP
    report = shown["report"].via(*up(x - GAP // 2, 60, y))
    sheet.add("PreviewAny", (x, y), VIDEO_WIDE, "What was loaded", room=TALL - y - 46, source=report)
    return sheet


def ltx25(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """LTX-2.5, whose parts are files of their own, in two stages."""
    return clip(name, info, notes.LTX25, LTX_25, size=LARGE, stages="two stages", sampler="euler_ancestral")


def two_stages(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """LTX-2.3 at half the size, latent upscaler, three more steps."""
    return clip(name, info, notes.TWO_STAGE, LTX_23, size=LARGE, stages="two stages")


def image_to_video(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """The first frame is a picture."""
    return clip(name, info, notes.I2V, LTX_23, image=True, positive=POSITIVE_I2V)


def one_stage(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """Smaller, and with nothing to upscale."""
    return clip(name, info, notes.ONE_STAGE, LTX_23)


def silent(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """Without an audio latent."""
    return clip(name, info, notes.SILENT, LTX_23, audio=False, positive=POSITIVE_SILENT)


def distilled(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """The distilled model, made from its FP8 checkpoint by the loader."""
    return clip(name, info, notes.DISTILLED, LTX_23_FP8)


def make_nvfp4(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """From one checkpoint to an NVFP4 file and VAEs of their own, with pictures of what is in it and where it fits."""
    sheet, inner = Sheet(name, info), Subgraph("Make an NVFP4 file", info)
    source = {"models": [DISTILLED_FP8], "file_name": inner.enter("checkpoint", "COMBO", DISTILLED_FP8[0])}
    given = {"name": inner.enter("name", "STRING", "")}
    chosen = {name: inner.enter(name, "COMBO", value) for name, value in notes.MAKE_CHOICES.items()}
    gpu = {"gpu": inner.enter("gpu", "COMBO", "detected")}
    chosen |= {name: inner.enter(name, "BOOLEAN", False) for name in ("protect_audio", "estimate_only")}
    look = inner.add("NVFP4Inspect", (0, 0), 440, room=460, **source)
    inner.group("1. Look: what is in the file", look)
    plan = inner.add("NVFP4Planner", (0, 680), 440, room=320, **source, **gpu)
    inner.group("2. Plan: does it fit, what will NVFP4 change", plan)
    made = inner.add("NVFP4Quantize", (0, 1380), 440, room=120, **source, **given, **chosen)
    inner.group("3. Quantize", made)
    parts = inner.add("NVFP4Split", (0, 2230), 440, room=60, audio_vae=True, **source, **given)
    inner.group("4. Split: the full VAEs as files of their own", parts)
    for name, out in (
        ("in the file", look["picture"]), ("plan", plan["picture"]), ("report", made["report"]),
        ("files", parts["files"]),
    ):  # fmt: skip
        inner.leave(name, out)
    _note(sheet, notes.MAKE)
    x = NOTE_WIDE + GAP
    shown = inner.stand(sheet, (x, 0), 400)
    x += 400 + GAP
    wide, picture = 245, 400
    right, above, between, y = x + wide + GAP, -45, picture + 70, picture + 20 + 2 * TITLE + GAP
    report = shown["report"].via(*up(x - GAP // 2, 80, y))
    sheet.add("PreviewImage", (x, 0), wide, "What is in the file", room=picture, images=shown["in the file"])
    plan = shown["plan"].via((x - 20, above), (right - 20, above))
    sheet.add("PreviewImage", (right, 0), wide, "Does it fit", room=picture, images=plan)
    sheet.add("PreviewAny", (x, y), wide, "What was made", room=TALL - y - 20, source=report)
    files = shown["files"].via(*up(x - 14, 110, between), (right - 20, between))
    sheet.add("PreviewAny", (right, y), wide, "VAE files", room=TALL - y - 20, source=files)
    return sheet


def ab_fp8_vs_nvfp4(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """The same prompt, sigmas and seed through both formats, three seeds: a card and a film of both each."""
    sheet, inner = Sheet(name, info), Subgraph("FP8 against NVFP4", info)
    build = files(inner, LTX_23_FP8, True, (768, 512), "one stage", False, POSITIVE, rival=True)
    positive, negative = prompts(build)
    video, sound = latents(build)
    x, wide = SAMPLING
    guiders = [
        guided(build, (x, y), "2.3", model, positive, negative)
        for y, model in ((-330, build.rival), (-120, build.model))
    ]
    for guider, title in zip(guiders, ("A: FP8", "B: NVFP4"), strict=True):
        guider.title = title
    choice = inner.add("KSamplerSelect", (x, 80), wide, sampler_name="euler")
    joined = inner.add("LTXVConcatAVLatent", (x, SIZE_ROW + 220), wide, video_latent=video, audio_latent=sound)
    build.frame("The same for both", *guiders, choice, joined)
    noises = [
        inner.add("RandomNoise", (x, SIZE_ROW + down), wide, f"Seed {number}", noise_seed=41 + number)
        for number, down in ((2, 400), (3, 640))
    ]
    build.frame("Further seeds", *noises)
    kind = _one_seed(info).define(inner)
    x += 600
    seeds = []
    for number, y in enumerate((-500, 60, 620)):
        sources = {
            "guider A": guiders[0]["GUIDER"], "guider B": guiders[1]["GUIDER"], "sampler": choice["SAMPLER"],
            "sigmas": build.settings["sigmas"].via((LATENTS[0] - 30, LANE + 25), (x - 120, LANE + 25)),
            "latent": joined["latent"], "vae": build.video_vae.via(*up(x - 100, VIDEO_ROW + 14, y + 210)),
            "audio_vae": build.audio_vae.via(*up(x - 80, AUDIO_ROW + 14, y + 230)),
            "fps": build.settings["fps"].via((430, BUS), *up(x - 60, BUS, y + 250)),
        }  # fmt: skip
        sources["noise"] = noises[number - 1]["NOISE"] if number else noise(build, x)
        seeds.append(inner.add(kind, (x, y), 300, f"Seed {number + 1}", **sources))
    build.frame("Three seeds", *seeds)
    for number, seed in enumerate(seeds, 1):
        inner.leave(f"card {number}", seed["card"])
        inner.leave(f"video {number}", seed["video"])
    note_wide, wide = 330, 370
    _note(sheet, notes.COMPARE, note_wide)
    x = note_wide + GAP
    shown = inner.stand(sheet, (x, 0), wide, text_height=220)
    x += wide + GAP
    for number in (1, 2, 3):
        _pair(sheet, shown, number, x)
    return sheet


def calibrate(name: str, info: Mapping[str, Mapping]) -> Sheet:
    """Clips of the source as ever, watched by NVFP4 Calibrate; below, muted, what makes the file and judges it."""
    sheet, inner = Sheet(name, info), Subgraph("Sample and collect", info)
    build = files(inner, TO_CALIBRATE, True, (768, 512), "one stage", False, POSITIVE, collect=True)
    positive, negative = prompts(build)
    video, sound = latents(build)
    _, steps = sampling(build, positive, negative, video, sound, "euler", "2.3")
    inner.leave("video", decoded(build, steps, DECODE[0])["VIDEO"])
    inner.leave("report", build.report)
    left, wide, x, y = 380, 400, (440, 880, 1200), (0, 556)
    sheet.note((0, -50), (left, y[1] + 300), notes.CALIBRATE[0], flow(notes.CALIBRATE[1]))
    shown = inner.stand(sheet, (x[0], y[0]), wide, text_height=160)
    second = _quantize_and_verify(info).stand(sheet, (x[0], y[1]), wide, mode=MUTED)
    film = sheet.add(
        "SaveVideo", (x[1], y[0]), 290, "A clip of the source", room=300, video=shown["video"],
        filename_prefix="nvfp4/calibration",
    )  # fmt: skip
    above = {row: ((x[0] + wide + 22, at - 38), (x[2] - 15, at - 38)) for row, at in enumerate(y)}
    told = shown["report"].via(*above[0])
    texts = [
        sheet.add("PreviewAny", at, across, title, room=room, source=source, mode=mode)
        for at, across, title, room, source, mode in (
            ((x[2], y[0]), 210, "What is collected", 370, told, ALWAYS),
            ((x[1], y[1]), 290, "What was made", 200, second["report"], MUTED),
            ((x[2], y[1]), 210, "Is it right", 200, second["verdict"].via(*above[1]), MUTED),
        )
    ]
    sheet.group("1. Collect: Run, with four to eight prompts", shown, film, texts[0])
    sheet.group("2. Then quantize and verify: unmute (Ctrl + M), Run", second, *texts[1:])
    return sheet


def _quantize_and_verify(info: Mapping[str, Mapping]) -> Subgraph:
    """The calibrated file of a checkpoint, and whether it is in order."""
    inner = Subgraph("Quantize and verify", info, first=201)
    name = inner.enter("checkpoint", "COMBO", DISTILLED_FP8[0])
    calibration = inner.enter("calibration", "COMBO", CALIBRATION)
    choices = (
        ("lora", "LoRA", "COMBO", "none"), ("lora_strength", "LoRA strength", "FLOAT", 1.0),
        ("budget", "budget", "STRING", "balanced"), ("name", "name", "STRING", f"{STEM}-calibrated"),
        ("contents", "contents", "COMBO", "whole checkpoint"),
    )  # fmt: skip
    given = {own: inner.enter(outside, kind, value) for own, outside, kind, value in choices}
    made = inner.add(
        "NVFP4Quantize", (0, 0), 440, room=120, models=[DISTILLED_FP8], file_name=name, quality="calibrated",
        calibration=calibration, **given,
    )  # fmt: skip
    inner.group("1. Quantize", made)
    name, calibration = (out.via((-80, 1000), *up(500, 1000, 100)) for out in (name, calibration))
    judged = inner.add(
        "NVFP4Verify", (560, 0), 440, room=300, models=[DISTILLED_FP8], file_name=name, source=name,
        calibration=calibration, written=made["file"],
    )  # fmt: skip
    inner.group("2. Verify", judged)
    inner.leave("report", made["report"])
    inner.leave("verdict", judged["report"])
    return inner


def _pair(sheet: Sheet, shown: Node, number: int, x: int) -> None:
    """The card and the film of one seed in a column; links run above the cards and between the rows."""
    wide, card = 210, 300  # the least width of a node that saves
    at, between = x + (number - 1) * (wide + 12), card + 44 + GAP // 2
    ways: tuple = ((), ())
    if number > 1:
        ways = ((x - 25, -45), (at - 6, -45)), (*up(x - 15, 160, between), (at - 6, between))
    prefix = f"nvfp4/fp8_vs_nvfp4_{number}"
    sheet.add(
        "SaveImage", (at, 0), wide, f"Card {number}", room=card - 6, filename_prefix=prefix,
        images=shown[f"card {number}"].via(*ways[0]),
    )  # fmt: skip
    y = card + 44 + GAP + TITLE
    sheet.add(
        "SaveVideo", (at, y), wide, f"A | B {number}", room=TALL - y - 98, filename_prefix=prefix,
        video=shown[f"video {number}"].via(*ways[1]),
    )  # fmt: skip


def _note(sheet: Sheet, note: tuple[str, str], wide: int = NOTE_WIDE) -> None:
    sheet.note((0, 0), (wide, TALL), note[0], flow(note[1]))


def _one_seed(info: Mapping[str, Mapping]) -> Subgraph:
    """Both formats sampled with one seed, decoded, compared, and set side by side."""
    seed = Subgraph("One seed, both formats", info, first=201)
    start = seed.enter("noise", "NOISE")
    guiders = [seed.enter("guider A", "GUIDER"), seed.enter("guider B", "GUIDER")]
    sampler, sigmas = seed.enter("sampler", "SAMPLER"), seed.enter("sigmas", "SIGMAS")
    latent, vae = seed.enter("latent", "LATENT"), seed.enter("vae", "VAE").via((960, 90))
    audio_vae = seed.enter("audio_vae", "VAE").via((980, 115))
    fps = seed.enter("fps", "FLOAT").via((-100, 620), (1740, 620))
    clips = []
    for y, guider, title in ((-220, guiders[0], "A: FP8"), (300, guiders[1], "B: NVFP4")):
        steps = seed.add(
            "SamplerCustomAdvanced", (360, y), 260, title, noise=start, guider=guider, sampler=sampler,
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
    both = seed.add(
        "ImageStitch", (1380, 440), 340, "A left, B right", image1=images_a, image2=images_b, direction="right",
        spacing_width=4,
    )  # fmt: skip
    film = seed.add(
        "CreateVideo", (1800, 440), 260, "Side by side, B's sound", images=both["IMAGE"],
        audio=audio_b.via((1340, 600), (1770, 600)), fps=fps,
    )  # fmt: skip
    seed.leave("card", card["card"])
    seed.leave("video", film["VIDEO"])
    return seed


WORKFLOWS: dict[str, Callable[[str, Mapping[str, Mapping]], Sheet]] = {
    "1 LTX-2.5 text to video": ltx25,
    "2 LTX-2.3 text to video": two_stages,
    "3 LTX-2.3 image to video": image_to_video,
    "4 LTX-2.3 small and quick": one_stage,
    "5 LTX-2.3 without sound": silent,
    "6 LTX-2.3 distilled, made from FP8": distilled,
    "7 Make an NVFP4 file": make_nvfp4,
    "8 FP8 against NVFP4": ab_fp8_vs_nvfp4,
    "9 Make a calibrated NVFP4 file": calibrate,
}
