# SPDX-License-Identifier: Apache-2.0
"""Makes the repository importable as ``nvfp4_video``, whatever its folder is called, over a stubbed ComfyUI.

The root ``__init__.py`` is what a running ComfyUI executes; tests import ``nvfp4_video.kernels`` and so on without it.
``tests/stub_comfy`` stands in for the host's modules in this process; tests marked ``host`` talk to a real one instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STUB = Path(__file__).resolve().parent / "stub_comfy"
PACKAGE = "nvfp4_video"

# Triton decides between compiling and interpreting when it is imported, so this precedes every import of a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _alias_repository() -> None:
    package = types.ModuleType(PACKAGE)
    package.__spec__ = ModuleSpec(PACKAGE, loader=None, is_package=True)
    package.__spec__.submodule_search_locations = [str(ROOT)]
    package.__path__ = package.__spec__.submodule_search_locations
    package.__package__ = PACKAGE
    sys.modules[PACKAGE] = package


def _take_time() -> None:
    """No test of hypothesis fails because the machine is busy, and none leaves examples in the checkout."""
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]
        settings.register_profile("busy machine", deadline=None, database=None, suppress_health_check=slow)
        settings.load_profile("busy machine")


_alias_repository()
_take_time()
sys.path.insert(0, str(STUB))


@pytest.fixture(scope="session", autouse=True)
def _triton_knows_the_gpu() -> None:
    """Triton keeps the function that tells it the GPU's capability, which some tests replace for their own time."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton"):
        importlib.import_module("triton").runtime.driver.active.get_current_target()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, each with its reason, which ``pytest -rs`` prints."""
    reasons = {}
    if not os.environ.get("COMFYUI_PATH"):
        reasons["host"] = "COMFYUI_PATH is not set, so there is no real ComfyUI to boot"
    if not torch.cuda.is_available():
        reasons["cuda"] = "torch finds no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):  # `in item.keywords` would take the names of folders too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Skip what Triton's interpreter, not the kernel, cannot do.

    Up to 3.6 it reads the bound of a loop as ``int(array of one number)``, which NumPy refuses since 2.4. Compiled
    kernels know nothing of it.
    """
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ != "InterpreterError" or "only 0-dimensional arrays" not in str(error):
            raise
        triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
        if tuple(map(int, triton.split(".")[:2])) > (3, 6):
            raise
        pytest.skip(f"the interpreter of Triton {triton} runs no loop with NumPy {numpy}: use Triton 3.7 or NumPy 2.3")


@pytest.fixture
def stub_comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The stubbed ``folder_paths``, its folders moved below ``tmp_path`` and created; a fresh prompt server."""
    folder_paths = importlib.import_module("folder_paths")
    folders = folder_paths.DEFAULT_FOLDERS.items()
    names = {name: ([str(tmp_path / "models" / name)], extensions) for name, (_, extensions) in folders}
    for paths, _ in names.values():
        Path(paths[0]).mkdir(parents=True)
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    monkeypatch.setattr(folder_paths, "base_path", str(tmp_path))
    server = importlib.import_module("server")
    monkeypatch.setattr(server.PromptServer, "instance", server.PromptServer(None))
    return folder_paths


@pytest.fixture(scope="session")
def pack() -> types.ModuleType:
    """The package with its root ``__init__.py`` executed from its file, as ComfyUI does it."""
    module = sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    spec.loader.exec_module(module)
    return module
