# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI renders the shipped LTX workflows to video files, on scaled-down models with random weights.

The graphs are those of the templates, with a small size and length in the settings node and seeded conditioning in the
place of the text encoder (``small_clip``). Everything else is the real thing: both loaders, guard, settings, sampler,
VAE classes, vocoder, muxing. PyAV then says what is in the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from nvfp4_video.checkpoint.write.calibration import read_calibration
from nvfp4_video.measure.ltx import audio_latents, mel_frames
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import graphs, small_files
from nvfp4_video.tests.real.harness import PACK, ComfyUI, run_in_host, small_model
from nvfp4_video.tests.workflows.workflow_files import CALIBRATION, STEM
from nvfp4_video.tests.workflows.workflow_format import ALWAYS, api_prompt
from PIL import Image

WIDTH, HEIGHT, FRAMES, FPS = 192, 128, 17, 24
CLIPS = sorted(path.stem for path in (PACK / "workflows").glob("*LTX*.json"))
IMAGE_TO_VIDEO, SILENT, MAKE = "3 LTX-2.3 image to video", "5 LTX-2.3 without sound", "7 Make an NVFP4 file"
CALIBRATE = "9 Make a calibrated NVFP4 file"
TEXT_ENCODERS = ("NVFP4TextEncoderLoader", "CLIPLoader")
MADE = "ltx-2.3-22b-distilled-fp8_nvfp4.safetensors"
RATE = 48_000
# A sound of n latents decodes to 4n - 3 MEL frames of 10 ms, so it ends up to a latent and a half before the picture.
MEL_FRAME = RATE // 100
AAC_FRAME = 1024


@dataclass
class Recording:
    """What PyAV finds in a file."""

    frames: list[np.ndarray]
    rate: Fraction
    seconds: float
    video_start: float
    channels: int | None = None
    sample_rate: int | None = None
    samples: int = 0
    audio_start: float = 0.0
    loudest: float = 0.0


def read(path: Path) -> Recording:
    """Decode a file to its end."""
    with av.open(str(path)) as file:
        (video,) = file.streams.video
        audio = file.streams.audio
        found = Recording([], video.average_rate, float(video.duration * video.time_base), start_of(video))
        if audio:
            (track,) = audio
            found.channels, found.sample_rate = track.codec_context.channels, track.codec_context.sample_rate
            found.audio_start = start_of(track)
        for frame in file.decode(*file.streams):
            if isinstance(frame, av.VideoFrame):
                found.frames.append(frame.to_ndarray(format="rgb24"))
            elif isinstance(frame, av.AudioFrame):
                found.samples += frame.samples
                found.loudest = max(found.loudest, float(np.abs(frame.to_ndarray()).max()))
    return found


def start_of(stream) -> float:
    """Seconds at which a stream begins."""
    return float((stream.start_time or 0) * stream.time_base)


@pytest.fixture(scope="module")
def files(host: ComfyUI) -> dict:
    """All files that the templates name but the text encoders, below the host's folders; the transformer's config."""
    if small_model(host.path) != "ltx23":
        pytest.skip(f"ComfyUI {host.version} does not know LTX-2.3")
    _, config = synthetic.small_ltx23()
    result = run_in_host(small_files.__file__, str(host.base / "models"))
    assert result.returncode == 0, result.stderr
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[:, :80] = (230, 60, 40)
    Image.fromarray(picture).save(host.base / "input" / "example.png")
    return config


def small_clip(name: str, config: dict, info: dict, frames: int = FRAMES, unmute: bool = False) -> dict:
    """A template -> the API prompt of a small clip, with seeded conditioning in place of encoded text.

    ``unmute``: what is muted there runs too.
    """
    graph = json.loads((PACK / "workflows" / f"{name}.json").read_text("utf-8"))
    for node in graph["nodes"] if unmute else ():
        node["mode"] = ALWAYS
    prompt = api_prompt(graph, info)
    for node, entry in list(prompt.items()):
        if entry["class_type"] == "NVFP4DistilledSettings":
            entry["inputs"] |= {"width": WIDTH, "height": HEIGHT, "frames": frames, "seconds": 0.0, "fps": FPS}
        elif entry["class_type"] == "CLIPTextEncode":
            prompt[node] = {
                "class_type": "StandInConditioning",
                "inputs": {"seed": int(node.rpartition(":")[2]), "tokens": 32, "dim": graphs.context_width(config)},
            }
        elif entry["class_type"] in TEXT_ENCODERS:
            prompt[node] = {"class_type": "StandInTextEncoder", "inputs": {}}
    return prompt


def node_of(prompt: dict, class_type: str) -> str:
    (node,) = [node for node, entry in prompt.items() if entry["class_type"] == class_type]
    return node


def render(host: ComfyUI, prompt: dict) -> tuple[dict, Path]:
    """-> the outputs of a prompt and the video file it saved."""
    outputs = host.queue(prompt)["outputs"]
    (saved,) = outputs[node_of(prompt, "SaveVideo")]["images"]
    return outputs, host.base / "output" / saved["subfolder"] / saved["filename"]


