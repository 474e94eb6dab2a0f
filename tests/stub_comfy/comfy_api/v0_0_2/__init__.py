# SPDX-License-Identifier: Apache-2.0
"""The pinned version of the node API that the pack uses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from . import io, ui

__all__ = ["ComfyAPISync", "ComfyExtension", "io", "ui"]


class ComfyExtension(ABC):
    """What ``comfy_entrypoint`` returns."""

    async def on_load(self):
        """Runs once, before the nodes are asked for."""
        return None

    @abstractmethod
    async def get_node_list(self):
        """The node classes."""


class _Execution:
    def __init__(self):
        self.progress = []

    def set_progress(self, value, max_value, node_id=None, preview_image=None, ignore_size_limit=False):
        self.progress.append((value, max_value))


class ComfyAPISync:
    """``execution.progress`` collects every (value, max)."""

    def __init__(self):
        self.execution = _Execution()
