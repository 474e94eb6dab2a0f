# SPDX-License-Identifier: Apache-2.0
"""Tensors of dtypes below a byte, weights and scales of shapes and dtypes that no writer means: copied, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.dialects import detect
from nvfp4_video.checkpoint.identify.layers import refuse
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.split import split
from nvfp4_video.samples.damage import Draft, read_draft
from nvfp4_video.tests.support.header_by_hand import entry, header
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny

LAYER = f"{PREFIX}transformer_blocks.1.ff.net.0.proj"
FAST = QuantizeSettings(search=AMAX)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("odd") / "source.safetensors", tiny())


@pytest.fixture(scope="module")
def packed(source: Path) -> Draft:
    quantize_checkpoint(source, source.with_name("packed.safetensors"), FAST)
    return read_draft(source.with_name("packed.safetensors"))


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12)])
def test_split_copies_tensors_of_less_than_a_byte_a_number(dtype: str, nbytes: int, source: Path, tmp_path: Path):
    draft = read_draft(source)
    name = "text_embedding_projection.table"
    draft.tensors[name] = (dtype, (4, 4), bytes(range(nbytes)))
    (part,) = split(draft.write(tmp_path), {"text_projection": "made.safetensors"}, base=tmp_path)
    assert read_header(part.path).tensors[name][:2] == (dtype, (4, 4))
    with TensorReader(part.path) as reader:
        assert bytes(reader.get_bytes(name)) == bytes(range(nbytes))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "U8"])
@pytest.mark.parametrize("beside", ["weight_scale", "input_scale", "pre_quant_scale", "svdquant_lora_a"])
def test_a_weight_without_dimensions_beside_scales_is_described_or_refused(beside: str, dtype: str):
    group = {"weight": entry(dtype), "weight_scale": entry("F32"), beside: entry("BF16")}
    if beside == "svdquant_lora_a":
        group |= {beside: entry("BF16", 4, 8), "svdquant_lora_b": entry("BF16", 8, 4)}
    for options in ({}, {"shown": True}):
        try:
            (layer,) = detect(header(q=group), **options).layers.values()
            assert layer.shape == () and not layer.title.startswith("NVFP4")
        except CheckpointError as error:
            assert "layer q" in str(error)


@pytest.mark.parametrize(("dtype", "content"), [("I32", b"\1\0\0\0"), ("BOOL", b"\1"), ("F8_E5M2", b"\x3c")])
def test_verify_refuses_a_global_scale_that_it_cannot_read_a_second_time(
    dtype: str, content: bytes, packed: Draft, source: Path, tmp_path: Path
):
    draft = packed.copy()
    assert f"{LAYER}.weight_scale_2" in draft.tensors
    draft.tensors[f"{LAYER}.weight_scale_2"] = (dtype, (), content)
    with pytest.raises(CheckpointError, match="weight_scale_2"):
        verify(draft.write(tmp_path), source)


def test_an_error_is_one_line_whatever_breaks_the_name_of_its_layer():
    plan = detect(header(**{"a\nb\x85c\u2028d": {"weight": entry("I32", 4, 4)}}))
    with pytest.raises(CheckpointError) as error:
        refuse("some.safetensors", plan.layers)
    assert str(error.value).splitlines() == [str(error.value)] and r"a\nb\x85c\u2028d" in str(error.value)
