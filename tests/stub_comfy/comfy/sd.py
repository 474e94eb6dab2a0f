# SPDX-License-Identifier: Apache-2.0
"""State dict in, ModelPatcher, CLIP or VAE out."""

from __future__ import annotations

import enum
import json

import torch

from . import model_detection, model_management, model_patcher, utils

# CLIPType is left out: how an Enum spells its parameters depends on the Python that records them.
__all__ = [
    "VAE",
    "load_diffusion_model",
    "load_diffusion_model_state_dict",
    "load_text_encoder_state_dicts",
]

_VAE_SIGNS = (
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
    "decoder.22.bias",
    "vocoder.resblocks.0.convs1.0.weight",
    "vocoder.vocoder.resblocks.0.convs1.0.weight",
)


class VAE:
    """Has the weights in ``first_stage_model`` and knows LTX's VAEs by name; decoding only moves the channels.

    A key that the config lists under ``vae`` as ``expected`` but the state dict lacks stays whatever the memory held.
    """

    def __init__(self, sd=None, device=None, config=None, dtype=None, metadata=None):
        self.disable_offload = False
        self.upscale_ratio, self.upscale_index_formula = (lambda frames: max(0, frames * 4 - 3), 16, 16), (4, 16, 16)
        self.first_stage_model = None
        if not any(sign in sd for sign in _VAE_SIGNS):
            return
        if "decoder.22.bias" not in sd and "config" not in (metadata or {}):
            raise RuntimeError("size mismatch")
        expected = json.loads(metadata["config"]).get("vae", {}).get("expected", []) if "config" in metadata else []
        self.first_stage_model = _Weights(sd, expected)
        self.device = device or model_management.vae_device()
        self.vae_dtype = dtype or torch.float32
        patcher = model_patcher.ModelPatcher if self.disable_offload else model_patcher.CoreModelPatcher
        self.patcher = patcher(self.first_stage_model, self.device, model_management.vae_offload_device())

    def throw_exception_if_invalid(self):
        if self.first_stage_model is None:
            raise RuntimeError("ERROR: VAE is invalid: None")

    def decode(self, samples_in, vae_options={}):  # noqa: B006  (the host's signature)
        self.throw_exception_if_invalid()
        return samples_in.movedim(1, -1)

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        return self.decode(samples)[..., : self.upscale_ratio[1], :]


class _Weights(torch.nn.Module):
    """Every floating-point tensor as a parameter of its name, dots replaced inside only."""

    def __init__(self, tensors, expected):
        super().__init__()
        self.values = {name: torch.nn.Parameter(t, t.is_floating_point()) for name, t in tensors.items()}
        self.values |= {name: torch.nn.Parameter(torch.empty(1)) for name in expected if name not in tensors}

    def named_parameters(self, *args, **kwargs):
        return iter(self.values.items())

    def state_dict(self, *args, **kwargs):
        return dict(self.values)


def load_diffusion_model_state_dict(sd, model_options=None, metadata=None, disable_dynamic=False):
    """None where no model is detected. ``custom_operations`` in the options skips the conversion of header markers."""
    model_options = model_options or {}
    operations = model_options.get("custom_operations")
    if operations is None:
        sd, metadata = utils.convert_old_quants(sd, "", metadata=metadata)
    prefix = model_detection.unet_prefix_from_state_dict(sd)
    sd = utils.state_dict_prefix_replace(sd, {prefix: ""}, filter_keys=True) or sd
    config = model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        return None
    load_device = model_options.get("load_device", model_management.get_torch_device())
    offload_device = model_options.get("offload_device", model_management.unet_offload_device())
    dtype = model_options.get("dtype") or model_management.unet_dtype(weight_dtype=utils.weight_dtype(sd))
    cast = model_management.unet_manual_cast(
        None if config.quant_config else dtype, load_device, config.supported_inference_dtypes
    )
    config.set_inference_dtype(dtype, cast, device=load_device)
    config.custom_operations = operations
    model = config.get_model(sd, "").load_model_weights(sd, "")
    return model_patcher.ModelPatcher(model, load_device, offload_device)


def load_diffusion_model(unet_path, model_options=None, disable_dynamic=False):
    sd, metadata = utils.load_torch_file(unet_path, return_metadata=True)
    patcher = load_diffusion_model_state_dict(sd, model_options, metadata, disable_dynamic)
    if patcher is None:
        raise RuntimeError(f"ERROR: Could not detect model type of: {unet_path}")
    patcher.cached_patcher_init = (load_diffusion_model, (unet_path, model_options))
    return patcher


class CLIPType(enum.Enum):
    """What a text encoder is for."""

    LTXV = 8


class _Clip:
    """LTX's text encoder: Gemma's modules by their names, the embedding and the projection as plain parameters."""

    def __init__(self, tensors, projection, options, embedding_directory):
        self.options, self.embedding_directory = options, embedding_directory
        device = options.get("load_device", model_management.text_encoder_device())
        model = torch.nn.Module()
        tokens = {name: tensors.pop(name) for name in list(tensors) if "embed_tokens" in name}
        tokenizer = {name: tensors.pop(name) for name in list(tensors) if "." not in name}
        operations = options["custom_operations"]
        model.gemma3_12b = torch.nn.Module()
        model.gemma3_12b.transformer = model_detection._build(tensors, "", operations, torch.bfloat16, device)
        model.gemma3_12b.transformer.load_state_dict(tensors, strict=False)
        if "model.layers.5.self_attn.v_proj.weight" not in tensors:
            model.text_encoder_key = "gemma4"
        self.tokens, self.tokenizer, self.projection = tokens, tokenizer, projection
        self.cond_stage_model = model
        self.patcher = model_patcher.ModelPatcher(model, device, device)


def load_text_encoder_state_dicts(
    state_dicts=(), embedding_directory=None, clip_type=None, model_options=None, disable_dynamic=False
):
    """Knows LTX's pair of Gemma and projection only; AttributeError without a tokenizer, as from the host's."""
    gemma, projection = state_dicts
    if not any("." not in name for name in gemma):
        raise AttributeError("no tokenizer")
    return _Clip(dict(gemma), dict(projection), model_options or {}, embedding_directory)
