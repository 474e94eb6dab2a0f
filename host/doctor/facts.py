# SPDX-License-Identifier: Apache-2.0
"""What a fact is, and the few means by which facts are found. Imports nothing of ComfyUI and does not touch the GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

GIB = 1024**3
NOT_STARTED = "ComfyUI is not running in this process"
PATH = re.compile(r"(?:^|[^\w.])[~.]?/\w|\\|\b[A-Za-z]:/")


class Unknown(Exception):
    """A question without an answer on this machine; the message says why."""


@dataclass(frozen=True)
class Fact:
    """``value`` is for code and None if unknown; ``text`` is for people; ``source`` is where the value was read."""

    id: str
    group: str
    label: str
    value: object | None
    text: str
    source: str

    @property
    def known(self) -> bool:
        return self.value is not None


def why(error: Exception) -> str:
    """An error in a few words, without paths."""
    if isinstance(error, ModuleNotFoundError):
        missing = error.name in ("comfy", "comfyui_version")
        # ComfyUI names the modules of a pack by the path of its folder.
        name = re.split(r"[/\\]", str(error.name))[-1]
        return "there is no ComfyUI in this process" if missing else f"there is no module {name}"
    if isinstance(error, importlib.metadata.PackageNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) or not text or PATH.search(text):
        name = re.split(r"[/\\]", str(getattr(error, "name", None) or ""))[-1]
        return f"{type(error).__name__} in {name}" if name else type(error).__name__
    return text if isinstance(error, Unknown) else f"{type(error).__name__}: {text[:200]}"


def running() -> bool:
    """Whether this process is a started ComfyUI, whose main.py has decided about its memory management."""
    server = sys.modules.get("server")
    return getattr(getattr(server, "PromptServer", None), "instance", None) is not None


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def comfy(name: str) -> ModuleType:
    return module(f"comfy.{name}")


def arguments() -> Any:
    """The host's parsed command line, if it has one."""
    return getattr(comfy("cli_args"), "args", None)


def gib(nbytes: float) -> str:
    """Bytes for people, in the binary unit in which GPUs are sold."""
    return f"{nbytes / GIB:.1f} GiB"
