# SPDX-License-Identifier: Apache-2.0
"""How large the pictures and films are that a prompt loads: from their headers, in the host's own folders.

What cannot be read at a glance is unknown: its loader will say why. A picture that a camera marked as turned is unknown
too, since ComfyUI has turned such pictures by different means.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import folder_paths

from ...checkpoint.file.header import CheckpointError, open_regular, read_header
from ..files import SUFFIXES
from .files import find_file
from .values.pictures import Film, Picture

_LONGEST_NAME = 4096  # PATH_MAX
_DOWNSCALE = "reference_downscale_factor"
_UPRIGHT, _ORIENTATION = 1, 0x0112  # of EXIF


def picture_of(name: object) -> Picture | None:
    """What LoadImage makes of a file: its size, and one picture, or unknown how many."""
    path = _input_file(name)
    if path is None:
        return None
    try:
        from PIL import Image

        with warnings.catch_warnings(), open_regular(path) as file:
            warnings.simplefilter("error")  # a picture of which Pillow warns is none to speak of
            image = Image.open(file)
            if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
                return None
            return Picture(*image.size, 1 if getattr(image, "n_frames", 1) == 1 else None)
    except (ImportError, CheckpointError, OSError, ValueError, SyntaxError, Warning):
        return None


def film_of(name: object) -> Film | None:
    """What LoadVideo makes of a file, by its header and its first frame, which tells whether it is turned."""
    path = _input_file(name)
    if path is None:
        return None
    try:
        import av

        with open_regular(path) as file, av.open(file) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            width, height = frame.width, frame.height
            if round(getattr(frame, "rotation", 0) // 90) % 2:
                width, height = height, width
            rate = float(stream.average_rate) if stream.average_rate else None
            return Film(Picture(width, height, stream.frames or None), rate)
    except (ImportError, CheckpointError, OSError, ValueError, IndexError, StopIteration):  # av's errors are OSErrors
        return None


def downscale_of(name: object) -> float | None:
    """What LTXICLoRALoaderModelOnly says of a LoRA: how much smaller its guides are, 1 where it does not tell."""
    path = find_file(name, ("loras",))
    if path is None or not path.lower().endswith(SUFFIXES):
        return None
    try:
        told = read_header(Path(path)).metadata.get(_DOWNSCALE)
    except CheckpointError:
        return None
    try:
        return float(told) if told is not None else 1.0
    except ValueError:
        return 1.0  # the node's own answer


def _input_file(name: object) -> Path | None:
    """The file of the input folder, or the one it is annotated with; None outside of them."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or "\0" in name:
        return None
    if not hasattr(folder_paths, "get_annotated_filepath"):
        return None
    folders = [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    try:
        path = os.path.realpath(folder_paths.get_annotated_filepath(name))
        inside = any(os.path.commonpath([path, os.path.realpath(folder)]) == os.path.realpath(folder)
                     for folder in folders)  # fmt: skip
    except (OSError, ValueError):
        return None
    return Path(path) if inside else None
