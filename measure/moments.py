# SPDX-License-Identifier: Apache-2.0
"""Second moments of the inputs of Linears, gathered while a model runs: Gram matrices X^T X of blocks of columns.

Sums are FP32, on the device of the inputs; a GPU adds BF16 and FP16 inputs up with its tensor cores, in one launch.
Layers that are called one after the other with the same tensor share one input. A quarter of each call's tokens is held
out, in sums of its own, by which a choice made with the others can be judged: the first quarter in the first call, the
second in the second, and so on, so that neighbouring tokens are on one side and every place of a clip comes to both.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..kernels.backends import BF16_CAPABILITY, pick_backend, triton_module
from ..kernels.format import BLOCK, TENSOR_CORE_DTYPES, round_up

_HELD_OUT = 4  # one in so many tokens
_ELEMENTS = 2**24  # of an input that is converted to FP32 at a time


@dataclass
class Moments:
    """Sums over the tokens of one input of ``columns`` columns.

    ``gram``, ``held_out``: (G, B, B) fp32, padded with zeros to G * B columns; ``tokens``, ``held_tokens``: how many
    are in either.
    """

    columns: int
    gram: torch.Tensor
    held_out: torch.Tensor
    tokens: int = 0
    held_tokens: int = 0
    _kernels: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def zeros(cls, columns: int, width: int, device: torch.device | str = "cpu") -> Moments:
        """Nothing yet, in blocks of ``width`` columns, or of all if there are fewer."""
        width = min(width, round_up(columns, BLOCK))
        shape = (-(-columns // width), width, width)
        return cls(columns, torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    @property
    def mean_square(self) -> torch.Tensor:
        """(K,) fp32 mean square of each column over all tokens."""
        total = (self.gram + self.held_out).diagonal(dim1=1, dim2=2).flatten()[: self.columns]
        return total / max(self.tokens + self.held_tokens, 1)

    def add(self, inputs: torch.Tensor, call: int) -> None:
        """Count (..., K) inputs of the call of that number."""
        turn, count = call % _HELD_OUT, inputs.numel() // self.columns
        start, stop = count * turn // _HELD_OUT, count * (turn + 1) // _HELD_OUT
        added = self._kernel(count, inputs)
        if added is not None:
            added(inputs.contiguous(), self.gram, self.held_out, turn)
        else:
            rows = inputs.reshape(-1, self.columns)
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                for part in (rows[:start], rows[stop:]):
                    self._sum(part, self.gram)
                self._sum(rows[start:stop], self.held_out)
        self.tokens += count - (stop - start)
        self.held_tokens += stop - start

    def _kernel(self, count: int, inputs: torch.Tensor) -> Callable | None:
        """What adds so many tokens of such inputs in one launch; None where nothing does."""
        key = count, inputs.dtype
        if key not in self._kernels:
            fit = _on_tensor_cores(inputs.device, inputs.dtype)
            prepare = triton_module("moments").prepare if fit else lambda *_: None
            shape = tuple(self.gram.shape)
            self._kernels[key] = prepare(count, self.columns, shape, inputs.dtype, inputs.device)
        return self._kernels[key]

    def _sum(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        count, width, _ = into.shape
        for part in rows.split(max(_ELEMENTS // self.columns, 1)):
            if not len(part):
                continue
            padded = torch.nn.functional.pad(part.float(), (0, count * width - self.columns))
            blocks = padded.unflatten(1, (count, width)).transpose(0, 1)
            into.baddbmm_(blocks.transpose(1, 2), blocks)


class Collector:
    """Gathers moments for as long as it is entered: ``with Collector(layers, width) as found: model(x)``.

    ``layers``: name -> module whose first argument is its input (..., K). ``width``: see ``block_width``. ``moments``:
    name of the first layer with an input -> Moments. ``inputs``: layer -> that name, for the layers that were reached.
    Entering it again goes on. ``attach`` and ``detach`` do the same for a caller that says by ``counting`` which calls
    count: hooks cost microseconds a layer to come and to go.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module], width: int) -> None:
        self.moments: dict[str, Moments] = {}
        self.inputs: dict[str, str] = {}
        self.counting = False
        self._layers, self._width = layers, width
        self._calls: dict[str, int] = {}
        self._hooks: list = []
        self._last: tuple[weakref.ref | None, int, str] = (None, 0, "")

    def attach(self) -> None:
        """Put hooks on the layers, unless they are there."""
        if not self._hooks:
            for name, module in self._layers.items():
                self._hooks.append(module.register_forward_pre_hook(functools.partial(self._see, name)))

    def detach(self) -> None:
        """Take them away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Collector:
        self.attach()
        self.counting = True
        return self

    def __exit__(self, *_: object) -> None:
        self.counting = False
        self._last = (None, 0, "")
        self.detach()

    def _see(self, layer: str, _: torch.nn.Module, given: tuple) -> None:
        """Count an input, unless it is the tensor that the leader of this layer has just counted."""
        if not self.counting:
            return
        inputs = given[0]
        seen, version, leader = self._last
        if seen is not None and seen() is inputs and version == _version(inputs):
            if layer != leader and self.inputs.setdefault(layer, leader) == leader:
                return
        # First a layer of its own, or one whose input is no longer the leader's: it has its own sums from here on.
        self.inputs[layer] = layer
        call = self._calls.get(layer, 0)
        if call == 0:
            self.moments[layer] = Moments.zeros(inputs.shape[-1], self._width, inputs.device)
        self.moments[layer].add(inputs, call)
        self._calls[layer] = call + 1
        self._last = (weakref.ref(inputs), _version(inputs), layer)


def block_width(columns: Sequence[int], budget: int) -> int:
    """Columns of each input, bytes -> the widest blocks whose sums fit: a power of two from 16, or all columns.

    Raises ValueError where not even blocks of 16 do.
    """
    widest = round_up(max(columns), BLOCK)
    width = None
    candidate = BLOCK
    while candidate < 2 * widest:
        if sum(moment_bytes(count, candidate) for count in columns) > budget:
            break
        width = candidate
        candidate *= 2
    if width is None:
        needed = sum(moment_bytes(count, BLOCK) for count in columns)
        raise ValueError(f"a budget of {budget:,} bytes; blocks of 16 columns need {needed:,}")
    return min(width, widest)


def moment_bytes(columns: int, width: int) -> int:
    """Bytes of the sums of one input."""
    width = min(width, round_up(columns, BLOCK))
    return 2 * 4 * -(-columns // width) * width * width


@functools.cache
def _on_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype not in TENSOR_CORE_DTYPES or torch.version.cuda is None or pick_backend(device)[0] != "triton":
        return False
    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for those of inference mode, which do not count: there, two layers between
    whose calls one tensor is overwritten are taken to share it."""
    return 0 if tensor.is_inference() else tensor._version
