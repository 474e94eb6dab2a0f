# SPDX-License-Identifier: Apache-2.0
"""State dicts and progress."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open

__all__ = [
    "ProgressBar",
    "calculate_parameters",
    "convert_old_quants",
    "detect_layer_quantization",
    "load_torch_file",
    "state_dict_prefix_replace",
    "weight_dtype",
]


def load_torch_file(ckpt, safe_load=False, device=None, return_metadata=False):
    with safe_open(ckpt, framework="pt", device=str(device or "cpu")) as file:
        sd = {name: file.get_tensor(name) for name in file.keys()}
        return (sd, file.metadata()) if return_metadata else sd


def state_dict_prefix_replace(state_dict, replace_prefix, filter_keys=False):
    """Move keys from one prefix to another; with ``filter_keys`` only the moved ones are in the result."""
    out = {} if filter_keys else state_dict
    for old, new in replace_prefix.items():
        for key in [key for key in state_dict if key.startswith(old)]:
            out[new + key[len(old) :]] = state_dict.pop(key)
    return out


def calculate_parameters(sd, prefix=""):
    return sum(tensor.nelement() for key, tensor in sd.items() if key.startswith(prefix))


def weight_dtype(sd, prefix=""):
    """The dtype that most elements have, or None."""
    counts = {}
    for key, tensor in sd.items():
        if key.startswith(prefix):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.get, default=None)


def detect_layer_quantization(state_dict, prefix):
    marked = any(key.startswith(prefix) and key.endswith(".comfy_quant") for key in state_dict)
    return {"mixed_ops": True} if marked else None


def convert_old_quants(state_dict, model_prefix="", metadata=None):
    """The header's ``_quantization_metadata`` becomes markers, one for each layer it names, names taken verbatim.

    Without one the tensor ``scaled_fp8`` marks the older format, whose scales get today's names.
    """
    metadata = {} if metadata is None else metadata
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
    elif f"{model_prefix}scaled_fp8" in state_dict:
        state_dict, layers = _convert_scaled_fp8(state_dict, model_prefix)
    else:
        layers = {}
    for layer, conf in layers.items():
        state_dict[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    return state_dict, metadata


def _convert_scaled_fp8(state_dict, prefix):
    """A new state dict, and what each layer's marker says: E4M3, and full precision if the mark has two elements."""
    conf = {"format": "float8_e4m3fn"}
    if state_dict[f"{prefix}scaled_fp8"].nelement() == 2:
        conf["full_precision_matrix_mult"] = True
    out, layers = {}, {}
    for key, tensor in state_dict.items():
        layer, _, leaf = key.rpartition(".")
        if not key.startswith(prefix):
            out[key] = tensor
        elif key == f"{prefix}scaled_fp8" or leaf == "scale_input" and tensor.item() == 1:
            continue  # an input scale of one says nothing
        elif leaf == "scale_weight":
            layers[layer] = conf
            out[f"{layer}.weight_scale"] = tensor
        else:
            out[f"{layer}.input_scale" if leaf == "scale_input" else key] = tensor
    return out, layers


class ProgressBar:
    """Keeps the last value in ``current``."""

    def __init__(self, total, node_id=None):
        self.total, self.current, self.node_id = total, 0, node_id

    def update_absolute(self, value, total=None, preview=None):
        self.total = self.total if total is None else total
        self.current = min(value, self.total)

    def update(self, value):
        self.update_absolute(self.current + value)
