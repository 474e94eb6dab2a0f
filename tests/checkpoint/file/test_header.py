# SPDX-License-Identifier: Apache-2.0
"""The reader of safetensors headers: sound files, hostile files, fuzzing against the safetensors package."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvfp4_video.checkpoint.file import header as header_module
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.dtypes import BITS
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo, read_header
from nvfp4_video.checkpoint.file.torch_dtypes import DTYPES

# No example database: the tests leave nothing behind in the checkout.
fuzz = settings(max_examples=250)


def pack(header: object, data: bytes = b"") -> bytes:
    """Header (JSON text, bytes, or anything json.dumps takes) and data -> the bytes of a file."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def fuzz_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


def test_a_file_written_by_hand_is_read_as_the_format_says(tmp_path):
    text = (
        b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},"a":{"dtype":"U8","shape":[1,3],"data_offsets":[0,3]},'
        b'"s":{"dtype":"BF16","shape":[],"data_offsets":[11,13]},"e":{"dtype":"I64","shape":[0,7],"data_offsets":[3,3]},'
        b'"__metadata__":{"config":"{}"}}   '
    )
    data = bytes([7, 8, 9]) + bytes.fromhex("0000803f000000c0") + bytes.fromhex("c03f")
    path = tmp_path / "hand.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    base = 8 + len(text)
    header = read_header(path)
    assert header == Header(
        path,
        {
            "b": TensorInfo("F32", (2,), base + 3, base + 11),
            "a": TensorInfo("U8", (1, 3), base, base + 3),
            "s": TensorInfo("BF16", (), base + 11, base + 13),
            "e": TensorInfo("I64", (0, 7), base + 3, base + 3),
        },
        {"config": "{}"},
        base + 13,
    )
    assert list(header.tensors) == ["b", "a", "s", "e"]
    info = header.tensors["b"]
    assert (info.nbytes, info.numel, info.torch_dtype) == (8, 2, torch.float32)
    with TensorReader(path) as reader:
        assert reader.get("a").tolist() == [[7, 8, 9]]
        assert reader.get("b").tolist() == [1.0, -2.0]
        assert reader.get("s").item() == 1.5
        assert reader.get("e").shape == (0, 7)
        assert reader.get("e").dtype == torch.int64
        assert bytes(reader.get_bytes("a")) == b"\x07\x08\x09"
        assert bytes(reader.get_bytes("e")) == b""


@pytest.mark.parametrize("header", ["{}", "{}      ", ' {"__metadata__":{}}', '{"__metadata__":null}'])
def test_a_file_without_tensors_is_sound(tmp_path, header):
    path = tmp_path / "none.safetensors"
    path.write_bytes(pack(header))
    assert read_header(str(path)).tensors == {}
    assert read_header(path).metadata == {}
    assert safetensors.deserialize(path.read_bytes()) == []


