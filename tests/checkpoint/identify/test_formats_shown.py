# SPDX-License-Identifier: Apache-2.0
"""Formats that no tool here reads are called what they are by inspect, and refused by that name elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.dtypes import bytes_of
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.write.plan import QuantizeSettings, plan_quantization
from nvfp4_video.checkpoint.write.repair import repair

PREFIX = "model.diffusion_model."
BNB = {"weight": ("U8", (1024, 1)), "weight.absmax": ("F32", (32,)), "weight.quant_map": ("F32", (16,))}
KINDS = {
    "NVFP4 of the dtype F4": {
        "weight": ("F4", (32, 64)), "weight_scale": ("F8_E4M3", (128, 4)), "weight_scale_2": ("F32", ()),
    },
    "MXFP4": {"weight": ("F4", (32, 64)), "weight_scale": ("F8_E8M0", (32, 2))},
    "FP4 without scales": {"weight": ("F4", (32, 64))},
    "F6_E2M3": {"weight": ("F6_E2M3", (32, 64)), "weight_scale": ("F8_E8M0", (32, 2))},
    "F8_E8M0": {"weight": ("F8_E8M0", (32, 64))},
    "bitsandbytes NF4, 4-bit": BNB | {"weight.quant_state.bitsandbytes__nf4": ("U8", (90,))},
    "bitsandbytes FP4, 4-bit": BNB | {"weight.quant_state.bitsandbytes__fp4": ("U8", (90,))},
    "bitsandbytes INT8": {"weight": ("I8", (32, 32)), "SCB": ("F32", (32,)), "weight_format": ("U8", ())},
    "bytes without scales (GGUF?)": {"weight": ("U8", (32, 34))},
}  # fmt: skip


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Zeros, also of dtypes that torch does not have."""
    entries, end = {}, 0
    for name, (dtype, shape) in ({"norm.weight": ("BF16", (8,))} | tensors).items():
        begin, end = end, end + bytes_of(dtype, shape)
        entries[PREFIX + name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


@pytest.mark.parametrize("title", KINDS)
def test_a_layer_is_shown_as_what_it_is_and_no_loader_is_named(tmp_path, title):
    path = write(tmp_path / "m.safetensors", {f"blocks.0.proj.{key}": value for key, value in KINDS[title].items()})
    found = inspect_checkpoint(path)
    assert found.formats[title][0] == 1
    assert found.loaders == {}
    assert any("1 layers are" in text for text in found.missing)
    with pytest.raises(CheckpointError, match="blocks.0.proj"):
        repair(path, tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError):
        plan_quantization(path, QuantizeSettings())


STRAYS = {
    "mlp.up_blocks": ("U8", (4, 32, 2, 16)),
    "mlp.up_scales": ("U8", (4, 32, 2)),
    **{f"lone_{dtype}": (dtype, (32,)) for dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "U8")},
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_tensor_that_belongs_to_no_weight_is_shown_and_refused_by_what_would_use_it(tmp_path, name):
    path = write(tmp_path / "m.safetensors", {name: STRAYS[name], "q.weight": ("BF16", (32, 32))})
    found = inspect_checkpoint(path)
    assert any(f"tensor '{PREFIX}{name}' ({STRAYS[name][0]}" in text for text in found.missing)
    assert found.loaders == {} and STRAYS[name][0] in found.formats
    for tool in (lambda: repair(path, tmp_path / "r.safetensors"), lambda: plan_quantization(path, QuantizeSettings())):
        with pytest.raises(CheckpointError, match=name):
            tool()


def test_blocks_as_gpt_oss_has_them_are_called_mxfp4(tmp_path):
    found = inspect_checkpoint(write(tmp_path / "m.safetensors", STRAYS))
    assert any("is MXFP4 in blocks" in text for text in found.missing)


def test_a_stray_beside_the_model_is_shown_and_copied(tmp_path):
    path = write(tmp_path / "m.safetensors", {"q.weight": ("F8_E4M3", (32, 32)), "q.weight_scale": ("F32", ())})
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["other.lone"] = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [len(data) - 8 - length] * 2}
    entries["other.lone"]["data_offsets"][1] += 4
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data[8 + length :]) + b"abcd")
    assert inspect_checkpoint(path).loaders
    repair(path, tmp_path / "r.safetensors")
    assert load_bytes(tmp_path / "r.safetensors", "other.lone") == b"abcd"


def load_bytes(path: Path, name: str) -> bytes:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return data[8 + length + begin : 8 + length + end]
