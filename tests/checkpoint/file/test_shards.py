# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in several files: what an index, a wildcard or a shard's name opens, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import Source, open_checkpoint
from nvfp4_video.tests.support.files import save


def test_parts_are_read_as_one_checkpoint_and_their_declared_layers_put_together(tmp_path):
    layers = [json.dumps({"layers": {name: {"format": "nvfp4"}}}) for name in "ab"]
    values = {"a": torch.arange(5, dtype=torch.int32), "b": torch.randn(3, 2), "c": torch.empty(0, 4)}
    declared = [{"config": "{}", "licence": "1"}, {"licence": "2"}]
    first, second = (entry | {"_quantization_metadata": text} for entry, text in zip(declared, layers, strict=True))
    save(tmp_path / "m-1.safetensors", {"a": values["a"]}, first)
    save(tmp_path / "m-2.safetensors", {"b": values["b"], "c": values["c"]}, second)
    checkpoint = open_checkpoint(tmp_path / "m-*.safetensors")
    assert checkpoint.sharded
    assert checkpoint.header.metadata["config"] == "{}"
    assert checkpoint.header.metadata["licence"] == "1"  # the first file that has an entry decides
    assert json.loads(checkpoint.header.metadata["_quantization_metadata"])["layers"].keys() == {"a", "b"}
    with Source(checkpoint) as source:
        for name, value in values.items():
            assert torch.equal(source.tensor(name), value)
            assert bytes(source.view(name)) == value.numpy().tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_read_are_given_back(tmp_path):
    count, size = 8, 4 * 2**20
    path = save(tmp_path / "big.safetensors", {str(i): torch.ones(size, dtype=torch.uint8) for i in range(count)})

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    with Source(open_checkpoint(path)) as source:
        before = resident()
        held = []
        for index in range(count):
            assert sum(source.view(str(index))[:: 2**18]) == 16
            held.append(resident() - before)
    assert max(held) < 2 * size


INDEXES = [
    ({"weight_map": {"a": "../other.safetensors"}}, "names the file '../other.safetensors'"),
    ({"weight_map": {"a": "/other.safetensors"}}, "names the file '/other.safetensors'"),
    ({"weight_map": {"a": 3}}, "names the file 3"),
    ({"weight_map": {"a": "gone.safetensors"}}, "1 are missing, 'gone.safetensors'"),
    ({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}, "promises are in none of its files, 'b'"),
    ({"weight_map": {}}, "names no file"),
    ({"weights": {}}, "cannot be read"),
    ([], "cannot be read"),
]


@pytest.mark.parametrize(("index", "words"), INDEXES)
def test_an_index_that_lies_is_refused(tmp_path, index, words):
    save(tmp_path / "part.safetensors", {"a": torch.ones(2)})
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_shards_that_miss_or_repeat_a_part_are_refused(tmp_path):
    save(tmp_path / "m-00001-of-00003.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="2 are missing, m-00002-of-00003"):
        open_checkpoint(tmp_path / "m-00001-of-00003.safetensors")
    save(tmp_path / "m-copy.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="both in"):
        open_checkpoint(tmp_path / "m-*.safetensors")
    with pytest.raises(CheckpointError, match="no file matches"):
        open_checkpoint(tmp_path / "n-*.safetensors")


def test_an_index_beside_a_file_makes_it_a_shard_only_if_it_names_it_among_others(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.safetensors", {name: torch.ones(2)})
    (tmp_path / "broken.safetensors.index.json").write_text("[")
    index = tmp_path / "m.safetensors.index.json"
    for weight_map, files in (({"a": "a.safetensors"}, 1), ({"a": "a.safetensors", "b": "b.safetensors"}, 2)):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert len(open_checkpoint(tmp_path / "a.safetensors").files) == files
    index.write_text(json.dumps({"weight_map": {"b": "b.safetensors", "c": "c.safetensors"}}))
    assert not open_checkpoint(tmp_path / "a.safetensors").sharded
    with pytest.raises(CheckpointError, match="c.safetensors"):
        open_checkpoint(tmp_path / "b.safetensors")


def test_a_name_that_promises_many_parts_costs_one_listing_of_its_folder(tmp_path, monkeypatch):
    path = save(tmp_path / "m-00001-of-99999.safetensors", {"a": torch.ones(2)})
    listed, looked = [], []
    listing, is_file = os.listdir, Path.is_file
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listing(folder))
    monkeypatch.setattr(Path, "is_file", lambda self: looked.append(self) or is_file(self))
    with pytest.raises(CheckpointError, match="of its 99999 parts 99998 are missing, m-00002-of-99999"):
        open_checkpoint(path)
    assert (len(listed), len(looked)) == (1, 0)


def test_a_shard_beyond_its_count_is_refused(tmp_path):
    path = save(tmp_path / "m-00003-of-00002.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="part 3 of 2"):
        open_checkpoint(path)


def test_a_source_that_is_replaced_meanwhile_is_refused(tmp_path):
    path = save(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    checkpoint = open_checkpoint(path)
    save(path, {"a": torch.ones(4)})
    with Source(checkpoint) as source, pytest.raises(CheckpointError, match="changed while"):
        source.view("a")


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "é" * 200])
def test_an_index_of_files_that_cannot_exist_is_refused(tmp_path, name):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="of its 1 files 1 are missing"):
        open_checkpoint(index)


def test_shards_of_a_variant_are_parts_of_one_checkpoint(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"m-0000{number}-of-00002.fp16.safetensors", {f"t{number}": torch.zeros(1)})
    assert open_checkpoint(tmp_path / "m-00002-of-00002.fp16.safetensors").homes.keys() == {"t1", "t2"}
