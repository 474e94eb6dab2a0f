# SPDX-License-Identifier: Apache-2.0
"""layers.py and declarations.py: each way to store a layer is told by its tensors; nothing beside it goes unread."""

from __future__ import annotations

import json

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, Header
from nvfp4_video.checkpoint.identify.dialects import detect
from nvfp4_video.checkpoint.identify.formats import FORMATS
from nvfp4_video.checkpoint.identify.layers import group_tensors, refuse
from nvfp4_video.checkpoint.identify.values import check_layer
from nvfp4_video.tests.support.header_by_hand import ENTRY, MODELOPT, comfy_layer, entry, header, marked, refusal

FP8 = {"weight": entry("F8_E4M3", 256, 384)}
ONE, ROWS, BLOCKS = entry("F32", 1), entry("BF16", 256, 1), entry("F32", 2, 3)
INT8 = {"weight": entry("I8", 256, 384), "weight_scale": entry("F32", 256, 1)}
MXFP8 = FP8 | {"weight_scale": entry("U8", 256, 12)}

KINDS = {
    "float": {"weight": entry("BF16", 8, 8), "bias": entry("BF16", 8)},
    "nvfp4": comfy_layer(),
    "fp8": FP8 | {"weight_scale": ONE, "input_scale": entry("F32")},
    "fp8_rows": FP8 | {"weight_scale": ROWS},
    "fp8_blocks": FP8 | {"weight_scale_inv": BLOCKS},
    "fp8_cast": FP8,
    "int8": INT8,
    "mxfp8": MXFP8,
    "bitsandbytes": {"weight": entry("U8", 4096, 1), "weight.absmax": entry("F32", 128)},
    "mxfp4": {"weight_packed": entry("U8", 128, 32), "weight_scale": entry("U8", 128, 2)},
    "bytes": {"weight": entry("U8", 128, 34)},
    "int": {"weight": entry("I32", 128, 8)},
}


