# SPDX-License-Identifier: Apache-2.0
"""What a node shows besides its outputs."""

from __future__ import annotations

__all__ = ["PreviewImage", "PreviewText"]


class PreviewText:
    def __init__(self, value, **kwargs):
        self.value = value

    def as_dict(self):
        return {"text": (self.value,)}


class PreviewImage:
    """Keeps the images instead of writing them to the host's temp folder."""

    def __init__(self, image, animated=False, cls=None, **kwargs):
        self.image, self.animated = image, animated

    def as_dict(self):
        names = {"filename": "preview.png", "subfolder": "", "type": "temp"}
        return {"images": [{"size": tuple(frame.shape)} | names for frame in self.image], "animated": (self.animated,)}