@pytest.mark.parametrize("name", CLIPS)
def test_the_template_renders_a_video_file_with_synced_sound(host: ComfyUI, files: dict, name: str):
    prompt = small_clip(name, files, host.get("/object_info"))
    outputs, path = render(host, prompt)
    found = read(path)
    assert path.suffix == ".mp4" and path.parent.name == "video"
    assert len(found.frames) == FRAMES
    assert found.rate == FPS
    assert found.seconds == pytest.approx(FRAMES / FPS, abs=1e-3)
    assert {frame.shape for frame in found.frames} == {(HEIGHT, WIDTH, 3)}
    assert len({frame.tobytes() for frame in found.frames}) > FRAMES // 2, "the picture stands still"
    if name != SILENT:
        assert (found.sample_rate, found.channels) == (RATE, 2)
        assert found.audio_start == found.video_start == 0
        decoded = mel_frames(audio_latents(FRAMES, FPS)) * MEL_FRAME
        assert decoded <= found.samples < decoded + 2 * AAC_FRAME
        assert abs(found.samples / RATE - FRAMES / FPS) < 0.06
        assert found.loudest > 1e-3, "the sound is silence"
    else:
        assert found.channels is None
    text = "".join(outputs[node_of(prompt, "NVFP4DistilledSettings")]["text"])
    assert f"{WIDTH}x{HEIGHT}, {FRAMES} frames at {FPS} fps" in text
    guard = "".join(outputs[node_of(prompt, "NVFP4LaunchGuard")]["text"])
    assert "error" not in guard.lower(), guard
    model = node_of(prompt, "NVFP4ModelLoader")
    shown = [node for node, entry in prompt.items() if entry["class_type"] == "PreviewAny"]
    reports = {"".join(outputs[node]["text"]) for node in shown if prompt[node]["inputs"]["source"][0] == model}
    (report,) = reports  # on the canvas and in the subgraph
    loaded = prompt[model]["inputs"]
    assert "comfy" in report and (MADE if loaded["make_nvfp4"] else loaded["model_name"]) in report
    sharpness = "".join(outputs[node_of(prompt, "NVFP4Sharpness")]["text"])
    assert f"{FRAMES}" in sharpness


def test_the_picture_of_image_to_video_is_the_first_frame_and_changes_the_clip(host: ComfyUI, files: dict):
    prompt = small_clip(IMAGE_TO_VIDEO, files, host.get("/object_info"))
    start = node_of(prompt, "LTXVImgToVideoInplace")
    with_picture = read(render(host, prompt)[1])
    prompt[start]["inputs"]["bypass"] = True
    without = read(render(host, prompt)[1])
    changes = [np.abs(a.astype(int) - b).mean() for a, b in zip(with_picture.frames, without.frames, strict=True)]
    assert changes[0] > 1


def test_the_text_encoder_writes_the_prompt_out_when_that_is_switched_on_and_only_then(host: ComfyUI, files: dict):
    prompt = small_clip("1 LTX-2.5 text to video", files, host.get("/object_info"))
    switch = node_of(prompt, "ComfySwitchNode")
    (seen,) = [node for node, entry in prompt.items() if entry["inputs"].get("source") == [switch, 0]]
    writer = node_of(prompt, "TextGenerateLTX2Prompt")
    wished = prompt[writer]["inputs"]["prompt"]
    kept = {node: prompt[node] for node in (switch, seen, writer, prompt[writer]["inputs"]["clip"][0])}
    texts = []
    for enhance in (False, True):
        kept[switch]["inputs"]["switch"] = enhance
        texts += host.queue(kept)["outputs"][seen]["text"]
    assert texts[0] == wished
    assert texts[1].startswith("written out: ") and wished in texts[1]


def test_what_two_clips_collect_makes_a_calibrated_file_that_is_in_order_by_its_outputs(host: ComfyUI, files: dict):
    info, output = host.get("/object_info"), host.base / "output"
    prompt = small_clip(CALIBRATE, files, info)
    (watch,) = [node for node, entry in prompt.items() if entry["class_type"] == "NVFP4Calibrate"]
    assert "LoraLoaderModelOnly" not in {entry["class_type"] for entry in prompt.values()}
    for seed in (42, 43):
        prompt[node_of(prompt, "RandomNoise")]["inputs"]["noise_seed"] = seed
        assert len(read(render(host, prompt)[1]).frames) == FRAMES
    assert read_calibration(output / "checkpoints" / CALIBRATION).prompts == 2
    again = small_clip(CALIBRATE, files, host.get("/object_info"), unmute=True)
    again[node_of(again, "RandomNoise")]["inputs"]["noise_seed"] = 43
    made, judged = node_of(again, "NVFP4Quantize"), node_of(again, "NVFP4Verify")
    assert watch in again
    # 72 layers instead of 168, which take a CPU minutes; a tenth more of a file of VAEs would spare all of them.
    again[made]["inputs"] |= {"protect_cross_attention": True, "budget": "smallest"}
    outputs = host.queue(again)["outputs"]
    assert "layers took GPTQ" in outputs[made]["text"][0]
    path = output / "checkpoints" / f"{STEM}-calibrated_nvfp4.safetensors"
    verdict = f"{path.name} against {small_files.FP8}: as good as its format allows"
    assert path.is_file() and outputs[judged]["text"][0].startswith(verdict)
    assert "outputs" in outputs[judged]["text"][0]
    assert read_calibration(output / "checkpoints" / CALIBRATION).prompts == 2, "what was sampled is not sampled again"
    assert path.name in str(host.get("/object_info/NVFP4ModelLoader"))


