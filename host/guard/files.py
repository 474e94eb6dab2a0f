"""What the guard has to know of a model file that a loader node names: from its name and its header, remembered.

Nothing but the header is read, and a file that is missing or cannot be read is simply unknown: its loader will say why.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...checkpoint.file.gguf import read_gguf
from ...checkpoint.file.header import CheckpointError, Header, read_header
from ...checkpoint.identify.signatures import find_model
from ...checkpoint.identify.vae_signatures import AUDIO, LTX, Vae, count_quantised, find_vaes
from ..files import SUFFIXES

_MOST_REMEMBERED = 128
_GGUF = ".gguf"
_LONGEST_NAME = 4096  # PATH_MAX
_LONGEST_ENTRY = 4096  # `config` and the like say nothing about it and may be large
# All forms of "distilled", but not "undistilled", "non-distilled", "not_distilled", "dedistilled".
_DISTILLED = re.compile("distil")
_DENIED = re.compile(r"(?:^|[^a-z])(?:un|non|not|no|de|pre|without|before)[^a-z0-9]*$")
_LONGEST_DENIAL = 24
# Header entries that name a model; others tell stories of it, and have licences.
_NAMING = ("modelspec.title", "general.name", "general.basename", "general.finetune", "name", "title", "model_name",
           "model_version", "ss_output_name", "ss_sd_model_name")  # fmt: skip
_remembered: dict[tuple[str, int, int], FileFacts] = {}


@dataclass(frozen=True)
class FileFacts:
    """``family``: of the diffusion model in it. ``distilled``: what says that it is a distilled one, or None.

    ``vae``: the first one in it that makes pictures; ``full_vae``: whether any one in it decodes LTX in full quality.
    """

    name: str
    family: str | None
    vae: Vae | None
    full_vae: bool
    nvfp4: bool
    distilled: str | None


def file_facts(name: object, folders: tuple[str, ...]) -> FileFacts | None:
    """A loader's file name -> facts, or None if it is no readable safetensors or GGUF file in one of these folders."""
    path = find_file(name, folders)
    if path is None or not path.lower().endswith((*SUFFIXES, _GGUF)):
        return None
    try:
        stat = os.stat(path)
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in _remembered:
            while len(_remembered) >= _MOST_REMEMBERED:
                _remembered.pop(next(iter(_remembered), None), None)
            _remembered[key] = _read(str(name), path)
        return _remembered[key]
    except (OSError, ValueError, KeyError):  # CheckpointError is a ValueError
        return None


def find_file(name: object, folders: tuple[str, ...]) -> str | None:
    """The file's path in the first folder that has it; None for a name that is no text, or leads nowhere."""
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or "\0" in name:
        return None
    for folder in folders:
        if folder in folder_paths.folder_names_and_paths:
            path = folder_paths.get_full_path(folder, name)
            if path is not None:
                return path
    return None


def name_says_distilled(name: object) -> bool:
    """Whether a file's name says that the model, or what a LoRA makes of it, is a distilled one."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return False
    return _distilled_by(os.path.basename(name.replace("\\", "/")))


def _read(name: str, path: str) -> FileFacts:
    if path.lower().endswith(_GGUF):  # never a full checkpoint, nor NVFP4 of a kind that a loader here would take
        header = read_gguf(Path(path))
        return FileFacts(name, _family(header), None, False, False, _distilled(name, header))
    header = read_header(path)
    visual = [vae for vae in find_vaes(header) if vae.kind != AUDIO]
    full = any(vae.family == LTX and not vae.preview for vae in visual)
    nvfp4 = "NVFP4" in count_quantised(header.tensors)
    return FileFacts(name, _family(header), visual[0] if visual else None, full, nvfp4, _distilled(name, header))


def _family(header: Header) -> str | None:
    try:
        return find_model(header).family
    except CheckpointError:
        return None


def _distilled(name: str, header: Header) -> str | None:
    if name_says_distilled(name):
        return "its file name"
    for key in _NAMING:
        text = header.metadata.get(key, "")
        if len(text) <= _LONGEST_ENTRY and _distilled_by(text):
            return f"its header entry `{key}`"
    return None


def _distilled_by(text: str) -> bool:
    """Whether a name has a form of "distilled" that nothing before it denies."""
    text = text.lower()
    starts = (found.start() for found in _DISTILLED.finditer(text))
    return any(not _DENIED.search(text, max(start - _LONGEST_DENIAL, 0), start) for start in starts)
