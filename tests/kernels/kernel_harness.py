# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: each implementation over poisoned memory, fresh inputs, and the format by hand in numpy.

On a CPU, Triton runs in its interpreter; on a GPU the same tests (marker ``cuda``) compile its kernels. Every tensor
that comes from ``torch.empty`` is full of NaN and lies between two guards, so neither a skipped nor a stray store goes
unseen. Inputs are fresh in each run; a failing test reports its seed, and NVFP4_TEST_SEED=<seed> repeats it.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from nvfp4_video.kernels import int8_reference, reference, video_reference
from nvfp4_video.kernels.backends import BF16_CAPABILITY
from nvfp4_video.kernels.format import PackedWeight, block_scale_shape, packed_shape

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_DEFINITIONS = (reference, int8_reference, video_reference)
_GUARD = 1024
_FILES = {"to_int8": "to_fp8", "quantize_rows_int8": "quantize_rows"}  # of kernels/triton, where named otherwise
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_empty = torch.empty


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation on one device; records and weights return to the CPU."""

    name: str
    device: str
    guarded: list[torch.Tensor]

    def function(self, name: str) -> Callable:
        """The one of this name in the definitions of kernels/, or in the file of kernels/triton that bears the name."""
        if self.name == "reference":
            return getattr(next(one for one in _DEFINITIONS if hasattr(one, name)), name)
        pytest.importorskip("triton")
        return getattr(importlib.import_module(f"nvfp4_video.kernels.triton.{_FILES.get(name, name)}"), name)

    def few(self, values: Sequence, most: int) -> Sequence:
        """All values; in Triton's interpreter, where a call can take a second, the first ``most``."""
        return values[:most] if (self.name, self.device) == ("triton", "cpu") else values

    def dequantize(self, record: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Record -> (N, K) ``dtype``."""
        return self.call("dequantize", record, dtype).cpu()

    def quantize(self, weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> PackedWeight:
        """(N, K) float -> record."""
        return moved(self.call("quantize", weight, global_scale), "cpu")

    def call(self, function: str, *arguments):
        """Call on the device, then look at the guards of all memory that ``torch.empty`` gave out meanwhile."""
        self.guarded.clear()
        result = self.function(function)(*(moved(value, self.device) for value in arguments))
        self.look_at_guards()
        return result

    def look_at_guards(self) -> None:
        """Fail for a store outside the memory that ``torch.empty`` has given out."""
        assert self.guarded or self.name == "reference", "nothing came from torch.empty, so nothing was poisoned"
        for buffer in self.guarded:
            stray = torch.cat((buffer[:_GUARD], buffer[-_GUARD:])) != _poison(buffer.dtype)
            assert not stray.any(), f"{int(stray.sum())} stores outside an output"


def moved(value, device: str):
    """A tensor or a record on the device; anything else as it is."""
    if isinstance(value, PackedWeight):
        return PackedWeight(*(part.to(device) for part in value.parts), value.shape)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _poison(integer: torch.dtype) -> int:
    """All bits set: a NaN in every floating-point type."""
    return 255 if integer == torch.uint8 else -1


def implementations():
    """Parameters for ``guarded_kernels``."""
    interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")
    yield pytest.param(("reference", "cpu"), id="reference")
    yield pytest.param(("triton", "cpu"), id="triton-interpreted", marks=interpreted)
    yield pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.cuda)
    yield pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.cuda)


def _patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare Triton's interpreter a third of its time: at each call within a kernel it goes through its language again.

    Only what is still as Triton has it needs the patch, and only a launch undoes it. Releases that undo it otherwise
    are left as they are.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    language = importlib.import_module("triton.language")
    patch = interpreter._patch_lang

    def patch_once(function):
        used = [module for module in function.__globals__.values() if module is language or module is language.core]
        done = used and not any(language.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if done else patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def guarded_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A fixture: each implementation in turn; ``torch.empty`` gives out poison between guards meanwhile."""
    buffers: list[torch.Tensor] = []

    def guarded(*size, dtype: torch.dtype = torch.float32, device="cpu") -> torch.Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        integer = _INTEGERS[dtype.itemsize]
        buffers.append(_empty(shape.numel() + 2 * _GUARD, dtype=integer, device=device).fill_(_poison(integer)))
        return buffers[-1][_GUARD:-_GUARD].view(dtype).view(shape)

    implementation = Kernels(*request.param, buffers)
    assert implementation.function("dequantize")  # imported, Triton with it, before the patch
    if request.param == ("triton", "cpu"):
        _patch_language_once(monkeypatch)
    monkeypatch.setattr(torch, "empty", guarded)
    return implementation


def tensor_core_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The fixture ``guarded_kernels`` for functions that multiply BF16."""
    found = guarded_kernels(request, monkeypatch)
    if (found.name, found.device) == ("triton", "cuda") and torch.cuda.get_device_capability() < BF16_CAPABILITY:
        pytest.skip("the tensor cores take no BF16")
    return found


def fresh_generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A fixture: fresh random numbers; the seed is shown with a failure."""
    seed = int(os.environ.get("NVFP4_TEST_SEED", random.SystemRandom().randrange(2**31)))
    request.node.add_report_section("setup", "seed", f"NVFP4_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def scalar(value: float) -> torch.Tensor:
    """() fp32."""
    return torch.tensor(value, dtype=torch.float32)


def random_record(
    shape: tuple[int, int], generator: torch.Generator, global_scale: float | None = None
) -> PackedWeight:
    """Random bytes everywhere, in the padding too, NaN scales included."""
    if global_scale is None:
        global_scale = (0.5 + torch.rand((), generator=generator).item()) / 2688
    packed, scale = (
        torch.randint(256, size, generator=generator, dtype=torch.uint8)
        for size in (packed_shape(shape), block_scale_shape(shape))
    )
    return PackedWeight(packed, scale.view(torch.float8_e4m3fn), scalar(global_scale), shape)


def e4m3(byte: np.ndarray) -> np.ndarray:
    """E4M3 bits -> fp32, from the definition of the format."""
    exponent, mantissa = byte.astype(int) >> 3 & 15, byte.astype(int) & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    size = np.where(byte & 0x7F == 0x7F, np.nan, size)
    return np.where(byte & 0x80, -size, size).astype(np.float32)


def scale_offset(row: np.ndarray, block: np.ndarray, blocks: int) -> np.ndarray:
    """Flat offset in the tiled scales of a matrix with ``blocks`` scales a row; the formula of kernels/format.py."""
    return (row // 128 * (-(-blocks // 4)) + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def unpack(record: PackedWeight) -> tuple[np.ndarray, np.ndarray]:
    """-> the E2M1 value and the block scale of each element, fp32 (N, K), by indexing."""
    row, column = np.indices(record.shape)
    packed = record.packed.numpy()
    byte = packed[row, column // 2]
    scales = record.block_scale.view(torch.uint8).numpy().ravel()
    offset = scale_offset(row, column // 16, packed.shape[1] // 8)
    return CODES[np.where(column % 2 == 0, byte >> 4, byte & 15)], e4m3(scales[offset])


def decode(record: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """``code * (block_scale * global_scale)`` in fp32, rounded once to ``dtype``."""
    codes, scales = unpack(record)
    return torch.from_numpy(codes * (scales * record.global_scale.numpy())).to(dtype)


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shape, dtype and bits, the sign of zero included; a NaN equals a NaN whatever its payload."""
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    integer = _INTEGERS[result.dtype.itemsize]
    same = result.view(integer) == expected.view(integer)
    if result.is_floating_point():
        same |= result.float().isnan() & expected.float().isnan()
    wrong = (~same).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        pytest.fail(f"{len(wrong)} elements differ, the first at {at}: {result[at].item()} for {expected[at].item()}")


def assert_same_record(result: PackedWeight, expected: PackedWeight) -> None:
    """Equal bytes and logical shape."""
    assert result.shape == expected.shape
    for one, other in zip(result.parts, expected.parts, strict=True):
        assert_same_bits(one, other)
