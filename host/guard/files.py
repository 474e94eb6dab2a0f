# SPDX-License-Identifier: Apache-2.0
"""What the guard has to know of a model file that a loader node names: from its name and its header, remembered.

Of a shard the whole checkpoint counts, as for the loaders. Nothing but headers is read, and a file that is missing or
cannot be read is simply unknown: its loader will say why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...checkpoint.file.gguf import read_gguf
from ...checkpoint.file.header import CheckpointError, Header
from ...checkpoint.file.shards import open_checkpoint
from ...checkpoint.identify.signatures import find_model
from ...checkpoint.identify.vae_signatures import AUDIO, LTX, Vae, count_quantised, find_vaes
from ..files import SUFFIXES

_MOST_REMEMBERED = 128
_GGUF = ".gguf"
_LONGEST_NAME = 4096  # PATH_MAX
_LONGEST_ENTRY = 4096  # `config` and the like say nothing about it and may be large
# All forms of "distilled", but not "undistilled", "non-distilled", "not_distilled", "dedistilled", "distill-free".
_DISTILLED = re.compile(r"distil(?!l?[a-z]*[^a-z0-9]*(?:free|removed|undone)(?![a-z]))")
_DENIED = re.compile(
    r"(?:^|[^a-z])(?:un|non|not|no|de|pre|without|before|anti|undo|reversed?|never|isnt)[^a-z0-9]*$"
)
_LONGEST_DENIAL = 24
# Header entries that name a model; others tell stories of it, and have licences.
_NAMING = ("modelspec.title", "general.name", "general.basename", "general.finetune", "name", "title", "model_name",
           "model_version", "ss_output_name", "ss_sd_model_name")  # fmt: skip
_State = tuple[tuple[str, int, int], ...]  # path, time of change and size of each file, and of the folder
_remembered: dict[str, tuple[_State, FileFacts]] = {}


@dataclass(frozen=True)
class FileFacts:
    """``family``: of the diffusion model in it. ``distilled``: what says that it is a distilled one, or None.

    ``vae``: the first one in it that makes pictures; ``full_vae``: whether any one in it decodes LTX in full quality;
    ``sound``: the first one that makes sound.
    """

    name: str
    family: str | None
    vae: Vae | None
    full_vae: bool
    nvfp4: bool
    distilled: str | None
    sound: Vae | None = None


def file_facts(name: object, folders: tuple[str, ...]) -> FileFacts | None:
    """A loader's file name -> facts, or None if it is no readable safetensors or GGUF file in one of these folders."""
    path = find_file(name, folders)
    if path is None or not path.lower().endswith((*SUFFIXES, _GGUF)):
        return None
    try:
        known = _remembered.get(path)
        if known is not None and known[0] == _state(entry[0] for entry in known[0]):
            return known[1]
        while len(_remembered) >= _MOST_REMEMBERED:
            _remembered.pop(next(iter(_remembered), None), None)
        if path.lower().endswith(_GGUF):
            files, facts = [path], _facts_of_gguf(str(name), read_gguf(Path(path)))
        else:
            checkpoint = open_checkpoint(path)
            files, facts = [str(header.path) for header in checkpoint.files], _facts(str(name), checkpoint.header)
        state = _state([*files, os.path.dirname(path) or os.curdir])  # an index beside it makes it a shard
        _remembered[path] = state, facts
        return _remembered[path][1]
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
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or "distil" not in name.lower():
        return False
    return _distilled_by(os.path.basename(name.replace("\\", "/")))


def _state(paths: Iterable[str]) -> _State:
    stats = [(path, os.stat(path)) for path in paths]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


def _facts_of_gguf(name: str, header: Header) -> FileFacts:
    """A GGUF file holds one model, without a VAE and in none of the formats that count here."""
    return FileFacts(name, _family(header), None, False, False, _distilled(name, header))


def _facts(name: str, header: Header) -> FileFacts:
    vaes = find_vaes(header)
    visual, sounds = ([vae for vae in vaes if (vae.kind == AUDIO) is audio] for audio in (False, True))
    full = any(vae.family == LTX and not vae.preview for vae in visual)
    nvfp4 = "NVFP4" in count_quantised(header.tensors)
    first, sound = visual[0] if visual else None, sounds[0] if sounds else None
    return FileFacts(name, _family(header), first, full, nvfp4, _distilled(name, header), sound)


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
