# SPDX-License-Identifier: Apache-2.0
"""Capturing blocks as CUDA graphs over tensors at fixed addresses, and giving all their memory back.

All of it happens outside the host's own recording of allocations, since a plan outlives the block in which it is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import residency
from . import graph_key

logger = logging.getLogger(__name__)

_IS_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_kept: list[BaseException] = []


@dataclass(eq=False)
class Captured:
    """A block's graph, what its weights and layers were (``graph_key.of_block``), and whether this sampling used it.

    What else it knows by address are the plan's tensors and those that kernels keep for the process.
    """

    graph: torch.cuda.CUDAGraph
    weights: tuple
    used: bool = True


class Plan:
    """Captured blocks for calls of one kind, and the tensors that they read and write.

    ``inputs`` has every argument that all blocks of a step share, ``arguments`` the dict a block gets. ``stream`` (two
    tensors, video and audio) is what the blocks hand on; they change it in place. ``graphs``: number of the block ->
    its branches -> Captured.
    """

    def __init__(self, arguments: Mapping, tensors: list[torch.Tensor]):
        with torch.inference_mode(False):  # tensors made in it cannot be written to in a sampling outside of it
            self.inputs = [_like(tensor) for tensor in tensors]
            self.stream = tuple(torch.empty_like(tensor) for tensor in arguments["img"])
        given = iter(self.inputs)
        # Not the options, which are each call's own and may know the model that these graphs must not keep alive.
        self.arguments = {
            name: self.stream if name == "img" else graph_key.rebuild(value, given)
            for name, value in arguments.items()
            if name != "transformer_options"
        }
        self.graphs: dict[int, dict[tuple, Captured]] = {}
        self.device = self.stream[0].device
        self.pool = torch.cuda.graph_pool_handle()
        self.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that stay while the graphs do."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.stream))

    def forget(self) -> None:
        """The tensors of a finished step need not be kept."""
        self._seen: list[torch.Tensor | None] = [None] * len(self.inputs)

    def replay(self, captured: Captured, arguments: Mapping, tensors: list[torch.Tensor]) -> None:
        """Bring a block's inputs to their places, those that all blocks share once a step, and queue the block."""
        for place, (own, tensor) in enumerate(zip(self.inputs, tensors, strict=True)):
            if self._seen[place] is not tensor:
                own.copy_(tensor)
                self._seen[place] = tensor
        for own, tensor in zip(self.stream, arguments["img"], strict=True):
            if own is not tensor:
                own.copy_(tensor)
        captured.graph.replay()
        captured.used = True

    def capture(self, number: int, branches: tuple, weights: tuple, options: Any, original: Callable) -> Captured:
        """Record what ``original``, the host's call of a block, queues for this plan's tensors; nothing is computed.

        Raises what the block raises, or RuntimeError; the GPU can be used afterwards as before.
        """
        known = self.graphs.setdefault(number, {})
        if branches in known:
            known.pop(branches).graph.reset()  # its weights have moved
        stream, graph = _capture_stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                out = original({**self.arguments, "transformer_options": options})["img"]
                for own, tensor in zip(self.stream, out, strict=True):
                    if own is not tensor:
                        own.copy_(tensor)
                del out
            except BaseException as error:
                _let_go(error, stream)
                with contextlib.suppress(RuntimeError):  # the first error is the one to tell
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        known[branches] = Captured(graph, weights)
        return known[branches]

    def free_unused(self) -> None:
        """Destroy the graphs that the sampling did not use, none of which may still run."""
        for known in self.graphs.values():
            for branches in [branches for branches, captured in known.items() if not captured.used]:
                known.pop(branches).graph.reset()
            for captured in known.values():
                captured.used = False

    def free(self) -> None:
        """Destroy the graphs, none of which may still run, and let go of the tensors."""
        for known in self.graphs.values():
            for captured in known.values():
                captured.graph.reset()
        self.graphs.clear()
        self.inputs.clear()
        self.stream, self.arguments, self._seen = (), {}, []


def _let_go(error: BaseException, stream: torch.cuda.Stream) -> None:
    """Drop the tensors of a failing capture, which frames of the error and of those behind it hold, while possible.

    With cudaMallocAsync, which ComfyUI uses, an address of a capture that came to nothing cannot be freed after it, nor
    in one that the driver has given up: torch ends the process over that. There the error is kept, and the addresses
    with it; memory they have none before a graph is launched.
    """
    status = ctypes.c_int()
    try:
        failed = _driver().cuStreamIsCapturing(ctypes.c_void_p(stream.cuda_stream), ctypes.byref(status))
    except (OSError, AttributeError):
        failed = True
    if failed or status.value != _IS_CAPTURING:
        _kept.append(error)
        return
    behind: BaseException | None = error
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__


def has_leaked() -> bool:
    """Whether the error of a capture is kept, and with its frames all that they know, until ComfyUI ends."""
    return bool(_kept)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor with its strides, by which kernels are chosen; but one that is written to has no overlaps."""
    if 0 in tensor.stride():
        return torch.empty_like(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextlib.contextmanager
def apart(device: torch.device):
    """Where graphs are made and destroyed: the GPU has come to rest, and the host records no allocation."""
    torch.cuda.synchronize(device)
    with residency.outside_host_graph(synchronize=True), torch.cuda.device(device):
        yield


def give_back(device: torch.device) -> None:
    """Return the memory of destroyed graphs to the card, where the VAE and other programs find it.

    torch's own allocator keeps what was a graph's in its cache; the driver keeps that of graphs whose allocations it
    made itself (cudaMallocAsync, which ComfyUI uses) until it is told to trim. That it does for graphs too which are
    still there and do not run: it brings the memory to their addresses again when they do.
    """
    torch.cuda.empty_cache()
    if reason := _trim(device):
        logger.info("the driver may keep memory of finished CUDA graphs: %s", reason)


def gives_memory_back() -> bool:
    """Whether graphs need not be destroyed for it: only where the driver itself allocates what they compute in."""
    return torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def _trim(device: torch.device) -> str:
    """cuDeviceGraphMemTrim -> why it was not possible, or an empty string."""
    try:
        driver, handle = _driver(), ctypes.c_int()
        status = driver.cuDeviceGet(ctypes.byref(handle), device.index or 0)
        status = status or driver.cuDeviceGraphMemTrim(handle)
    except (OSError, AttributeError) as error:
        return str(error)
    return f"error {status} of cuDeviceGraphMemTrim" if status else ""


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all captures: cuBLAS keeps a workspace for each, made here, outside any graph."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        one = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        torch.nn.functional.linear(one, one, one[0])
        stream.synchronize()
    return stream
