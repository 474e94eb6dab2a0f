# SPDX-License-Identifier: Apache-2.0
"""What no dialect reader may guess or pass over: ambiguous, contradictory and damaged files, each one clear error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, Header
from nvfp4_video.checkpoint.identify.dialects import DIALECTS, DialectPlan, detect
from nvfp4_video.checkpoint.identify.host_layer import host_layer
from nvfp4_video.tests.support.header_by_hand import (
    ENTRY,
    LIGHTRICKS,
    MODELOPT,
    comfy_layer,
    entry,
    header,
    marked,
    refusal,
    row_major_layer,
)

LISTED = {ENTRY: json.dumps({"layers": dict.fromkeys(("q", "bad"), {"format": "nvfp4"})})}


@pytest.mark.parametrize(
    "metadata",
    [
        *({}, {"config": "{"}, {"config": "[]"}, {"config": '{"transformer": "AVTransformer3DModel"}'}),
        {"config": '{"transformer": {"_class_name": "FluxTransformer2DModel"}}'},
    ],
    ids=str,
)
def test_undeclared_bytes_are_never_guessed_and_the_error_names_the_widget(metadata):
    message = refusal(header(metadata, q=comfy_layer()))
    assert "neither markers nor the header say in which layout" in message
    assert "set `dialect` (comfy if ComfyUI or Lightricks' tools wrote it, modelopt or" in message


def test_row_major_scales_without_a_declaration_suggest_modelopt_but_do_not_decide():
    for metadata in ({}, LIGHTRICKS):
        message = refusal(header(metadata, q=row_major_layer()))
        assert "set `dialect`" in message and "dialect modelopt is the likely one" in message


def test_modelopt_with_layer_entries_and_only_aligned_shapes_is_left_to_the_user():
    head = header(MODELOPT | {ENTRY: '{"layers": {}}'}, q=comfy_layer(256, 128))
    message = refusal(head)
    assert "no layer of this file has a shape that tells" in message
    assert "set `dialect` to modelopt_swizzled if the export " in message


def test_a_file_beside_the_checkpoint_never_decides_over_markers_or_header_entries(tmp_path: Path):
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    layers = header(LISTED, q=comfy_layer()), header(q=marked(comfy_layer(32, 32)))
    for head in (replace(layer, path=tmp_path / "some.safetensors") for layer in layers):
        assert detect(head).dialect == "comfy"


def test_markers_win_over_a_quantization_config_that_modelopt_left_in_the_header():
    assert detect(header(MODELOPT, q=marked(comfy_layer()))).dialect == "comfy"


@pytest.mark.parametrize(
    ("head", "requested", "expected"),
    [
        (header(ok=comfy_layer(), bad=row_major_layer()), "comfy", "shape of row-major scales; expected tiled ones"),
        (header(ok=comfy_layer(), bad=comfy_layer(32, 32)), "modelopt", "shape of tiled scales; expected row-major"),
        (header(ok=comfy_layer(), bad=row_major_layer()), "modelopt_swizzled", "expected tiled ones"),
        (header(a=marked(comfy_layer()), bad=marked(row_major_layer())), "auto", "expected tiled ones, as comfy has"),
        (header(LISTED, bad=row_major_layer()), "auto", "expected tiled ones, as comfy has"),
        (header(a=row_major_layer(), bad=comfy_layer(32, 32)), "modelopt", "expected row-major ones, as modelopt has"),
        (header(bad=comfy_layer()), "compressed_tensors", "it has no `weight_packed`, only weight, weight_scale"),
        (header(bad=comfy_layer()), "lightx2v", "no global scale, only .*; expected `alpha` . `input_global_scale` or"),
    ],
)
def test_tensors_that_contradict_the_dialect_are_refused_by_file_and_layer(head: Header, requested: str, expected: str):
    message = refusal(head, requested)
    assert message.startswith("some.safetensors, layer bad: ")
    pytest.raises(CheckpointError, detect, head, requested).match(expected)
    assert "choose another dialect" in message


def test_a_file_in_two_dialects_is_refused_at_the_layer_of_the_other():
    packed = {"weight_packed": entry("U8", 32, 16), "weight_scale": entry("F8_E4M3", 32, 2)}
    first = packed | {"weight_global_scale": entry("F32", 1)}
    assert refusal(header(a=first, bad=marked(row_major_layer()))).startswith("some.safetensors, layer bad: ")
    assert refusal(header(a=marked(comfy_layer()), bad=first)).startswith("some.safetensors, layer bad: ")


@pytest.mark.parametrize("more", [{}, LIGHTRICKS, MODELOPT], ids=["nothing", "lightricks", "modelopt"])
def test_layers_without_a_mark_beside_marked_ones_may_be_of_another_writer(more: dict):
    """Both are aligned, so no shape tells the ModelOpt layers that somebody merged into a file for ComfyUI."""
    some = {ENTRY: json.dumps({"layers": {"a": {"format": "nvfp4"}}})}
    heads = [header(more, a=marked(comfy_layer()), b=comfy_layer())]
    heads += [header(more | some, a=comfy_layer(), b=comfy_layer())] if more is not MODELOPT else []
    for head in heads:
        message = refusal(head)
        assert "1 of its 2 NVFP4 layers are declared neither by markers nor by the header, b for one" in message
        assert "set `dialect` (comfy if tools for ComfyUI wrote them all)" in message
        assert detect(head, "comfy").dialect == "comfy"
    both = header(more | some, a=comfy_layer(), b=marked(comfy_layer()))
    assert more is MODELOPT or detect(both).dialect == "comfy"


def test_a_header_entry_that_names_no_nvfp4_layer_declares_none():
    head = header({ENTRY: json.dumps({"layers": {"other": {"format": "nvfp4"}}})}, q=comfy_layer())
    assert "neither markers nor the header say in which layout" in refusal(head)


def test_modelopt_s_file_in_the_folder_does_not_decide_over_lightricks_own_header(tmp_path: Path):
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    head = replace(header(LIGHTRICKS, q=comfy_layer(32, 32)), path=tmp_path / "some.safetensors")
    message = refusal(head)
    assert "hf_quant_config.json beside the file says ModelOpt" in message
    assert "set `dialect` (comfy if that file came with another model" in message
    rows = replace(header(LIGHTRICKS, q=row_major_layer()), path=tmp_path / "some.safetensors")
    assert detect(rows).dialect == "modelopt"


DAMAGE = {
    "no block scales": ({"weight_scale": None}, "it has no `weight_scale`; expected the block scales"),
    "no global scale": ({"weight_scale_2": None}, "it has no global scale, only comfy_quant, weight"),
    "K not a multiple of 16": ({"weight": entry("U8", 128, 28)}, "28 bytes, 56 columns; expected a multiple of 16"),
    "no columns": ({"weight": entry("U8", 128, 0)}, "0 bytes, 0 columns"),
    "rows not padded": (
        {"weight": entry("U8", 120, 32)},
        "120 packed rows; expected a multiple of 16, as ComfyUI pads",
    ),
    "scales too few": ({"weight_scale": entry("F8_E4M3", 127, 4)}, r"shape \(127, 4\) for 128 x 64 weights; expected"),
    "scales transposed": ({"weight_scale": entry("F8_E4M3", 4, 128)}, r"shape \(4, 128\) for 128 x 64 weights"),
    "scales flattened": ({"weight_scale": entry("F8_E4M3", 512)}, r"shape \(512,\) for 128 x 64 weights"),
    "scale of a tensor": ({"weight_scale": entry("F8_E4M3")}, r"shape \(\) for 128 x 64 weights"),
    "scales in fp32": ({"weight_scale": entry("F32", 128, 4)}, "`weight_scale` is F32; expected F8_E4M3"),
    "scales in e5m2": ({"weight_scale": entry("F8_E5M2", 128, 4)}, "`weight_scale` is F8_E5M2; expected F8_E4M3"),
    "two global scales": (
        {"weight_scale_2": entry("F32", 2)},
        r"`weight_scale_2` has shape \(2,\); expected one number",
    ),
    "a scale a row": ({"weight_scale_2": entry("F32", 128, 1)}, r"has shape \(128, 1\); expected one number"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_layer_is_refused_by_file_and_layer(how: str):
    change, expected = DAMAGE[how]
    damaged = {name: info for name, info in (marked(comfy_layer()) | change).items() if info is not None}
    message = refusal(header(ok=marked(comfy_layer()), bad=damaged))
    assert message.startswith("some.safetensors, layer bad: ")
    pytest.raises(CheckpointError, detect, header(bad=damaged)).match(expected)
    assert "download it again or choose another dialect" in message


def planned(dialect: str) -> DialectPlan:
    names = {key for keys, _ in DIALECTS[dialect].global_scales[:1] for key in keys}
    layer = comfy_layer() if DIALECTS[dialect].weight == "weight" else {"weight_packed": entry("U8", 128, 32)}
    layer.pop("weight_scale_2", None)
    layer |= {"weight_scale": entry("F8_E4M3", 128, 4)} | {name: entry("F32") for name in names}
    return detect(header(q=layer), dialect)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.25])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_global_scale_that_is_no_factor_is_refused_by_file_and_layer(dialect: str, value: float):
    stored = {"weight_scale": torch.zeros(128, 4, dtype=torch.uint8), "input_global_scale": torch.tensor(128.0)}
    stored |= {name: torch.zeros(128, 32, dtype=torch.uint8) for name in ("weight", "weight_packed")}
    stored |= {name: torch.tensor(value) for name in ("weight_scale_2", "weight_global_scale", "alpha")}
    with pytest.raises(CheckpointError, match="^some.safetensors, layer q: its global scale is .*; expected a finite"):
        host_layer(planned(dialect), "q", stored.__getitem__)


def test_a_divisor_of_zero_is_refused():
    stored = {"weight_global_scale": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="layer q: its global scale is inf"):
        host_layer(planned("compressed_tensors"), "q", stored.__getitem__)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            '"layers"',
            "{}",
            '{"layers": []}',
            '{"layers": {"q": 1}}',
            '{"layers": {"q": "nvfp4"}}',
        ),
        *('{"layers": {"q": {}}}', '{"layers": {"q": {"format": null}}}', "[" * 100_000),
    ],
    ids=lambda text: text[:24] or "empty",
)
def test_a_broken_header_entry_is_refused_and_named(text: str):
    message = refusal(header({ENTRY: text}, q=comfy_layer()))
    assert ENTRY in message and len(message) < 500


def test_a_header_entry_that_calls_packed_bytes_something_else_is_refused():
    head = header({ENTRY: '{"layers": {"bad": {"format": "float8_e4m3fn"}}}'}, bad=comfy_layer())
    message = refusal(head)
    assert message.startswith("some.safetensors, layer bad: ") and "float8_e4m3fn" in message


def test_a_config_nested_without_end_is_no_declaration():
    assert "set `dialect`" in refusal(header({"config": "[" * 100_000}, q=comfy_layer()))
