# SPDX-License-Identifier: Apache-2.0
"""A named pipe in the place of a file is refused at once by every reader; one that opened it would wait for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.identify.dialects import modelopt_declaration
from nvfp4_video.host.doctor import page_cache
from nvfp4_video.host.guard import files as guard_files
from nvfp4_video.host.guard.limit import within
from nvfp4_video.measure import media
from nvfp4_video.samples import shapes

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
PATIENCE = 60


@pytest.fixture
def pipe(tmp_path: Path):
    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["x.safetensors", "x.safetensors.index.json", "x-00001-of-00001.safetensors"])
def test_a_checkpoint(name: str, pipe):
    path = pipe(name)
    with pytest.raises(CheckpointError):
        within(PATIENCE, lambda: open_checkpoint(path))


def test_a_sidecar(pipe, tmp_path):
    pipe("hf_quant_config.json")
    shapes.write_names(tmp_path / "x.safetensors", ["a"])
    assert within(PATIENCE, lambda: modelopt_declaration(read_header(tmp_path / "x.safetensors"))) is None


def test_a_model_file_that_a_prompt_names(stub_comfy, tmp_path):
    os.mkfifo(tmp_path / "models" / "vae" / "x.safetensors")
    assert within(PATIENCE, lambda: guard_files.file_facts("x.safetensors", ("vae",))) is None


@pytest.mark.parametrize("name", ["x.png", "x.mp4"])
def test_a_picture_and_a_video(name: str, pipe):
    path = pipe(name)
    with pytest.raises(media.MediaError, match="no plain file"):
        within(PATIENCE, lambda: media.read_frames(path))


def test_a_file_whose_cached_pages_are_asked_for(pipe):
    path = pipe("x.safetensors")
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the page cache cannot be asked here")
    with pytest.raises(page_cache.PageCacheError, match="not a plain file"):
        within(PATIENCE, lambda: page_cache.cached_bytes(path))
    assert within(PATIENCE, lambda: page_cache.offer(path)) == ""
