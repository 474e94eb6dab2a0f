# SPDX-License-Identifier: Apache-2.0
"""The operations class with which ComfyUI builds a model whose NVFP4 Linears compute from packed weights.

It derives from the host's own mixed-precision operations, so loading, LoRA, offload, DynamicVRAM and saving stay the
host's. Only ``Linear.forward`` gains a path of its own, without tensor-subclass dispatch: it finds the packed weight
where it lies and has it multiplied (matmul.py). Plain LoRAs are a branch beside the packed weight (lora.py). Whatever
that path does not cover (weight functions, low-VRAM patches, training, odd inputs, layers in FP4 mode) goes to the
host's forward, which is weight-only too but for the FP4 layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ...checkpoint.file.header import CheckpointError
from ...kernels import reference
from ...kernels.format import OUTPUT_DTYPES, FP8Rows, packed_shape
from .. import residency
from . import lora
from .experts import bank_class
from .low_rank import LOW_RANK, add_low_rank
from .matmul import multiply, multiply_with_lora
from .modes import EIGHT_BITS, OWN, Compute

_WEIGHT_ONLY = Compute()


def supports(parameter: str) -> bool:
    """Whether this host's NVFP4 Linear reads the extra tensor ``parameter``, such as ``pre_quant_scale``."""
    return parameter in QUANT_ALGOS.get("nvfp4", {}).get("parameters", ())


def weight_only_operations(
    compute_dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    source: str = "the file",
    compute: Compute = _WEIGHT_ONLY,
) -> type:
    """Operations class for a model with NVFP4 layers that computes in ``compute_dtype``; FP8 files stay the host's.

    Weight-only unless ``compute`` says otherwise.
    """
    marked = SimpleNamespace(quant_config={"mixed_ops": True})
    host = comfy.ops.pick_operations(None, compute_dtype, device, model_config=marked)
    # A disabled format is one the host computes from full-precision weights instead of quantising the activations.
    disabled = {*host._disabled} if compute.uses("fp4") else {*host._disabled, "nvfp4"}
    base = comfy.ops.mixed_precision_ops(host._quant_config, compute_dtype, disabled=disabled)
    books = residency.check()
    patched = residency.patched if books.patches else _always
    resident = residency.resident if books.places else _nowhere

    class WeightOnlyOperations(base):
        class Linear(base.Linear):
            takes_fp8_rows = True  # see rows.py

            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict.get(f"{prefix}weight")
                if isinstance(weight, QuantizedTensor):
                    _unwrap(state_dict, prefix, weight, (self.out_features, self.in_features), source)
                low_rank = [state_dict.pop(f"{prefix}{suffix}", None) for suffix in LOW_RANK]
                super()._load_from_state_dict(state_dict, prefix, *args)
                choose_mode(self, compute.of(prefix[:-1]))
                if low_rank[0] is not None:
                    add_low_rank(self, low_rank)

            def forward(self, input, *args, activation="", **kwargs):
                # Looked up in the instance: a missing attribute of an nn.Module costs microseconds, a thousand times
                # a step.
                own = self.__dict__
                parameters = own["_parameters"]
                weight = parameters.get("weight")
                rows = type(input) is FP8Rows
                if not (
                    own.get("nvfp4_mode") in OWN
                    and isinstance(weight, QuantizedTensor)
                    and not patched(self)
                    and (rows or type(input) is torch.Tensor)
                    and input.dtype in OUTPUT_DTYPES
                    and (rows or not (input.requires_grad and torch.is_grad_enabled()))
                ):
                    input = reference.activate(input.plain() if rows else input, activation)
                    out, branch = super().forward(input, *args, **kwargs), own.get("nvfp4_lora")
                    return out if branch is None else lora.beside(parameters, out, input, branch)
                device = input.device
                matmul = multiply if own.get("nvfp4_lora") is None else multiply_with_lora
                smoothed = "pre_quant_scale" in parameters  # ModelOpt's AWQ
                if rows and (smoothed or activation):
                    input = input.plain()
                if activation and (smoothed or own["nvfp4_mode"] not in EIGHT_BITS):
                    input, activation = reference.activate(input, activation), ""
                if smoothed:
                    smoothing = parameters["pre_quant_scale"]
                    input = input * comfy.model_management.cast_to_device(smoothing, device, input.dtype)
                found = resident(own, device)
                if found is None:
                    return _streamed(self, input, weight, backend, matmul, activation)
                return matmul(own, input, *found, device, backend, activation)

    if hasattr(base, "MoEExperts"):
        WeightOnlyOperations.MoEExperts = bank_class(base.MoEExperts, backend, source)
    return WeightOnlyOperations


def _always(module: torch.nn.Module) -> bool:
    """What stands for ``residency.patched`` where the host's patches cannot be seen: its forward knows them."""
    return True


def _nowhere(own: dict, device: torch.device) -> None:
    """What stands for ``residency.resident`` where that cannot be told: ``cast_bias_weight`` brings the weight."""


def choose_mode(module, mode: str) -> None:
    """Note how a Linear computes: ``nvfp4_mode``, None if its weight is not NVFP4.

    FP4 can be had again only by a layer that was loaded for it.
    """
    own = module.__dict__
    if own.get("quant_format") != "nvfp4":
        own["nvfp4_mode"] = None
        return
    if own.get("_full_precision_mm_config"):  # its file asks for weight-only
        mode = "bf16"
    if mode != "fp4":
        module._full_precision_mm = True
    elif own.get("nvfp4_mode"):  # it is not being loaded
        module._full_precision_mm = False
    own["nvfp4_mode"] = mode


def modes_of(model: torch.nn.Module) -> Counter[str]:
    """How many of a model's NVFP4 layers compute in which mode."""
    return Counter(mode for module in model.modules() if (mode := module.__dict__.get("nvfp4_mode")))


def _unwrap(state_dict: dict, prefix: str, weight: QuantizedTensor, shape: tuple[int, int], source: str) -> None:
    """Give the host the tensors it expects to find in a file; refuse a weight of another layer's size."""
    packed, params = weight._qdata, weight._params
    if tuple(packed.shape) != packed_shape(shape):
        raise CheckpointError(
            f"its NVFP4 weight is {(packed.shape[0], packed.shape[1] * 2)} (padded)",
            where=f"{source}, layer {prefix[:-1]}",
            expected=f"{shape}, as the model has",
            remedy="the file is damaged, or of another version of the model than its `config` says: download it again",
        )
    state_dict[f"{prefix}weight"] = packed
    state_dict[f"{prefix}weight_scale"] = params.block_scale
    state_dict[f"{prefix}weight_scale_2"] = params.scale


def _streamed(
    module, input: torch.Tensor | FP8Rows, weight: QuantizedTensor, backend: str, matmul: Callable, activation: str
) -> torch.Tensor:
    """The weight is offloaded, or DynamicVRAM owns it: the host brings it, and takes it back afterwards."""
    comfy.ops.run_every_op()
    # Asking for the weight's own dtype keeps the host from dequantising it.
    dtype = weight._params.orig_dtype
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module, dtype=dtype, device=input.device, bias_dtype=input.dtype, offloadable=True
    )
    try:
        if isinstance(weight, QuantizedTensor):
            return matmul(module.__dict__, input, weight, bias, input.device, backend, activation)
        input = input.plain() if type(input) is FP8Rows else input
        input, branch = reference.activate(input, activation), module.__dict__.get("nvfp4_lora")
        out = torch.nn.functional.linear(input, weight.to(input.dtype), bias)
        return out if branch is None else lora.add(out, input, *lora.factors(branch, input, backend))
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
