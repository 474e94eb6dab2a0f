# SPDX-License-Identifier: Apache-2.0
"""LoRAs folded in before packing: the same as merging them with torch first, told, verified, and nothing left out."""

from __future__ import annotations

import json

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.verify.found import summary
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.card import PROVENANCE, text_of
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.kernels import reference
from nvfp4_video.tests.support.files import metadata
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, to_fp8
from safetensors.torch import load_file, save_file

Q, K2, FF = (f"transformer_blocks.1.{name}" for name in ("attn1.to_q", "attn2.to_k", "ff.net.0.proj"))
OUT = "transformer_blocks.2.audio_to_video_attn.to_out.0"
KEPT, NORM, TABLE = "adaln_single.linear", "transformer_blocks.0.attn1.q_norm", "scale_shift_table"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def every_kind() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A LoRA's tensors in all its spellings, and what it adds at strength 1, by tensor without prefix."""
    up, down = random(64, 4), random(4, 64)
    w1, w2a, w2b = random(8, 8, seed=1), random(8, 2, seed=2), random(2, 4, seed=3)
    had = [random(*shape, seed=at) for at, shape in enumerate(((256, 3), (3, 64), (256, 3), (3, 64)), 5)]
    low_out, low_kept = (random(64, 2, seed=8), random(2, 32, seed=8)), (random(96, 5), random(5, 64, seed=9))
    keys = {
        f"diffusion_model.{Q}.lora_B.weight": up,
        f"diffusion_model.{Q}.lora_A.weight": down.bfloat16(),
        f"diffusion_model.{Q}.alpha": torch.tensor(2.0),
        f"diffusion_model.{Q}.diff_b": random(64, seed=4),
        f"lora_unet_{K2}".replace(".", "_") + ".lokr_w1": w1,
        f"lora_unet_{K2}".replace(".", "_") + ".lokr_w2_a": w2a,
        f"lora_unet_{K2}".replace(".", "_") + ".lokr_w2_b": w2b,
        f"lora_unet_{K2}".replace(".", "_") + ".alpha": torch.tensor(1.0),
        **{f"{FF}.hada_{part}": t for part, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), had, strict=True)},
        f"transformer.{OUT}.lora.up.weight": low_out[0],
        f"transformer.{OUT}.lora.down.weight": low_out[1],
        f"{KEPT}.lora_up.weight": low_kept[0].half(),
        f"{KEPT}.lora_down.weight": low_kept[1],
        f"diffusion_model.{NORM}.w_norm": random(64, seed=6),
        f"diffusion_model.{TABLE}.diff": random(2, 64, seed=7),
    }
    added = {
        f"{Q}.weight": 0.5 * (up @ down.bfloat16().float()),
        f"{Q}.bias": random(64, seed=4),
        f"{K2}.weight": 0.5 * torch.kron(w1, w2a @ w2b),
        f"{FF}.weight": (had[0] @ had[1]) * (had[2] @ had[3]),
        f"{OUT}.weight": low_out[0] @ low_out[1],
        f"{KEPT}.weight": low_kept[0].half().float() @ low_kept[1],
        f"{NORM}.weight": random(64, seed=6),
        TABLE: random(2, 64, seed=7),
    }
    return keys, added


def low_rank(layer: str, shape: tuple[int, int], rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"diffusion_model.{layer}.lora_B.weight": random(shape[0], rank, seed=seed),
        f"diffusion_model.{layer}.lora_A.weight": random(rank, shape[1], seed=seed),
    }


def folded(*given) -> QuantizeSettings:
    return QuantizeSettings(loras=given)


