# SPDX-License-Identifier: Apache-2.0
"""VAEs of LTX-2.3 in their true size in a real ComfyUI: ours decodes bit for bit what the host's own loaders decode.

vae_in_process.py gathers the facts in the host's own Python, once for all tests of this file; those at its end go
through a running server.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import vae_in_process
from nvfp4_video.tests.real.harness import ComfyUI, HostError, facts_in_host

VIDEO_BYTES, AUDIO_TENSORS = 1_452_212_450, 1329


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Topic -> what vae_in_process.py found."""
    folder = tmp_path_factory.mktemp("vae")
    try:
        return facts_in_host(Path(vae_in_process.__file__), str(folder), mark=vae_in_process.MARK, timeout=1800)
    finally:
        shutil.rmtree(folder)


def facts_of(all_facts: dict, topic: str) -> dict:
    found = all_facts[topic]
    assert "error" not in found, found["error"]
    if "refused" in found:
        assert re.search("(could not build|does not know) the LTX 2.3 .*; .*update ComfyUI", found["refused"])
        pytest.skip(f"ComfyUI {all_facts['version']} cannot build this VAE, and the loader says so")
    return found


def test_the_split_video_vae_is_complete_and_the_host_s_vaeloader_decodes_with_it(all_facts: dict):
    found = facts_of(all_facts, "video")
    assert found["parts"] == [["video_vae", 170, VIDEO_BYTES], ["audio_vae", AUDIO_TENSORS, 364_666_868]]
    assert found["shape"] == [1, 9, 128, 128, 3]
    assert found["finite"]
    assert found["std"] > 0.01, "a picture without contrast could hide a difference"


@pytest.mark.parametrize("name", [vae_in_process.VIDEO, vae_in_process.FULL])
def test_split_and_embedded_the_decode_equals_the_host_s_bit_for_bit(all_facts: dict, name: str):
    found = facts_of(all_facts, "video")
    assert found["equal"][name]
    assert "LTX 2.3 video VAE" in found["reports"][name]
    assert "device: cpu, dtype: float32" in found["reports"][name]
    assert ("its vae.* tensors" in found["reports"][name]) == (name == vae_in_process.FULL)


@pytest.mark.parametrize(("name", "count", "stored_as"), [("fp8", 40, "scaled FP8"), ("nvfp4", 4, "NVFP4, comfy")])
def test_a_quantised_vae_decodes_like_its_dequantised_weights(all_facts: dict, name: str, count: int, stored_as: str):
    found = facts_of(all_facts, "restored")[name]
    assert found["changed"], "quantizing must have cost something"
    assert found["equal"] and found["finite"]
    assert found["restored"] == {stored_as: count}
    assert f"restored to BF16: {count} from {stored_as}" in found["report"]


def test_the_audio_vae_sounds_the_same_split_and_embedded(all_facts: dict):
    found = facts_of(all_facts, "audio")
    assert found["equal"] == {vae_in_process.FULL: True, vae_in_process.AUDIO: True}
    assert found["finite"] and not found["silent"]
    assert found["encoded"] == {"bf16_vae": "[1, 8]", "fp16_vae": "[1, 8]"}
    assert found.get("factory", True), "a clone for another GPU must load the same weights anew"


def test_a_preview_decoder_that_was_let_pass_warns_and_is_never_tiled(all_facts: dict):
    found = facts_of(all_facts, "preview")
    assert "preview decoder" in found["warnings"][0]
    assert "warning: this is a preview decoder" in found["report"]
    assert found["whole"] == found["tiled"]["ours"] == [1, 17, 192, 192, 3]
    assert found["equal"]


def test_the_vae_gets_the_patcher_that_loads_all_of_it_even_where_the_host_prefers_another(all_facts: dict):
    found = facts_of(all_facts, "residency")
    assert found == {"stock": "Dynamic", "ours": "ModelPatcher", "full_load": [False, True]}


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("tae", "preview decoder, several times softer", "take the full VAE"),
        ("flux", "FLUX or SD3 image VAE (16 latent channels, LTX has 128)", "take the full VAE"),
        ("no config", "the header has no `config`", "set `config_from`"),
        ("no statistics", "per_channel_statistics.mean-of-means", "garbage"),
        ("weights missing", "weights of its decoder are missing, `decoder.", "download or convert it again"),
        ("wrong config", "could not build the LTX 2.3 video VAE", "take the `config` from a file of the same model"),
        ("no vae", "there is no video VAE in it", "choose a full checkpoint or a VAE file"),
    ],
)
def test_a_file_that_would_decode_badly_is_refused_with_the_remedy(all_facts, name, reason, remedy):
    message = facts_of(all_facts, "refusals")[name]
    if name in ("weights missing", "wrong config") and "could not build" in message:
        return  # hosts that cannot build the whole VAE either stop earlier
    assert message.startswith("refused.safetensors: ")
    assert reason in message
    assert remedy in message


