# SPDX-License-Identifier: Apache-2.0
"""Every dialect is told by what its writer declared, and read to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.header import Header, read_header
from nvfp4_video.checkpoint.identify.dialects import DIALECTS, detect
from nvfp4_video.checkpoint.identify.host_layer import host_layer, input_scale
from nvfp4_video.kernels.format import PackedWeight, swap_nibbles, swizzle, unswizzle
from nvfp4_video.kernels.reference import dequantize, quantize
from nvfp4_video.samples import synthetic
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

DIT = synthetic.DIT_PREFIX
GATE = "transformer_blocks.2.attn1.to_gate_logits"
# kind -> dialect and what tells it; {gate} is the first layer whose padding shows.
FOUND = {
    "comfy_markers": ("comfy", "`comfy_quant` markers"),
    "mixed": ("comfy", "`comfy_quant` markers"),
    "comfy_header": ("comfy", f"header entry {ENTRY}"),
    "comfy_header_unprefixed": ("comfy", f"header entry {ENTRY}"),
    "metadata_less": (
        "comfy",
        "no mark; Lightricks' own header, whose NVFP4 files have this layout, tiled scales in {gate}",
    ),
    "modelopt": ("modelopt", "{modelopt}, row-major scales in {gate}"),
    "modelopt_layerwise": ("modelopt", "{modelopt}, row-major scales in {gate}"),
    "modelopt_swizzled": ("modelopt_swizzled", "{modelopt}, tiled scales in {gate}"),
    "compressed_tensors": ("compressed_tensors", "keys `weight_packed`"),
    "lightx2v": ("lightx2v", "keys `alpha` + `input_global_scale`"),
    "lightx2v_absmax": ("lightx2v", "key `weight_global_scale`"),
}


@pytest.fixture(scope="module")
def model():
    """State, config and packed layers of the small LTX-2.3; amax global scales, so that no bit of them is spare."""
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config, exact=False)


def getter(reader: TensorReader, layer: str):
    return lambda suffix: reader.get(f"{layer}.{suffix}")


def padded(weight: PackedWeight) -> tuple[int, int]:
    return weight.packed.shape[0], weight.packed.shape[1] * 2


# Every kind of file


@pytest.mark.parametrize("full", [False, True], ids=["model", "full"])
@pytest.mark.parametrize("sidecar", [False, True], ids=["header", "sidecar"])
@pytest.mark.parametrize("kind", FOUND)
def test_every_kind_of_file_is_told_by_what_its_writer_declared(kind, sidecar, full, model, tmp_path: Path):
    if sidecar and kind == "modelopt_swizzled":
        pytest.skip("ModelOpt tiles scales only in files that say so in their header; test_dialects_refused.py")
    synthetic.write(tmp_path / "file.safetensors", kind, *model, full=full, sidecar=sidecar)
    prefix = DIT if full or kind == "comfy_header_unprefixed" else ""
    plan = detect(read_header(tmp_path / "file.safetensors"), prefix=prefix)
    modelopt = "hf_quant_config.json beside the file" if sidecar else "header entry quantization_config"
    dialect, evidence = FOUND[kind]
    assert (plan.dialect, plan.evidence) == (dialect, evidence.format(gate=prefix + GATE, modelopt=modelopt))
    assert plan.native == (dialect == "comfy")


@pytest.mark.parametrize("full", [False, True], ids=["model", "full"])
@pytest.mark.parametrize("kind", FOUND)
def test_every_kind_of_file_is_read_to_the_bytes_that_were_packed(kind, full, model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *model, full=full)
    prefix = DIT if full or kind == "comfy_header_unprefixed" else ""
    with TensorReader(tmp_path / "file.safetensors") as reader:
        plan = detect(reader.header, prefix=prefix)
        assert plan.nvfp4
        for layer, shape in plan.nvfp4.items():
            expected = model[2][layer.removeprefix(prefix)]
            record = host_layer(plan, layer, getter(reader, layer))
            unpadded = {"modelopt", "modelopt_layerwise", "compressed_tensors", "lightx2v", "lightx2v_absmax"}
            assert shape == record.shape == (expected.shape if kind in unpadded else padded(expected))
            assert torch.equal(record.packed, expected.packed), layer
            assert record.block_scale.dtype == torch.float8_e4m3fn
            assert torch.equal(record.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8)), layer
            assert record.global_scale.shape == () and torch.equal(record.global_scale, expected.global_scale)


@pytest.mark.parametrize("kind", [kind for kind in FOUND if kind != "mixed"])
def test_the_packed_layers_of_the_model_are_found_and_no_others(kind, model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *model, full=True)
    plan = detect(read_header(tmp_path / "file.safetensors"), prefix=DIT)
    assert set(plan.nvfp4) == {DIT + layer for layer in model[2]}
    assert plan.formats == {DIT + layer: {"format": "nvfp4"} for layer in model[2]}


def test_a_mixed_file_keeps_its_fp8_layers_beside_the_nvfp4_ones(model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", "mixed", *model)
    plan = detect(read_header(tmp_path / "file.safetensors"))
    gates = {layer for layer in model[2] if layer.endswith("to_gate_logits")}
    sound = {layer for layer in model[2] if "audio" in layer} - gates
    assert set(plan.nvfp4) == set(model[2]) - sound - gates
    assert {layer for layer, content in plan.formats.items() if content == {"format": "float8_e4m3fn"}} == sound
    assert not gates & set(plan.formats)


@pytest.mark.parametrize("kind", ["bf16", "bf16_decoded"])
def test_a_file_without_nvfp4_needs_no_dialect(kind, model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *model)
    for requested in ("auto", "modelopt"):
        plan = detect(read_header(tmp_path / "file.safetensors"), requested)
        assert (plan.dialect, plan.evidence, plan.nvfp4, plan.formats) == (None, "no NVFP4 layer", {}, {})
        assert plan.native


def test_native_tensors_stay_where_the_file_is_mapped(model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", "comfy_markers", *model)
    with TensorReader(tmp_path / "file.safetensors") as reader:
        plan = detect(reader.header)
        for layer in plan.nvfp4:
            record = host_layer(plan, layer, getter(reader, layer))
            stored = reader.get(f"{layer}.weight"), reader.get(f"{layer}.weight_scale")
            assert [record.packed.data_ptr(), record.block_scale.data_ptr()] == [part.data_ptr() for part in stored]


@pytest.mark.parametrize("kind", FOUND)
def test_the_input_scale_multiplies_whatever_the_file_stores(kind, model, tmp_path: Path):
    synthetic.write(tmp_path / "file.safetensors", kind, *model)
    with TensorReader(tmp_path / "file.safetensors") as reader:
        plan = detect(reader.header, prefix=DIT if kind == "comfy_header_unprefixed" else "")
        layer = next(iter(plan.nvfp4))
        scale = input_scale(plan, layer, getter(reader, layer))
    dynamic = {"comfy_markers", "comfy_header", "comfy_header_unprefixed", "mixed"}
    if kind in dynamic:
        assert scale is None
    else:
        assert (scale.shape, scale.dtype, scale.item()) == ((), torch.float32, 1 / 128)


# Names and prefixes


@pytest.mark.parametrize("written", ["blocks.0.q", "model.diffusion_model.blocks.0.q"])
def test_header_entries_reach_their_layer_with_and_without_the_prefix(written: str):
    content = {"format": "nvfp4", "full_precision_matrix_mult": True}
    head = header({ENTRY: json.dumps({"layers": {written: content}})}, **{f"{DIT}blocks.0.q": comfy_layer()})
    plan = detect(head, prefix=DIT)
    assert plan.evidence == f"header entry {ENTRY}"
    assert plan.formats == {f"{DIT}blocks.0.q": content}


def test_layers_outside_the_prefix_are_none_of_the_model_s_business():
    broken = {"weight": entry("U8", 16, 12), "weight_scale_2": entry("F32")}
    head = header(LIGHTRICKS, **{f"{DIT}q": comfy_layer(), "text_encoders.q": broken, "vae.q": row_major_layer()})
    assert list(detect(head, prefix=DIT).nvfp4) == [f"{DIT}q"]
    assert "text_encoders.q" in refusal(head, "comfy")


def test_header_entries_of_layers_that_are_not_in_the_file_change_nothing():
    head = header({ENTRY: json.dumps({"layers": dict.fromkeys(("gone", "q"), {"format": "nvfp4"})})}, q=comfy_layer())
    assert detect(head).formats == {"q": {"format": "nvfp4"}}


# The dialect that was asked for


@pytest.mark.parametrize("dialect", ["comfy", "modelopt", "modelopt_swizzled"])
def test_the_dialect_asked_for_decides_how_the_same_bytes_are_read(dialect: str):
    generator = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(256, (128, 32), dtype=torch.uint8, generator=generator),
        "weight_scale": torch.randint(0x7F, (128, 4), dtype=torch.uint8, generator=generator),
        "weight_scale_2": torch.tensor(0.5),
    }
    plan = detect(header(q=comfy_layer()), dialect)
    assert (plan.dialect, plan.evidence) == (dialect, "stated by the user")
    record = host_layer(plan, "q", stored.__getitem__)
    swapped = dialect != "comfy"
    assert torch.equal(record.packed, swap_nibbles(stored["weight"]) if swapped else stored["weight"])
    tiled = swizzle(stored["weight_scale"]) if dialect == "modelopt" else stored["weight_scale"]
    assert torch.equal(record.block_scale.view(torch.uint8), tiled)


def test_the_dialect_asked_for_overrides_what_the_header_declares():
    listed = {ENTRY: json.dumps({"layers": {"q": {"format": "nvfp4"}}})}
    for metadata, requested in ((MODELOPT, "comfy"), (listed, "modelopt"), (LIGHTRICKS, "modelopt")):
        head = header(metadata, q=comfy_layer(32, 32) if metadata is MODELOPT else comfy_layer())
        assert detect(head).dialect != requested
        assert (detect(head, requested).dialect, detect(head, requested).evidence) == (requested, "stated by the user")


def test_an_unknown_dialect_is_refused_with_the_known_ones():
    message = refusal(header(q=comfy_layer()), "gguf")
    assert "unknown dialect 'gguf'" in message and all(name in message for name in ("auto", *DIALECTS))


@pytest.mark.parametrize("class_name", ["AVTransformer3DModel", "LTXVideoTransformer3DModel", "Transformer3DModel"])
def test_a_file_without_a_mark_is_accepted_from_lightricks(class_name: str):
    config = json.dumps({"transformer": {"_class_name": class_name}})
    plan = detect(header({"config": config}, q=comfy_layer()))
    assert plan.dialect == "comfy"
    assert plan.evidence == "no mark; Lightricks' own header, whose NVFP4 files have this layout"


def test_modelopt_with_only_aligned_shapes_is_a_question_where_the_scales_cannot_be_looked_at():
    message = refusal(header(MODELOPT, q=comfy_layer()))
    assert "not measured" in message and "set `dialect` to modelopt_swizzled" in message


def test_a_file_beside_the_checkpoint_counts_only_if_modelopt_wrote_it(tmp_path: Path):
    head = Header(tmp_path / "some.safetensors", header(q=row_major_layer()).tensors, {}, 0)
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "somebody"}}')
    refusal(head)
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "ModelOpt"}}')
    assert detect(head).evidence == "hf_quant_config.json beside the file, row-major scales in q"


def test_block_scales_may_be_stored_as_bytes():
    plan = detect(header(q=marked(comfy_layer() | {"weight_scale": entry("U8", 128, 4)})))
    stored = {
        "weight": torch.zeros(128, 32, dtype=torch.uint8),
        "weight_scale": torch.full((128, 4), 0x38, dtype=torch.uint8),
        "weight_scale_2": torch.ones(1),
    }
    record = host_layer(plan, "q", stored.__getitem__)
    assert torch.equal(record.block_scale.float(), torch.ones(128, 4))
    assert record.global_scale.shape == ()


def test_a_wrong_reading_costs_what_the_measured_facts_say_and_raises_nothing():
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    record = quantize(weight)

    def error(packed: torch.Tensor, scale: torch.Tensor) -> float:
        values = dequantize(PackedWeight(packed, scale, record.global_scale, record.shape), torch.float32)
        return ((values - weight).norm() / weight.norm()).item()

    assert error(record.packed, record.block_scale) == pytest.approx(0.095, abs=0.002)
    assert error(swap_nibbles(record.packed), record.block_scale) == pytest.approx(1.41, abs=0.02)
    assert error(record.packed, unswizzle(record.block_scale, 256, 64)) == pytest.approx(0.36, abs=0.03)
