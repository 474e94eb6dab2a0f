# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and wildcards that no writer makes: one clear error with file and layer, or a right result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.identify.dialects import DIALECTS
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.host.load.text_encoder import load_text_encoder
from nvfp4_video.tests.support.files import save
from nvfp4_video.tests.support.hostile import ESCAPE, SHOWN, checkpoint


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("start", ["transformer_blocks", "blocks", "model.layers"])
def test_a_block_number_of_4400_digits_is_a_name_too_long(start: str, tmp_path: Path):
    path = save(tmp_path / "x.safetensors", {f"{start}.{'9' * 4400}.attn1.to_q.weight": bf16(16, 16)})
    for read in (inspect_checkpoint, load_text_encoder, lambda path: quantize_checkpoint(path, tmp_path / "t")):
        with pytest.raises(CheckpointError, match=r"x\.safetensors: .*has 4,4\d\d characters; expected at most 1,000"):
            read(path)


def test_a_block_number_of_900_digits_is_a_number(tmp_path: Path):
    names = [f"transformer_blocks.{number}.attn1.to_q.weight" for number in ("9" * 900, "2", "10")]
    found = inspect_checkpoint(save(tmp_path / "x.safetensors", {name: bf16(16, 16) for name in names}))
    assert list(found.formats) == ["BF16"] and len(str(found)) < 10_000


@pytest.mark.parametrize("dialect", ["auto", *DIALECTS])
def test_a_weight_of_three_dimensions_beside_a_packed_one_is_refused_by_layer(dialect: str, tmp_path: Path):
    tensors = {
        "a.weight_packed": torch.zeros(16, 8, dtype=torch.uint8),
        "a.weight": torch.zeros(2, 2, 2, dtype=torch.uint8),
        "a.weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
    }
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="x.safetensors, layer a: "):
        inspect_checkpoint(path, dialect)


def test_a_weight_without_a_layer_is_looked_at_and_not_quantised(tmp_path: Path):
    path = save(tmp_path / "x.safetensors", {"weight": bf16(256, 256), "bias": bf16(256)})
    assert inspect_checkpoint(path).formats["BF16"] == (1, 131_584)
    with pytest.raises(CheckpointError, match="x.safetensors: nothing in it would be quantized"):
        quantize_checkpoint(path, tmp_path / "t.safetensors")


@pytest.mark.parametrize("pattern", ["a**b.safetensors", "**.safetensors", "a*[12]b.safetensors"])
def test_a_wildcard_stays_in_its_folder_whatever_stars_it_has(pattern: str, tmp_path: Path):
    (tmp_path / "deeper").mkdir()
    for name in ("a1b", "a2b", "deeper/a1b"):
        save(tmp_path / f"{name}.safetensors", {f"{name}.weight": bf16(2, 2)})
    assert set(open_checkpoint(tmp_path / pattern).header.tensors) == {"a1b.weight", "a2b.weight"}


@pytest.mark.parametrize(
    ("name", "why"), [("x" * 300, "too long"), ("\ud800", "not a file name"), ("a\0b", "not a file name")]
)
def test_what_no_file_can_be_called_is_a_clear_error(name: str, why: str, tmp_path: Path):
    for read in (open_checkpoint, read_header):
        with pytest.raises(CheckpointError, match=why):
            read(tmp_path / name)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b'{"quant_algo": [1]}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_sidecar_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path):
    path = save(tmp_path / "x.safetensors", {"blocks.0.a.weight": bf16(16, 16)})
    (tmp_path / "hf_quant_config.json").write_bytes(content)
    assert list(inspect_checkpoint(path).formats) == ["BF16"]


def test_a_report_shows_the_control_characters_of_a_name(tmp_path: Path):
    text = str(inspect_checkpoint(checkpoint(tmp_path / "x.safetensors", f"{ESCAPE}\nline")))
    assert SHOWN in text and not set("\x1b\x07\u202e\x9b") & set(text)
