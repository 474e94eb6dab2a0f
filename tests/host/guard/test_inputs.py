# SPDX-License-Identifier: Apache-2.0
"""The size of a picture or a film that a prompt loads is read from its header, inside the host's folders alone."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from nvfp4_video.host.guard import inputs
from nvfp4_video.host.guard.values.pictures import Film, Picture
from safetensors.torch import save_file


@pytest.fixture
def folder(stub_comfy: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's input folder."""
    path = tmp_path / "input"
    path.mkdir(exist_ok=True)
    monkeypatch.setattr(inputs.folder_paths, "get_input_directory", lambda: str(path), raising=False)
    monkeypatch.setattr(inputs.folder_paths, "get_output_directory", lambda: str(tmp_path / "output"), raising=False)
    monkeypatch.setattr(
        inputs.folder_paths, "get_annotated_filepath", lambda name: str(path / name), raising=False
    )  # fmt: skip
    return path


def test_a_picture_has_the_size_in_its_header(folder: Path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (720, 1280)).save(folder / "a.png")
    assert inputs.picture_of("a.png") == Picture(720, 1280, 1)
    two = [image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    two[0].save(folder / "a.gif", save_all=True, append_images=two[1:])
    assert inputs.picture_of("a.gif") == Picture(64, 32, None)


def test_a_picture_that_a_camera_turned_is_unknown(folder: Path):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6
    image.new("RGB", (720, 480)).save(folder / "a.jpg", exif=exif)
    assert inputs.picture_of("a.jpg") is None


def test_a_film_has_the_size_length_and_rate_that_its_header_says(folder: Path):
    av = pytest.importorskip("av")
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert inputs.film_of("a.mp4") == Film(Picture(64, 32, 9), 24.0)


@pytest.mark.parametrize("name", [None, "", "gone.png", "a\0b", "../secret.png", "/etc/passwd", "torn.png", "x" * 5000])
def test_what_is_no_file_of_the_input_folder_is_unknown(name: object, folder: Path):
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder.parent / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert inputs.picture_of(name) is None and inputs.film_of(name) is None


def test_a_lora_tells_how_much_smaller_its_guides_are(stub_comfy: types.ModuleType, tmp_path: Path):
    path = tmp_path / "models" / "loras"
    path.mkdir(parents=True, exist_ok=True)
    stub_comfy.folder_names_and_paths["loras"] = ([str(path)], {".safetensors"})
    for name, told in (("half", {"reference_downscale_factor": "2"}), ("plain", {"a": json.dumps({})})):
        save_file({"x.lora_A.weight": torch.zeros(1)}, path / f"{name}.safetensors", told)
    assert (inputs.downscale_of("half.safetensors"), inputs.downscale_of("plain.safetensors")) == (2.0, 1.0)
    assert inputs.downscale_of("gone.safetensors") is None
