# SPDX-License-Identifier: Apache-2.0
"""Where decoded frames go: to host memory while the GPU decodes the next chunk."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


class FrameCopy:
    """Copies chunks of frames to their place in the clip, one chunk behind the GPU.

    A chunk goes to pinned memory on a stream of its own; when the next one has been queued, the CPU moves it on. So
    neither waits for the other, and at most two chunks are in pinned memory, which torch keeps for the next decode.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: list[tuple] = []

    def put(self, pixels: torch.Tensor, place: torch.Tensor) -> None:
        """(C, t, H, W) on the GPU -> ``place`` of the same shape and dtype; it is there after ``finish``."""
        pinned = self._pinned(pixels) if self._stream is not None and place.device.type == "cpu" else None
        if pinned is None:
            place.copy_(pixels)
            return
        self._stream.wait_stream(torch.cuda.current_stream(pixels.device))
        with torch.cuda.stream(self._stream):
            pinned.copy_(pixels, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        ready, self._waiting = self._waiting, [(done, pinned, pixels, place)]
        self._move(ready)

    def finish(self) -> None:
        """Move what is still on its way."""
        ready, self._waiting = self._waiting, []
        self._move(ready)

    def _move(self, ready: list[tuple]) -> None:
        for done, pinned, _, place in ready:  # the pixels are kept until they have been copied
            done.synchronize()
            place.copy_(pinned)

    def _pinned(self, pixels: torch.Tensor) -> torch.Tensor | None:
        try:
            return torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        except RuntimeError as error:  # the system gives out no more of it
            logger.info("frames are copied without pinned memory: %s", error)
            self._stream = None
            self.finish()
            return None
