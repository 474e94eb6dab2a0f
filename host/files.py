# SPDX-License-Identifier: Apache-2.0
"""Names on widgets -> files of the host's model folders, and the places in its output folder where loaders look."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..checkpoint.file.header import CheckpointError
from ..checkpoint.file.shards import open_checkpoint, plain_name
from ..checkpoint.identify.components import AUDIO_VAE, DIFFUSION_MODEL, REST, TEXT_PROJECTION, VIDEO_VAE
from ..checkpoint.write.card import loras_of

SUFFIXES = (".safetensors", ".sft")
SAME_FILE = "(the file itself)"
NO_LORA = "none"
LORA_FOLDERS = ("loras",)
VAE_FOLDERS = ("vae", "checkpoints", "diffusion_models")
ALL_FOLDERS = ("checkpoints", "diffusion_models", "vae", "text_encoders", "loras")
# Component -> folder below output/ whose files ComfyUI lists among the models.
OUTPUT_FOLDERS = {
    VIDEO_VAE: "vae",
    AUDIO_VAE: "checkpoints",  # every host's LTXVAudioVAELoader lists it; since 0.38 `vae` too
    TEXT_PROJECTION: "checkpoints",
    DIFFUSION_MODEL: "diffusion_models",
    REST: "checkpoints",
}

# Folder of models -> folder below output/ whose files ComfyUI lists with it, for a file like one of that folder.
LIKE_FOLDERS = {"diffusion_models": "diffusion_models", "checkpoints": "checkpoints", "text_encoders": "clip"}
# Parts of a file's name that tell how its weights are stored, not which model it is.
_FORMATS = re.compile(
    r"(nvfp4|mxfp[48]|(bf|b|fp?)(4|8|16|32)|int8|e4m3fn?|e5m2)?(scaled|mixed|comfy|transformer|only|model|v\d)?"
)
_PACKED = re.compile(r"nvfp4|fp4|int8|mxfp[48]|gguf")


def file_names(folders: Iterable[str]) -> list[str]:
    """Safetensors files of the model folders, each name once, in the folders' order."""
    names = dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder))
    return [name for name in names if name.lower().endswith(SUFFIXES)]


def source_of(name: str, folders: Iterable[str]) -> str | None:
    """A file that may not be there -> one in the folders that is the same model by its name, and not packed."""
    model = _model(name)
    return next((other for other in file_names(folders) if not _packed(other) and _model(other) == model), None)


def file_path(name: str, folders: Iterable[str]) -> str:
    """Name from ``file_names`` -> path in the first folder that has it; FileNotFoundError if none has."""
    return _found(name, folders)[1]


def _found(name: str, folders: Iterable[str]) -> tuple[str, str]:
    """As ``file_path``, and the folder's name first."""
    folders = tuple(folders)
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return folder, path
    places = ", ".join(f"models/{folder}" for folder in folders)
    raise FileNotFoundError(f"{name} is in none of {places}; put it into one of them")


def optional_path(name: str | None, folders: Iterable[str]) -> str | None:
    """As ``file_path``; None for the choice that means the file itself."""
    return None if name in (None, SAME_FILE) else file_path(name, folders)


