# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI renders the shipped LTX-2.3 workflows to video files, on scaled-down models with random weights.

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
from nvfp4_video.measure.ltx import audio_latents, mel_frames
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import graphs, small_files
from nvfp4_video.tests.real.harness import PACK, ComfyUI, run_in_host, small_model
from nvfp4_video.tests.workflows.workflow_format import api_prompt
from PIL import Image

WIDTH, HEIGHT, FRAMES, FPS = 192, 128, 17, 24
CLIPS = {
    "ltx23_nvfp4_t2v_audio": True,
    "ltx23_nvfp4_t2v_audio_two_stage": True,
    "ltx23_nvfp4_i2v_audio": True,
    "ltx23_nvfp4_t2v_video_only": False,
}
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
    """All files that the LTX-2.3 templates name, below the host's folders; the transformer's config."""
    if small_model(host.path) != "ltx23":
        pytest.skip(f"ComfyUI {host.version} does not know LTX-2.3")
    _, config = synthetic.small_ltx23()
    result = run_in_host(small_files.__file__, str(host.base / "models"))
    assert result.returncode == 0, result.stderr
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[:, :80] = (230, 60, 40)
    Image.fromarray(picture).save(host.base / "input" / "example.png")
    return config


def small_clip(name: str, config: dict, info: dict, frames: int = FRAMES) -> dict:
    """A template -> the API prompt of a small clip, with seeded conditioning in place of encoded text."""
    prompt = api_prompt(json.loads((PACK / "workflows" / f"{name}.json").read_text("utf-8")), info)
    for node, entry in list(prompt.items()):
        if entry["class_type"] == "NVFP4DistilledSettings":
            entry["inputs"] |= {"width": WIDTH, "height": HEIGHT, "frames": frames, "fps": FPS}
        elif entry["class_type"] == "CLIPTextEncode":
            prompt[node] = {
                "class_type": "StandInConditioning",
                "inputs": {"seed": int(node), "tokens": 32, "dim": graphs.context_width(config)},
            }
        elif entry["class_type"] == "LTXAVTextEncoderLoader":
            del prompt[node]
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
    if CLIPS[name]:
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
    report = "".join(outputs[node_of(prompt, "PreviewAny")]["text"])
    assert "comfy" in report and small_files.NVFP4 in report
    sharpness = "".join(outputs[node_of(prompt, "NVFP4Sharpness")]["text"])
    assert f"{FRAMES}" in sharpness


def test_the_picture_of_image_to_video_is_the_first_frame_and_changes_the_clip(host: ComfyUI, files: dict):
    prompt = small_clip("ltx23_nvfp4_i2v_audio", files, host.get("/object_info"))
    start = node_of(prompt, "LTXVImgToVideoInplace")
    with_picture = read(render(host, prompt)[1])
    prompt[start]["inputs"]["bypass"] = True
    without = read(render(host, prompt)[1])
    changes = [np.abs(a.astype(int) - b).mean() for a, b in zip(with_picture.frames, without.frames, strict=True)]
    assert changes[0] > 1


def test_the_comparison_writes_three_cards_of_three_seeds(host: ComfyUI, files: dict):
    prompt = small_clip("ab_fp8_vs_nvfp4", files, host.get("/object_info"), frames=9)
    outputs = host.queue(prompt)["outputs"]
    cards, texts = [], []
    for node, entry in prompt.items():
        if entry["class_type"] == "SaveImage":
            (saved,) = outputs[node]["images"]
            cards.append((host.base / "output" / saved["subfolder"] / saved["filename"]).read_bytes())
        elif entry["class_type"] == "NVFP4Compare":
            texts.append("".join(outputs[node]["text"]))
    assert len(set(cards)) == len(set(texts)) == 3
    for text in texts:
        assert "PSNR" in text and "identical" not in text.lower()


def test_make_nvfp4_turns_the_fp8_file_into_the_one_that_the_other_templates_load(host: ComfyUI, files: dict):
    info = host.get("/object_info")
    graph = json.loads((PACK / "workflows" / "make_nvfp4.json").read_text("utf-8"))
    prompt = api_prompt(graph, info)
    prompt[node_of(prompt, "NVFP4Planner")]["inputs"]["gpu"] = "RTX 5090"  # there may be none to detect
    outputs = host.queue(prompt)["outputs"]
    written = host.base / "output" / "checkpoints" / small_files.NVFP4
    downloaded = host.base / "models" / "checkpoints" / small_files.NVFP4
    try:
        assert written.is_file()
        assert (host.base / "output" / "vae" / "ltx-2.3-22b-distilled_video_vae.safetensors").is_file()
        assert (host.base / "output" / "checkpoints" / "ltx-2.3-22b-distilled_audio_vae.safetensors").is_file()
        assert all(outputs[node_of(prompt, kind)]["text"] for kind in ("NVFP4Inspect", "NVFP4Planner", "NVFP4Quantize"))
        downloaded.rename(downloaded.with_suffix(".away"))
        clip = small_clip("ltx23_nvfp4_t2v_audio", files, info)
        assert len(read(render(host, clip)[1]).frames) == FRAMES
    finally:
        away = downloaded.with_suffix(".away")
        if away.exists():
            away.rename(downloaded)
        written.unlink(missing_ok=True)
