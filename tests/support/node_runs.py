# SPDX-License-Identifier: Apache-2.0
"""What a node's run leaves in a folder, and the progress it tells, with a cancel in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest


def written(folder: Path) -> list[str]:
    """Files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def watch_bars(monkeypatch: pytest.MonkeyPatch, cancel_at: Callable[[int], float | None]) -> list:
    """The host's progress bars, in a list that grows; the bar of that number is cancelled at that share, if any."""
    bars: list = []

    class Bar(comfy.utils.ProgressBar):
        def __init__(self, total, node_id=None):
            super().__init__(total, node_id)
            bars.append(self)

        def update_absolute(self, value, total=None, preview=None):
            super().update_absolute(value, total, preview)
            share = cancel_at(len(bars))
            if share is not None and self.current >= share * self.total:
                comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    return bars
