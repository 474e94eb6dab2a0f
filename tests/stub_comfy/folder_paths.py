# SPDX-License-Identifier: Apache-2.0
"""The host's folders. The fixture ``stub_comfy`` moves them below a test's ``tmp_path``."""

from __future__ import annotations

import os
import tempfile

__all__ = [
    "base_path",
    "folder_names_and_paths",
    "get_filename_list",
    "get_folder_paths",
    "get_full_path",
    "get_full_path_or_raise",
    "get_input_directory",
    "get_output_directory",
    "get_temp_directory",
    "get_user_directory",
]

_EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
_KINDS = ("checkpoints", "diffusion_models", "embeddings", "loras", "text_encoders", "vae")

base_path = os.path.join(tempfile.gettempdir(), "nvfp4-video-stub")
DEFAULT_FOLDERS = {kind: ([os.path.join(base_path, "models", kind)], _EXTENSIONS) for kind in _KINDS}
folder_names_and_paths = dict(DEFAULT_FOLDERS)


def get_folder_paths(folder_name):
    return folder_names_and_paths[folder_name][0][:]


def get_filename_list(folder_name):
    """Sorted names, with subfolders, of the files that have a known extension; KeyError for an unknown folder name."""
    folders, extensions = folder_names_and_paths[folder_name]
    found = set()
    for top in folders:
        for folder, _, files in os.walk(top, followlinks=True):
            found |= {os.path.relpath(os.path.join(folder, name), top) for name in files}
    return sorted(name for name in found if os.path.splitext(name)[1].lower() in extensions)


def get_full_path(folder_name, filename):
    """The file's path, or None; ``..`` cannot leave the folder."""
    for top in folder_names_and_paths.get(folder_name, ([], ()))[0]:
        path = os.path.join(top, os.path.relpath(os.path.join("/", filename), "/"))
        if os.path.isfile(path):
            return path
    return None


def get_full_path_or_raise(folder_name, filename):
    path = get_full_path(folder_name, filename)
    if path is None:
        raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")
    return path


def get_input_directory():
    return os.path.join(base_path, "input")


def get_output_directory():
    return os.path.join(base_path, "output")


def get_temp_directory():
    return os.path.join(base_path, "temp")


def get_user_directory():
    return os.path.join(base_path, "user")
