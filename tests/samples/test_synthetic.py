# SPDX-License-Identifier: Apache-2.0
"""The scaled-down checkpoints: bytes by hand for each dialect, and every file decoded without the pack's readers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from nvfp4_video.samples import synthetic
from nvfp4_video.samples.recorded import recorded
from safetensors import safe_open
from safetensors.torch import load_file

PACKED_KINDS = [kind for kind in synthetic.KINDS if not kind.startswith("bf16") and kind != "mixed"]
HIGH_FIRST = {"comfy_markers", "comfy_header", "comfy_header_unprefixed", "metadata_less"}
LINEAR = {"modelopt", "modelopt_layerwise", "compressed_tensors"}
UNPADDED = LINEAR | {"lightx2v", "lightx2v_absmax"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def model():
    """State, config and packed layers of the small LTX-2.3, computed once."""
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config)


@pytest.fixture
def tiny():
    """One 4x32 layer of known bytes: amax 6 gives the global scale 2**-8, so its block scales are 256 and 128."""
    weight = torch.zeros(4, 32)
    weight[0, :3] = torch.tensor([-1.0, -1.5, 6.0])
    weight[1, 16:] = 3.0
    return {"transformer_blocks.2.to_q.weight": weight.to(torch.bfloat16)}, {"num_layers": 5}


def layer_parts(path: Path, layer: str) -> dict[str, torch.Tensor]:
    """{key suffix: tensor} of one layer, whatever the file's prefix is."""
    return {key.rpartition(".")[2]: tensor for key, tensor in load_file(path).items() if f"{layer}." in key}