# Each row: what the file holds, what was found, and the expectation or remedy that the error must state.
PLAIN = {"a": entry(), "b": entry(offsets=(4, 8))}
HOSTILE = {
    "empty": (b"", "the file is empty", "download it again"),
    "seven binary bytes": (b"\x01\0\0\0\0\0\0", "only 7 bytes", "download it again"),
    "all zeros": (b"\0" * 64, "are zero", "download it again"),
    "header longer than the file": (pack(PLAIN, b"12345678")[:40], "missing", "download it again"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "100,000,001 bytes", "at most 100,000,000"),
    "header of 2**64 - 1": (b"\xff" * 16, "18,446,744,073,709,551,615", "at most 100,000,000"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git-LFS pointer", "git lfs"),
    "web page": (b"\n<!DOCTYPE html>\n<html><head>caf\xc3\xa9", "web page", "download the file itself"),
    "short message": (b"denied", "text that begins 'denied'", "log in"),
    "JSON message": (b'{"error":"Access to the model is restricted"}', "text that begins", "log in"),
    "zip pickle": (b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0archive/data.pkl", "pickle", "convert it"),
    "bare pickle": (b"\x80\x02}q\0X\x05\0\0\0state", "pickle", "convert it"),
    "GGUF": (b"GGUF\x03\0\0\0\x10\0\0\0", "GGUF", "safetensors version"),
    "not UTF-8": (pack(b'{"\xff":1}'), "valid JSON", "damaged"),
    "UTF-16": (pack('{"a":1}'.encode("utf-16")), "valid JSON", "damaged"),
    "not JSON": (pack("{nope}"), "valid JSON", "damaged"),
    "NaN": (pack('{"a":NaN}'), "NaN", "damaged"),
    "cut JSON": (pack('{"a":'), "valid JSON", "damaged"),
    "lone surrogate": (pack({"\ud800": entry()}, b"1234"), "Unicode", "damaged"),
    "duplicate tensor": (pack(json.dumps(PLAIN).replace('"b"', '"a"'), bytes(8)), "'a' occurs twice", "damaged"),
    "duplicate field": (pack('{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' occurs twice", "damaged"),
    "list": (pack([1, 2]), "its header is [1, 2]", "a JSON object"),
    "nested": (pack("[" * 200_000), "nested too deeply", "damaged"),
    "nested value": (pack('{"a":' + "[" * 300 + "]" * 300 + "}"), "tensor 'a' is", "dtype, shape"),
    "giant integer": (pack('{"a":{"dtype":"U8","shape":[' + "9" * 6000 + '],"data_offsets":[0,4]}}'), "", "damaged"),
    "metadata a list": (pack({"__metadata__": []}), "__metadata__ is []", "strings to strings"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__ is", "strings to strings"),
    "entry a string": (pack({"a": "x"}), "tensor 'a' is 'x'", "dtype, shape and data_offsets"),
    "no dtype": (pack({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), "unknown dtype None", "'a'"),
    "half a byte": (pack({"a": entry("F4", [7])}, b"1234"), "shape [7]", "fill whole bytes"),
    "sub-byte dtype of wrong size": (pack({"a": entry("F6_E2M3", [4])}, b"1234"), "bytes 0 to 4", "span of 3 bytes"),
    "dtype a list": (pack({"a": entry(["U8"])}, b"1234"), "unknown dtype ['U8']", "'a'"),
    "negative shape": (pack({"a": entry(shape=[-4])}, b"1234"), "shape [-4]", "non-negative"),
    "two negatives": (pack({"a": entry(shape=[-2, -2])}, b"1234"), "shape [-2, -2]", "non-negative"),
    "boolean shape": (pack({"a": entry(shape=[True, 4])}, b"1234"), "shape [True, 4]", "non-negative"),
    "float shape": (pack({"a": entry(shape=[4.0])}, b"1234"), "shape [4.0]", "non-negative"),
    "shape a number": (pack({"a": entry(shape=4)}, b"1234"), "shape 4", "non-negative"),
    "no shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), "shape None", "'a'"),
    "65 dimensions": (pack({"a": entry(shape=[1] * 64 + [4])}, b"1234"), "shape [1, 1,", "at most 64"),
    "dimension over int64": (pack({"a": entry(shape=[2**63, 0])}), "shape [9223372036854775808, 0]", "'a'"),
    "size over int64": (pack({"a": entry(shape=[2**62, 2**62])}, b"1234"), "shape", "below 2**63"),
    "empty, strides over int64": (pack({"a": entry(shape=[0, 2**62, 4], offsets=[0, 0])}), "shape", "below 2**63"),
    "size wraps to 4": (pack({"a": entry(shape=[2**62 + 1, 4])}, b"1234"), "shape", "below 2**63"),
    "one offset": (pack({"a": entry(offsets=[0])}, b"1234"), "data_offsets [0]", "two non-negative"),
    "boolean offsets": (pack({"a": entry(shape=[1], offsets=[False, True])}, b"1"), "data_offsets", "two non-negative"),
    "negative offset": (pack({"a": entry(offsets=[-4, 0])}, b"1234"), "data_offsets [-4, 0]", "two non-negative"),
    "no offsets": (pack({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "data_offsets None", "'a'"),
    "begin after end": (pack({"a": entry(offsets=[4, 0])}, b"1234"), "bytes 4 to 0", "span of 4 bytes"),
    "wrong size": (pack({"a": entry("BF16")}, b"1234"), "bytes 0 to 4", "span of 8 bytes for BF16"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"), "'b' overlaps 'a'", "without overlaps"),
    "same bytes": (pack({"a": entry(), "b": entry()}, b"1234"), "overlaps", "without overlaps"),
    "hole": (pack({"a": entry(), "b": entry(offsets=[5, 9])}, b"1" * 9), "leaves 1 unused bytes after 'a'", "holes"),
    "hole at the start": (pack({"a": entry(offsets=[8, 12])}, b"1" * 12), "8 unused bytes after the header", "holes"),
    "truncated": (pack(PLAIN, b"12345"), "3 of its", "download it again"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_name_the_fault_and_a_remedy(tmp_path, case):
    content, found, remedy = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith("hostile.safetensors: ")
    assert found in message
    assert remedy in message
    assert len(message) < 700
    assert "\n" not in message
    with pytest.raises(CheckpointError):
        TensorReader(path)


def test_bytes_behind_the_last_tensor_are_counted_and_the_tensors_are_read(tmp_path):
    path = tmp_path / "trailing.safetensors"
    path.write_bytes(pack({"a": entry(), "b": entry(offsets=[4, 8])}, b"123456789ab"))
    assert read_header(path).trailing == 3
    with TensorReader(path) as reader:
        assert bytes(reader.get_bytes("b")) == b"5678"


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [2, 4]), ("F6_E2M3", [4]), ("F6_E3M2", [2, 2]), ("F8_E8M0", [3])])
def test_dtypes_below_a_byte_are_described_and_not_read_as_numbers(tmp_path, dtype, shape):
    path = tmp_path / "small.safetensors"
    nbytes = math.prod(shape) * BITS[dtype] // 8
    path.write_bytes(pack({"a": entry(dtype, shape, [0, nbytes])}, bytes(range(nbytes))))
    info = read_header(path).tensors["a"]
    assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(shape), nbytes)
    with TensorReader(path) as reader:
        assert bytes(reader.get_bytes("a")) == bytes(range(nbytes))
        if dtype in DTYPES:
            assert reader.get("a").shape == tuple(shape)
        else:
            with pytest.raises(CheckpointError, match=f"dtype {dtype}"):
                reader.get("a")


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: the file does not exist"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="this is a folder"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="not a file name"):
        read_header("a\0b.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(tmp_path / "pipe.safetensors")


def test_a_pipe_that_took_the_file_s_place_after_it_was_looked_at_is_not_waited_for(tmp_path, monkeypatch):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes")
    (tmp_path / "plain").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    plain, original = os.stat(tmp_path / "plain"), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: plain if str(path).endswith("pipe") else original(path, **how))
    with pytest.raises(CheckpointError, match="not a regular file"), header_module.open_regular(tmp_path / "pipe"):
        pass


def test_entries_in_another_order_or_with_further_fields_are_read_alike(tmp_path):
    path = tmp_path / "other.safetensors"
    plain = {"a": entry(), "b": entry(shape=[0, 3], offsets=[4, 4])}
    read = []
    for change in (lambda e: e, lambda e: dict(reversed(e.items())), lambda e: e | {"more": {"dtype": "U8"}}):
        content = pack({name: change(fields) for name, fields in plain.items()}, bytes(4))
        path.write_bytes(content)
        data = len(content) - 4
        infos = read_header(path).tensors.items()
        read.append({name: info._replace(start=info.start - data, end=info.end - data) for name, info in infos})
    assert read[0] == read[1] == read[2] == {"a": TensorInfo("U8", (4,), 0, 4), "b": TensorInfo("U8", (0, 3), 4, 4)}


def test_a_true_that_equals_a_size_read_before_is_still_no_size(tmp_path):
    path = tmp_path / "true.safetensors"
    path.write_bytes(pack({"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[True], offsets=[1, 2])}, b"12"))
    with pytest.raises(CheckpointError, match="tensor 'b' has the shape"):
        read_header(path)


def test_tensors_of_one_shape_share_it(tmp_path):
    path = tmp_path / "many.safetensors"
    path.write_bytes(pack({f"t{i}": entry(shape=[2, 2], offsets=[4 * i, 4 * i + 4]) for i in range(9)}, bytes(36)))
    infos = list(read_header(path).tensors.values())
    assert len({id(info.shape) for info in infos}) == len({id(info.dtype) for info in infos}) == 1


@pytest.mark.parametrize(
    "text",
    ['{"a":[' + "[]," * 1_000_001 + "[]]}", '{"a":[' + "10," * 1_000_001 + "1]}",
     '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(1_000_002)) + "}}"],
    ids=["lists", "numbers", "metadata"],
)  # fmt: skip
def test_a_header_of_more_values_than_its_tensors_need_is_refused_before_it_is_parsed(tmp_path, text, monkeypatch):
    monkeypatch.setattr(header_module.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    path = tmp_path / "dense.safetensors"
    path.write_bytes(pack(text))
    with pytest.raises(CheckpointError, match="far more values than its 0 tensors need"):
        read_header(path)


def test_a_header_of_more_tensors_than_any_file_has_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "many.safetensors"
    path.write_bytes(pack({f"t{i}": entry(offsets=[4 * i, 4 * i + 4]) for i in range(9)}, bytes(36)))
    monkeypatch.setattr(header_module, "_MOST_TENSORS", 9)
    assert len(read_header(path).tensors) == 9
    monkeypatch.setattr(header_module, "_MOST_TENSORS", 8)
    monkeypatch.setattr(header_module.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match="lists 9 tensors; expected at most 8"):
        read_header(path)


def test_objects_that_are_no_entries_are_not_collected_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(header_module, "_MOST_UNUSUAL", 5)
    path = tmp_path / "objects.safetensors"
    path.write_bytes(pack('{"a":[' + "{}," * 6 + "{}]}"))
    with pytest.raises(CheckpointError, match="more than 5 objects are no sound entries"):
        read_header(path)


def test_the_missing_bytes_of_a_truncated_file_are_counted(tmp_path):
    path = tmp_path / "cut.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1000)}, path)
    whole = path.stat().st_size
    os.truncate(path, whole - 1234)
    with pytest.raises(CheckpointError, match=f"1,234 of its {whole:,} bytes are missing"):
        read_header(path)


def check_outcome(path: Path, content: bytes) -> bool:
    """Whether ``content`` is accepted. Only CheckpointError may escape; what we accept, the reference must accept."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(error).startswith("fuzzed.safetensors: ")
        return False
    assert header.file_size == len(content)
    data_start = 8 + int.from_bytes(content[:8], "little")
    reference = dict(safetensors.deserialize(content[: len(content) - header.trailing]))
    assert set(reference) == set(header.tensors)
    with TensorReader(header) as reader:
        for name, info in header.tensors.items():
            assert data_start <= info.start <= info.end <= len(content)
            assert 8 * info.nbytes == info.numel * BITS[info.dtype]
            if info.dtype in DTYPES:
                assert reader.get(name).shape == info.shape
            assert bytes(reader.get_bytes(name)) == bytes(reference[name]["data"])
    return not header.trailing


@fuzz
@given(content=st.binary(max_size=200), honest_length=st.booleans())
def test_random_bytes_raise_only_checkpoint_errors(fuzz_file, content, honest_length):
    check_outcome(fuzz_file, pack(content) if honest_length else content)


VALID = pack(
    {"__metadata__": {"format": "pt"}, "a": entry("BF16", [2, 3], [0, 12]), "b": entry("U8", [5], [12, 17])}, bytes(17)
)


positions = st.integers(0, len(VALID) - 1)
kinds = st.sampled_from(["set", "insert", "delete", "swap", "cut"])


@fuzz
@given(
    edits=st.lists(st.tuples(positions, kinds, st.binary(max_size=3)), min_size=1, max_size=4),
    relength=st.booleans(),
)
def test_a_damaged_header_is_refused_or_still_describes_the_file(fuzz_file, edits, relength):
    content = VALID
    for position, kind, new in edits:
        if kind == "set":
            content = content[:position] + new + content[position + len(new) :]
        elif kind == "insert":
            content = content[:position] + new + content[position:]
        elif kind == "delete":
            content = content[:position] + content[position + max(1, len(new)) :]
        elif kind == "swap":
            content = content[:position] + content[position : position + 8][::-1] + content[position + 8 :]
        else:
            content = content[: len(content) - position % 5]
    if relength and len(content) > 25:
        content = pack(content[8:-17], content[-17:])
    check_outcome(fuzz_file, content)


small = st.integers(0, 3)
odd_value = st.sampled_from([None, True, -1, 1.0, float("nan"), 2**64, "", "U8", [], {}, [[]]]) | st.integers()
mostly_shape = st.one_of(st.lists(small, max_size=3), st.lists(st.one_of(small, odd_value), max_size=3), odd_value)
mostly_dtype = st.one_of(st.sampled_from([*DTYPES, "F4", "F6_E2M3"]), odd_value)
mostly_offsets = st.one_of(st.lists(st.integers(0, 40), min_size=2, max_size=2), st.lists(odd_value, max_size=3))
loose_entry = st.one_of(
    st.fixed_dictionaries({"dtype": mostly_dtype, "shape": mostly_shape, "data_offsets": mostly_offsets}), odd_value
)


@fuzz
@given(
    tensors=st.dictionaries(st.text(max_size=3), loose_entry, max_size=3),
    metadata=st.one_of(st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), odd_value),
    data=st.binary(max_size=40),
)
def test_a_random_structure_is_refused_or_describes_the_file(fuzz_file, tensors, metadata, data):
    check_outcome(fuzz_file, pack({**tensors, "__metadata__": metadata}, data))


@fuzz
@given(
    parts=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(small, max_size=3)), max_size=5),
    shift=st.sampled_from([0, 0, 0, 1, -1]),
    extra=st.sampled_from([0, 0, 0, 1, -1]),
    order=st.randoms(use_true_random=False),
)
def test_laid_out_tensors_are_accepted_exactly_when_the_reference_accepts_them(fuzz_file, parts, shift, extra, order):
    entries, end = [], 0
    for number, (dtype, shape) in enumerate(parts):
        begin = max(0, end + (shift if number == len(parts) - 1 else 0))
        end = begin + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        entries.append((f"t{number}", entry(dtype, shape, [begin, end])))
    order.shuffle(entries)
    content = pack(dict(entries), bytes(max(0, end + extra)))
    try:
        safetensors.deserialize(content)
        expected = True
    except safetensors.SafetensorError:
        expected = False
    assert check_outcome(fuzz_file, content) == expected
