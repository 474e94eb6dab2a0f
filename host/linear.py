"""The operations class with which ComfyUI builds a model whose NVFP4 Linears compute from packed weights.

It derives from the host's own mixed-precision operations, so loading, LoRA, offload, DynamicVRAM and saving stay the
host's. Only ``Linear.forward`` gains a path of its own, without tensor-subclass dispatch: few rows go to the fused
kernel, a layer in FP8 mode to the FP8 tensor cores, the rest is dequantised on the device and multiplied. Plain LoRAs
are a branch beside the packed weight (host/lora.py). Whatever that path does not cover (weight functions, low-VRAM
patches, training, odd inputs, layers in FP4 mode) goes to the host's forward, which is weight-only too but for the FP4
layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class

from ..checkpoint.file.header import CheckpointError
from ..checkpoint.identify.formats import LOW_RANK, SMOOTHING
from ..kernels import backends, fp8, gemv, reference
from ..kernels.format import OUTPUT_DTYPES, PackedWeight, packed_shape
from . import lora
from .compute import Compute

LAYOUT = "TensorCoreNVFP4Layout"
# Below it FP8 saves no GPU time worth its additional kernel launches: see benchmarks/fp8.py.
FP8_MIN_TOKENS = 256
_OWN_MODES = ("bf16", "fp8")
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

    class WeightOnlyOperations(base):
        class Linear(base.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict.get(f"{prefix}weight")
                if isinstance(weight, QuantizedTensor):
                    _unwrap(state_dict, prefix, weight, (self.out_features, self.in_features), source)
                low_rank = [state_dict.pop(f"{prefix}{suffix}", None) for suffix in LOW_RANK]
                super()._load_from_state_dict(state_dict, prefix, *args)
                _choose_mode(self, compute.of(prefix[:-1]))
                if low_rank[0] is not None:
                    _add_low_rank(self, low_rank)

            def forward(self, input, *args, activation="", **kwargs):
                # Looked up in the instance: a missing attribute of an nn.Module costs microseconds, a thousand times
                # a step.
                own = self.__dict__
                parameters = own["_parameters"]
                weight = parameters.get("weight")
                if not (
                    own.get("nvfp4_mode") in _OWN_MODES
                    and isinstance(weight, QuantizedTensor)
                    and not self.weight_function
                    and not self.bias_function
                    and own.get("weight_lowvram_function") is None
                    and own.get("bias_lowvram_function") is None
                    and type(input) is torch.Tensor
                    and input.dtype in OUTPUT_DTYPES
                    and not (input.requires_grad and torch.is_grad_enabled())
                ):
                    input = reference.activate(input, activation)
                    out, branch = super().forward(input, *args, **kwargs), own.get("nvfp4_lora")
                    return out if branch is None else lora.beside(parameters, out, input, branch)
                device = input.device
                matmul = _matmul if own.get("nvfp4_lora") is None else _matmul_with_lora
                smoothed = "pre_quant_scale" in parameters  # ModelOpt's AWQ
                if activation and (smoothed or matmul is not _matmul or own["nvfp4_mode"] != "fp8"):
                    input, activation = reference.activate(input, activation), ""
                if smoothed:
                    smoothing = parameters["pre_quant_scale"]
                    input = input * comfy.model_management.cast_to_device(smoothing, device, input.dtype)
                if "_v" not in own and weight._qdata.device == device:
                    return matmul(own, input, weight, parameters["bias"], device, backend, activation)
                resident = _prefetched(own, device)
                if resident is not None:
                    return matmul(own, input, resident, own.get("_v_bias"), device, backend, activation)
                return _streamed(self, input, weight, backend, matmul, activation)

    return WeightOnlyOperations


def _add_low_rank(module: torch.nn.Module, parts: list[torch.Tensor]) -> None:
    """Make a loaded Linear one that adds ``parts``. The host moves further parameters, as it does `pre_quant_scale`."""
    device = module.factory_kwargs["device"]
    for suffix, part in zip(LOW_RANK, parts, strict=True):
        part = part[: module.out_features] if suffix == LOW_RANK[1] else part
        module.register_parameter(suffix, torch.nn.Parameter(part.to(device=device), requires_grad=False))
    module.__class__ = _low_rank_class(type(module))


@functools.cache
def _low_rank_class(linear: type) -> type:
    """Linear of this module -> one that adds a low-rank product of the same input, as ModelOpt's SVDQuant does."""

    class LowRankLinear(linear):
        def forward(self, input, *args, activation="", **kwargs):
            input = reference.activate(input, activation)
            return _with_low_rank(self._parameters, super().forward(input, *args, **kwargs), input)

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            out = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            out.update({f"{prefix}{suffix}": self._parameters[suffix] for suffix in LOW_RANK})
            return out

    return LowRankLinear