def test_the_comparison_writes_three_cards_and_three_films_of_both_clips_side_by_side(host: ComfyUI, files: dict):
    prompt = small_clip("8 FP8 against NVFP4", files, host.get("/object_info"), frames=9)
    outputs = host.queue(prompt)["outputs"]
    cards, films, texts = [], [], []
    for node, entry in prompt.items():
        if entry["class_type"] in ("SaveImage", "SaveVideo"):
            (saved,) = outputs[node]["images"]
            path = host.base / "output" / saved["subfolder"] / saved["filename"]
            (cards if entry["class_type"] == "SaveImage" else films).append(path)
        elif entry["class_type"] == "NVFP4Compare":
            texts.append("".join(outputs[node]["text"]))
    assert len({card.read_bytes() for card in cards}) == len(set(texts)) == 3
    for text in texts:
        assert "PSNR" in text and "identical" not in text.lower()
    for film in map(read, films):
        assert {frame.shape for frame in film.frames} == {(HEIGHT, 2 * WIDTH + 4, 3)} and len(film.frames) == 9
        assert film.sample_rate == RATE


def test_the_loader_makes_the_nvfp4_file_once_and_finds_it_again(host: ComfyUI, files: dict):
    info, made = host.get("/object_info"), host.base / "output" / "diffusion_models" / MADE
    prompt = small_clip("6 LTX-2.3 distilled, made from FP8", files, info)
    render(host, prompt)
    written = made.stat().st_mtime_ns
    assert MADE in host.get("/object_info/NVFP4ModelLoader")["NVFP4ModelLoader"]["input"]["required"]["model_name"][1][
        "options"
    ]  # fmt: skip
    prompt[node_of(prompt, "RandomNoise")]["inputs"]["noise_seed"] = 7
    prompt[node_of(prompt, "NVFP4ModelLoader")]["inputs"]["layer_compute"] = "blocks.0=bf16"
    render(host, prompt)
    assert made.stat().st_mtime_ns == written


def test_a_missing_nvfp4_file_is_refused_with_what_it_can_be_made_from(host: ComfyUI, files: dict):
    prompt = small_clip("6 LTX-2.3 distilled, made from FP8", files, host.get("/object_info"))
    loader = node_of(prompt, "NVFP4ModelLoader")
    prompt[loader]["inputs"]["model_name"] = "ltx-2.3-22b-distilled-nvfp4.safetensors"
    # What does not need the loader is run all the same.
    (error,) = host.post("/prompt", {"prompt": prompt, "client_id": "tests"})["node_errors"][loader]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert f"{small_files.FP8} is, the same model by its name" in error["details"] and "make_nvfp4" in error["details"]


def test_make_nvfp4_asks_for_the_file_once_and_writes_what_all_loaders_list(host: ComfyUI, files: dict):
    info = host.get("/object_info")
    graph = json.loads((PACK / "workflows" / f"{MAKE}.json").read_text("utf-8"))
    prompt = api_prompt(graph, info)
    prompt[node_of(prompt, "NVFP4Planner")]["inputs"]["gpu"] = "RTX 5090"  # there may be none to detect
    outputs = host.queue(prompt)["outputs"]
    output, stem = host.base / "output", small_files.FP8.removesuffix(".safetensors")
    assert (output / "vae" / f"{stem}_video_vae.safetensors").is_file()
    assert (output / "checkpoints" / f"{stem}_audio_vae.safetensors").is_file()
    assert all(outputs[node_of(prompt, kind)]["text"] for kind in ("NVFP4Inspect", "NVFP4Planner", "NVFP4Quantize"))
    assert sum(entry["class_type"] == "PreviewImage" for entry in prompt.values()) == 2
    clip = small_clip("6 LTX-2.3 distilled, made from FP8", files, info)
    for entry in clip.values():
        for key, value in entry["inputs"].items():
            if value == small_files.FP8:
                entry["inputs"][key] = MADE
    outputs, path = render(host, clip)
    assert len(read(path).frames) == FRAMES
    assert (output / "checkpoints" / MADE).is_file()
    assert not (output / "diffusion_models" / MADE.replace("_nvfp4", "_nvfp4_nvfp4")).exists(), "it is NVFP4 already"
