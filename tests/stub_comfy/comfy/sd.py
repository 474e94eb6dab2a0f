"""State dict in, ModelPatcher out."""

from __future__ import annotations

from . import model_detection, model_management, model_patcher, utils

__all__ = ["load_diffusion_model", "load_diffusion_model_state_dict"]


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
