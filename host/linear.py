"""The operations class with which ComfyUI builds a model whose NVFP4 Linears compute from packed weights.

It derives from the host's own mixed-precision operations, so loading, LoRA, offload, DynamicVRAM and saving stay the
host's. Only ``Linear.forward`` gains a path of its own: dequantise on the device, one matmul, no tensor-subclass
dispatch. Whatever that path does not cover (weight functions, low-VRAM patches, training, odd inputs) goes to the
host's forward, which here is weight-only too.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class

from ..checkpoint.header import CheckpointError
from ..kernels import backends
from ..kernels.format import OUTPUT_DTYPES, PackedWeight, packed_shape

LAYOUT = "TensorCoreNVFP4Layout"


def supports(parameter: str) -> bool:
    """Whether this host's NVFP4 Linear reads the extra tensor ``parameter``, such as ``pre_quant_scale``."""
    return parameter in QUANT_ALGOS.get("nvfp4", {}).get("parameters", ())


def weight_only_operations(
    compute_dtype: torch.dtype, device: torch.device, backend: str = "auto", source: str = "the file"
) -> type:
    """Operations class for a model with NVFP4 layers that computes in ``compute_dtype``; FP8 stays the host's."""
    marked = SimpleNamespace(quant_config={"mixed_ops": True})
    host = comfy.ops.pick_operations(None, compute_dtype, device, model_config=marked)
    # A disabled format is one the host computes from full-precision weights instead of quantising the activations.
    base = comfy.ops.mixed_precision_ops(host._quant_config, compute_dtype, disabled={*host._disabled, "nvfp4"})

    class WeightOnlyOperations(base):
        class Linear(base.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict.get(f"{prefix}weight")
                if isinstance(weight, QuantizedTensor):
                    _unwrap(state_dict, prefix, weight, (self.out_features, self.in_features), source)
                super()._load_from_state_dict(state_dict, prefix, *args)

            def forward(self, input, *args, **kwargs):
                if not _takes_fast_path(self, input):
                    return super().forward(input, *args, **kwargs)
                parameters, own, device = self._parameters, self.__dict__, input.device
                weight, bias = parameters["weight"], parameters["bias"]
                if "pre_quant_scale" in parameters:  # ModelOpt's AWQ
                    smoothing = parameters["pre_quant_scale"]
                    input = input * comfy.model_management.cast_to_device(smoothing, device, input.dtype)
                if "_v" not in own and weight._qdata.device == device:
                    return _matmul(input, weight, bias, backend)
                resident = _prefetched(own, device)
                if resident is not None:
                    return _matmul(input, resident, own.get("_v_bias"), backend)
                return _streamed(self, input, weight, backend)

    return WeightOnlyOperations


def wrap(record: PackedWeight) -> QuantizedTensor:
    """PackedWeight -> the host's tensor; it shows the logical shape, from which the host detects architectures.

    Its dtype is provisional: the layer that loads it computes in its own.
    """
    params = get_layout_class(LAYOUT).Params(
        scale=record.global_scale, orig_dtype=torch.bfloat16, orig_shape=record.shape, block_scale=record.block_scale
    )
    return QuantizedTensor(record.packed, LAYOUT, params)


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


def _takes_fast_path(module, input: torch.Tensor) -> bool:
    """Whether nothing but an inference matmul with the plain NVFP4 weight is asked for."""
    # Looked up in the instance: a missing attribute of an nn.Module costs microseconds, a thousand times a step.
    own = module.__dict__
    return (
        own.get("quant_format") == "nvfp4"
        and not module.weight_function
        and not module.bias_function
        and own.get("weight_lowvram_function") is None
        and own.get("bias_lowvram_function") is None
        and type(input) is torch.Tensor
        and input.dtype in OUTPUT_DTYPES
        and not (input.requires_grad and torch.is_grad_enabled())
        and isinstance(module._parameters.get("weight"), QuantizedTensor)
    )


def _streamed(module, input: torch.Tensor, weight: QuantizedTensor, backend: str) -> torch.Tensor:
    """The weight is offloaded, or DynamicVRAM owns it: the host brings it, and takes it back afterwards."""
    comfy.ops.run_every_op()
    # Asking for the weight's own dtype keeps the host from dequantising it.
    dtype = weight._params.orig_dtype
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module, dtype=dtype, device=input.device, bias_dtype=input.dtype, offloadable=True
    )
    try:
        if isinstance(weight, QuantizedTensor):
            return _matmul(input, weight, bias, backend)
        return torch.nn.functional.linear(input, weight.to(input.dtype), bias)
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _prefetched(own: dict, device: torch.device) -> QuantizedTensor | None:
    """The weight that DynamicVRAM's block prefetch has already found resident and pinned, or None.

    It is what ``cast_bias_weight`` would return, at a tenth of its cost; the prefetch queue unpins it after the
    block. Read as data that may be absent: on a host that keeps its books otherwise, ``cast_bias_weight`` answers.
    """
    prefetch = own.get("_prefetch")
    if type(prefetch) is not dict or prefetch.get("resident") is not True:
        return None
    weight = own.get("_v_weight")
    return weight if isinstance(weight, QuantizedTensor) and weight._qdata.device == device else None


def _matmul(input: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    params, dtype = weight._params, input.dtype
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if torch.compiler.is_compiling():
        return backends.linear(input, weight._qdata, params.block_scale, params.scale, params.orig_shape, bias, backend)
    dequantize = backends.dequantizer(params.orig_shape, dtype, input.device, backend)
    return torch.nn.functional.linear(input, dequantize(weight._qdata, params.block_scale, params.scale), bias)
