# SPDX-License-Identifier: Apache-2.0
"""Modules that a test gives to its process, or keeps from it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def offer(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> ModuleType:
    """Put a module into this process for one test."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def withhold(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make ``import name`` fail as if the module did not exist."""
    monkeypatch.setitem(sys.modules, name, None)
