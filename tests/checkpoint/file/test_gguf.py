# SPDX-License-Identifier: Apache-2.0
"""The head of a GGUF file gives names, sides and texts; what is no such head is refused with a reason."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvfp4_video.checkpoint.file.gguf import read_gguf
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.signatures import find_model


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(names: dict[str, tuple[int, ...]], entries: list[bytes] | None = None, version: int = 3) -> bytes:
    """A GGUF head by hand; ``names``: sides as PyTorch has them, the file has them turned round."""
    kv = entries if entries is not None else []
    data = b"GGUF" + struct.pack("<IQQ", version, len(names), len(kv)) + b"".join(kv)
    for name, sides in names.items():
        data += text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *reversed(sides), 12, 0)
    return data


LTX = {name + ".weight": (64, 32) for name in ("adaln_single.linear", "audio_adaln_single.linear",
                                               "transformer_blocks.0.attn1.to_gate_logits")}  # fmt: skip
ENTRIES = [
    text("general.architecture") + struct.pack("<I", 8) + text("ltxv"),
    text("general.quantization_version") + struct.pack("<II", 4, 2),
    text("a.list") + struct.pack("<IIQ", 9, 5, 3) + bytes(12),
    text("a.list.of.texts") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("y"),
    text("general.name") + struct.pack("<I", 8) + text("LTX Distilled"),
]


def test_names_sides_and_texts_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "a.gguf"
    path.write_bytes(head(LTX, ENTRIES) + bytes(100))
    header = read_gguf(path)
    assert header.metadata == {"general.architecture": "ltxv", "general.name": "LTX Distilled"}
    assert {name: info.shape for name, info in header.tensors.items()} == LTX
    assert find_model(header).family == "LTX-2.3"


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", b"GGML" + bytes(40), head(LTX, ENTRIES, version=1), head(LTX, ENTRIES)[:-30],
     b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), head({}, [text("x") + struct.pack("<I", 77)]),
     head({}, [struct.pack("<Q", 1 << 62)]),
     b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("n") + struct.pack("<I", 900)],
)  # fmt: skip
def test_what_is_no_such_head_is_refused(data: bytes, tmp_path: Path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        read_gguf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 400), st.binary(max_size=8))
def test_no_damage_raises_anything_else(tmp_path: Path, place: int, damage: bytes):
    data = head(LTX, ENTRIES)
    path = tmp_path / "a.gguf"
    path.write_bytes(data[:place] + damage + data[place + len(damage) :])
    try:
        read_gguf(path)
    except CheckpointError:
        pass