def test_a_config_can_be_lent_by_a_sibling_file(all_facts: dict):
    found = facts_of(all_facts, "lender")
    assert "config taken from audio.safetensors" in found["report"]
    assert found["parameters"] > 100_000_000


@pytest.fixture(scope="module")
def checkpoint(host: ComfyUI) -> str:
    """A small full checkpoint where the host lists it."""
    path = host.base / "models" / "checkpoints" / "vae_full.safetensors"
    state, config = synthetic.small_ltx23()
    synthetic.write(path, "comfy_markers", state, config, synthetic.quantize_layers(state, config), full=True)
    return path.name


def listed(host: ComfyUI, node: str, widget: str) -> list[str]:
    spec = host.get(f"/object_info/{node}")[node]["input"]["required"][widget]
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def run_node(host: ComfyUI, node: str, **inputs) -> dict:
    """The node's own entry in the history's outputs."""
    return host.queue({"1": {"class_type": node, "inputs": inputs}})["outputs"]["1"]


def split_inputs(checkpoint: str, **changes) -> dict:
    parts = dict.fromkeys(("audio_vae", "text_projection", "diffusion_model", "rest"), False) | {"video_vae": True}
    return parts | {"file_name": checkpoint, "name": "", "dtype": "keep", "overwrite": False} | changes


def test_split_components_are_listed_by_the_loaders_at_once(host: ComfyUI, checkpoint: str):
    listed(host, "VAELoader", "vae_name")  # so that the host has a list to refresh
    parts = {"audio_vae": True, "diffusion_model": True}
    shown = run_node(host, "NVFP4Split", **split_inputs(checkpoint, **parts))
    assert "diffusion model: vae_full_diffusion_model.safetensors" in shown["text"][0]
    assert "vae_full_video_vae.safetensors" in listed(host, "VAELoader", "vae_name")
    assert "vae_full_audio_vae.safetensors" in listed(host, "LTXVAudioVAELoader", "ckpt_name")
    assert "vae_full_audio_vae.safetensors" in listed(host, "NVFP4VAELoader", "vae_name")
    assert "vae_full_diffusion_model.safetensors" in listed(host, "UNETLoader", "unet_name")
    assert "vae_full_diffusion_model.safetensors" in listed(host, "NVFP4ModelLoader", "model_name")
    with TensorReader(host.base / "output" / "vae" / "vae_full_video_vae.safetensors") as reader:
        assert reader.header.tensors
        assert not any(name.startswith("vae.") for name in reader.header.tensors)
    with pytest.raises(HostError, match="the target exists.*allow overwriting"):
        run_node(host, "NVFP4Split", **split_inputs(checkpoint, rest=False, text_projection=True, **parts))
    assert not (host.base / "output" / "checkpoints" / "vae_full_text_projection.safetensors").exists()


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out"])
def test_a_split_never_leaves_the_output_folder(host: ComfyUI, checkpoint: str, name: str):
    with pytest.raises(HostError, match="leads out of the folder"):
        run_node(host, "NVFP4Split", **split_inputs(checkpoint, name=name))


def test_inspect_shows_text_and_picture(host: ComfyUI, checkpoint: str):
    shown = run_node(host, "NVFP4Inspect", file_name=checkpoint)
    assert "vae_full.safetensors: full checkpoint" in shown["text"][0]
    assert "NVFP4 Model Loader" in shown["text"][0]
    (image,) = shown["images"]
    assert (host.base / image["type"] / image["subfolder"] / image["filename"]).is_file()


def test_sharpness_and_comparison_of_a_blurred_picture_name_it(host: ComfyUI):
    import cv2

    random, picture = np.random.default_rng(0), np.full((96, 128, 3), 128.0, np.float32)
    for scale in (1, 2, 4, 8):  # detail of every size; white noise alone is called noise
        octave = random.normal(0, 18, (96 // scale, 128 // scale, 3)).astype(np.float32)
        picture += cv2.resize(octave, (128, 96), interpolation=cv2.INTER_CUBIC)
    picture = picture.clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(host.base / "input" / "sharp.png"), picture)
    cv2.imwrite(str(host.base / "input" / "soft.png"), cv2.GaussianBlur(picture, (0, 0), 2.0))
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "sharp.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "soft.png"}},
        "3": {"class_type": "NVFP4Sharpness", "inputs": {"images": ["2", 0], "reference": 5000.0}},
        "4": {
            "class_type": "NVFP4Compare",
            "inputs": {"images_a": ["1", 0], "images_b": ["3", 0], "common_prefix": False},
        },
    }
    outputs = host.queue(prompt)["outputs"]
    grey = cv2.cvtColor(cv2.imread(str(host.base / "input" / "soft.png")), cv2.COLOR_BGR2GRAY)
    value = cv2.Laplacian(grey, cv2.CV_64F).var()
    assert f"median {value:.1f}" in outputs["3"]["text"][0]
    assert "Warning" in outputs["3"]["text"][0]
    assert "it looks like a preview decode or a blurred one" in outputs["4"]["text"][0]
    assert len(outputs["3"]["images"]) == len(outputs["4"]["images"]) == 1
