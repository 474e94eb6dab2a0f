"""What a node shows besides its outputs."""

from __future__ import annotations

__all__ = ["PreviewText"]


class PreviewText:
    def __init__(self, value, **kwargs):
        self.value = value

    def as_dict(self):
        return {"text": (self.value,)}
