# SPDX-License-Identifier: Apache-2.0
"""Damaged pictures, clips and sounds through what Compare and Sharpness read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np

from ...measure import media
from ...measure.compare import compare_clips
from ...measure.sharpness import measure_sharpness
from .run import Found, Kind, Outcome, judge

_FRAMES = 6
_ALLOWED = (media.MediaError,)


@dataclass(frozen=True)
class Sample:
    """A sound file: its ending and bytes."""

    ending: str
    data: bytes


def prepare(folder: Path) -> tuple[Sample, ...]:
    """Small pictures and clips, with sound and without, in the formats that users have."""
    import av
    import cv2

    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (_FRAMES, 32, 48, 3), dtype=np.uint8)
    found = [Sample(".png", media.encode_png(frames[0])), Sample(".png", media.encode_png(frames[0][..., 0]))]
    for ending in (".jpg", ".bmp", ".tif", ".webp"):
        done, data = cv2.imencode(ending, frames[0])
        found += [Sample(ending, data.tobytes())] if done else []
    for ending, codec, sound in ((".mp4", "mpeg4", "aac"), (".mkv", "ffv1", "pcm_s16le"), (".avi", "mjpeg", None)):
        path = folder / f"clip{ending}"
        with av.open(str(path), "w") as container:
            video = container.add_stream(codec, rate=24)
            video.width, video.height = 48, 32
            video.pix_fmt = {"mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            audio = container.add_stream(sound, rate=24000) if sound else None
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(video.encode())
            if audio is not None:
                wave = rng.integers(-999, 999, (1, 6000), dtype=np.int16)
                part = av.AudioFrame.from_ndarray(wave, "s16", "mono")
                part.sample_rate = 24000
                container.mux(audio.encode(part))
                container.mux(audio.encode())
        found.append(Sample(ending, path.read_bytes()))
    return tuple(found)


def damage(sample: Sample, rng: Random) -> Sample:
    """Flipped, cut, doubled or moved bytes, most of them at the start, where the structure is; or another ending."""
    data = bytearray(sample.data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        reach = min(len(data), rng.choice((64, 512, len(data))))
        at = rng.randrange(max(reach, 1))
        how = rng.randrange(7)
        if how < 3:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 3:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", rng.randbytes(4)))
        elif how == 4:
            del data[at + rng.randrange(len(data) + 1) :]
        elif how == 5:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            del data[at : at + rng.randrange(1, 40)]
    ending = rng.choice((".png", ".mp4", ".mkv", ".webp", ".wav", "")) if rng.random() < 0.1 else sample.ending
    return Sample(ending, bytes(data))


def case(samples: tuple[Sample, ...], rng: Random, folder: Path) -> Outcome:
    """One damaged file, or a folder of them, measured and compared with itself."""
    outcome, path = Outcome(), _write(samples, rng, folder)
    judge(outcome, "sharpness", lambda: str(measure_sharpness(islice(media.iter_frames(path), _FRAMES))), _ALLOWED)
    judge(outcome, "rate", lambda: media.frame_rate(path), _ALLOWED)
    judge(outcome, "compare", lambda: _compared(path), _ALLOWED)
    return outcome


def _write(samples: tuple[Sample, ...], rng: Random, folder: Path) -> Path:
    sample = damage(rng.choice(samples), rng)
    if rng.random() < 0.1:
        (folder / "many").mkdir()
        for i in range(2):
            (folder / "many" / f"{i}{sample.ending}").write_bytes(sample.data)
        return folder / "many"
    path = folder / f"m{sample.ending}"
    path.write_bytes(sample.data)
    return path


def _compared(path: Path) -> None:
    frames, rate = media.read_frames(path, _FRAMES)
    sound = media.read_audio(path)
    found = compare_clips(frames, frames, sound, sound, (path.name, path.name), False, (rate, rate))
    json.dumps(found.to_dict(), allow_nan=False)


def minimise(samples: tuple[Sample, ...], rng: Random, folder: Path, found: Found) -> list:
    """The file as it is."""
    path = _write(samples, rng, folder)
    if path.is_dir():
        for part in path.iterdir():
            shutil.move(part, folder / part.name)
        path.rmdir()
    return []


KIND = Kind("damaged pictures, clips and sounds", prepare, case, minimise)
