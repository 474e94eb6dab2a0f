# SPDX-License-Identifier: Apache-2.0
"""Launching a Triton kernel again and again at a few microseconds of CPU time, and what all kernels do before it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..backends import BF16_CAPABILITY
from ..format import block_scale_shape, check_parts, packed_shape

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None

# Compiled kernels take all arguments, constants included, since Triton 3.4; its interpreter compiles nothing.
_DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4) and not triton.knobs.runtime.interpret
_HOPPER = (9, 0)
_L2_SHARE, _L2_UNKNOWN = 0.8, 48 << 20  # the rest of the cache is for what the matmul reads beside the weight


def warps(columns: int, a_warp: int) -> int:
    """How many warps take a row of a power of two of columns, ``a_warp`` columns each: 1 to 16."""
    return min(16, max(1, columns // a_warp))


def part_reader(shape: tuple[int, int], device: torch.device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """(N, K), device -> function (packed, block_scale, global_scale) -> the three as kernels read them.

    That is: contiguous, ``packed`` and the block scales at a multiple of 4 bytes, the global scale in FP32 on
    ``device``. Parts that are so already come back as they are. The function raises ValueError for those of another
    shape.
    """
    bytes_shape, scale_shape = packed_shape(shape), block_scale_shape(shape)

    def read(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if packed.shape != bytes_shape or block_scale.shape != scale_shape:
            check_parts(packed, block_scale, shape)  # raises
        if not (packed.is_contiguous() and block_scale.is_contiguous()):
            packed, block_scale = packed.contiguous(), block_scale.contiguous()
        if global_scale.dtype != torch.float32 or global_scale.device != device:
            global_scale = global_scale.to(device, torch.float32)
        if packed.data_ptr() % 4:  # both are read as 32-bit words
            packed = packed.clone()
        if block_scale.data_ptr() % 4:
            block_scale = block_scale.clone()
        return packed, block_scale, global_scale

    return read


def bf16_as_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an output of ``dtype`` is BF16 that a kernel must round itself and store as int16.

    Triton converts to BF16 from compute capability 8.0 on; its interpreter truncates instead of rounding.
    """
    if dtype != torch.bfloat16:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < BF16_CAPABILITY


def overlap(device: torch.device) -> dict[str, bool]:
    """Options of a ``Launcher`` whose kernel may begin while the one before it ends: none below Hopper."""
    if gdc_wait is None or device.type != "cuda" or torch.version.cuda is None:
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= _HOPPER else {}


@triton.jit
def after_the_one_before(OVERLAP: tl.constexpr, SMALL: tl.constexpr = True):
    """What a kernel launched with ``overlap`` reads that the kernel before it wrote, it reads behind this.

    Each program must come by, whatever it does. What the one before that wrote, and weights, may be read earlier.
    SMALL: the kernel leaves room on the GPU, so that the next may begin at once; programs of one that fills it would
    crowd where the first of its own end, and be the last to end there.
    """
    if OVERLAP:
        gdc_wait()
        if SMALL:
            gdc_launch_dependents()


def store_modifier(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str:
    """Cache modifier for a decoded weight: past the L2 cache if it outgrows that, else left for the matmul after it."""
    return ".cs" if shape[0] * shape[1] * dtype.itemsize > cached_bytes(device) else ""


@functools.cache
def cached_bytes(device: torch.device) -> int:
    """Bytes of a decoded weight that the device's L2 cache keeps until they are multiplied."""
    if device.type != "cuda":
        return _L2_UNKNOWN
    return int(_L2_SHARE * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _L2_UNKNOWN


class Launcher:
    """One kernel with everything fixed but its tensors.

    From its second call on it skips the JIT's analysis of arguments, which costs the CPU more than all the rest, and
    Triton's look at each pointer, which fails for what cudaMallocAsync gives out while a CUDA graph is captured; that
    needs the first call's alignment. ``as_bytes``: positions of tensors that the kernel sees as uint8; ``changes``: of
    those that it reads and writes, since it is launched a second time in the first call.
    """

    __slots__ = ("_arguments", "_as_bytes", "_changes", "_device", "_direct", "_grid", "_kernel", "_options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple,
        device: torch.device,
        as_bytes: tuple[int, ...] = (),
        changes: tuple[int, ...] = (),
        **options: int,
    ):
        self._kernel, self._grid, self._arguments, self._changes = kernel, (*grid, 1, 1)[:3], arguments, changes
        self._device, self._options, self._as_bytes, self._direct = device, options, as_bytes, None

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream; ``tensors`` are the kernel's first arguments. The grid must not be empty."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        aligned = True
        for pointer in pointers:
            if pointer & 15:
                aligned = False
        if aligned and self._direct is not None:
            self._direct(*pointers, *self._arguments)
            return
        copies = [tensors[at].clone() for at in self._changes] if aligned and _DIRECT else []
        seen = [tensor.view(torch.uint8) if at in self._as_bytes else tensor for at, tensor in enumerate(tensors)]
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            compiled = self._kernel[self._grid](*seen, *self._arguments, **self._options)
        if aligned and _DIRECT:
            for at, copy in zip(self._changes, copies, strict=True):
                pointers[at] = copy.data_ptr()
            self._direct = direct_launch(compiled, self._grid, self._device, (*pointers, *self._arguments))


def direct_launch(compiled: Any, grid: tuple[int, int, int], device: torch.device, trial: tuple) -> Callable[..., None]:
    """A compiled kernel -> function of addresses and arguments that launches it on the device's current stream.

    It leaves out Triton's look-up of the device and its hooks for profilers. ``trial``, arguments with which the kernel
    has just run and may run again, shows whether this Triton takes that; otherwise its own, slower launch is returned.
    """
    slower = compiled[grid]
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        index = torch.cuda.current_device() if device.index is None else device.index
        current_stream = torch._C._cuda_getCurrentRawStream

        def launch(*arguments: Any) -> None:
            run(*grid, current_stream(index), function, metadata, None, None, None, *arguments)

        with torch.cuda.device(index):
            launch(*trial)
    except (AttributeError, TypeError):
        return slower
    return launch if torch.cuda.device_count() < 2 else _on(index, launch)


def _on(index: int, launch: Callable[..., None]) -> Callable[..., None]:
    """``launch`` where the GPU for which it was compiled may not be the current one."""

    def switched(*arguments: Any) -> None:
        with torch.cuda.device(index):
            launch(*arguments)

    return switched