def fingerprint(names: Iterable[str | None], folders: Iterable[str], *options: object) -> str:
    """Changes when a file or an option does. Names that come over a link are None here."""
    folders = tuple(folders)
    paths = [file_path(name, folders) for name in names if name not in (None, SAME_FILE)]
    return str([(path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths] + list(options))


def lora_paths(name: str, strength: float, more: str) -> tuple[tuple[str, float], ...]:
    """A LoRA's name, or NO_LORA, its strength, lines of ``name = strength`` -> (path, strength) of each.

    CheckpointError for a line that is none, FileNotFoundError for a name that is in no folder.
    """
    found = [] if name in (None, NO_LORA) else [(name, strength)]
    for line in filter(None, map(str.strip, (more or "").splitlines())):
        name, _, text = line.rpartition("=")
        try:
            found.append((name.strip(), float(text)))
        except ValueError as error:
            raise CheckpointError(
                "it has no strength", where=f"LoRA {line!r}", expected="one a line, as in name.safetensors = 0.8"
            ) from error
    return tuple((file_path(name, LORA_FOLDERS), strength) for name, strength in found)


def lora_states(name: str, strength: float, more: str) -> str:
    """Changes when one of the LoRAs does, or a strength."""
    return str([(path, os.stat(path).st_mtime_ns, at) for path, at in lora_paths(name, strength, more)])


def folded_loras(path: str) -> list[tuple[str, float]]:
    """(path, strength) of the LoRAs that a written file says were folded in, looked for by name in models/loras.

    FileNotFoundError for one that is not there.
    """
    found = []
    for name, strength in loras_of(open_checkpoint(path).header):
        listed = (full for full in file_names(LORA_FOLDERS) if PurePath(full).name == name)
        found.append((file_path(next(listed, name), LORA_FOLDERS), strength))
    return found


def output_folder() -> str:
    """ComfyUI's output folder."""
    return folder_paths.get_output_directory()


def output_targets(source: str, name: str, components: Iterable[str]) -> dict[str, str]:
    """Components -> paths below the output folder, ``<its folder>/<name>_<component>.safetensors``.

    ``name`` may hold subfolders; empty, it is that of ``source``. Raises CheckpointError for one that leads elsewhere.
    """
    name = _output_name(source, name)
    return {part: os.path.join(OUTPUT_FOLDERS[part], f"{name}_{part}.safetensors") for part in components}


def output_nvfp4(source: str, name: str, part: str) -> str:
    """Path below the output folder of ``source`` in NVFP4, ``part`` being DIFFUSION_MODEL or REST, the whole of it."""
    return os.path.join(OUTPUT_FOLDERS[part], f"{_output_name(source, name)}_nvfp4.safetensors")


def output_like(source: str, name: str, ending: str) -> str:
    """Path below the output folder, ``<folder>/<name>_<ending>.safetensors``, that is listed where ``source`` is.

    ``source``: a name from ``file_names`` of LIKE_FOLDERS. ``name`` and errors: as for ``output_targets``.
    """
    folder = LIKE_FOLDERS[_found(source, LIKE_FOLDERS)[0]]
    return os.path.join(folder, f"{_output_name(source, name)}_{ending}.safetensors")


def output_written(name: str) -> str:
    """A path below the output folder, as the functions above give it, -> the whole path of the file that is there.

    Raises CheckpointError for one that leads out of the folder, FileNotFoundError where there is no such file.
    """
    path = os.path.join(output_folder(), _output_name("", name))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} is not below ComfyUI's output folder; was it written, and not only estimated?")
    return path


def _output_name(source: str, name: str) -> str:
    """The user's ``name``, or that of the checkpoint ``source``. CheckpointError for one that leads elsewhere."""
    name = name.strip() or plain_name(source) or PurePath(source).stem
    pure = PurePath(name)
    if pure.is_absolute() or pure.drive or {".", ".."} & set(name.replace("\\", "/").split("/")) or name[-1] in "/\\":
        found, remedy = "this name leads out of the folder where loaders look", "give a plain name, without `..`"
        raise CheckpointError(found, where=name, remedy=remedy)
    return name


def restore_device() -> torch.device:
    """Where quantised weights are restored: the device on which the host would run a VAE."""
    return comfy.model_management.vae_device()


def progress() -> Callable[[int, int], None]:
    """-> on_step(done, total) for long functions: shows the progress, and stops them when the user cancels."""
    bar = comfy.utils.ProgressBar(1)

    def on_step(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_step


def _words(name: str) -> list[str]:
    return re.split(r"[-_. ]+", PurePath(name.replace("\\", "/")).stem.lower())


def _model(name: str) -> list[str]:
    """What of a file's name tells the model."""
    return [word for word in _words(name) if not _FORMATS.fullmatch(word)]


def _packed(name: str) -> bool:
    return any(_PACKED.match(word) for word in _words(name))