def _with_low_rank(parameters: dict, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out (..., N) + ((x * smoothing) A^T) B^T: ModelOpt's SVDQuant multiplies both parts by the smoothed input."""
    parts = [parameters.get(SMOOTHING), *(parameters[suffix] for suffix in LOW_RANK)]
    smoothing, down, up = (
        None if part is None else comfy.model_management.cast_to_device(part, x.device, out.dtype) for part in parts
    )
    x = x.to(out.dtype) if smoothing is None else x.to(out.dtype) * smoothing
    return out + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)


def _choose_mode(module, mode: str) -> None:
    """Note how a freshly loaded Linear computes: ``nvfp4_mode``, None if its weight is not NVFP4."""
    own = module.__dict__
    if own.get("quant_format") != "nvfp4":
        own["nvfp4_mode"] = None
        return
    if own.get("_full_precision_mm_config"):  # its file asks for weight-only
        mode = "bf16"
    if mode != "fp4":
        module._full_precision_mm = True
    own["nvfp4_mode"] = mode


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


def _streamed(
    module, input: torch.Tensor, weight: QuantizedTensor, backend: str, matmul: Callable, activation: str
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
        input, branch = reference.activate(input, activation), module.__dict__.get("nvfp4_lora")
        out = torch.nn.functional.linear(input, weight.to(input.dtype), bias)
        return out if branch is None else lora.add(out, input, branch)
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


def _matmul(
    own: dict,
    input: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    device: torch.device,
    backend: str,
    activation: str,
) -> torch.Tensor:
    params, packed, dtype = weight._params, weight._qdata, input.dtype
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if torch.compiler.is_compiling():
        return _compiled_matmul(own, reference.activate(input, activation), packed, params, bias, backend)
    functions = own.get("_nvfp4_functions")
    if functions is None or functions[0] is not dtype or functions[1] != device or functions[2] != backend:
        functions = own["_nvfp4_functions"] = _functions(own, params.orig_shape, dtype, device, backend)
    _, _, _, few, many, dequantize = functions
    if few is not None or many is not None:
        shape = input.shape
        cols = shape[-1] if shape else 0
        rows = input.numel() // cols if cols else 0
        if many is not None and rows >= FP8_MIN_TOKENS:
            shared = own.get("_nvfp4_shared")
            return many(input, packed, params.block_scale, params.scale, bias, activation, shared)
        if activation:
            input = reference.activate(input, activation)
        if few is not None and 0 < rows <= gemv.MAX_TOKENS:
            if len(shape) == 2:
                return few(input, packed, params.block_scale, params.scale, bias)
            out = few(input.reshape(rows, cols), packed, params.block_scale, params.scale, bias)
            return out.view(*shape[:-1], out.shape[1])
    return torch.nn.functional.linear(input, dequantize(packed, params.block_scale, params.scale), bias)


def _matmul_with_lora(
    own: dict,
    input: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    device: torch.device,
    backend: str,
    activation: str = "",
) -> torch.Tensor:
    """As ``_matmul`` with the layer's branch; where the weight is decoded, it is decoded with the LoRA added.

    The branch takes the input too, so an activation has been computed before.
    """
    branch, cols = own["nvfp4_lora"], input.shape[-1] if input.ndim else 0
    rows = input.numel() // cols if cols else 0
    if own.get("nvfp4_mode") != "bf16" or rows <= gemv.MAX_TOKENS:
        return lora.add(_matmul(own, input, weight, bias, device, backend, activation), input, branch)
    params = weight._params
    down, up = lora.tensors(branch, input)
    scales = params.block_scale, params.scale
    merged = backends.dequantize_sum(weight._qdata, *scales, params.orig_shape, up, down, backend)
    return torch.nn.functional.linear(input, merged, bias if bias is None else bias.to(input.dtype))


def _functions(own: dict, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, backend: str) -> tuple:
    """What this layer calls for inputs of ``dtype`` on ``device``, which led the tuple: few rows, many, any number."""
    few = gemv.gemv_function(shape, dtype, device, backend)
    many = fp8.linear_function(shape, dtype, device, backend) if own.get("nvfp4_mode") == "fp8" else None
    return dtype, device, backend, few, many, backends.dequantizer(shape, dtype, device, backend)


def _compiled_matmul(own: dict, input, packed, params, bias, backend: str) -> torch.Tensor:
    """As ``_matmul`` with operators that torch.compile takes whole; the number of rows is a guard of the graph."""
    arguments = (input, packed, params.block_scale, params.scale, params.orig_shape, bias, backend)
    cols = input.shape[-1] if input.ndim else 0
    rows = input.numel() // cols if cols else 0
    if own.get("nvfp4_mode") == "fp8" and rows >= FP8_MIN_TOKENS:
        return fp8.linear_fp8(*arguments)
    if 0 < rows <= gemv.MAX_TOKENS:
        return gemv.gemv(*arguments)
    return backends.linear(*arguments)
