# SPDX-License-Identifier: Apache-2.0
"""Detects one made-up family: any state dict with transformer blocks. Its model has one module per tensor name."""

from __future__ import annotations

import json

import torch

from . import ops, utils

__all__ = ["model_config_from_unet", "unet_prefix_from_state_dict"]

_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
_LAYER_TENSORS = {"weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant"}


def unet_prefix_from_state_dict(state_dict):
    """The prefix that more than five keys have, else the host's guess."""
    counts = {prefix: sum(key.startswith(prefix) for key in state_dict) for prefix in _PREFIXES}
    best = max(counts, key=counts.get)
    return best if counts[best] > 5 else "model."


def model_config_from_unet(state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None):
    """A config, or None where no block is found, as for a VAE, a LoRA or a text encoder."""
    blocks = any(key.startswith(unet_key_prefix) and "transformer_blocks.0." in key for key in state_dict)
    if not blocks or any(".lora_" in key for key in state_dict):
        return None
    config = _Config(json.loads((metadata or {}).get("config", "{}")).get("transformer", {}))
    config.quant_config = utils.detect_layer_quantization(state_dict, unet_key_prefix)
    return config


class _Config:
    """What ``load_diffusion_model_state_dict`` asks of a model config."""

    def __init__(self, unet_config):
        self.unet_config = {"image_model": "ltxav"} | unet_config
        self.quant_config = None
        self.custom_operations = None
        self.supported_inference_dtypes = [torch.bfloat16, torch.float32]
        self.optimizations = {"fp8": False}

    def set_inference_dtype(self, dtype, manual_cast_dtype, device=None):
        self.dtype, self.manual_cast_dtype, self.load_device = dtype, manual_cast_dtype, device
        self.unet_config["dtype"] = dtype

    def get_model(self, state_dict, prefix="", device=None):
        operations = self.custom_operations or ops.pick_operations(
            self.dtype, self.manual_cast_dtype, load_device=self.load_device, model_config=self
        )
        return _Model(self, state_dict, prefix, operations, device)


class _Model(torch.nn.Module):
    """The host's BaseModel as far as a loader sees it."""

    def __init__(self, config, state_dict, prefix, operations, device):
        super().__init__()
        self.model_config, self.manual_cast_dtype, self.device = config, config.manual_cast_dtype, device
        self.diffusion_model = _build(state_dict, prefix, operations, config.dtype, device)

    def get_dtype(self):
        return self.model_config.dtype

    def load_model_weights(self, sd, unet_prefix="", assign=False):
        own = {key[len(unet_prefix) :]: sd.pop(key) for key in list(sd) if key.startswith(unet_prefix)}
        self.diffusion_model.load_state_dict(own, strict=False, assign=assign)
        return self


def _build(state_dict, prefix, operations, dtype, device):
    """A module tree with a Linear at every matrix and a plain parameter for every other tensor."""
    root = torch.nn.Module()
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    names = [name for name in names if all(name.split("."))]  # torch knows no empty names, and no architecture has any
    for name in names:
        path, _, leaf = name.rpartition(".")
        weight = state_dict.get(f"{prefix}{path}.weight")
        linear = weight is not None and weight.ndim == 2 and leaf in _LAYER_TENSORS
        parent_path, _, child = path.rpartition(".")
        if linear and leaf == "weight":
            bias = state_dict.get(f"{prefix}{path}.bias")
            # The host knows the logical size from the architecture; the bias, and two codes a byte, stand in for that.
            rows = weight.shape[0] if bias is None else bias.shape[0]
            cols = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
            layer = operations.Linear(cols, rows, bias=bias is not None, dtype=dtype, device=device)
            _submodule(root, parent_path).add_module(child, layer)
        elif not linear:
            value = torch.nn.Parameter(torch.empty_like(state_dict[prefix + name]), requires_grad=False)
            _submodule(root, path).register_parameter(leaf, value)
    return root


def _submodule(root, path):
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]
    return root
