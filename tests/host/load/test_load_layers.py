# SPDX-License-Identifier: Apache-2.0
"""Formats beside NVFP4 in one file, on the stub: loaded to their writer's weights, or refused by layer; never bare."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nvfp4_video.host.load.model import load_model
from nvfp4_video.samples import synthetic
from nvfp4_video.samples.damage import read_draft
from nvfp4_video.tests.host.load.test_load_model import (  # the fixtures come with their names
    LAYER,
    assert_computes_the_decoded_weights,
    assert_refused,
    edit,  # noqa: F401
    files,  # noqa: F401
    model,  # noqa: F401
    one_thread,  # noqa: F401
    put,
)

TALL = "transformer_blocks.2.ff.net.0.proj"  # four blocks of 128 rows
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def bytes_of(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def coded(weight: torch.Tensor, scale: torch.Tensor, dtype=E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, scale that broadcasts -> codes, and the weight they mean."""
    codes = (weight.float() / scale).to(dtype)
    return codes, codes.float() * scale


def stored(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One layer as writers of this kind store it, and the weight it means."""
    top = weight.float().abs()
    if kind in ("one", "old", "e5m2", "old_inverse"):
        dtype = E5M2 if kind == "e5m2" else E4M3
        scale = (top.amax() / torch.finfo(dtype).max).reshape(1)
        name = {"one": "weight_scale", "old_inverse": "weight_scale_inv"}.get(kind, "scale_weight")
    elif kind in ("rows", "rows_flat"):
        scale = (top.amax(1, keepdim=True) / 448).bfloat16()
        dtype, name = E4M3, "weight_scale"
    else:
        scale = (top.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax((1, 3)) / 448) if kind == "blocks" else None
        dtype, name = E4M3, "weight_scale_inv"
    factor = scale.float()
    if kind == "blocks":
        factor = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
    codes, meant = coded(weight, factor, dtype)
    return {"weight": codes, name: scale.reshape(-1) if kind == "rows_flat" else scale}, meant


def replaced(tensors: dict, layer: str, new: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{layer}.") and not key.endswith(".bias")]:
        del tensors[key]
    tensors.update({f"{layer}.{suffix}": tensor for suffix, tensor in new.items()})


@pytest.mark.parametrize("file", ["comfy_markers", "comfy_header", "compressed_tensors", "modelopt"])
@pytest.mark.parametrize("kind", ["one", "old", "old_inverse", "e5m2", "rows", "rows_flat", "blocks"])
def test_fp8_of_every_kind_beside_nvfp4_loads_to_its_writer_s_weights(kind: str, file: str, edit, model):  # noqa: F811
    meant = {}

    def change(tensors, metadata):
        new, meant[TALL] = stored(kind, model[0][f"{TALL}.weight"])
        replaced(tensors, TALL, new)
        if kind in ("old", "e5m2"):
            tensors["scaled_fp8"] = torch.zeros(2).to(E4M3)
        if "_quantization_metadata" in metadata:
            about = json.loads(metadata["_quantization_metadata"])
            about["layers"].pop(TALL)
            metadata["_quantization_metadata"] = json.dumps(about)

    patcher, report = load_model(edit(file, change))
    module = patcher.model.diffusion_model.get_submodule(TALL)
    x = torch.randn(3, module.in_features, dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x.float(), meant[TALL], module.bias.float())
    assert (module(x).float() - wanted).norm() < 0.02 * wanted.norm()
    if kind == "blocks":
        assert report.layers["FP8 in blocks, restored to BF16"] == 1
    else:
        assert module.weight._qdata.dtype == (E5M2 if kind == "e5m2" else E4M3)
    if kind in ("old", "e5m2", "rows", "rows_flat"):
        assert module._full_precision_mm_config


def test_a_low_rank_part_is_added_to_the_layer_and_saved_with_it(edit, model):  # noqa: F811
    generator = torch.Generator().manual_seed(3)
    parts = {}

    def change(tensors, metadata):
        for layer in model[2]:
            rows, cols = model[0][f"{layer}.weight"].shape
            parts[layer] = [torch.randn(s, generator=generator).bfloat16() * 0.1 for s in ((4, cols), (rows, 4))]
            tensors[f"{layer}.svdquant_lora_a"], tensors[f"{layer}.svdquant_lora_b"] = parts[layer]
            tensors[f"{layer}.pre_quant_scale"] = torch.linspace(0.5, 2, cols).bfloat16()

    dit = load_model(edit("modelopt", change))[0].model.diffusion_model
    for layer in (LAYER, "transformer_blocks.2.attn1.to_gate_logits"):
        module, (down, up) = dit.get_submodule(layer), parts[layer]
        x = torch.randn(3, module.in_features)
        smooth = x * module.pre_quant_scale
        weight = module.weight.dequantize()[: module.out_features]
        wanted = torch.nn.functional.linear(smooth, weight, module.bias)
        wanted = wanted + torch.nn.functional.linear(torch.nn.functional.linear(smooth, down.float()), up.float())
        torch.testing.assert_close(module(x), wanted, rtol=0.02, atol=0.01)
        saved = module.state_dict(prefix=f"{layer}.")
        assert torch.equal(saved[f"{layer}.svdquant_lora_a"], down)


BAD_VALUES = [
    *[("comfy_markers", f"{LAYER}.weight_scale", value) for value in (float("nan"), -1.0)],
    *[("modelopt", f"{LAYER}.input_scale", value) for value in (float("nan"), 0.0, -1.0)],
    *[("mixed", "transformer_blocks.2.audio_attn1.to_q.weight_scale", value) for value in (float("nan"), 0.0, -1.0)],
    *[("comfy_markers", f"{LAYER}.weight_scale_2", value) for value in (0.0, 3.0)],
    *[("compressed_tensors", f"{LAYER}.weight_global_scale", value) for value in (0.25, -1.0)],
]


@pytest.mark.parametrize(("file", "key", "value"), BAD_VALUES)
def test_scales_that_are_nan_negative_zero_or_reciprocal_are_refused(file: str, key: str, value: float, edit):  # noqa: F811
    def spoil(tensors, metadata):
        stored = tensors[key].float()
        stored.view(-1)[0] = value
        tensors[key] = stored.to(tensors[key].dtype)

    assert_refused(edit(file, spoil), rf"edited\.safetensors, layer {key.rpartition('.')[0]}: its .*")


def test_a_weight_of_zeros_may_have_scales_of_zero(edit, model):  # noqa: F811
    def clear(tensors, metadata):
        for suffix in ("weight", "weight_scale_2"):
            tensors[f"{LAYER}.{suffix}"] = torch.zeros_like(tensors[f"{LAYER}.{suffix}"])

    module = load_model(edit("comfy_markers", clear))[0].model.diffusion_model.get_submodule(LAYER)
    assert not module.weight.dequantize().any()


def test_an_fp8_layer_of_another_size_than_the_model_s_is_refused_before_it_computes(edit):  # noqa: F811
    layer = "transformer_blocks.2.audio_attn1.to_q"

    def halve(tensors, metadata):
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"][:32].clone()

    assert_refused(edit("mixed", halve), rf"edited\.safetensors, layer {layer}: .*\(32, 64\).*expected .*\(64, 64\).*")


@pytest.mark.parametrize("suffix", ["weight_zero_point", "lora_A.weight", "svd_up", "weight_quantizer._amax"])
def test_what_nobody_reads_beside_a_weight_is_named(suffix: str, edit):  # noqa: F811
    for layer in (LAYER, "transformer_blocks.0.attn1.to_q"):
        path = edit("comfy_markers", put(f"{layer}.{suffix}", torch.zeros(2)))
        assert_refused(path, rf"edited\.safetensors, layer {layer}: `{suffix}` beside its weight .*not understood.*")


def test_an_fp8_weight_never_loads_without_its_scale(edit, model):  # noqa: F811
    layer = "transformer_blocks.2.audio_attn1.to_q"

    def drop(tensors, metadata):
        for suffix in ("weight_scale", "comfy_quant"):
            del tensors[f"{layer}.{suffix}"]

    assert_refused(edit("mixed", drop), rf"edited\.safetensors, layer {layer}: its FP8 weight has no scale, though .*")

    def one(tensors, metadata):
        replaced(tensors, LAYER, {"weight": stored("one", model[0][f"{LAYER}.weight"])[0]["weight"]})

    assert_refused(edit("comfy_markers", one), rf"edited\.safetensors, layer {LAYER}: its FP8 weight .*RMS.*")


def test_int8_that_nothing_declares_is_refused(edit, model):  # noqa: F811
    def change(tensors, metadata):
        replaced(tensors, LAYER, {"weight": torch.ones(128, 128, dtype=torch.int8), "weight_scale": torch.ones(1)})

    path = edit("comfy_markers", change)
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: its weight is scaled INT8, and nothing declares.*")


def test_empty_markers_of_plain_weights_count_as_absent(edit, model):  # noqa: F811
    layer = "transformer_blocks.0.attn1.to_q"
    for content in (torch.zeros(0, dtype=torch.uint8), torch.zeros(19, dtype=torch.uint8)):
        patcher, _ = load_model(edit("comfy_markers", put(f"{layer}.comfy_quant", content)))
        assert_computes_the_decoded_weights(patcher, model)


def test_damaged_markers_of_fp8_are_refused_until_the_dialect_is_stated(edit):  # noqa: F811
    layer = "transformer_blocks.2.audio_attn1.to_q"
    path = edit("mixed", put(f"{layer}.comfy_quant", torch.zeros(27, dtype=torch.uint8)))
    assert_refused(path, rf"edited\.safetensors, layer {layer}: its `comfy_quant` marker holds nothing but NUL.*")
    module = load_model(path, dialect="comfy")[0].model.diffusion_model.get_submodule(layer)
    assert module.quant_format == "float8_e4m3fn"


def test_a_sidecar_of_modelopt_s_changes_nothing_for_a_file_with_markers(edit, model, tmp_path):  # noqa: F811
    path = edit("comfy_markers", lambda tensors, metadata: None)
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    assert_computes_the_decoded_weights(load_model(path)[0], model)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (8, 8)), ("F6_E2M3", (4, 4)), ("F6_E3M2", (8,))])
def test_a_tensor_beside_the_model_of_a_dtype_that_torch_lacks_is_refused_by_name(dtype, shape, model, tmp_path):  # noqa: F811
    state, config, packed = model
    synthetic.write(tmp_path / "full.safetensors", "comfy_markers", state, config, packed, full=True)
    draft = read_draft(tmp_path / "full.safetensors")
    bits = 4 if dtype == "F4" else 6
    draft.tensors["vae.table"] = (dtype, shape, bytes(math.prod(shape) * bits // 8))
    assert_refused(str(draft.write(tmp_path)), rf"full\.safetensors: tensor 'vae\.table' is {dtype}; .*")


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn1", "transformer_blocks.2.ff"])
def test_a_tensor_that_does_not_fit_into_the_host_s_model_is_one_clear_error(name: str, edit):  # noqa: F811
    path = edit("comfy_markers", put(name, torch.zeros(7, dtype=torch.bfloat16)))
    assert_refused(path, rf"edited\.safetensors.*{name.rpartition('.')[2]}.*")


def test_an_fp8_norm_with_a_scale_becomes_bf16_since_the_host_would_drop_the_scale(edit):  # noqa: F811
    name = "transformer_blocks.2.attn1.q_norm.weight"
    meant = {}

    def change(tensors, metadata):
        codes, meant[name] = coded(tensors[name] * 1.3, torch.tensor(1.3 / 448))
        scale = {"weight_scale": torch.tensor(1.3 / 448), "comfy_quant": bytes_of('{"format": "float8_e4m3fn"}')}
        replaced(tensors, name.removesuffix(".weight"), {"weight": codes} | scale)

    found = load_model(edit("comfy_markers", change))[0].model.diffusion_model.get_parameter(name)
    assert torch.equal(found, meant[name].bfloat16())


def test_a_table_of_fp8_codes_never_loads_without_a_scale(edit):  # noqa: F811
    def change(tensors, metadata):
        scale = tensors["scale_shift_table"].abs().amax().float() / 448
        tensors["scale_shift_table"] = coded(tensors["scale_shift_table"], scale)[0]
        tensors["scale_shift_table_scale"] = scale

    path = edit("comfy_markers", change)
    assert_refused(path, r"edited\.safetensors: tensor 'scale_shift_table' is FP8 without a scale.*RMS.*")