def said(content: object, **layers) -> Header:
    """A header whose layers have a marker each of this content; bytes are taken as they are."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = header(**{name: group | {"comfy_quant": entry("U8", len(raw))} for name, group in layers.items()})
    head.markers.update({f"{name}.comfy_quant": raw for name in layers})
    return head


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_store_a_weight_is_called_what_it_is(kind: str):
    layer = detect(header(q=KINDS[kind]), "comfy").layers["q"]
    assert layer.kind == kind and layer.title == FORMATS[kind].title
    assert set(layer.read) >= {suffix for suffix in KINDS[kind] if suffix != "bias"} or not FORMATS[kind].loads


@pytest.mark.parametrize("kind", ["bitsandbytes", "mxfp4", "bytes", "int", "int8", "mxfp8"])
def test_what_no_loader_reads_for_what_it_is_is_refused_by_layer_and_format(kind: str):
    plan = detect(header(q=KINDS[kind]))
    with pytest.raises(CheckpointError, match=f"layer q: its weight is .*{FORMATS[kind].title[:6]}"):
        refuse("some.safetensors", plan.layers)


MARKERS = {
    "fp8": {"format": "float8_e4m3fn"},
    "fp8_rows": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    "nvfp4": {"format": "nvfp4"},
    "fp8_blocks": None,
    "fp8_cast": None,
    "float": None,
    "int8": None,
}


@pytest.mark.parametrize(("kind", "marker"), MARKERS.items())
def test_the_marker_that_comfyui_needs_follows_from_the_tensors(kind: str, marker):
    assert detect(header(q=KINDS[kind]), "comfy").layers["q"].marker == marker


def test_the_format_of_fp8_is_that_of_its_dtype():
    wide = {"weight": entry("F8_E5M2", 8, 8), "scale_weight": entry("F32")}
    plan = detect(header(q=wide, r=KINDS["fp8"]))
    assert [plan.formats[layer]["format"] for layer in "qr"] == ["float8_e5m2", "float8_e4m3fn"]


def test_an_older_file_that_asks_for_full_precision_gets_it_in_its_own_part_only():
    tensors = header(**{"a.q": KINDS["fp8"], "b.q": KINDS["fp8"]}).tensors | {"a.scaled_fp8": entry("F8_E4M3", 2)}
    plan = detect(Header(header().path, tensors, {}, 0))
    assert "full_precision_matrix_mult" in plan.formats["a.q"]
    assert "full_precision_matrix_mult" not in plan.formats["b.q"]


@pytest.mark.parametrize("format", ["int8_tensorwise", "convrot_w4a4"])
def test_a_declaration_says_how_int8_codes_are_read(format: str):
    content = {"format": format, "convrot": True}
    layer = detect(said(content, q=INT8)).layers["q"]
    assert layer.marker == content and layer.kind == {"int8_tensorwise": "int8"}.get(format, format)


def test_mxfp8_is_read_as_declared_and_its_scales_must_be_tiled():
    assert detect(said({"format": "mxfp8"}, q=MXFP8)).layers["q"].kind == "mxfp8"
    odd = MXFP8 | {"weight_scale": entry("U8", 384, 12)}
    pytest.raises(CheckpointError, detect, said({"format": "mxfp8"}, q=odd)).match(r"\(256, 12\), tiled")


UNREAD = {
    "svd of another writer": (KINDS["float"], {"svd_u": entry("BF16", 8, 2)}),
    "a zero point": (KINDS["fp8"], {"weight_zero_point": entry("F8_E4M3", 1)}),
    "two scales": (KINDS["fp8"], {"scale_weight": ONE}),
    "a scale of a plain weight": (KINDS["float"], {"weight_scale": ONE}),
    "an old scale of a plain weight": (KINDS["float"], {"scale_weight": ONE}),
    "a quantizer's own state": (KINDS["float"], {"weight_quantizer._scale": ONE}),
    "a LoRA inside the model": (KINDS["float"], {"lora_A.weight": entry("BF16", 2, 8)}),
    "a second global scale": (KINDS["nvfp4"], {"weight_global_scale": ONE}),
    "a codebook": (INT8, {"weight_codebook": entry("F32", 16)}),
    "bytes": (KINDS["nvfp4"], {"extra": entry("U8", 16)}),
    "any tensor beside codes": (KINDS["fp8"], {"rotation": entry("F32", 384, 384)}),
}


@pytest.mark.parametrize("what", UNREAD)
def test_whatever_sits_beside_a_weight_and_is_not_read_is_an_error_that_names_it(what: str):
    group, more = UNREAD[what]
    message = refusal(header(q=group | more), "comfy")
    assert message.startswith("some.safetensors, layer q: ") and f"`{next(iter(more))}`" in message


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight", "weight_scale_inv", "input_scale", "comfy_quant"])
def test_scales_and_markers_without_a_weight_are_an_error(suffix: str):
    assert "but no `weight`" in refusal(header(q={suffix: ONE}, r=KINDS["float"]))


@pytest.mark.parametrize("name", ["experts.gate_up_proj_scales", "experts.gate_up_proj_blocks", "q_absmax"])
def test_packed_bytes_that_belong_to_no_weight_are_an_error(name: str):
    tensors = header(r=KINDS["float"]).tensors | {name: entry("U8", 16)}
    message = refusal(Header(header().path, tensors, {}, 0))
    assert name in message and "belongs to no weight" in message


def test_a_model_s_own_parameters_are_no_business_of_the_accounting():
    own = {"scale_shift_table": entry("BF16", 6, 8), "norm.scale": entry("BF16", 8), "spiece_model": entry("U8", 99)}
    own |= {"embeddings.position_ids": entry("I64", 8), "vocoder.act.alpha": entry("F32", 8)}
    tensors = header(q=KINDS["float"]).tensors | own
    assert list(detect(Header(header().path, tensors, {}, 0)).layers) == ["q"]


def test_cache_scales_beside_a_projection_are_known_and_left_out():
    layer = detect(header(q=KINDS["nvfp4"] | {"k_scale": ONE}), "comfy").layers["q"]
    assert layer.ignored == ("k_scale",)


SHAPES = {
    "a scale a column": FP8 | {"weight_scale": entry("F32", 1, 384)},
    "half the rows": FP8 | {"weight_scale": entry("F32", 128)},
    "blocks of 64": FP8 | {"weight_scale": entry("F32", 4, 6)},
    "blocks transposed": FP8 | {"weight_scale": entry("F32", 3, 2)},
    "an input scale a column": FP8 | {"weight_scale": ONE, "input_scale": entry("F32", 384)},
    "smoothing of another layer": comfy_layer() | {"pre_quant_scale": entry("BF16", 128)},
    "one low-rank tensor": comfy_layer() | {"svdquant_lora_a": entry("BF16", 4, 64)},
    "low rank transposed": comfy_layer()
    | {"svdquant_lora_a": entry("BF16", 64, 4), "svdquant_lora_b": entry("BF16", 128, 4)},
}


@pytest.mark.parametrize("what", SHAPES)
def test_scales_of_a_shape_that_does_not_say_what_they_multiply_are_refused(what: str):
    assert refusal(header(q=SHAPES[what]), "comfy").startswith("some.safetensors, layer q: ")


def test_blocks_may_be_declared_or_be_groups_along_a_row():
    config = {"quantization_config": json.dumps({"weight_block_size": [64, 64]})}
    assert detect(header(config, q=SHAPES["blocks of 64"])).layers["q"].block == (64, 64)
    assert detect(header(q=FP8 | {"weight_scale": entry("F32", 256, 3)})).layers["q"].block == (1, 128)
    assert detect(header(q=KINDS["fp8_blocks"])).layers["q"].block == (128, 128)


def test_fp8_without_its_scale_among_scaled_ones_is_refused():
    message = refusal(header(q=KINDS["fp8_cast"], r=KINDS["fp8"]))
    assert message.startswith("some.safetensors, layer q: its FP8 weight has no scale, though r has one")


# Declarations


@pytest.mark.parametrize("format", ["NVFP4", "fp4", "", "float8_e4m3"])
def test_a_format_nobody_knows_is_one_message_with_layer_and_value(format: str):
    for head in (
        said({"format": format}, q=comfy_layer()),
        header({ENTRY: json.dumps({"layers": {"q": {"format": format}}})}, q=comfy_layer()),
    ):
        message = refusal(head)
        assert message.startswith("some.safetensors, layer q: ") and repr(format) in message


def test_a_header_entry_without_format_names_layer_and_value():
    message = refusal(header({ENTRY: '{"layers": {"q": {"kind": "nvfp4"}}}'}, q=comfy_layer()))
    assert message.startswith("some.safetensors, layer q: ") and "{'kind': 'nvfp4'}" in message


@pytest.mark.parametrize("raw", [b"\0" * 19, b"", b'{"form'])
@pytest.mark.parametrize("kind", ["fp8", "fp8_rows", "nvfp4"])
def test_a_damaged_marker_is_a_fault_where_the_tensors_are_clear(kind: str, raw: bytes):
    plan = detect(said(raw, q=KINDS[kind]))
    assert plan.faults().keys() == plan.markers_to_drop() == {"q"} and plan.formats["q"] == MARKERS[kind]


def test_an_empty_marker_of_a_plain_weight_counts_as_absent():
    plan = detect(said(b"\0" * 8, q=KINDS["float"]))
    assert (plan.faults(), plan.formats, plan.markers_to_drop()) == ({}, {}, {"q"})


@pytest.mark.parametrize("kind", ["float", "fp8_cast", "fp8_blocks"])
def test_a_marker_that_its_tensors_contradict_is_refused(kind: str):
    message = refusal(said({"format": "nvfp4"}, q=KINDS[kind]))
    assert "says nvfp4, its tensors are" in message


def test_a_marker_and_a_header_entry_that_differ_are_refused():
    head = said({"format": "float8_e4m3fn"}, q=KINDS["fp8"])
    head.metadata[ENTRY] = json.dumps({"layers": {"q": {"format": "float8_e5m2"}}})
    assert "its marker says 'float8_e4m3fn', the header 'float8_e5m2'" in refusal(head)


@pytest.mark.parametrize("stored", ["", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("written", ["", "model.diffusion_model.", "diffusion_model."])
def test_header_names_reach_their_layer_whichever_of_the_two_lacks_a_prefix(stored: str, written: str):
    content = {"format": "int8_tensorwise"}
    head = header({ENTRY: json.dumps({"layers": {f"{written}a.q": content}})}, **{f"{stored}a.q": INT8})
    plan = detect(head, prefix=stored)
    assert plan.formats == {f"{stored}a.q": content} and not plan.absent
    assert bool(plan.misnamed) == (stored != written)


def test_an_entry_for_a_layer_that_is_not_there_is_reported():
    about = {ENTRY: '{"layers": {"gone": {"format": "nvfp4"}, "q": {"format": "nvfp4"}}}'}
    assert detect(header(about, q=comfy_layer())).absent == ("gone",)


def test_an_fp8_weight_that_is_no_matrix_loses_its_scale_in_comfyui():
    for shape, loses in (((8,), True), ((8, 4), False), ((2, 8, 4), False), ((8, 4, 3, 3), True)):
        members = {"weight": entry("F8_E4M3", *shape), "weight_scale": entry("F32")}
        assert detect(header(q=members)).layers["q"].loses_scale is loses


def test_low_rank_tensors_of_some_layers_only_are_refused():
    low = {"svdquant_lora_a": entry("BF16", 4, 64), "svdquant_lora_b": entry("BF16", 128, 4)}
    assert detect(header(q=comfy_layer() | low), "modelopt").layers["q"].low_rank
    assert "it has no low-rank tensors" in refusal(header(MODELOPT, q=comfy_layer() | low, r=comfy_layer()), "modelopt")


def test_what_quantisers_keep_below_a_layer_is_of_that_layer():
    more = {"weight.quant_state.bitsandbytes__nf4": entry("U8", 90), "weight.nested_absmax": entry("F32", 1)}
    head = header(**{"blocks.0.q": KINDS["bitsandbytes"] | more, "blocks.0.k": marked(comfy_layer())})
    groups = group_tensors(head.tensors)
    assert {layer: len(group) for layer, group in groups.items()} == {"blocks.0.q": 4, "blocks.0.k": 4}


def bank(**others) -> dict:
    """Four experts of 256 x 384 in NVFP4."""
    scales = {"weight_scale": entry("F8_E4M3", 4, 256, 24), "weight_scale_2": entry("F32", 4)}
    return {"weight": entry("U8", 4, 256, 192)} | scales | others


def test_a_declared_bank_of_experts_is_read_with_its_scales():
    layer = detect(said({"format": "nvfp4"}, q=bank())).layers["q"]
    assert (layer.kind, layer.shape) == ("nvfp4", (4, 256, 192))
    assert set(layer.read) == {*bank(), "comfy_quant"}


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"pre_quant_scale": entry("BF16", 384)}, "`pre_quant_scale` beside its weight .* is not understood"),
        ({"svdquant_lora_a": entry("BF16", 8, 384)}, "`svdquant_lora_a` beside its weight"),
        ({"weight_scale": entry("F8_E4M3", 4, 256, 12)}, r"has shape \(4, 256, 12\) for 4 experts"),
        ({"weight_scale_2": entry("F32", 3)}, r"`weight_scale_2` has shape \(3,\); expected one number, or 4"),
    ],
)
def test_what_a_bank_of_experts_would_not_be_multiplied_by_is_refused(others: dict, words: str):
    with pytest.raises(CheckpointError, match=f"layer q: .*{words}"):
        detect(said({"format": "nvfp4"}, q=bank(**others)))


def test_a_bank_of_experts_without_scales_is_refused():
    group = bank()
    del group["weight_scale_2"]
    with pytest.raises(CheckpointError, match="layer q: .*bank of 4 experts without `weight_scale_2`"):
        detect(said({"format": "nvfp4"}, q=group))


@pytest.mark.parametrize(("block", "factor", "words"), [(0x7F, 1e-3, "block scales hold NaN"), (8, float("nan"), "")])
def test_a_bank_one_of_whose_experts_has_nan_in_its_scales_is_refused(block: int, factor: float, words: str):
    layer = detect(said({"format": "nvfp4"}, q=bank())).layers["q"]
    tensors = {"weight": torch.ones(4, 256, 192, dtype=torch.uint8), "weight_scale_2": torch.full((4,), 1e-3)}
    tensors["weight_scale"] = torch.full((4, 256, 24), 8, dtype=torch.uint8)
    check_layer("some.safetensors", layer, tensors.__getitem__)
    tensors["weight_scale"][2, 0, 0], tensors["weight_scale_2"][2] = block, factor
    with pytest.raises(CheckpointError, match=f"layer q.*{words or 'weight_scale_2. holds NaN'}"):
        check_layer("some.safetensors", layer, tensors.__getitem__)
