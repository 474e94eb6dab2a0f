# SPDX-License-Identifier: Apache-2.0
"""Operations: the classes a model is built from, and the one way a layer gets at its weight.

As on the host, a Linear of ``mixed_precision_ops`` turns an NVFP4 or FP8 layer's tensors into a ``QuantizedTensor`` and
any other into a plain parameter of the compute dtype; here it always dequantises before the matmul.
"""

from __future__ import annotations

import json

import torch

from . import model_management
from .quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class

__all__ = [
    "CastWeightBiasOp",
    "cast_bias_weight",
    "disable_weight_init",
    "manual_cast",
    "mixed_precision_ops",
    "pick_operations",
    "run_every_op",
    "uncast_bias_weight",
]


def run_every_op():
    """The host's interruption point, called at the start of every operation."""
    if not torch.compiler.is_compiling():
        model_management.throw_exception_if_processing_interrupted()


def cast_bias_weight(
    s,
    input=None,
    dtype=None,
    device=None,
    bias_dtype=None,
    offloadable=False,
    compute_dtype=None,
    want_requant=False,
):
    """Weight and bias of ``s`` as ``input`` needs them, plus an offload handle if ``offloadable``.

    A QuantizedTensor of the right dtype that no function touches is handed back as it is.
    """
    if input is not None:
        dtype = dtype or input.dtype
        device = device or input.device
    bias_dtype = bias_dtype or dtype
    weight, bias = s.weight.to(device=device), s.bias
    if bias is not None:
        bias = bias.to(device=device, dtype=bias_dtype)
        for function in s.bias_function:
            bias = function(bias)
    if s.weight_function or weight.dtype != dtype:
        weight = weight.to(dtype=dtype)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        for function in s.weight_function:
            weight = function(weight)
    return (weight, bias, None) if offloadable else (weight, bias)


def uncast_bias_weight(s, weight, bias, offload_stream):
    """Nothing was offloaded, so there is nothing to wait for."""


class CastWeightBiasOp:
    """What the patcher looks for in a layer: two lists of functions, and whether to go through the cast."""

    comfy_cast_weights = False
    weight_function = []
    bias_function = []


class disable_weight_init:
    """Operations whose parameters keep the dtype they were loaded with."""

    class Linear(torch.nn.Linear, CastWeightBiasOp):
        def reset_parameters(self):
            """The weights come from a file."""

        def forward_comfy_cast_weights(self, input):
            weight, bias, handle = cast_bias_weight(self, input, offloadable=True)
            output = torch.nn.functional.linear(input, weight, bias)
            uncast_bias_weight(self, weight, bias, handle)
            return output

        def forward(self, *args, **kwargs):
            run_every_op()
            if self.comfy_cast_weights or self.weight_function or self.bias_function:
                return self.forward_comfy_cast_weights(*args, **kwargs)
            return super().forward(*args, **kwargs)


class manual_cast(disable_weight_init):
    """Operations that cast their parameters to the input's dtype on every call."""

    class Linear(disable_weight_init.Linear):
        comfy_cast_weights = True


def _scales(quant_format, take):
    """The layout's scale arguments from one layer's tensors. Raises ValueError if one is missing."""
    scales = {"scale": take("weight_scale_2"), "block_scale": take("weight_scale")}
    if quant_format in ("float8_e4m3fn", "float8_e5m2"):
        return {"scale": scales["block_scale"]}
    if quant_format in ("mxfp8", "int8_tensorwise"):
        if scales["block_scale"] is None:
            raise ValueError(f"Missing {quant_format} scales")
        mxfp8 = quant_format == "mxfp8"
        return {"scale": scales["block_scale"].view(torch.float8_e8m0fnu) if mxfp8 else scales["block_scale"]}
    if None in scales.values():
        raise ValueError("Missing NVFP4 scales")
    return scales | {"block_scale": scales["block_scale"].view(torch.float8_e4m3fn)}


