# SPDX-License-Identifier: Apache-2.0
"""A second stream of a GPU, on which small kernels run while large ones of the first leave room for them.

LTX's sound has a fiftieth of the picture's tokens and as many kernels. What one stream hands to the other has to live
until they have met, whoever allocated it: memory is reused in the order of the stream that allocated it. Inside a
capture the second stream becomes a branch of the graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from .. import residency

_FIRST = -1  # its kernels are short and few wait for them: they take the next free multiprocessor


class Beside:
    """Work beside that of the current stream of ``device``; without a device everything runs in one stream.

    As a context it ends when the streams have met, whatever happened inside.
    """

    def __init__(self, device: torch.device | None):
        self._stream = None if device is None else _second_stream(device)
        self._main = None if device is None else torch.cuda.current_stream(device)
        self._mark: torch.cuda.Event | None = None

    def __enter__(self) -> Beside:
        self.mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.meet()

    def mark(self) -> None:
        """What is queued up to here is done before what is queued beside from now on."""
        if self._stream is not None:
            self._mark = self._main.record_event()

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Queue the body beside; none of its tensors may be used outside."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(self._mark)
        with residency.outside_host_graph(), torch.cuda.stream(self._stream):
            yield

    def meet(self) -> None:
        """The current stream waits for what was queued beside."""
        if self._stream is not None:
            self._main.wait_stream(self._stream)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device; cuBLAS keeps a workspace for each stream, which is made here, outside any graph."""
    with residency.outside_host_graph():
        stream = torch.cuda.Stream(device, priority=_FIRST)
        with torch.cuda.stream(stream):
            one = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
            torch.nn.functional.linear(one, one, one[0])
            stream.synchronize()
    return stream


def may_run_beside(device: torch.device, *parts: torch.nn.Module) -> bool:
    """Whether these modules' weights lie on ``device``, an NVIDIA GPU, and nobody's function stands in them.

    A function may keep a tensor for whom does not know of the second stream; weights that the host brings are ordered
    by its own streams.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    waiting, places = [*parts], []
    while waiting:
        module = waiting.pop()
        own = module.__dict__
        if residency.taken_over(own) or not residency.addresses(own, device, places):
            return False
        waiting += [child for child in own["_modules"].values() if child is not None]
    return True
