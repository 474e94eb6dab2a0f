# SPDX-License-Identifier: Apache-2.0
"""Whether a VAE of the host may decode our way: by what it is made of, and by a trial."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.backends import pick_backend
from .decoder import Decoding, Finished, install, kernels_for
from .known import host_module, unknown

_TOLERANCE = 1e-3  # of the trial's pixels, in FP32


@functools.cache
def _trial(config: str) -> str:
    """Why a scaled-down decoder of this config decodes otherwise than the host's, or an empty string."""
    host, small = host_module(), json.loads(config)
    for key in ("decoder_blocks", "blocks"):
        if key in small:
            small[key] = [[name, _one_layer(value)] for name, value in small[key]]
    small |= {"decoder_base_channels": 8, "encoder_base_channels": 8, "latent_channels": 16, "encoder_blocks": []}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        decoder = host.VideoVAE(config=small).decoder.eval()
    for parameter in decoder.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    latent = torch.randn((1, 16, 3, 2, 2), generator=generator)
    made = []
    for ours in (False, True):
        if ours:
            install(decoder, Decoding(kernels_for(torch.device("cpu")), chunk=2048))
        with torch.inference_mode():
            made.append(decoder(latent.clone(), timestep=0.05))
    if decoder.__dict__["_nvfp4_decoding"].stood_down:
        return decoder.__dict__["_nvfp4_decoding"].stood_down
    error = (made[0] - made[1]).abs().max().item()
    return "" if error < _TOLERANCE * max(made[0].abs().max().item(), 1.0) else f"a trial is off by {error:.2g}"


def _one_layer(value: Any) -> Any:
    if isinstance(value, dict) and "num_layers" in value:
        return value | {"num_layers": min(value["num_layers"], 2)}
    return min(value, 2) if isinstance(value, int) else value


def obstacle(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why a VAE of the host would not be decoded by ``install``, or an empty string."""
    host = host_module()
    if type(model) is not getattr(host, "VideoVAE", None) or not hasattr(host, "get_max_chunk_size"):
        return "this ComfyUI decodes it by other classes than those of LTX's video VAE"
    if device.type != "cuda":
        return f"it decodes on {device.type}, where there is nothing to gain"
    backend, reason = pick_backend(device)
    if backend != "triton":
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it decodes in {str(dtype).removeprefix('torch.')}"
    return tried(model)


def tried(model: Any) -> str:
    """What speaks against a VideoVAE of the host, be it the device or dtype what it may; a failure is a reason too."""
    try:
        return unknown(model.decoder) or _trial(json.dumps(model.config))
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        return f"a trial failed ({type(error).__name__}: {error})"


def _is_known(process: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether it brings -1..1 to 0..1 and cuts the rest off, as ``to_pixels`` does it."""
    probe = torch.tensor([-9.0, -1.0, -0.3, 0.0, 0.7, 1.0, 9.0])
    return torch.equal(process(probe.clone()), ((probe + 1.0) / 2.0).clamp(0.0, 1.0))


def install_in(host_vae: Any) -> str:
    """Let the host's VAE decode our way -> why it does not, or an empty string."""
    model = getattr(host_vae, "first_stage_model", None)
    device, dtype = getattr(host_vae, "device", torch.device("cpu")), getattr(host_vae, "vae_dtype", torch.float32)
    reason = obstacle(model, device, dtype)
    if not reason:
        decoding = Decoding()
        install(model.decoder, decoding)
        if _is_known(host_vae.process_output):
            host_vae.process_output = Finished(decoding, host_vae.process_output)
    return reason
