# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: parity with the safetensors package, memory mapping, atomic writing."""

from __future__ import annotations

import errno
import gc
import io
import mmap
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from nvfp4_video.checkpoint.file import container
from nvfp4_video.checkpoint.file.container import PlannedTensor, TensorReader, write_checkpoint
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.file.torch_dtypes import DTYPES

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX: links, rights, replacing a mapped file")


def planned(name: str, tensor: torch.Tensor) -> PlannedTensor:
    dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
    return PlannedTensor(name, dtype, tuple(tensor.shape), lambda: tensor)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bit patterns (NaNs included), of BOOL only 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_packages_read_each_others_files_bit_for_bit(tmp_path, dtype):
    shapes = {"matrix": (5, 3), "scalar": (), "empty": (0, 4), "deep": (1, 2, 1, 3)}
    tensors = {name: random_tensor(DTYPES[dtype], shape) for name, shape in shapes.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_checkpoint(ours, [planned(name, tensor) for name, tensor in tensors.items()], {"format": "pt", "x": "é\n"})
    try:
        safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt", "x": "é\n"})
    except (KeyError, safetensors.SafetensorError):
        pytest.skip(f"this safetensors does not write {dtype}")
    with TensorReader(theirs) as reader:
        assert reader.header.metadata == {"format": "pt", "x": "é\n"}
        assert set(reader.header.tensors) == set(tensors)
        assert all(same_bits(reader.get(name), tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(ours, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt", "x": "é\n"}
        assert set(reader.keys()) == set(tensors)
        assert all(same_bits(reader.get_tensor(name), tensor) for name, tensor in tensors.items())


def save(path: Path, **tensors: torch.Tensor) -> Path:
    write_checkpoint(path, [planned(name, tensor) for name, tensor in tensors.items()])
    return path


def test_tensors_are_views_of_one_mapping_and_raise_no_warning(tmp_path):
    path = save(tmp_path / "m.safetensors", a=torch.arange(8.0), b=torch.arange(4, dtype=torch.int16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TensorReader(path) as reader:
            first, second, other = reader.get("a"), reader.get("a"), reader.get("b")
    assert first.data_ptr() == second.data_ptr()
    assert other.data_ptr() - first.data_ptr() == 32
    assert first.untyped_storage().nbytes() == 32


def test_writing_into_a_tensor_never_reaches_the_file(tmp_path):
    path = save(tmp_path / "m.safetensors", a=torch.arange(8.0))
    before = path.read_bytes()
    with TensorReader(path) as reader:
        reader.get("a").fill_(-1)
    assert path.read_bytes() == before
    with TensorReader(path) as reader:
        assert torch.equal(reader.get("a"), torch.arange(8.0))
        with pytest.raises(TypeError):
            reader.get_bytes("a")[0] = 1


def test_tensors_outlive_the_reader_which_names_what_it_cannot_give(tmp_path):
    path = save(tmp_path / "m.safetensors", a=torch.arange(100_000.0))
    with TensorReader(path) as reader:
        tensor, data = reader.get("a"), reader.get_bytes("a")
        with pytest.raises(CheckpointError, match=r"m\.safetensors: there is no tensor 'b'"):
            reader.get("b")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'a' was asked for after close"):
        reader.get("a")
    del reader
    gc.collect()
    assert torch.equal(tensor, torch.arange(100_000.0))
    assert bytes(data) == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", [name for name, of in DTYPES.items() if of.itemsize > 1])
def test_a_misaligned_tensor_has_the_right_values_in_aligned_memory(tmp_path, dtype):
    wide = random_tensor(DTYPES[dtype], (5, 3))
    path = save(tmp_path / "m.safetensors", odd=torch.tensor([1, 2, 3], dtype=torch.uint8), wide=wide)
    with TensorReader(path) as reader:
        assert reader.header.tensors["wide"].start % wide.itemsize != 0
        tensor = reader.get("wide")
        assert tensor.data_ptr() % wide.itemsize == 0
        assert same_bits(tensor, wide)


def test_without_a_private_mapping_tensors_are_copies_with_the_same_values(tmp_path, monkeypatch):
    path = save(tmp_path / "m.safetensors", a=torch.arange(8.0), e=torch.empty(0, 3))
    real = mmap.mmap

    def read_only_system(*args, **kwargs):
        if kwargs.get("access") != mmap.ACCESS_READ:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(container.mmap, "mmap", read_only_system)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TensorReader(path) as reader:
            reader.get("a").fill_(-1)
            assert torch.equal(reader.get("a"), torch.arange(8.0))
            assert reader.get("e").shape == (0, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: sparse files, overcommit")
def test_a_file_larger_than_memory_is_opened_and_mapped(tmp_path):
    size = 2**40
    head = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    head = len(head).to_bytes(8, "little") + head
    path = tmp_path / "large.safetensors"
    try:
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
    except OSError as error:
        pytest.skip(f"no sparse file of 1 TiB here: {error}")
    with TensorReader(path) as reader:
        tensor = reader.get("a")
    assert tensor.shape == (size,)
    assert tensor[-1].item() == 0


def test_a_header_of_a_file_that_has_changed_since_is_refused(tmp_path):
    path = save(tmp_path / "m.safetensors", a=torch.zeros(4))
    header = read_header(path)
    with TensorReader(header) as reader:
        assert torch.equal(reader.get("a"), torch.zeros(4))
    save(path, b=torch.zeros(4))
    with pytest.raises(CheckpointError, match="changed"):
        TensorReader(header)


def test_the_written_bytes_are_the_header_in_plan_order_padded_then_the_data(tmp_path):
    path = tmp_path / "w.safetensors"
    plan = [
        PlannedTensor("z", "U8", (2,), lambda: memoryview(b"\x01\x02")),
        PlannedTensor("a", "I16", (1,), lambda: torch.tensor([-2], dtype=torch.int16)),
    ]
    write_checkpoint(path, plan, {"k": "ü"})
    content = path.read_bytes()
    text = (
        '{"__metadata__":{"k":"ü"},"z":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"a":{"dtype":"I16","shape":[1],"data_offsets":[2,4]}}'
    ).encode()
    text += b" " * (-len(text) % 8)
    assert content == len(text).to_bytes(8, "little") + text + b"\x01\x02\xfe\xff"
    write_checkpoint(tmp_path / "again.safetensors", plan, {"k": "ü"})
    assert (tmp_path / "again.safetensors").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["again.safetensors", "w.safetensors"]


def test_any_stride_and_a_tensor_that_needs_gradients_are_written_by_value(tmp_path):
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "sliced": base[:, ::2, 1::2],
        "expanded": torch.tensor([1.5, -0.0]).expand(3, 2),
        "gradient": torch.nn.Parameter(torch.tensor([1.0, 2.0])),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj().imag,
    }
    path = save(tmp_path / "w.safetensors", **tensors)
    loaded = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name


@pytest.mark.cuda
def test_a_tensor_on_the_gpu_is_written_by_value(tmp_path):
    tensor = torch.randn(33, 7, device="cuda").to(torch.bfloat16).t()
    path = save(tmp_path / "w.safetensors", a=tensor)
    assert torch.equal(safetensors.torch.load_file(path)["a"], tensor.cpu())


@posix_only
def test_a_mapped_tensor_can_be_streamed_onto_its_own_file(tmp_path):
    path = save(tmp_path / "w.safetensors", a=torch.arange(5.0), b=torch.arange(3, dtype=torch.uint8))
    with TensorReader(path) as reader:
        infos = reader.header.tensors
        plan = [PlannedTensor(n, i.dtype, i.shape, lambda n=n: reader.get_bytes(n)) for n, i in reversed(infos.items())]
        write_checkpoint(path, plan)
        assert torch.equal(reader.get("a"), torch.arange(5.0))
    with TensorReader(path) as reader:
        assert list(reader.header.tensors) == ["b", "a"]
        assert torch.equal(reader.get("a"), torch.arange(5.0))
        assert torch.equal(reader.get("b"), torch.arange(3, dtype=torch.uint8))


def test_progress_counts_data_bytes_in_chunks_and_after_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "CHUNK_BYTES", 16)
    seen = []
    plan = [planned("a", torch.arange(10.0)), planned("e", torch.empty(0)), planned("b", torch.arange(3.0))]
    write_checkpoint(tmp_path / "w.safetensors", plan, on_bytes=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 52), (32, 52), (40, 52), (40, 52), (52, 52)]
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w.safetensors")["a"], torch.arange(10.0))


def test_a_tensor_is_released_before_the_next_is_produced(tmp_path):
    class Buffer(bytearray):
        """A bytearray that can be weakly referenced."""

    alive: list[weakref.ref] = []

    def produce() -> memoryview:
        assert all(reference() is None for reference in alive)
        buffer = Buffer(b"x" * 1000)
        alive.append(weakref.ref(buffer))
        return memoryview(buffer)

    write_checkpoint(tmp_path / "w.safetensors", [PlannedTensor(f"t{i}", "U8", (1000,), produce) for i in range(4)])
    assert len(alive) == 4


def fail(error: BaseException):
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [RuntimeError("cancelled"), KeyboardInterrupt(), OSError("disk"), SystemExit(1)])
@pytest.mark.parametrize("moment", ["produce", "on_bytes"])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_the_old_file_or_none_and_no_temporary_one(tmp_path, error, moment, existing):
    path = tmp_path / "w.safetensors"
    if existing:
        path.write_bytes(b"old content")
    first = planned("a", torch.zeros(100))
    second = PlannedTensor("b", "F32", (1,), fail(error) if moment == "produce" else lambda: torch.zeros(1))
    with pytest.raises(type(error)) as caught:
        write_checkpoint(path, [first, second], on_bytes=fail(error) if moment == "on_bytes" else None)
    assert caught.value is error
    assert os.listdir(tmp_path) == (["w.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"old content"


def test_a_disk_too_small_is_refused_before_anything_is_produced(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=399)
    monkeypatch.setattr(container.shutil, "disk_usage", lambda _: usage)
    plan = [PlannedTensor("a", "F32", (100,), fail(AssertionError("produced")))]
    with pytest.raises(CheckpointError, match=r"w\.safetensors: only 399 bytes .* free on its disk; expected \d+"):
        write_checkpoint(tmp_path / "w.safetensors", plan)
    assert os.listdir(tmp_path) == []


class StingyFile(io.FileIO):
    """A file that takes at most 7 bytes a call and is full after ``room`` of them."""

    room = 10**9

    def write(self, data) -> int:
        if self.tell() >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:7])


@pytest.mark.parametrize("room", [0, 100, 300])
def test_a_disk_that_fills_up_is_named_and_the_old_file_stays(tmp_path, monkeypatch, room):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old content")
    monkeypatch.setattr(StingyFile, "room", room)
    monkeypatch.setattr(container, "open_unnamed", lambda _: None)
    monkeypatch.setattr(container, "open", lambda name, *_, **__: StingyFile(name, "x"), raising=False)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: it cannot be written \(.*No space left.*free space"):
        write_checkpoint(path, [planned("a", torch.zeros(1000))])
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert path.read_bytes() == b"old content"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    tensor = torch.randn(50)
    monkeypatch.setattr(container, "open", lambda name, *_, **__: StingyFile(name, "x"), raising=False)
    path = save(tmp_path / "w.safetensors", a=tensor)
    assert torch.equal(safetensors.torch.load_file(path)["a"], tensor)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_fsync_or_rename_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old content")
    monkeypatch.setattr(container.os, call, fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(path, [planned("a", torch.zeros(3))])
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert path.read_bytes() == b"old content"


def test_the_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(container.os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(container.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    save(tmp_path / "w.safetensors", a=torch.zeros(3))
    assert calls == ["fsync", "replace", "fsync"][: 3 if os.name == "posix" else 2]


@posix_only
def test_a_new_file_has_the_rights_of_the_umask_and_a_link_stays_a_link(tmp_path):
    umask = os.umask(0o022)
    os.umask(umask)
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(real)
    save(link, a=torch.ones(2))
    assert link.is_symlink()
    assert torch.equal(safetensors.torch.load_file(real)["a"], torch.ones(2))
    assert real.stat().st_mode & 0o777 == 0o666 & ~umask


ZERO = torch.zeros(2)
BAD_PLANS = {
    "unknown dtype": ([PlannedTensor("a", "F3", (2,), lambda: ZERO)], None, "'F3'"),
    "negative shape": ([PlannedTensor("a", "F32", (-2,), lambda: ZERO)], None, r"\(-2,\)"),
    "name twice": ([planned("a", ZERO), planned("a", ZERO)], None, "'a'"),
    "reserved name": ([planned("__metadata__", ZERO)], None, "__metadata__"),
    "name no text": ([planned("\ud800", ZERO)], None, "Unicode"),
    "metadata of numbers": ([planned("a", ZERO)], {"k": 1}, "strings to strings"),
    "other dtype": ([PlannedTensor("a", "BF16", (2,), lambda: ZERO)], None, "'a' was produced as torch.float32"),
    "other shape": ([PlannedTensor("a", "F32", (1, 2), lambda: ZERO)], None, r"expected F32 of shape \(1, 2\)"),
    "too few bytes": ([PlannedTensor("a", "F32", (2,), lambda: memoryview(b"1234567"))], None, "'a' .* of 7 bytes"),
    "strided bytes": ([PlannedTensor("a", "U8", (2,), lambda: memoryview(b"1234")[::2])], None, "contiguous"),
    "no tensor": ([PlannedTensor("a", "F32", (2,), lambda: None)], None, "'a' was produced as a NoneType"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_does_not_hold_is_refused_by_name_and_leaves_nothing(tmp_path, case):
    plan, metadata, message = BAD_PLANS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        write_checkpoint(tmp_path / "w.safetensors", plan, metadata)
    assert str(caught.value).startswith("w.safetensors: ")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_folder_as_target_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="folder does not exist"):
        write_checkpoint(tmp_path / "gone" / "w.safetensors", [])
    with pytest.raises(CheckpointError, match="this is a folder"):
        write_checkpoint(tmp_path, [])
    assert os.listdir(tmp_path) == []


KILLED_WRITER = """
import sys, time, types
package = types.ModuleType("nvfp4_video")
package.__path__ = [sys.argv[1]]
sys.modules["nvfp4_video"] = package
from nvfp4_video.checkpoint.file.container import PlannedTensor, write_checkpoint
plan = [PlannedTensor(n, "U8", (4096,), lambda: memoryview(bytes(4096))) for n in "ab"]
def wait(done, total):
    print(done, total, flush=True)
    time.sleep(60)
write_checkpoint(sys.argv[2], plan, on_bytes=wait)
"""


def test_a_writer_killed_half_way_leaves_nothing_where_files_can_be_unnamed(tmp_path):
    root = Path(container.__file__).parents[2]
    command = [sys.executable, "-c", KILLED_WRITER, str(root), str(tmp_path / "w.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "4096 8192\n"
        process.kill()
    assert not os.listdir(tmp_path) or container.open_unnamed(tmp_path) is None
