# SPDX-License-Identifier: Apache-2.0
"""Banks of experts in NVFP4, as gpt-oss has them: the host's class for them, each expert decoded by the pack's kernels.

A bank is one tensor, (E, N, K/2) uint8 with tiled scales (E, N', K'/16) and one global scale, or one an expert.
"""

from __future__ import annotations

import contextlib

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...checkpoint.file.header import CheckpointError
from ...kernels.format import PackedWeight, packed_shape
from .matmul import multiply, wrap

_AGAIN = "the file is damaged, or of another size of the model: download it again"


class _Resident:
    """A bank on the device of its input, for as long as the host lends it."""

    def __init__(self, module: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, backend: str):
        self.module, self.weight, self.bias, self.backend = module, weight, bias, backend

    def expert_linear(self, input: torch.Tensor, index: int) -> torch.Tensor:
        """(T, K) times expert ``index`` (N, K) -> (T, N)"""
        bias = None if self.bias is None else self.bias[index].to(input.dtype)
        if not isinstance(self.weight, QuantizedTensor):  # patched: the host has decoded it
            return torch.nn.functional.linear(input, self.weight[index].to(input.dtype), bias)
        params = self.weight._params
        scale = params.scale.reshape(-1)
        scale = scale[index if scale.numel() > 1 else 0]
        shape = (self.module.out_features, self.module.in_features)
        expert = wrap(PackedWeight(self.weight._qdata[index], params.block_scale[index], scale, shape))
        return multiply(self.module.__dict__, input, expert, bias, input.device, self.backend, "")


def bank_class(host: type, backend: str, source: str) -> type:
    """The host's ``MoEExperts`` -> one whose NVFP4 banks are decoded here; other formats stay the host's."""

    class MoEExperts(host):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            super()._load_from_state_dict(state_dict, prefix, *args)
            codes = getattr(self.weight, "_qdata", self.weight)
            if codes is None:
                raise CheckpointError("it has no `weight`", where=f"{source}, layer {prefix[:-1]}", remedy=_AGAIN)
            rows, cols = self.out_features, self.in_features
            if self.quant_format == "nvfp4":
                rows, cols = packed_shape((rows, cols))
            elif isinstance(self.weight, QuantizedTensor):
                return
            if tuple(codes.shape) != (self.num_experts, rows, cols):
                found, wanted = f"its experts have shape {tuple(codes.shape)}", (self.num_experts, rows, cols)
                where = f"{source}, layer {prefix[:-1]}"
                raise CheckpointError(found, where=where, expected=f"shape {wanted}", remedy=_AGAIN)

        @contextlib.contextmanager
        def bank_resident(self, input):
            if self.quant_format != "nvfp4":
                with super().bank_resident(input) as bank:
                    yield bank
                return
            # Asking for the weight's own dtype keeps the host from dequantising all experts.
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype, offloadable=True
            )
            try:
                yield _Resident(self, weight, bias, backend)
            finally:
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)

        def expert_linear(self, input, i):
            if self.quant_format != "nvfp4":
                return super().expert_linear(input, i)
            with self.bank_resident(input) as bank:
                return bank.expert_linear(input, i)

    return MoEExperts
