# SPDX-License-Identifier: Apache-2.0
"""The stand-in of ComfyUI's modules under which the guard and the loaders can be run without a ComfyUI."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

STUB = Path(__file__).resolve().parent.parent.parent / "tests" / "stub_comfy"
NO_STUB = "needs tests/stub_comfy, which this copy of the pack leaves out: clone the repository"


def there() -> bool:
    """Whether this copy of the pack has it."""
    return (STUB / "folder_paths.py").is_file()


def connect(base: Path | None = None) -> Any:
    """Make the stub importable -> its ``folder_paths``, with the host's folders below ``base``, if one is given."""
    if str(STUB) not in sys.path:
        sys.path.insert(0, str(STUB))
    folder_paths = importlib.import_module("folder_paths")
    if base is not None:
        folders = folder_paths.DEFAULT_FOLDERS.items()
        folder_paths.base_path = str(base)
        places = {name: ([str(base / "models" / name)], ends) for name, (_, ends) in folders}
        folder_paths.folder_names_and_paths = places
    return folder_paths


def vulnerable_host() -> dict[str, Any]:
    """Facts of a host on which every rule of the guard has something to look for."""
    from ...host.doctor.probe import Fact

    values = {
        "prefetch_crash": True, "dynamic_vram": True, "async_offload_streams": 2, "ltxav_needs_audio": True,
        "torch_cuda": (12, 8), "capability": (12, 0), "kitchen_backends": {"cuda": True, "eager": True},
    }  # fmt: skip
    return {name: Fact(name, "", name, value, str(value), "made") for name, value in values.items()}