def decode(parts: dict[str, torch.Tensor], kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """One layer's tensors -> FP32 (N, K), by indexing: nothing of the pack is used."""
    rows, cols = shape
    packed = parts.get("weight_packed", parts.get("weight"))[:rows, : cols // 2]
    nibbles = (packed >> 4, packed & 15) if kind in HIGH_FIRST else (packed & 15, packed >> 4)
    codes = torch.stack(nibbles, dim=-1).flatten(1).long()
    scales = parts["weight_scale"].float()
    row, block = torch.arange(rows)[:, None], torch.arange(cols // 16)[None]
    if kind in LINEAR:
        scales = scales[row, block]
    else:
        tile = row // 128 * (scales.shape[1] // 4) + block // 4
        scales = scales.flatten()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]
    if kind == "lightx2v":
        factor = parts["alpha"] * parts["input_global_scale"]
    elif "weight_global_scale" in parts:
        factor = 1 / parts["weight_global_scale"].squeeze()
    else:
        factor = parts["weight_scale_2"]
    return E2M1[codes] * (scales * factor).repeat_interleave(16, dim=1)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_codes_a_and_b_share_a_byte_in_the_order_of_the_dialect(kind: str, tiny, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *tiny)
    parts = layer_parts(tmp_path / "file.safetensors", "transformer_blocks.2.to_q")
    packed = parts.get("weight_packed", parts.get("weight"))
    assert packed[0, :3].tolist() == ([0xAB, 0x70, 0x00] if kind in HIGH_FIRST else [0xBA, 0x07, 0x00])
    assert packed.shape == ((4, 16) if kind in UNPADDED else (16, 16))


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_the_scale_of_row_1_block_1_lies_where_the_dialect_puts_it(kind: str, tiny, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *tiny)
    scales = layer_parts(tmp_path / "file.safetensors", "transformer_blocks.2.to_q")["weight_scale"]
    assert scales.dtype == torch.float8_e4m3fn
    expected = torch.zeros(4, 2) if kind in LINEAR else torch.zeros(128, 4)
    expected.view(-1)[0], expected.view(-1)[3 if kind in LINEAR else 17] = 256, 128
    assert torch.equal(scales.float(), expected)


def test_global_scales_are_factors_divisors_or_products_by_dialect(tiny, tmp_path: Path):
    scalars = {}
    for kind in PACKED_KINDS:
        synthetic.write(tmp_path / "file.safetensors", kind, *tiny)
        parts = layer_parts(tmp_path / "file.safetensors", "transformer_blocks.2.to_q")
        scalars[kind] = {name: t.tolist() for name, t in parts.items() if t.dtype == torch.float32}
    assert scalars["comfy_markers"] == scalars["comfy_header"] == {"weight_scale_2": 2**-8}
    assert scalars["metadata_less"] == scalars["modelopt"] == {"weight_scale_2": 2**-8, "input_scale": 2**-7}
    assert scalars["modelopt_layerwise"] == scalars["modelopt_swizzled"] == scalars["modelopt"]
    assert scalars["compressed_tensors"] == {"weight_global_scale": [256.0], "input_global_scale": [128.0]}
    assert scalars["lightx2v"] == {"alpha": 2**-15, "input_global_scale": 128.0}
    assert scalars["lightx2v_absmax"] == {"weight_global_scale": 256.0, "input_absmax": 21.0}


@pytest.mark.parametrize("exact", [True, False], ids=["power-of-two scales", "amax scales"])
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_every_dialect_of_the_model_decodes_to_the_same_weights(kind: str, exact: bool, model, tmp_path: Path):
    state, config, _ = model
    packed = synthetic.quantize_layers(state, config, exact=exact)
    synthetic.write(tmp_path / "file.safetensors", kind, state, config, packed)
    tensors = load_file(tmp_path / "file.safetensors")
    found = {key.removeprefix(synthetic.DIT_PREFIX): tensor for key, tensor in tensors.items()}
    decoded = synthetic.decoded_state(state, packed)
    for layer, weight in packed.items():
        parts = {key.rpartition(".")[2]: found.pop(key) for key in list(found) if key.rpartition(".")[0] == layer}
        values = decode(parts, kind, weight.shape)
        assert torch.equal(values.to(torch.bfloat16), decoded[f"{layer}.weight"]), layer
        if exact:
            assert torch.equal(values, decoded[f"{layer}.weight"].float()), f"{layer} is not exact in BF16"
        assert torch.equal(parts["bias"], state[f"{layer}.bias"])
    assert {key for key in state if key.rpartition(".")[0] not in packed} == found.keys()
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_amax_scales_survive_their_reciprocal_and_are_not_all_powers_of_two(model):
    state, config, _ = model
    scales = [weight.global_scale for weight in synthetic.quantize_layers(state, config, exact=False).values()]
    assert all(1 / (1 / scale) == scale for scale in scales)
    assert any(torch.frexp(scale).mantissa != 0.5 for scale in scales)


def test_four_bits_cost_the_error_that_nvfp4_costs(model):
    state, _, packed = model
    decoded = synthetic.decoded_state(state, packed)
    errors = [
        ((decoded[key].float() - state[key].float()).norm() / state[key].float().norm()).item()
        for key in (f"{layer}.weight" for layer in packed)
    ]
    assert 0.08 < min(errors) and max(errors) < 0.13


def test_the_small_model_has_the_released_model_s_names_but_for_the_number_of_blocks(model):
    released = recorded("ltxav_keys")

    def families(keys) -> set[str]:
        return {re.sub(r"\.\d+\.", ".#.", key) for key in keys}

    assert families(model[0]) == families(released["keys"])
    assert model[1].keys() == released["config"].keys()


def test_blocks_2_to_n_minus_3_are_packed_down_to_the_gates_of_four_rows(model):
    _, _, packed = model
    assert {layer.split(".")[1] for layer in packed} == {"2", "3"}
    assert packed["transformer_blocks.2.attn1.to_gate_logits"].shape == (4, 128)
    assert not any("norm" in layer or "table" in layer for layer in packed)


def test_a_seed_decides_every_byte(model, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write(tmp_path / name, "comfy_markers", *synthetic.small_ltx23(seed))
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_headers_name_the_layers_as_the_dialect_does(model, tmp_path: Path):
    layer = "transformer_blocks.3.attn1.to_q"
    for kind, full, expected in (
        ("comfy_header", False, layer),
        ("comfy_header", True, f"model.diffusion_model.{layer}"),
        ("comfy_header_unprefixed", False, layer),
        ("modelopt_swizzled", True, f"model.diffusion_model.{layer}"),
    ):
        synthetic.write(tmp_path / "file.safetensors", kind, *model, full=full)
        with safe_open(tmp_path / "file.safetensors", "pt") as file:
            metadata, names = file.metadata(), set(file.keys())
        assert json.loads(metadata["config"]) == {"transformer": model[1]}
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        assert layers[expected] == {"format": "nvfp4"}
        assert len(layers) == len(model[2])
        prefix = "" if kind == "comfy_header" and not full else "model.diffusion_model."
        assert f"{prefix}{layer}.weight" in names
        assert ("vae.per_channel_statistics.mean-of-means" in names) == full


def test_only_modelopt_says_modelopt_in_the_header_or_in_the_file_beside_it(model, tmp_path: Path):
    for kind in PACKED_KINDS:
        synthetic.write(tmp_path / "file.safetensors", kind, *model)
        with safe_open(tmp_path / "file.safetensors", "pt") as file:
            config = json.loads(file.metadata().get("quantization_config", "{}"))
        assert (config.get("producer", {}).get("name") == "modelopt") == kind.startswith("modelopt")
        assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    synthetic.write(tmp_path / "file.safetensors", "modelopt", *model, sidecar=True)
    beside = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert beside["producer"]["name"] == "modelopt"
    assert beside["quantization"]["quant_algo"] == "NVFP4"
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert "quantization_config" not in file.metadata()
    synthetic.write(tmp_path / "file.safetensors", "compressed_tensors", *model, sidecar=True)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "nvfp4-pack-quantized"


def test_a_mixed_file_keeps_audio_in_fp8_and_gates_in_bf16(model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", "mixed", *model)
    tensors = load_file(tmp_path / "file.safetensors")
    block = "transformer_blocks.2."
    audio, weight = tensors[block + "audio_attn1.to_q.weight"], model[0][block + "audio_attn1.to_q.weight"].float()
    assert audio.dtype == torch.float8_e4m3fn
    decoded = audio.float() * tensors[block + "audio_attn1.to_q.weight_scale"]
    assert (decoded - weight).norm() / weight.norm() < 0.04
    assert bytes(tensors[block + "audio_attn1.to_q.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'
    assert torch.equal(tensors[block + "attn1.to_gate_logits.weight"], model[0][block + "attn1.to_gate_logits.weight"])
    assert tensors[block + "attn1.to_q.weight"].dtype == torch.uint8
    assert bytes(tensors[block + "attn1.to_q.comfy_quant"].tolist()) == b'{"format": "nvfp4"}'


def test_a_lora_changes_packed_padded_and_plain_layers(model, tmp_path: Path):
    layers = synthetic.write_lora(tmp_path / "lora.safetensors", *model[:2])
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {"transformer_blocks.0.attn1.to_q", "transformer_blocks.2.attn1.to_gate_logits"} <= set(layers)
    for layer in layers:
        down, up = (tensors.pop(f"diffusion_model.{layer}.lora_{part}.weight").float() for part in "AB")
        weight = model[0][f"{layer}.weight"].float()
        assert 0.1 < (up @ down).norm() / weight.norm() < 1
    assert not tensors


def test_an_unknown_kind_is_refused_with_the_known_ones(model, tmp_path: Path):
    with pytest.raises(ValueError, match="unknown kind of checkpoint 'nf4'.*comfy_markers"):
        synthetic.write(tmp_path / "file.safetensors", "nf4", *model)
    assert list(tmp_path.iterdir()) == []
