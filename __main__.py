# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python <pack folder> <command>``. See cli/ for the commands."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = "nvfp4_video"
FOLDER = Path(__file__).resolve().parent


def _alias_folder() -> None:
    """Make the folder importable as one package, whatever it is called, without its ``__init__.py``.

    That file needs a running ComfyUI. Python has put the folder itself on ``sys.path``, where its `nodes`, `host` or
    `tests` could be taken for somebody else's module of that name, so it is taken off again.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]
    package = ModuleType(PACKAGE)
    package.__spec__ = ModuleSpec(PACKAGE, loader=None, is_package=True)
    package.__spec__.submodule_search_locations = [str(FOLDER)]
    package.__path__ = package.__spec__.submodule_search_locations
    sys.modules[PACKAGE] = package


if __name__ == "__main__":
    _alias_folder()
    sys.exit(import_module(f"{PACKAGE}.cli").main(sys.argv[1:]))
