# SPDX-License-Identifier: Apache-2.0
"""Which model a file holds is told from true key lists; what is no model is refused with the loader that takes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo, read_header
from nvfp4_video.checkpoint.identify.signatures import Model, config_fault, find_model, transformer_config
from nvfp4_video.samples import synthetic
from nvfp4_video.samples.recorded import recorded

DIT = "model.diffusion_model."
OTHER_FAMILIES = {
    "LTX-Video": ("adaln_single.emb.timestep_embedder.linear_1.weight", "patchify_proj.weight", "proj_out.weight"),
    "FLUX": ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "final_layer.linear.weight"),
    "Wan": ("blocks.0.cross_attn.k.weight", "head.head.weight", "patch_embedding.weight"),
    "Qwen-Image": ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "proj_out.weight"),
    "Z-Image": ("noise_refiner.0.attention.qkv.weight", "cap_embedder.1.weight", "layers.0.attention.qkv.weight"),
    "HunyuanVideo": ("txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight", "img_in.proj.weight"),
}


def header(names: Iterable[str], config: str | None = None) -> Header:
    tensors = {name: TensorInfo("BF16", (1,), 0, 2) for name in names}
    return Header(Path("some.safetensors"), tensors, {} if config is None else {"config": config}, 0)


@pytest.fixture(scope="module")
def released() -> list[str]:
    """Names of all tensors of LTX-2.3 as released, without prefix."""
    names = list(recorded("ltxav_keys")["keys"])
    assert len(names) == 4444
    return names


@pytest.fixture(scope="module")
def packed_model():
    """State, config and packed layers of the small LTX-2.3."""
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config)


# Models


@pytest.mark.parametrize("prefix", ["", DIT, "diffusion_model."])
def test_the_released_ltx_2_3_is_found_under_any_prefix_of_the_host(prefix: str, released):
    assert find_model(header(prefix + name for name in released)) == Model("LTX-2.3", prefix)


@pytest.mark.parametrize("prefix", ["net.", "model.", "model.model.", "transformer.", "my.own."])
def test_a_known_family_is_found_under_prefixes_of_others_too(prefix: str, released):
    beside = ["vae.decoder.conv_in.weight", "vocoder.conv_pre.weight"]
    for others in ([], beside):
        assert find_model(header([*others, *(prefix + name for name in released)])) == Model("LTX-2.3", prefix)


def test_a_full_checkpoint_is_its_model_and_neither_its_vae_nor_its_text_encoder(released):
    vaes = recorded("ltx_vae_keys")
    others = [f"vae.{name}" for name in vaes["video_vae"]] + list(vaes["audio_vae"])
    others += ["text_embedding_projection.video_aggregate_embed.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert find_model(header([*others, *(DIT + name for name in released)])) == Model("LTX-2.3", DIT)


def test_ltx_2_0_is_ltx_2_3_without_gates():
    state, config = synthetic.small_ltx20()
    assert find_model(header(state)) == Model("LTX-2", "")
    assert not config["apply_gated_attention"]


@pytest.mark.parametrize("full", [False, True], ids=["model", "full"])
@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_packing_in_any_dialect_leaves_the_family_recognisable(kind: str, full: bool, packed_model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *packed_model, full=full)
    prefix = DIT if full or kind == "comfy_header_unprefixed" else ""
    assert find_model(read_header(tmp_path / "file.safetensors")) == Model("LTX-2.3", prefix)


@pytest.mark.parametrize("suffix", ["weight", "weight_packed", "weight_scale"])
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_are_told_by_two_of_their_layers_packed_or_not(family: str, suffix: str):
    for prefix in ("", DIT):
        names = [prefix + name.removesuffix("weight") + suffix for name in OTHER_FAMILIES[family]]
        assert find_model(header(names)) == Model(family, prefix)


def test_a_model_nobody_listed_is_left_to_the_host():
    assert find_model(header([f"{DIT}novel_blocks.0.mixer.weight"])) == Model(None, DIT)
    assert find_model(header(["novel_blocks.0.mixer.weight"])) == Model(None, "")


def test_a_config_without_the_transformer_describes_no_model():
    assert config_fault(header([], '{"transformer": {"num_layers": 48}}')) == ""
    assert config_fault(header([])) == "the header has no `config`"
    for config in ('{"vae": {}}', '{"transformer": {}}', '{"transformer": "LTX"}'):
        assert "no section transformer" in config_fault(header([], config))
    for config in ("{", "null", '"{}"'):
        assert config_fault(header([], config)) == "the header's `config` is no JSON object"


def test_only_the_audio_video_families_cannot_do_without_their_config(released):
    assert Model("LTX-2.3", "").needs_config and Model("LTX-2", DIT).needs_config
    assert not any(Model(family, "").needs_config for family in (None, *OTHER_FAMILIES))


# What is picked by mistake


def refusal(head: Header) -> str:
    with pytest.raises(CheckpointError) as raised:
        find_model(head)
    message = str(raised.value)
    assert "expected a diffusion model" in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "ending",
    ["lora_A.default.weight", "lora_up.weight", "lora.down.weight", "lokr_w2", "hada_w1_a", "oft_blocks", "diff"],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_changes_of_every_kind_are_sent_to_the_lora_loader(prefix: str, ending: str, released):
    layers = [name.removesuffix(".weight") for name in released if name.endswith(".weight")]
    assert "this is a LoRA" in refusal(header(f"{prefix}{layer}.{ending}" for layer in layers))


def test_a_lora_is_sent_to_the_lora_loader(tmp_path: Path):
    synthetic.write_lora(tmp_path / "lora.safetensors", *synthetic.small_ltx23())
    message = refusal(read_header(tmp_path / "lora.safetensors"))
    assert message.startswith("lora.safetensors: this is a LoRA; ")
    assert "models/loras" in message and "LoraLoaderModelOnly" in message


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.cross_attn.k.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "lycoris_blocks_0_attn.lokr_w1",
    ],
)
def test_loras_of_every_tool_are_loras(name: str):
    assert "this is a LoRA" in refusal(header([name, name.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]))


def test_a_video_vae_is_sent_to_a_vae_loader(tmp_path: Path):
    synthetic.write_vae(tmp_path / "vae.safetensors")
    for head in (
        read_header(tmp_path / "vae.safetensors"),
        header(recorded("ltx_vae_keys")["video_vae"]),
        header(recorded("ltx_vae_keys")["taehv_ltx2"]),
        header(["decoder.conv_in.weight", "encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"]),
    ):
        message = refusal(head)
        assert "this is a VAE; " in message and "models/vae" in message and "VAE loader" in message


def test_an_audio_vae_is_called_one():
    message = refusal(header(recorded("ltx_vae_keys")["audio_vae"]))
    assert "this is an audio VAE" in message and "loader for audio VAEs" in message


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"],
        ["model.language_model.layers.0.mlp.up_proj.weight", "model.vision_tower.embed.weight"],
        ["language_model.model.layers.0.mlp.up_proj.weight"],
        ["text_model.encoder.layers.0.mlp.fc1.weight"],
        ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    ],
    ids=lambda names: names[0],
)
def test_a_text_encoder_is_sent_to_a_text_encoder_loader(names):
    message = refusal(header(names))
    assert "this is a text encoder" in message and "models/text_encoders" in message


def test_a_file_without_tensors_is_to_be_downloaded_again():
    assert refusal(header([])) == (
        "some.safetensors: the file holds no tensors; expected a diffusion model; download it again"
    )


# The config in the header


def test_the_transformer_section_is_what_the_host_builds_the_model_from():
    assert transformer_config(header([], '{"transformer": {"num_layers": 48}, "vae": {}}')) == {"num_layers": 48}
    full = recorded("ltx23_config")
    assert transformer_config(header([], json.dumps(full))) == full["transformer"]


@pytest.mark.parametrize("config", [None, "{}", '{"vae": {}}', '{"transformer": null}', '{"transformer": "LTX"}'])
def test_a_config_without_a_transformer_section_counts_as_none(config):
    assert transformer_config(header([], config)) is None


@pytest.mark.parametrize(
    "config", ["", "{", "[]", "null", "48", '"transformer"', "[" * 100_000], ids=lambda text: text[:12] or "empty"
)
def test_a_config_that_is_no_json_object_is_refused_and_named(config):
    with pytest.raises(
        CheckpointError, match="^some.safetensors: its header entry `config` cannot be read .*; expected"
    ):
        transformer_config(header([], config))