def mixed_precision_ops(quant_config=None, compute_dtype=torch.bfloat16, full_precision_mm=False, disabled=()):
    """A fresh class of operations whose Linear takes quantised tensors from the state dict."""

    class MixedPrecisionOps(manual_cast):
        _quant_config = quant_config
        _compute_dtype = compute_dtype
        _full_precision_mm = full_precision_mm
        _disabled = disabled

        class Linear(torch.nn.Module, CastWeightBiasOp):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__()
                self.in_features, self.out_features = in_features, out_features
                self.factory_kwargs = {"device": device, "dtype": compute_dtype}
                self.register_parameter("bias", None)
                if bias:
                    self.bias = torch.nn.Parameter(torch.empty(out_features, **self.factory_kwargs))
                self._full_precision_mm = full_precision_mm

            def reset_parameters(self):
                """The weights come from a file."""

            def _load_from_state_dict(self, *args):
                state_dict, prefix, _, _, missing, _, _ = args
                taken = []

                def take(name):
                    taken.append(prefix + name)
                    return state_dict.pop(prefix + name, None)

                weight, marker = take("weight"), take("comfy_quant")
                if weight is None:
                    self.weight = None
                elif marker is None:
                    self.weight = torch.nn.Parameter(weight.to(self.factory_kwargs["dtype"]), requires_grad=False)
                else:
                    self._load_quantized(weight, json.loads(bytes(marker.tolist())), take)
                super()._load_from_state_dict(*args)
                missing[:] = [key for key in missing if key not in taken]

            def _load_quantized(self, weight, conf, take):
                self.quant_format = conf["format"]
                algorithm = QUANT_ALGOS[self.quant_format]
                self.layout_type = algorithm["comfy_tensor_layout"]
                self._full_precision_mm_config = conf.get("full_precision_matrix_mult", False)
                self._full_precision_mm |= self._full_precision_mm_config or self.quant_format in disabled
                params = get_layout_class(self.layout_type).Params(
                    **_scales(self.quant_format, take),
                    orig_dtype=compute_dtype,
                    orig_shape=(self.out_features, self.in_features),
                )
                quantized = QuantizedTensor(weight.to(algorithm["storage_t"]), self.layout_type, params)
                self.weight = torch.nn.Parameter(quantized, requires_grad=False)
                for name in sorted(algorithm["parameters"] - {"weight_scale", "weight_scale_2"}):
                    if (value := take(name)) is not None:
                        self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                out = {} if destination is None else destination
                if self.bias is not None:
                    out[f"{prefix}bias"] = self.bias
                if not isinstance(self.weight, QuantizedTensor):
                    out[f"{prefix}weight"] = self.weight
                    return out
                out.update(self.weight.state_dict(f"{prefix}weight"))
                conf = {"format": self.quant_format}
                if self._full_precision_mm_config:
                    conf["full_precision_matrix_mult"] = True
                out[f"{prefix}comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
                for name in ("input_scale", "pre_quant_scale"):
                    if hasattr(self, name):
                        out[prefix + name] = getattr(self, name)
                return out

            def forward_comfy_cast_weights(self, input, compute_dtype=None, want_requant=False):
                weight, bias, handle = cast_bias_weight(self, input, offloadable=True, compute_dtype=compute_dtype)
                if isinstance(weight, QuantizedTensor):
                    weight = weight.dequantize()
                output = torch.nn.functional.linear(input, weight, bias)
                uncast_bias_weight(self, weight, bias, handle)
                return output

            def forward(self, input, *args, **kwargs):
                run_every_op()
                if hasattr(self, "pre_quant_scale"):
                    input = input * self.pre_quant_scale.to(input.dtype)
                return self.forward_comfy_cast_weights(input, input.dtype)

            def convert_weight(self, weight, inplace=False, **kwargs):
                return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if isinstance(self.weight, QuantizedTensor):
                    weight = self.weight.requantize_from_float(weight, scale="recalculate")
                if return_weight:
                    return weight
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

    return MixedPrecisionOps


def pick_operations(
    weight_dtype, compute_dtype, load_device=None, disable_fast_fp8=False, fp8_optimizations=False, model_config=None
):
    """Mixed precision where the model is quantised layer by layer, else plain or casting operations."""
    if getattr(model_config, "quant_config", None):
        disabled = {"nvfp4"} if not model_management.supports_nvfp4_compute(load_device) else set()
        if not model_management.supports_fp8_compute(load_device):
            disabled |= {"float8_e4m3fn", "float8_e5m2"}
        return mixed_precision_ops(model_config.quant_config, compute_dtype, disabled=disabled)
    return disable_weight_init if compute_dtype in (None, weight_dtype) else manual_cast
