# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI samples the scaled-down LTX-2.x from every dialect: 8 distilled steps of joint audio and video.

The oracle is the host's own UNETLoader on the same weights decoded to BF16: the global scales are powers of two, so no
order of multiplications changes a weight, and the latents must agree bit for bit. Hosts older than LTX-2.3 get LTX-2.0.
"""

from __future__ import annotations

import pytest
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import graphs
from nvfp4_video.tests.real.harness import ComfyUI, HostError
from nvfp4_video.tests.real.models import small_model_of

# Files whose tensors and header leave the dialect open; the user has to state it.
STATED: dict[str, str] = {}
PACKED_KINDS = [kind for kind in synthetic.KINDS if not kind.startswith("bf16") and kind != "mixed"]


@pytest.fixture(scope="module")
def config(host: ComfyUI) -> dict:
    """Puts every file into the host's folders; the transformer config of the model they hold."""
    state, config, packed = small_model_of(host)
    models = host.base / "models"
    for kind in synthetic.KINDS:
        synthetic.write(models / "diffusion_models" / f"{kind}.safetensors", kind, state, config, packed)
    for kind in ("comfy_header_unprefixed", "compressed_tensors"):
        synthetic.write(models / "checkpoints" / f"full_{kind}.safetensors", kind, state, config, packed, full=True)
    synthetic.write_lora(models / "loras" / "change.safetensors", state, config)
    synthetic.write_lora(models / "diffusion_models" / "picked_lora.safetensors", state, config)
    synthetic.write_vae(models / "diffusion_models" / "picked_vae.safetensors")
    return config


def sample(host: ComfyUI, loader: dict, config: dict, **options: object) -> list[dict]:
    """Loader node -> what StandInLatentStats says of the video and the audio latent, which must be sane."""
    stats = graphs.stats_of(host.queue(graphs.sampling(loader, config, **options))["outputs"])
    assert [stream["shape"] for stream in stats] == [[1, 128, 2, 2, 2], [1, 8, 9, 16]]
    for stream in stats:
        assert stream["finite"]
        assert 0.5 < stream["std"] < 5
    return stats


def ours(kind: str, **inputs: str) -> dict:
    """Our loader on the file of this kind, with the dialect stated where the file leaves it open."""
    return graphs.nvfp4_loader(f"{kind}.safetensors", **{"dialect": STATED.get(kind, "auto")} | inputs)


@pytest.fixture(scope="module")
def reference(host: ComfyUI, config: dict) -> list[dict]:
    """The host's own loader on the decoded weights."""
    return sample(host, graphs.stock_loader("bf16_decoded.safetensors"), config)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_each_dialect_samples_the_latents_of_its_decoded_weights(host: ComfyUI, config: dict, reference, kind: str):
    assert sample(host, ours(kind), config) == reference


def test_the_latents_tell_packed_weights_from_the_originals(host: ComfyUI, config: dict, reference):
    original = sample(host, graphs.stock_loader("bf16.safetensors"), config)
    assert all(full["sha256"] != packed["sha256"] for full, packed in zip(original, reference, strict=True))


def test_a_file_of_fp8_bf16_and_nvfp4_layers_samples_as_in_the_host_s_own_loader(host: ComfyUI, config: dict):
    stock = sample(host, graphs.stock_loader("mixed.safetensors"), config)
    assert sample(host, ours("mixed"), config) == stock


@pytest.mark.parametrize("kind", ["comfy_header_unprefixed", "compressed_tensors"])
def test_the_model_inside_a_full_checkpoint_samples_alike(host: ComfyUI, config: dict, reference, kind: str):
    assert sample(host, ours(f"full_{kind}"), config) == reference


def test_a_lora_changes_every_dialect_alike_and_can_be_taken_off(host: ComfyUI, config: dict, reference):
    kinds = ("comfy_markers", "modelopt", "lightx2v")
    changed = [sample(host, ours(kind), config, lora_name="change.safetensors") for kind in kinds]
    assert changed[0] == changed[1] == changed[2]
    assert all(new["sha256"] != old["sha256"] for new, old in zip(changed[0], reference, strict=True))
    assert sample(host, ours("comfy_markers"), config) == reference


def test_the_torch_backend_can_be_asked_for_by_name(host: ComfyUI, config: dict, reference):
    assert sample(host, ours("compressed_tensors", backend="torch"), config) == reference


@pytest.mark.parametrize(("name", "remedy"), [("picked_lora", "LoraLoaderModelOnly"), ("picked_vae", "VAE")])
def test_a_file_that_is_no_model_is_refused_with_the_node_to_use(host: ComfyUI, config: dict, reference, name, remedy):
    with pytest.raises(HostError) as refusal:
        host.queue(graphs.sampling(ours(name), config))
    message = str(refusal.value)
    assert "NVFP4ModelLoader" in message
    assert f"{name}.safetensors" in message
    assert remedy in message
    assert sample(host, ours("comfy_markers"), config) == reference, "the server must go on working"
