# SPDX-License-Identifier: Apache-2.0
"""The planning nodes in a real ComfyUI: its own count of audio latents, sockets that fit its own nodes."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from nvfp4_video.measure import ltx
from nvfp4_video.tests.real.harness import ComfyUI, run_in_host
from nvfp4_video.tests.support import full_size

pytestmark = pytest.mark.host
PACK = Path(__file__).resolve().parents[2]
CLIPS = [(121, 24.0), (121, 25.0), (121, 30.0), (97, 24.0), (161, 23.976), (9, 50.0), (257, 24.0)]
# Output of the settings node -> inputs of the host's own nodes that workflows connect it to.
LINKS = {
    "width": ["EmptyLTXVLatentVideo.width"],
    "height": ["EmptyLTXVLatentVideo.height"],
    "frames": ["EmptyLTXVLatentVideo.length", "LTXVEmptyLatentAudio.frames_number"],
    "fps": ["LTXVConditioning.frame_rate", "CreateVideo.fps"],
    "frame_rate": ["LTXVEmptyLatentAudio.frame_rate"],
    "sigmas": ["SamplerCustomAdvanced.sigmas"],
    "sigmas_stage_2": ["SamplerCustomAdvanced.sigmas"],
    "cfg": ["CFGGuider.cfg"],
}
NAMES = ["width", "height", "frames", "fps", "frame_rate", "sigmas", "sigmas_stage_2", "cfg", "audio_latents",
         "final_width", "final_height", "text"]  # fmt: skip
SCRIPT = """
import json, sys, types
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import nodes, torch
from comfy.ldm.lightricks.vae.audio_vae import AudioVAE
package = types.ModuleType("nvfp4_video")
package.__path__ = [{pack!r}]
sys.modules["nvfp4_video"] = package
from nvfp4_video.host.planning import audio_latents
try:
    with torch.device("meta"):
        vae = AudioVAE(metadata={config!r})
except TypeError:  # hosts up to 0.15 load the weights there
    vae = types.SimpleNamespace(latents_per_second=25.0)
found = [(AudioVAE.num_of_latents_from_frames(vae, *clip), audio_latents(*clip)) for clip in {clips!r}]
print("facts:", json.dumps([vae.latents_per_second, found]))
"""


def test_the_audio_length_is_that_of_the_host_s_own_audio_vae():
    config = {"config": json.dumps(full_size.recorded("ltx23_config"))}
    script = textwrap.dedent(SCRIPT).format(pack=str(PACK), config=config, clips=CLIPS)
    done = run_in_host("-c", script)
    facts = re.search(r"^facts: (.*)$", done.stdout, re.MULTILINE)
    assert facts, done.stderr[-4000:]
    rate, counts = json.loads(facts[1])
    assert rate == ltx.AUDIO_LATENTS_PER_SECOND
    for clip, (theirs, ours) in zip(CLIPS, counts, strict=True):
        assert theirs == ours
        # Hosts up to 0.25 round up, later ones to the nearest, as the pack's own formula does.
        assert theirs - ltx.audio_latents(*clip) in (0, 1)


def test_outputs_fit_the_inputs_of_the_host_s_own_nodes(host: ComfyUI):
    info = host.object_info("NVFP4DistilledSettings")
    kinds = dict(zip(NAMES, info["output"], strict=True))
    for output, inputs in LINKS.items():
        for target in inputs:
            node, _, name = target.partition(".")
            wanted = host.object_info(node)["input"]["required"][name][0]
            assert kinds[output] in wanted.split(","), f"{output} ({kinds[output]}) -> {target} ({wanted})"


def test_the_settings_drive_the_host_s_empty_latent(host: ComfyUI):
    wishes = {"width": 250, "height": 130, "frames": 10, "seconds": 0.0, "fps": 24.0, "stages": "one stage"}
    graph = {
        "1": {"class_type": "NVFP4DistilledSettings", "inputs": wishes | {"version": "2.3"}},
        "2": {
            "class_type": "EmptyLTXVLatentVideo",
            "inputs": {"width": ["1", 0], "height": ["1", 1], "length": ["1", 2], "batch_size": 1},
        },
        "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "planned"}},
    }
    outputs = host.queue(graph)["outputs"]
    text = outputs["1"]["text"][0]
    assert "250x130 -> 256x128" in text and "10 -> 9" in text
    (latent,) = (host.base / "output").glob("planned*.latent")
    assert '"shape":[1,128,2,4,8]' in latent.read_bytes()[:4000].decode("utf-8", "replace").replace(" ", "")


def test_the_planner_reads_a_full_size_header_and_draws(host: ComfyUI):
    name = "planned.safetensors"
    full_size.write(host.base / "models" / "diffusion_models" / name, full_size.checkpoint("NVFP4"))
    inputs = {"file_name": name, "width": 768, "height": 512, "frames": 121, "fps": 24.0, "gpu": "GB10"}
    graph = {"1": {"class_type": "NVFP4Planner", "inputs": inputs | {"compute": "bf16"}}}
    shown = host.queue(graph)["outputs"]["1"]
    assert "on GB10, bf16 compute" in shown["text"][0] and "what NVFP4 changes here:" in shown["text"][0]
    assert len(shown["images"]) == 1
    (host.base / "models" / "diffusion_models" / name).unlink()
