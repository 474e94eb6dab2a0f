# SPDX-License-Identifier: Apache-2.0
"""Recipes: which layers of which family become NVFP4, what the user changes about it, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo
from nvfp4_video.checkpoint.write import recipes
from nvfp4_video.checkpoint.write.recipes import RECIPES, Options, find_recipe, select
from nvfp4_video.samples.recorded import recorded

SHAPES = recorded("ltxav_keys")["keys"]
LTX23 = {n.removesuffix(".weight"): tuple(s) for n, s in SHAPES.items() if n.endswith(".weight")}
LTX23 = {layer: shape for layer, shape in LTX23.items() if len(shape) > 1}


def header(layers: dict[str, tuple[int, ...]], prefix: str = "", **metadata: str) -> Header:
    infos = {f"{prefix}{layer}.weight": TensorInfo("BF16", shape, 0, 0) for layer, shape in layers.items()}
    return Header(Path("model.safetensors"), infos, metadata, 0)


def wan(blocks: int = 10) -> dict[str, tuple[int, ...]]:
    layers = {"patch_embedding": (64, 16, 1, 2, 2), "head.head": (64, 64), "time_projection.1": (384, 64)}
    for block in range(blocks):
        for name in ("self_attn.q", "cross_attn.k", "ffn.0"):
            layers[f"blocks.{block}.{name}"] = (64, 64)
    return layers


def flux() -> dict[str, tuple[int, ...]]:
    layers = {"img_in": (64, 64), "txt_in": (64, 64), "final_layer.linear": (64, 64)}
    for block in range(3):
        layers |= {f"double_blocks.{block}.{n}": (64, 64) for n in ("img_attn.qkv", "txt_mlp.0", "img_mod.lin")}
        layers |= {f"single_blocks.{block}.{n}": (64, 64) for n in ("linear1", "linear2", "modulation.lin")}
    return layers


def qwen() -> dict[str, tuple[int, ...]]:
    layers = {"img_in": (64, 64), "txt_norm": (64,), "proj_out": (64, 64)}
    for block in range(6):
        layers |= {f"transformer_blocks.{block}.{n}": (64, 64) for n in ("img_mod.1", "attn.to_q", "img_mlp.net.2")}
    return layers


def z_image() -> dict[str, tuple[int, ...]]:
    layers = {"cap_embedder.1": (64, 64), "x_embedder": (64, 64)}
    for stack in ("noise_refiner", "context_refiner", "layers"):
        layers |= {f"{stack}.0.{n}": (64, 64) for n in ("attention.qkv", "feed_forward.w1", "adaLN_modulation.0")}
    return layers


def quantized(recipe: str, layers: dict, options: Options | None = None) -> set[str]:
    return set(select(RECIPES[recipe], layers, options).quantized)


def test_ltx23_quantises_attention_and_feed_forward_of_all_48_blocks_and_nothing_else():
    found = select(find_recipe(header(LTX23)), LTX23)
    pattern = re.compile(r"transformer_blocks\.\d+\.(\w*attn\w*\.to_(q|k|v|out\.0)|(audio_)?ff\.net\.(0\.proj|2))$")
    assert set(found.quantized) == {layer for layer in LTX23 if pattern.fullmatch(layer)}
    assert len(found.quantized) == 48 * 28
    assert Counter(found.kept.values())[recipes.OUTSIDE] == len(LTX23) - 48 * 34
    assert not found.warnings


def test_a_fine_tune_has_the_recipe_of_its_tensors_whatever_the_file_is_called():
    prefixed = header(LTX23, "model.diffusion_model.")
    assert find_recipe(prefixed).name == "LTX-2.3"
    ltx2 = {layer: shape for layer, shape in LTX23.items() if "gate_logits" not in layer}
    assert find_recipe(header(ltx2)).name == "LTX-2"


def test_ltx25_is_told_by_its_header_or_by_its_vae():
    assert find_recipe(header(LTX23, model_version="2.5.0")).name == "LTX-2.5"
    infos = header(LTX23, "model.diffusion_model.").tensors | {
        "vae.decoder.conv_in_x_t.weight": TensorInfo("BF16", (8, 8, 3, 3, 3), 0, 0)
    }
    assert find_recipe(Header(Path("x"), infos, {}, 0)).name == "LTX-2.5"


@pytest.mark.parametrize(
    ("recipe", "kept"), [("LTX-2", {0, 43, 44, 45, 46, 47}), ("LTX-2.5", {0, 43, 44, 45, 46, 47}), ("LTX-2.3", set())]
)
def test_the_ltx_versions_keep_the_blocks_of_their_published_files(recipe, kept):
    blocks = {int(layer.split(".")[1]) for layer in quantized(recipe, LTX23)}
    assert blocks == set(range(48)) - kept


def test_a_model_with_fewer_blocks_than_are_kept_at_an_end_is_kept_whole():
    few = {layer: shape for layer, shape in LTX23.items() if not layer.startswith("transformer_blocks.") or
           int(layer.split(".")[1]) < 4}  # fmt: skip
    assert quantized("LTX-2", few) == set() and quantized("LTX-2.3", few)


def test_two_blocks_at_either_end_are_the_choice_of_the_published_ltx23_files():
    found = quantized("LTX-2.3", LTX23, Options(keep_first_last=2))
    assert {int(layer.split(".")[1]) for layer in found} == set(range(2, 46))
    assert quantized("LTX-2", LTX23, Options(keep_first_last=0)) == quantized("LTX-2.3", LTX23)


def test_protected_audio_and_cross_attention_stay():
    both = quantized("LTX-2.3", LTX23)
    audio = quantized("LTX-2.3", LTX23, Options(protect_audio=True))
    assert both - audio == {layer for layer in both if "audio" in layer}
    cross = quantized("LTX-2.3", LTX23, Options(protect_cross_attention=True))
    kinds = {layer.split(".")[2] for layer in both - cross}
    assert kinds == {"attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"}
    assert {layer.split(".")[2] for layer in cross} == {"attn1", "audio_attn1", "ff", "audio_ff"}


def test_patterns_of_the_user_win_and_say_so():
    forced = Options(quantize=(r"^adaln_single\.linear$", r"\.0\.attn1\."), keep=(r"\.to_v$",), keep_first_last=1)
    found = select(RECIPES["LTX-2.3"], LTX23, forced)
    assert {"adaln_single.linear", "transformer_blocks.0.attn1.to_q"} <= set(found.quantized)
    assert "transformer_blocks.0.attn2.to_q" not in found.quantized
    assert not any(layer.endswith(".to_v") for layer in found.quantized)
    assert found.kept["transformer_blocks.0.attn1.to_v"] == recipes.ASKED
    assert select(RECIPES["LTX-2.3"], LTX23, Options(keep=("nowhere",))).warnings == (
        "the pattern 'nowhere' matches no layer",
    )
    with pytest.raises(CheckpointError, match="no regular expression"):
        select(RECIPES["LTX-2.3"], LTX23, Options(keep=("(",)))


def test_wan_keeps_three_blocks_at_either_end_and_the_outer_layers():
    assert find_recipe(header(wan())).name == "Wan"
    found = quantized("Wan", wan())
    assert {layer.split(".")[1] for layer in found} == {"3", "4", "5", "6"}
    assert all(layer.startswith("blocks.") for layer in found)
    protected = quantized("Wan", wan(), Options(protect_cross_attention=True))
    assert found - protected == {f"blocks.{block}.cross_attn.k" for block in range(3, 7)}


def test_flux_keeps_modulation_and_the_layers_whose_shapes_comfyui_reads():
    assert find_recipe(header(flux())).name == "FLUX"
    found = quantized("FLUX", flux())
    assert {layer.split(".", 2)[2] for layer in found} == {"img_attn.qkv", "txt_mlp.0", "linear1", "linear2"}
    ends = quantized("FLUX", flux(), Options(keep_first_last=1))
    assert {".".join(layer.split(".")[:2]) for layer in found - ends} == {"double_blocks.0", "single_blocks.2"}
    warned = select(RECIPES["FLUX"], flux(), Options(protect_audio=True)).warnings
    assert warned == ("FLUX has no audio branch that could be protected",)


def test_qwen_image_and_z_image_follow_their_published_profiles():
    assert find_recipe(header(qwen())).name == "Qwen-Image"
    inner = {f"transformer_blocks.{b}.{n}" for b in (2, 3) for n in ("img_mod.1", "attn.to_q", "img_mlp.net.2")}
    assert quantized("Qwen-Image", qwen()) == inner
    assert find_recipe(header(z_image())).name == "Z-Image"
    assert quantized("Z-Image", z_image()) == {"layers.0.attention.qkv", "layers.0.feed_forward.w1"}


def test_an_unknown_family_gets_a_cautious_default_and_a_warning():
    layers = {"embed.proj": (512, 512), "tiny_blocks.0.q": (512, 512)}
    for block in range(8):
        names = {"attn.q": (512, 512), "norm.linear": (512, 512), "small": (512, 128), "ada_mod.1": (512, 512)}
        layers |= {f"net.blocks.{block}.{name}": shape for name, shape in names.items()}
    recipe = find_recipe(header(layers))
    found = select(recipe, layers)
    assert set(found.quantized) == {f"net.blocks.{block}.attn.q" for block in range(2, 6)}
    assert "cautious default" in found.warnings[0] and "NVFP4 Verify" in found.warnings[0]


@pytest.mark.parametrize(
    "name",
    ["attn.to_gate", "moe.router", "norm1.proj", "a_mod.1", "adaln.1", "time_in.fc", "pos_embed.q", "scale_shift.1"],
)
def test_the_cautious_default_keeps_what_sounds_like_control(name: str):
    layers = {f"blocks.{block}.{part}": (512, 512) for block in range(8) for part in ("attn.q", name)}
    found = select(find_recipe(header(layers)), layers)
    assert set(found.quantized) == {f"blocks.{block}.attn.q" for block in range(2, 6)}
    assert "sounds like" in found.kept[f"blocks.3.{name}"]


def test_shapes_the_format_cannot_hold_are_kept_for_that_reason_even_if_asked_for():
    shapes = {"a": (64, 40), "b": (64, 16, 3), "c": (4, 16)}
    layers = {f"transformer_blocks.0.{name}": shape for name, shape in shapes.items()}
    found = select(RECIPES["LTX-2.3"], layers, Options(quantize=(".",)))
    assert found.quantized == ("transformer_blocks.0.c",)
    assert "multiple of 16" in found.kept["transformer_blocks.0.a"]
    assert "3 dimensions" in found.kept["transformer_blocks.0.b"]


def test_an_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(CheckpointError, match="unknown recipe 'ltx'.*LTX-2.3"):
        find_recipe(header(LTX23), "ltx")


def test_every_recipe_states_its_reason_and_its_sources():
    assert all(recipe.why and recipe.sources and recipe.stacks for recipe in RECIPES.values())