@pytest.fixture
def lora(tmp_path):
    save_file(every_kind()[0], tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("strength", (1.0, -0.7))
def test_folding_in_gives_the_bytes_of_merging_with_torch_first(strength, lora, tmp_path, tensors):
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    source = save(tmp_path / "wide.safetensors", wide)
    merged = dict(wide)
    for own, change in every_kind()[1].items():
        # In the order in which the pack multiplies, for the last bit.
        scale = {f"{Q}.weight": 0.5, f"{K2}.weight": 0.5}.get(own, 1.0)
        merged[PREFIX + own] = wide[PREFIX + own] + (strength * scale) * (change / scale)
    quantize_checkpoint(source, tmp_path / "f.safetensors", folded((lora, strength)))
    quantize_checkpoint(save(tmp_path / "merged.safetensors", merged), tmp_path / "m.safetensors")
    one, other = load_file(tmp_path / "f.safetensors"), load_file(tmp_path / "m.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def test_what_is_kept_is_merged_in_its_own_dtype(lora, source, tmp_path, tensors):
    quantize_checkpoint(source, tmp_path / "t.safetensors", folded((lora, 1.0)))
    found = load_file(tmp_path / "t.safetensors")
    for own in (f"{KEPT}.weight", f"{Q}.bias", f"{NORM}.weight", TABLE):
        wanted = (tensors[PREFIX + own].float() + every_kind()[1][own]).bfloat16()
        assert torch.equal(found[PREFIX + own], wanted), own


def test_several_loras_add_up(source, tmp_path, tensors):
    for number, shape in enumerate(((64, 64), (256, 64))):
        keys = low_rank(Q, (64, 64), seed=number) | (low_rank(FF, shape, 5) if number else {})
        save_file(keys, tmp_path / f"{number}.safetensors")
    both = [(tmp_path / "0.safetensors", 0.5), (tmp_path / "1.safetensors", 2.0)]
    quantize_checkpoint(source, tmp_path / "t.safetensors", folded(*both))
    assert verify(tmp_path / "t.safetensors", source, loras=both).ok
    change = sum(at * random(64, 3, seed=n) @ random(3, 64, seed=n) for n, at in enumerate((0.5, 2.0)))
    merged = tensors | {f"{PREFIX}{Q}.weight": tensors[f"{PREFIX}{Q}.weight"].float() + change}
    quantize_checkpoint(save(tmp_path / "m.safetensors", merged), tmp_path / "n.safetensors")
    one, other = load_file(tmp_path / "t.safetensors"), load_file(tmp_path / "n.safetensors")
    name = f"{PREFIX}{Q}.weight"
    assert (one[name] != other[name]).float().mean() < 0.01  # sums of FP32 in another order


def test_an_fp8_layer_that_is_kept_becomes_bf16_with_the_lora_in_it(lora, tmp_path, tensors):
    name = f"{PREFIX}{KEPT}.weight"
    coded, scale = to_fp8(tensors[name])
    given = tensors | {name: coded, f"{PREFIX}{KEPT}.weight_scale": scale}
    given[f"{PREFIX}{KEPT}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    source = save(tmp_path / "fp8.safetensors", given)
    quantize_checkpoint(source, tmp_path / "t.safetensors", folded((lora, 1.0)))
    found = load_file(tmp_path / "t.safetensors")
    assert torch.equal(found[name], (coded.float() * scale + every_kind()[1][f"{KEPT}.weight"]).bfloat16())
    assert not {f"{PREFIX}{KEPT}.weight_scale", f"{PREFIX}{KEPT}.comfy_quant"} & found.keys()
    assert verify(tmp_path / "t.safetensors", source, loras=[(lora, 1.0)]).ok


def test_header_card_and_report_tell_of_it(lora, source, tmp_path):
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", folded((lora, 0.8)))
    (told,) = record["loras"]
    assert told["file"] == "lora.safetensors" and told["strength"] == 0.8 and told["tensors"] == 8
    assert json.loads(metadata(tmp_path / "t.safetensors")[PROVENANCE])["loras"] == record["loras"]
    words = "lora.safetensors at strength 0.8, which changes 8 tensors"
    assert f"{words}, sha256 `{told['sha256']}`" in (tmp_path / "t.md").read_text("utf-8")
    assert f"LoRA folded in: {words}" in text_of(record)


def test_verify_wants_the_loras_and_finds_all_of_them(lora, source, tmp_path):
    path = tmp_path / "t.safetensors"
    quantize_checkpoint(source, path, folded((lora, 1.0)))
    with pytest.raises(CheckpointError, match="LoRAs were folded in: 'lora.safetensors' at 1; name them"):
        verify(path, source)
    found = verify(path, source, loras=[(lora, 1.0)])
    assert found.ok, summary(found)
    assert all(0.9 < check.lora < 1.1 for check in found.layers if check.lora is not None)
    assert "compared with the source and lora.safetensors at 1, " in summary(found)


def test_verify_notices_another_strength_and_a_lora_that_is_not_in_it(lora, source, tmp_path):
    path, other = tmp_path / "t.safetensors", tmp_path / "other.safetensors"
    quantize_checkpoint(source, path, folded((lora, 1.0)))
    found = verify(path, source, loras=[(lora, 0.5)])
    assert not found.ok and "model.diffusion_model." not in " ".join(found.changed)
    assert {f"{KEPT}.weight", f"{Q}.bias", TABLE} <= set(found.changed)
    # Too weak to show in a layer's error, which is that of rounding.
    save_file({name: t * 0.2 for name, t in low_rank(FF, (256, 64)).items()}, other)
    plain = tmp_path / "p.safetensors"
    quantize_checkpoint(source, plain)
    wrong = [check for check in verify(plain, source, loras=[(other, 1.0)]).layers if check.verdict]
    assert [check.layer for check in wrong] == [FF] and wrong[0].error < wrong[0].allowed
    assert "of what the LoRAs add is in it, expected 0.9" in wrong[0].verdict


def test_another_strength_is_another_request(lora, source, tmp_path):
    path = tmp_path / "t.safetensors"
    hashes = [
        quantize_checkpoint(source, path, folded((lora, strength)), overwrite=True)["sha256"]
        for strength in (1.0, 0.5, 1.0)
    ]
    assert hashes[0] == hashes[2] != hashes[1]


def without(*parts: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in low_rank(Q, (64, 64)).items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("keys", "words"),
    (
        ({f"diffusion_model.{Q}.dora_scale": random(64, 1)}, r"1 keys of a kind that is not folded in: .*\(DoRA\)"),
        ({f"diffusion_model.{Q}.oft_blocks": random(4, 4)}, r"\(OFT\)"),
        ({f"diffusion_model.{Q}.lora_mid.weight": random(3, 3)}, "LoCon with a tensor in the middle"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": random(4, 4)}, "1 of its 3 keys fit no layer"),
        ({"diffusion_model.nowhere.lora_A.weight": random(4, 4)}, "'diffusion_model.nowhere.lora_A.weight'"),
        ({f"diffusion_model.{Q}.rank": random(1)}, "1 of its 3 keys fit no layer of source.safetensors"),
        ({f"diffusion_model.{FF}.diff_b": random(256)}, "fit no layer"),
        ({f"diffusion_model.{Q}.diff": random(64, 64)}, "not one change of one tensor"),
        ({f"{Q}.lora_A.weight": random(3, 64)}, "change what other keys change, too"),
        ({f"diffusion_model.{FF}.alpha": torch.tensor(1.0)}, "not one change of one tensor"),
        ({f"diffusion_model.{FF}.lora_A.weight": random(3, 64)}, "not one change of one tensor"),
        (low_rank(FF, (128, 64)), r"\(128, 3\), for a tensor of shape \(256, 64\)"),
        ({f"diffusion_model.{Q}.alpha": torch.tensor(torch.nan)}, "no finite number"),
        ({f"diffusion_model.{Q}.alpha": torch.ones(2)}, "no finite number"),
        ({f"diffusion_model.{TABLE}.diff": random(3, 64)}, r"\(3, 64\), for a tensor of shape \(2, 64\)"),
    ),
)
def test_a_file_of_which_a_key_cannot_be_folded_in_is_refused_before_anything_is_written(keys, words, source, tmp_path):
    save_file(low_rank(Q, (64, 64)) | keys, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=words):
        quantize_checkpoint(source, tmp_path / "t.safetensors", folded((tmp_path / "bad.safetensors", 1.0)))
    assert not list(tmp_path.glob("t.*"))


@pytest.mark.parametrize("strength", (0.0, float("nan"), float("inf")))
def test_a_strength_that_changes_nothing_or_everything_is_refused(strength, lora, source, tmp_path):
    with pytest.raises(CheckpointError, match="expected a number other than 0"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", folded((lora, strength)))


def test_nan_in_a_lora_is_an_error_with_its_key(source, tmp_path):
    keys = low_rank(Q, (64, 64))
    keys[f"diffusion_model.{Q}.lora_B.weight"][3, 1] = torch.nan
    save_file(keys, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=f"bad.safetensors, diffusion_model.{Q}.lora_B.weight: NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", folded((tmp_path / "bad.safetensors", 1.0)))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("t.")], "no run could go on with it"


def test_a_lora_cannot_be_the_target(lora, source):
    with pytest.raises(CheckpointError, match="the target is a file that is read"):
        quantize_checkpoint(source, lora, folded((lora, 1.0)), overwrite=True)


def test_the_commands_take_loras_with_and_without_a_strength(lora, source, tmp_path, capsys):
    target = str(tmp_path / "t.safetensors")
    assert main(["quantize", str(source), target, "--lora", f"{lora}=0.5", "--estimate"]) == 0
    assert "at strength 0.5, which changes 8 tensors" in " ".join(capsys.readouterr().out.split())
    assert main(["quantize", str(source), target, "--lora", str(lora)]) == 0
    assert main(["verify", target, str(source), "--lora", str(lora)]) == 0
    assert main(["verify", target, str(source), "--lora", f"{lora}=2"]) == 1
    capsys.readouterr()
    assert main(["verify", target, str(source)]) == 2
    assert "--lora FILE=STRENGTH" in capsys.readouterr().err


def test_a_source_on_a_coarse_grid_may_lose_a_lora_which_is_no_fault_of_the_file(source, tmp_path, tensors):
    weight = f"{PREFIX}{FF}.weight"
    packed = reference.quantize(tensors[weight].float())
    coarse = save(tmp_path / "c.safetensors", tensors | {weight: reference.dequantize(packed, torch.float32)})
    weak = tmp_path / "weak.safetensors"
    save_file({name: 0.1 * t for name, t in low_rank(FF, (256, 64)).items()}, weak)
    target = tmp_path / "t.safetensors"
    quantize_checkpoint(coarse, target, QuantizeSettings(search=AMAX, loras=((weak, 1.0),)))
    found = verify(target, coarse, loras=[(weak, 1.0)])
    assert found.ok
    (layer,) = (check for check in found.layers if check.layer == FF)
    assert layer.lora < 0.7
