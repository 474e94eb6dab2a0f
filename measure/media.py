# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound in and out: what the measuring functions read, and the one place that knows array conventions.

* A frame is (H, W, 3) uint8 RGB. A clip is (F, H, W, 3) uint8 RGB.
* ComfyUI's IMAGE is (F, H, W, C) float in 0..1. It becomes ``round(255 * clip(x, 0, 1))``, so a PNG that went through
  LoadImage comes back byte for byte.
* A single channel is repeated three times. Alpha is composited over black, as a video encoder does it, so that hidden
  colours under transparent pixels are not measured.
* Sound is (channels, samples) float32 in -1..1, with its sample rate.

OpenCV reads and writes still pictures, after Pillow has read how large they say they are; PyAV (ComfyUI's own) reads
videos and sound. All are imported on first use.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import PackError

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MOST_PIXELS = 80_000_000  # of a frame: a small file may say that it is of any size, and decoding it takes that memory
_MOST_IMAGE_BYTES = 16 * MOST_PIXELS
_PNG_START = b"\x89PNG\r\n\x1a\n"  # then chunks: length (4 bytes, big-endian), kind (4), data, checksum (4)
_SMALLER = f"Expected at most {MOST_PIXELS:,} pixels; reduce it first."


class MediaError(PackError):
    """A picture, clip or sound that cannot be used: what was found, where, what was expected, what to do."""


def to_frames(images: np.ndarray | torch.Tensor | Sequence[Any]) -> np.ndarray:
    """ComfyUI IMAGE, MASK-like or uint8 arrays -> (F, H, W, 3) uint8 RGB.

    Takes (F, H, W, C), one (H, W, C), one (H, W), or a sequence of frames; C is 1, 3 or 4; uint8, or float in 0..1.
    Raises MediaError for other shapes, no frames, or NaN and infinity.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise MediaError("found no frames; expected at least one. Check what is linked to the input.")
        parts = [to_frames(item) for item in images]
        sizes = sorted({part.shape[1:3] for part in parts})
        if len(sizes) > 1:
            named = ", ".join(f"{width}x{height}" for height, width in sizes)
            raise MediaError(f"found frames of sizes {named} in one clip; expected one size. Resize them first.")
        return np.concatenate(parts)
    shape = tuple(images.shape)
    if len(shape) == 2:
        images = images[None, :, :, None]
    elif len(shape) == 3 and shape[-1] in (1, 3, 4):
        images = images[None]
    elif len(shape) != 4 or shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"found an image of shape {shape}; expected (frames, height, width, channels) with 1, 3 or 4 channels. "
            "Link an IMAGE output, not a latent."
        )
    if 0 in images.shape:
        raise MediaError(f"found an empty image of shape {shape}; expected at least one frame of one pixel.")
    clip = np.empty((*images.shape[:3], 3), np.uint8)
    for index in range(len(clip)):  # frame by frame: a float copy of a whole clip would be twelve times its size
        clip[index] = _frame(images[index], index)
    return clip


def _frame(image: Any, index: int) -> np.ndarray:
    """(H, W, 1 | 3 | 4) uint8 or float -> (H, W, 3) uint8."""
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.dtype == np.uint8:
        if image.shape[-1] < 4:
            return image
        values = image.astype(np.float32) / 255.0
    elif np.issubdtype(image.dtype, np.floating):
        values = image.astype(np.float32, copy=False)
    else:
        raise MediaError(f"found pixels of type {image.dtype}; expected float in 0..1 or uint8. Convert them first.")
    if not np.isfinite(values).all():
        raise MediaError(
            f"found NaN or infinity in frame {index}; expected finite pixels. The decode failed: "
            "run the VAE in bfloat16 or float32."
        )
    values = values.clip(0.0, 1.0)
    if values.shape[-1] == 4:
        values = values[..., :3] * values[..., 3:]
    return np.rint(values * 255.0).astype(np.uint8)


def to_sound(sound: tuple[np.ndarray, int] | dict[str, Any]) -> tuple[np.ndarray, int]:
    """(array, rate), or ComfyUI's AUDIO {"waveform": (1, C, S), "sample_rate"} -> ((C, S) float32, rate)."""
    wave, rate = (sound["waveform"], sound["sample_rate"]) if isinstance(sound, dict) else sound
    if hasattr(wave, "detach"):
        wave = wave.detach().cpu().float().numpy()
    wave = np.asarray(wave, np.float32)
    if wave.ndim == 3 and len(wave) == 1:
        wave = wave[0]
    elif wave.ndim == 1:
        wave = wave[None]
    if wave.ndim != 2 or 0 in wave.shape:
        raise MediaError(
            f"found sound of shape {wave.shape}; expected (channels, samples), one clip, not empty. "
            "Pass one sound at a time, not a batch."
        )
    if not np.isfinite(wave).all():
        raise MediaError("found NaN or infinity in the sound; expected finite samples. The audio decode failed.")
    return wave, int(rate)


def gray(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, OpenCV's 0.299 R + 0.587 G + 0.114 B."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)


def read_frames(path: str | os.PathLike[str], max_frames: int | None = None) -> tuple[np.ndarray, float | None]:
    """Image, folder of images or video -> ((F, H, W, 3) uint8 RGB, frames per second or None for stills).

    ``max_frames`` stops after that many. Raises MediaError if there is nothing to read or the frames differ in size.
    """
    frames = []
    for frame in iter_frames(path):
        if frames and frame.shape != frames[0].shape:
            raise MediaError(
                f"found frame {len(frames)} of {_size(frame)} after frames of {_size(frames[0])} in {path}; expected "
                "one size. Measure such a folder frame by frame, or resize the files."
            )
        frames.append(frame)
        if max_frames is not None and len(frames) >= max_frames:
            break
    return np.stack(frames), frame_rate(path)


def iter_frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Like ``read_frames``, one (H, W, 3) uint8 RGB frame at a time: constant memory. The sizes may differ."""
    path = Path(path)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
        if not files:
            raise MediaError(f"found no images in the folder {path}; expected {', '.join(IMAGE_SUFFIXES)}.")
        for file in files:
            yield _read_image(file)
    elif not path.exists():
        raise MediaError(f"found nothing at {path}; expected an image, a folder of images or a video. Check the name.")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield _read_image(path)
    else:
        yield from _decode_video(path)


def frame_rate(path: str | os.PathLike[str]) -> float | None:
    """Frames per second of a video file; None for an image, a folder, or a video that does not say."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    with _open(path) as container:
        rate = container.streams.video[0].average_rate if container.streams.video else None
    return float(rate) if rate else None


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int] | None:
    """First sound track of a file -> ((channels, samples) float32, sample rate), or None if it has no sound."""
    import av

    path = Path(path)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    with _open(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        _check_codec(path, stream, "sound")
        rate = stream.rate
        try:
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
            chunks = [out.to_ndarray() for frame in container.decode(stream) for out in resampler.resample(frame)]
            chunks += [out.to_ndarray() for out in resampler.resample(None)]
        except (av.FFmpegError, ValueError, MemoryError, OverflowError) as error:
            raise MediaError(f"found a damaged sound track in {path} ({error}); expected a complete file.") from error
    if not chunks:
        raise MediaError(f"found a sound track without samples in {path}; expected at least one. Export it again.")
    return np.concatenate(chunks, axis=1).astype(np.float32, copy=False), int(rate)


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB or (H, W) uint8 grey -> PNG file bytes."""
    import cv2

    ordered = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    return cv2.imencode(".png", ordered)[1].tobytes()


def _read_image(path: Path) -> np.ndarray:
    import cv2

    _check_plain(path)
    if (size := _stated_size(path)) is not None:
        _check_size(path, size)
    # imdecode instead of imread: OpenCV cannot open non-ASCII paths on Windows.
    with open(path, "rb") as file:
        raw = file.read(_MOST_IMAGE_BYTES)
    if _is_cut_png(raw):
        raise _unreadable(path)
    data = np.frombuffer(raw, np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error:  # more pixels than it takes, for one
        image = None
    if image is None:
        raise _unreadable(path)
    if image.dtype == np.uint16:
        image = (image.astype(np.float32) / 65535.0).astype(np.float32)
    if image.ndim == 3 and image.shape[-1] >= 3:
        order = cv2.COLOR_BGRA2RGBA if image.shape[-1] == 4 else cv2.COLOR_BGR2RGB
        image = cv2.cvtColor(image, order)
    try:
        return to_frames(image)[0]
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error


def _stated_size(path: Path) -> tuple[int, int] | None:
    """Width and height that the file's own header says, no pixel is decoded; None for a TIFF that only OpenCV reads."""
    import PIL
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # MOST_PIXELS is checked instead
            with PIL.Image.open(path) as image:
                return image.size
    except PIL.Image.DecompressionBombError as error:
        raise MediaError(f"found an image too large to be read: {path} ({error}). {_SMALLER}") from error
    except (OSError, ValueError, SyntaxError, OverflowError) as error:
        if isinstance(error, PIL.UnidentifiedImageError) and path.suffix.lower() in (".tif", ".tiff"):
            return None  # one of floating-point numbers, say; OpenCV has a limit of its own
        raise _unreadable(path) from error


def _is_cut_png(data: bytes) -> bool:
    """Whether a chunk of a PNG says that it is longer than what is there of the file.

    OpenCV reads no such file, but first fills as much memory as the chunk says it has: 1.7 GB for 5 kB, in 9 s.
    """
    at = len(_PNG_START)
    if not data.startswith(_PNG_START):
        return False
    while data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if at + 12 > len(data):
            return True
    return False


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise MediaError(f"found a picture of {size[0]:,} x {size[1]:,} pixels: {path}. {_SMALLER}")


def _unreadable(path: Path) -> MediaError:
    remedy = "It is damaged or of another kind: copy it again."
    suffixes = ", ".join(IMAGE_SUFFIXES)
    return MediaError(f"found a file that is not a readable image: {path}; expected {suffixes}. {remedy}")


def _decode_video(path: Path) -> Iterator[np.ndarray]:
    import av

    count = 0
    with _open(path) as container:
        if not container.streams.video:
            raise MediaError(f"found no picture track in {path}; expected a video. Choose one with pictures.")
        stream = container.streams.video[0]
        _check_codec(path, stream, "picture")
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                _check_size(path, (frame.width, frame.height))
                yield frame.to_ndarray(format="rgb24")
                count += 1
        except (av.FFmpegError, MemoryError, OverflowError) as error:
            raise MediaError(
                f"found damage after frame {count} of {path} ({error}); expected a complete video. Export it again."
            ) from error
    if not count:
        raise MediaError(f"found a video without frames: {path}; expected at least one. Export it again.")


def _open(path: Path) -> Any:
    import av

    _check_plain(path)
    try:
        # A tag that is no UTF-8 says nothing about the pictures.
        return av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"found a file that PyAV cannot open: {path} ({error}); expected a video, an image, or a folder of images."
        ) from error


def _check_codec(path: Path, stream: Any, kind: str) -> None:
    """Refuse a track of a codec that FFmpeg has no decoder for; most attributes of its stream do not exist."""
    if stream.codec_context is None:
        found = f"found a {kind} track of an unknown codec in {path}"
        raise MediaError(f"{found}; expected one that FFmpeg knows. Export it again.")


def _check_plain(path: Path) -> None:
    """Refuse a pipe, a device and the like, for which a reader would wait for ever."""
    if path.exists() and not path.is_file():
        raise MediaError(f"found no plain file at {path}; expected a video, an image, or a folder of images.")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key with frame_9 before frame_10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
