# SPDX-License-Identifier: Apache-2.0
"""A host that runs on the CPU, with no offload streams and no FP4 or FP8 arithmetic."""

from __future__ import annotations

import torch

__all__ = [
    "InterruptProcessingException",
    "NUM_STREAMS",
    "cast_to_device",
    "get_free_memory",
    "get_torch_device",
    "in_training",
    "interrupt_current_processing",
    "is_device_cpu",
    "load_models_gpu",
    "should_use_bf16",
    "soft_empty_cache",
    "supports_fp8_compute",
    "supports_nvfp4_compute",
    "text_encoder_device",
    "throw_exception_if_processing_interrupted",
    "unet_dtype",
    "unet_manual_cast",
    "unet_offload_device",
    "vae_device",
    "vae_offload_device",
]

NUM_STREAMS = 0
in_training = False
_interrupted = False


class InterruptProcessingException(BaseException):
    """What the host raises where the user pressed cancel."""


def interrupt_current_processing(value=True):
    global _interrupted
    _interrupted = value


def throw_exception_if_processing_interrupted():
    """Raises once per request to interrupt."""
    if _interrupted:
        interrupt_current_processing(False)
        raise InterruptProcessingException()


def get_torch_device():
    return torch.device("cpu")


def unet_offload_device():
    return torch.device("cpu")


def text_encoder_device():
    return torch.device("cpu")


def vae_device():
    return torch.device("cpu")


def vae_offload_device():
    return torch.device("cpu")


def is_device_cpu(device):
    return getattr(device, "type", None) == "cpu"


def get_free_memory(dev=None, torch_free_too=False):
    free = 8 << 30
    return (free, free) if torch_free_too else free


def soft_empty_cache(force=False):
    return None


def should_use_bf16(device=None, model_params=0, prioritize_performance=True, manual_cast=False):
    return False


def supports_fp8_compute(device=None):
    return False


def supports_nvfp4_compute(device=None):
    return False


def unet_dtype(
    device=None,
    model_params=0,
    supported_dtypes=(torch.float16, torch.bfloat16, torch.float32),
    weight_dtype=None,
):
    return torch.float32


def unet_manual_cast(weight_dtype, inference_device, supported_dtypes=(torch.float16, torch.bfloat16, torch.float32)):
    """None where no cast is needed; a CPU computes everything else in fp32, whatever the model supports."""
    return None if weight_dtype in (torch.float32, torch.float64) else torch.float32


def cast_to_device(tensor, device, dtype, copy=False):
    return tensor.to(device=device, dtype=dtype, copy=copy)


def load_models_gpu(
    models, memory_required=0, force_patch_weights=False, minimum_memory_required=None, force_full_load=False
):
    """Everything is on the CPU already."""
