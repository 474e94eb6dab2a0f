# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips that somebody made to be more than they seem: refused before they cost anything, or read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from nvfp4_video.measure import media  # noqa: E402


def png(width: int, height: int) -> bytes:
    """A sound PNG of this size with the data of a few pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(131_072, 131_072), (2**31 - 1, 2**31 - 1), (30_000, 30_000), (9_000, 9_000)])
def test_a_picture_that_says_it_is_huge_is_not_decoded(size, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    (tmp_path / "x.png").write_bytes(png(*size))
    with pytest.raises(media.MediaError, match=r"x\.png.*at most 80,000,000 pixels"):
        media.read_frames(tmp_path / "x.png")


@pytest.mark.parametrize("kind", [b"IDAT", b"IHDR", b"tEXt", b"IEND"])
def test_a_png_with_a_chunk_longer_than_the_file_costs_no_memory_of_that_length(kind, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    sound = png(48, 32)
    at = sound.index(b"IDAT" if kind == b"tEXt" else kind) - 4
    length = (2**31 - 1 if kind != b"IEND" else 0).to_bytes(4, "big")
    path = tmp_path / "x.png"
    path.write_bytes(sound[:at] + length + kind + sound[at + 8 : -1])
    with pytest.raises(media.MediaError, match=r"not a readable image: .*x\.png"):
        media.read_frames(path)


def test_what_is_wrong_with_frames_of_several_sizes_is_told_as_width_by_height():
    frames = [np.zeros((8, 16, 3), np.uint8), np.zeros((24, 16, 3), np.uint8)]
    with pytest.raises(media.MediaError, match="frames of sizes 16x8, 16x24 in one clip"):
        media.to_frames(frames)


@pytest.mark.parametrize(("ending", "size"), [(".jpg", (7680, 4320)), (".png", (12_000, 1_000)), (".png", (1, 70_000))])
def test_an_8k_frame_and_a_panorama_are_read(ending: str, size: tuple[int, int], tmp_path: Path):
    width, height = size
    image = np.zeros((height, width), np.uint8)
    image[-1, -1] = 255
    (tmp_path / f"x{ending}").write_bytes(cv2.imencode(ending, image)[1].tobytes() + b"behind the end")
    frames, _ = media.read_frames(tmp_path / f"x{ending}")
    assert frames.shape == (1, height, width, 3) and frames[0, 0, 0, 0] == 0 and frames[0, -1, -1, 0] > 200


def test_a_frame_of_a_clip_that_is_huge_is_not_converted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(media, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(media.MediaError, match="64 x 64 pixels"):
        media.read_frames(clip(tmp_path / "x.mkv"))


def clip(path: Path, **tags: str) -> Path:
    with av.open(str(path), "w") as container:
        container.metadata.update(tags)
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for level in (0, 128):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("ending", [".mkv", ".mp4"])
def test_a_clip_whose_tags_are_no_utf_8_is_read(ending: str, tmp_path: Path):
    path = clip(tmp_path / f"x{ending}", title="MARKED!", comment="MARKED!")
    data = path.read_bytes()
    assert b"MARKED!" in data
    path.write_bytes(data.replace(b"MARKED!", b"\xb1\xff\xfe\x80\xc3(!"))
    frames, rate = media.read_frames(path)
    assert frames.shape == (2, 64, 64, 3) and rate == 8
    assert media.read_audio(path) is None


def test_a_folder_may_be_called_as_a_picture_and_a_folder_in_it_is_none(tmp_path: Path):
    folder = tmp_path / "x.png"
    folder.mkdir()
    (folder / "1.png").write_bytes(media.encode_png(np.zeros((4, 4, 3), np.uint8)))
    assert media.read_frames(folder)[0].shape == (1, 4, 4, 3)
    assert media.read_audio(folder) is media.frame_rate(folder) is None
    (folder / "2.png").mkdir()
    with pytest.raises(media.MediaError, match=r"no plain file at .*2\.png"):
        media.read_frames(folder)


def test_a_tiff_of_floating_point_numbers_which_pillow_does_not_know_is_read(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "x.tif"), np.full((4, 4, 3), 0.5, np.float32))
    assert (media.read_frames(tmp_path / "x.tif")[0] == 128).all()


@pytest.mark.parametrize(("track", "codec"), [("picture", b"V_MPEG4/ISO/ASP"), ("sound", b"A_PCM/INT/LIT")])
def test_a_track_of_a_codec_that_nobody_knows_is_refused_by_name(track: str, codec: bytes, tmp_path: Path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width = video.height = 64
        audio = container.add_stream("pcm_s16le", rate=24000)
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode())
        part = av.AudioFrame.from_ndarray(np.ones((1, 2400), np.int16), "s16", "mono")
        part.sample_rate = 24000
        container.mux([*audio.encode(part), *audio.encode()])
    data = path.read_bytes()
    assert codec in data
    path.write_bytes(data.replace(codec, codec[:2] + b"X" * (len(codec) - 2)))
    with pytest.raises(media.MediaError, match=rf"{track} track of an unknown codec .*x\.mkv"):
        media.read_audio(path) if track == "sound" else media.read_frames(path)
