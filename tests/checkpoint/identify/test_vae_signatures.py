# SPDX-License-Identifier: Apache-2.0
"""Every row of the signature table, the true key lists of LTX-2.3 and of the preview TAE, and a VAE's faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo
from nvfp4_video.checkpoint.identify.vae_signatures import (
    AUDIO,
    FULL,
    IMAGE,
    PREVIEW,
    TAESD,
    VIDEO,
    Vae,
    find_vaes,
    identify,
    pick_vae,
    refusal,
)
from nvfp4_video.samples.recorded import recorded

CONFIG = json.dumps({"vae": {"dims": 3}, "audio_vae": {"model": {}}, "vocoder": {"vocoder": {}}})
RESIDUAL = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
LAST_DOWN = "encoder.down_blocks.7.conv.conv.weight"
TIMESTEPS = "decoder.last_time_embedder.timestep_embedder.linear_1.weight"
STATISTICS = {"per_channel_statistics.mean-of-means": (128,), "per_channel_statistics.std-of-means": (128,)}


def vae_shapes(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in recorded("ltx_vae_keys")[part].items()}


def header(shapes: dict, dtypes: dict | None = None, config: str | None = CONFIG, prefix: str = "") -> Header:
    """A header as a file with these tensors would have it; the offsets do not matter here."""
    dtypes = dtypes or {}
    infos = {prefix + name: TensorInfo(dtypes.get(name, "BF16"), tuple(shape), 0, 0) for name, shape in shapes.items()}
    return Header(Path("model.safetensors"), infos, {} if config is None else {"config": config}, 0)


def only(found: Header) -> Vae:
    (vae,) = find_vaes(found)
    return vae


def codes(vae: Vae) -> set[str]:
    return {problem.code for problem in vae.problems}


def conv(rows: int, cols: int = 1) -> tuple[int, ...]:
    return rows, cols, 3, 3, 3


LTX_ROWS = {
    "0.9.0": {RESIDUAL: conv(512)},
    "0.9.1": {RESIDUAL: conv(1024), "encoder.conv_in.conv.weight": conv(128)},
    "0.9.5 or later": {RESIDUAL: conv(1024), "encoder.down_blocks.1.conv.conv.bias": (64,)},
    "0.9.5 to 0.9.8, or 2.0": {RESIDUAL: conv(1024), LAST_DOWN: conv(256), TIMESTEPS: (8, 8)},
    "2.0": {RESIDUAL: conv(1024), LAST_DOWN: conv(256)},
    "2.3": {RESIDUAL: conv(1024), LAST_DOWN: conv(128)},
    "2.5 (diffusion decoder)": {"decoder.conv_in_x_t.weight": (256, 48), "decoder.conv_in.weight": (512, 128)},
    "decoder only": {RESIDUAL: conv(1024)},
}


@pytest.mark.parametrize("version", LTX_ROWS)
def test_each_ltx_video_vae_is_known_by_its_shapes(version):
    vae = only(header(LTX_ROWS[version] | STATISTICS))
    assert (vae.kind, vae.family, vae.version, vae.latent_channels) == (VIDEO, "LTX", version, 128)
    assert vae.final_decoder
    assert not vae.preview
    assert vae.problems == ()
    assert refusal(vae) is None


def test_a_timestep_embedder_rules_ltx_2_3_out():
    assert only(header(LTX_ROWS["2.3"] | STATISTICS | {TIMESTEPS: (8, 8)})).version != "2.3"


OTHERS = [
    ({"decoder.22.bias": (48,), "decoder.1.weight": (256, 128, 3, 3)}, PREVIEW, "LTX-2", 128),
    ({"decoder.22.bias": (12,), "decoder.1.weight": (256, 48, 3, 3)}, PREVIEW, "Wan", 48),
    ({"decoder.22.bias": (12,), "decoder.1.weight": (256, 32, 3, 3)}, PREVIEW, "Hunyuan", 32),
    ({"decoder.22.bias": (3,), "decoder.1.weight": (256, 16, 3, 3)}, PREVIEW, "Hunyuan or Wan", 16),
    ({"decoder.1.weight": (64, 4, 3, 3)}, TAESD, "image", 4),
    ({"taesd_decoder.1.weight": (64, 16, 3, 3)}, TAESD, "image", 16),
    ({"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, IMAGE, "FLUX or SD3", 16),
    ({"decoder.conv_in.weight": (512, 4, 3, 3)}, IMAGE, "Stable Diffusion", 4),
    ({"decoder.middle.0.residual.0.gamma": (384, 1, 1, 1)}, VIDEO, "Wan", 16),
    (
        {"decoder.middle.0.residual.0.gamma": (1,), "decoder.upsamples.0.upsamples.0.residual.2.weight": (1,)},
        VIDEO,
        "Wan",
        48,
    ),
    ({"decoder.conv_in.conv.weight": conv(512, 16)}, VIDEO, "Hunyuan", 16),
    ({"decoder.conv_in.conv.weight": conv(1024, 32)}, VIDEO, "Hunyuan", 32),
    (
        {"decoder.conv_in.conv.weight": conv(512, 16), "decoder.mid_block.resnets.0.norm1.norm_layer.weight": (1,)},
        VIDEO,
        "CogVideoX",
        16,
    ),
]


@pytest.mark.parametrize(("shapes", "kind", "family", "channels"), OTHERS)
def test_each_other_family_is_known_and_refused_as_final_decoder(shapes, kind, family, channels):
    vae = only(header(shapes))
    assert (vae.kind, vae.family, vae.latent_channels) == (kind, family, channels)
    assert not vae.final_decoder
    assert vae.preview == (kind in (PREVIEW, TAESD))
    assert "full VAE" in refusal(vae)


def test_only_the_ltx_preview_passes_where_previews_are_allowed():
    allowed = [family for shapes, _, family, _ in OTHERS if refusal(only(header(shapes)), allow_preview=True) is None]
    assert allowed == ["LTX-2"]


def test_the_true_keys_of_ltx_2_3_are_its_video_and_audio_vae():
    video, audio = only(header(vae_shapes("video_vae"))), only(header(vae_shapes("audio_vae")))
    assert (video.title, video.latent_channels, video.problems) == ("LTX 2.3 video VAE", 128, ())
    assert (audio.title, audio.latent_channels, audio.problems) == ("LTX 2.3 audio VAE", 8, ())
    assert audio.kind == AUDIO
    assert refusal(audio, audio=True) is None
    assert "choose a video VAE" in refusal(audio)


def test_the_true_keys_of_taehv_are_a_preview():
    vae = only(header(vae_shapes("taehv_ltx2"), config=None))
    assert (vae.kind, vae.family, vae.latent_channels, vae.problems) == (PREVIEW, "LTX-2", 128, ())


def test_the_older_vocoder_is_that_of_ltx_2_0():
    shapes = {name.replace("vocoder.vocoder.", "vocoder."): shape for name, shape in vae_shapes("audio_vae").items()}
    assert only(header(shapes)).version == "2.0"


def test_a_full_checkpoint_holds_both_vaes_under_their_prefixes():
    shapes = {f"vae.{name}": shape for name, shape in vae_shapes("video_vae").items()} | vae_shapes("audio_vae")
    shapes["model.diffusion_model.patchify_proj.weight"] = (4096, 128)
    found = identify(header(shapes))
    assert found.kind == FULL
    assert [(vae.title, vae.prefix) for vae in found.vaes] == [("LTX 2.3 video VAE", "vae."), ("LTX 2.3 audio VAE", "")]
    assert pick_vae(header(shapes)).prefix == "vae."
    assert pick_vae(header(shapes), audio=True).kind == AUDIO


def test_a_prefix_left_on_is_found_and_named():
    assert codes(only(header(vae_shapes("audio_vae"), prefix="x."))) == {"prefix"}
    vae = only(header(vae_shapes("video_vae"), prefix="vae."))
    assert (vae.prefix, codes(vae), vae.final_decoder) == ("vae.", {"prefix"}, True)


def test_an_ltx_vae_in_diffusers_layout_is_not_taken_for_hunyuan():
    vae = only(header({"decoder.conv_in.conv.weight": conv(1024, 128), "latents_mean": (128,)}))
    assert (vae.family, codes(vae)) == ("LTX", {"layout"})
    assert "diffusers" in refusal(vae)


@pytest.mark.parametrize(
    ("config", "words"),
    [(None, "no `config`"), ("{", "cannot be read"), ('{"scheduler": {}}', "no section vae"), ("[]", "no section vae")],
)
def test_a_config_that_is_missing_or_broken_is_a_reason_to_refuse(config, words):
    vae = only(header(vae_shapes("video_vae"), config=config))
    assert codes(vae) == {"config"}
    assert words in refusal(vae)


def test_a_config_from_elsewhere_counts():
    (vae,) = find_vaes(header(vae_shapes("video_vae"), config=None), config=CONFIG)
    assert vae.problems == ()


def test_missing_statistics_are_a_reason_to_refuse():
    shapes = {name: shape for name, shape in vae_shapes("video_vae").items() if "std-of-means" not in name}
    vae = only(header(shapes))
    assert codes(vae) == {"statistics"}
    assert "`per_channel_statistics.std-of-means`" in refusal(vae)
    assert "mean-of-means" not in refusal(vae)


def test_an_audio_vae_without_vocoder_is_named_and_refused():
    shapes = {name: shape for name, shape in vae_shapes("audio_vae").items() if name.startswith("audio_vae.")}
    vae = only(header(shapes))
    assert "vocoder" in codes(vae)
    assert "vocoder" in refusal(vae, audio=True)


def test_quantised_weights_are_counted_by_format_and_do_not_hide_the_signature():
    shapes, dtypes = vae_shapes("video_vae"), {}
    shapes[RESIDUAL], dtypes[RESIDUAL] = (1024, 1024 * 27 // 2), "U8"
    shapes[RESIDUAL.replace("weight", "weight_scale")] = (1024, 1728)
    dtypes[LAST_DOWN] = "F8_E4M3"
    other = "decoder.conv_out.conv.weight"
    dtypes[other] = "F8_E4M3"
    shapes[other.replace("weight", "scale_weight")] = ()
    vae = only(header(shapes, dtypes))
    assert vae.title == "LTX 2.3 video VAE"
    assert dict(vae.quantised) == {"NVFP4": 1, "FP8": 1, "scaled FP8": 1}
    assert codes(vae) == {"quantized"}
    assert refusal(vae) is None


def test_weights_packed_under_the_name_of_compressed_tensors_keep_the_signature():
    shapes = vae_shapes("video_vae")
    shapes[f"{RESIDUAL}_packed"] = (shapes.pop(RESIDUAL)[0], 1024 * 27 // 2)
    shapes[RESIDUAL.replace("weight", "weight_scale")] = (1024, 1728)
    assert only(header(shapes, {f"{RESIDUAL}_packed": "U8"}, prefix="vae.")).version == "2.3"


def test_a_file_without_vae_and_one_with_two_are_refused_by_name():
    with pytest.raises(CheckpointError, match="there is no video VAE in it"):
        pick_vae(header({"model.diffusion_model.patchify_proj.weight": (1, 1)}))
    video = vae_shapes("video_vae")
    double = header({f"{prefix}{name}": shape for prefix in ("vae.", "other.vae.") for name, shape in video.items()})
    with pytest.raises(CheckpointError, match=r"2 VAEs are in it: .*'vae\.\*'.*'other\.vae\.\*'.*name the prefix"):
        pick_vae(double)
    assert pick_vae(double, prefix="other.vae.").prefix == "other.vae."


def test_a_preview_beside_the_full_vae_does_not_count():
    shapes = {f"vae.{name}": shape for name, shape in vae_shapes("video_vae").items()}
    shapes |= {f"tae.{name}": shape for name, shape in vae_shapes("taehv_ltx2").items()}
    assert pick_vae(header(shapes)).prefix == "vae."


def test_names_of_text_encoders_and_diffusion_models_are_no_vae():
    shapes = {f"text_encoders.t5.{RESIDUAL}": conv(1024), f"model.diffusion_model.{RESIDUAL}": conv(1024)}
    assert find_vaes(header(shapes)) == ()
