# SPDX-License-Identifier: Apache-2.0
"""LTX's video decoder by the layers of stream.py, in the place of the host's forward on the model's own decoder.

Nothing of the host is patched: the decoder of this model gets a class derived from its own. It looks at every call
whether its modules are still the host's own, in nobody else's hands, and else decodes the host's way. What the host's
classes compute is not taken on trust: ``obstacle`` decodes a scaled-down model of the same config by both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import comfy.model_management
import torch

from ...kernels import video_reference
from ...kernels.backends import pick_backend, triton_module
from .. import residency
from .frames import FrameCopy
from .stream import Clip, Frames, Kernels, convolve, residual_block, upsample

logger = logging.getLogger(__name__)
_HOST = "comfy.ldm.lightricks.vae.causal_video_autoencoder"
_TOLERANCE = 1e-3  # of the trial's pixels, in FP32


def host_module() -> ModuleType | None:
    """The host's module of the video VAE, None on one that does not know it."""
    try:
        return importlib.import_module(_HOST)
    except ImportError:
        return None


def kernels_for(device: torch.device) -> Kernels:
    """The operations between the convolutions, by the backend that runs on ``device``."""
    if pick_backend(device)[0] == "triton":
        return Kernels(*map(triton_module, ("norm_silu", "depth_to_space", "to_pixels")))
    return Kernels(video_reference, video_reference, video_reference)


def unknown(decoder: torch.nn.Module) -> str:
    """What of a decoder is not as stream.py computes it, or an empty string."""
    host = host_module()
    norm = importlib.import_module("comfy.ldm.lightricks.vae.pixel_norm").PixelNorm
    conv = importlib.import_module("comfy.ldm.lightricks.vae.causal_conv3d").CausalConv3d
    for name, module in decoder.named_modules():
        found, kind = type(module), type(module).__name__
        if residency.taken_over(module.__dict__):
            return f"`{name}` has a hook or another forward"
        if found is conv:
            inner = module.conv
            if module.time_stride != 1 or inner.dilation != (1, 1, 1) or module.time_kernel_size != 3:
                return f"`{name}` is a convolution of another kind"
        elif found is host.ResnetBlock3D:
            parts = (type(module.norm1), type(module.norm2), type(module.norm3), type(module.conv_shortcut))
            if parts != (norm, norm, torch.nn.Identity, torch.nn.Identity) or module.inject_noise:
                return f"`{name}` has a shortcut, noise or another norm"
            if type(module.non_linearity) is not torch.nn.SiLU or module.dropout.p:
                return f"`{name}` has another activation"
        elif found is norm:
            if module.dim != 1:
                return f"`{name}` is a norm over another axis"
        elif kind in ("GroupNorm", "LayerNorm"):
            return f"`{name}` is a {kind}"
    if not isinstance(decoder.conv_norm_out, norm) or type(decoder.conv_act) is not torch.nn.SiLU:
        return "its last norm is of another kind"
    blocks = {type(block) for block in decoder.up_blocks}
    if unexpected := blocks - {host.UNetMidBlock3D, host.DepthToSpaceUpsample}:
        return f"it has blocks of class {unexpected.pop().__name__}"
    return ""


class Decoding:
    """What a decoder of ours knows beside its modules."""

    def __init__(self, kernels: Kernels | None = None, chunk: int | None = None):
        self.kernels, self.chunk = kernels, chunk  # None: by the device
        self.finishing = False  # whether frames become 0 to 1 on the GPU, and go through no ``process_output``
        self.finished: torch.Tensor | None = None
        self.stood_down = ""


@functools.cache
def fast_class(found: type) -> type:
    """The host's decoder class -> ours, derived from it."""

    class FastDecoder(found):
        def forward(self, sample, timestep=None, output_buffer=None):
            decoding: Decoding = self.__dict__["_nvfp4_decoding"]
            decoding.finished = None
            reason = _stands_down(self, sample)
            if reason:
                if reason != decoding.stood_down:
                    logger.warning("the VAE decodes ComfyUI's own way: %s", reason)
                decoding.stood_down = reason
                return super().forward(sample, timestep=timestep, output_buffer=output_buffer)
            if output_buffer is None:
                shape = self.decode_output_shape(sample.shape)
                place = comfy.model_management.intermediate_device()
                output_buffer = torch.empty(shape, dtype=sample.dtype, device=place)
            elif decoding.finishing and output_buffer.device.type == "cpu":
                decoding.finished = output_buffer
            for number in range(len(sample)):
                _Run(self, decoding, sample[number : number + 1], timestep, output_buffer[number])()
            return output_buffer

    return FastDecoder


def _stands_down(decoder: torch.nn.Module, sample: torch.Tensor) -> str:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return "gradients are wanted, or torch.compile is at work"
    if sample.device.type == "cpu" and decoder.__dict__["_nvfp4_decoding"].kernels is None:
        return "the latent is on the CPU"
    own = decoder.__dict__["forward"] if "forward" in decoder.__dict__ else None
    return "its forward was replaced" if own is not None else unknown(decoder)


class _Run:
    """One clip through one decoder, depth first: a chunk of frames goes all the way before the next one starts."""

    def __init__(self, decoder: Any, decoding: Decoding, sample: torch.Tensor, timestep: Any, buffer: torch.Tensor):
        self.decoder, self.decoding, self.sample, self.buffer = decoder, decoding, sample, buffer
        self.clip = Clip(decoding.kernels or kernels_for(sample.device), decoder.causal)
        self.chunk = decoding.chunk or host_module().get_max_chunk_size(sample.device)
        self.copy, self.written = FrameCopy(sample.device), 0
        self.modulations, self.last_modulation = _modulations(decoder, sample, timestep)

    def __call__(self) -> None:
        frames = Frames(self.sample[0].permute(1, 2, 3, 0).contiguous())
        self.clip.last = True
        self._next(0, convolve(self.clip, self.decoder.conv_in, frames), True)
        self.copy.finish()

    def _next(self, place: int, frames: Frames, last: bool) -> None:
        """``frames`` through the blocks from ``place`` on; ``last``: no more frames come after them."""
        blocks = self.decoder.up_blocks
        self.clip.last = last
        if place >= len(blocks):
            self._write(frames)
            return
        made = self._block(place, blocks[place], frames)
        if made is None or not len(made):
            return
        size = made.raw.numel() * made.raw.element_size()
        parts = min(-(-size // self.chunk), len(made))
        step = -(-len(made) // parts)
        chunks = [made.cut(first, min(first + step, len(made))) for first in range(0, len(made), step)]
        del made
        while chunks:
            self._next(place + 1, chunks.pop(0), last and not chunks)

    def _block(self, place: int, block: Any, frames: Frames) -> Frames | None:
        if hasattr(block, "stride"):
            return upsample(self.clip, block, frames)
        made: Frames | None = frames
        for number, inner in enumerate(block.res_blocks):
            if made is not None:
                made = residual_block(self.clip, inner, made, self.modulations.get((place, number)))
        return made

    def _write(self, frames: Frames) -> None:
        decoder, finish = self.decoder, self.decoding.finished is not None
        made = convolve(
            self.clip, decoder.conv_out, frames, eps=decoder.conv_norm_out.eps, modulation=self.last_modulation
        )
        if made is None:
            return
        pixels = self.clip.kernels.to_pixels.to_pixels(
            made.raw, decoder.patch_size, made.bias, self.buffer.dtype, finish
        )
        end = self.written + pixels.shape[1]
        self.copy.put(pixels, self.buffer[:, self.written : end])
        self.written = end


def _modulations(decoder: Any, sample: torch.Tensor, timestep: Any) -> tuple[Mapping, tuple | None]:
    """-> {(up block, residual block): ((shift, scale), (shift, scale))} and those of the last norm; by the host's own
    embedders. Nothing where the decoder takes no timestep."""
    if not decoder.timestep_conditioning:
        return {}, None
    scaled = timestep * decoder.timestep_scale_multiplier.to(sample)

    def embedded(embedder: Any, table: torch.Tensor) -> torch.Tensor:
        made = embedder(
            timestep=scaled.flatten(), resolution=None, aspect_ratio=None, batch_size=1, hidden_dtype=sample.dtype
        )
        return table.to(sample) + made.reshape(len(table), -1)

    found = {}
    for place, block in enumerate(decoder.up_blocks):
        for number, inner in enumerate(getattr(block, "res_blocks", ())):
            shift1, scale1, shift2, scale2 = embedded(block.time_embedder, inner.scale_shift_table)
            found[place, number] = ((shift1, scale1), (shift2, scale2))
    return found, tuple(embedded(decoder.last_time_embedder, decoder.last_scale_shift_table))


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
    return unknown(model.decoder) or tried(model.config)


def tried(config: Mapping[str, Any]) -> str:
    """``_trial``, with whatever a host that is not as known raises as the reason."""
    try:
        return _trial(json.dumps(config))
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        return f"a trial failed ({type(error).__name__}: {error})"


@contextlib.contextmanager
def finishing(host_vae: Any) -> Iterator[None]:
    """Meanwhile the frames that the host's VAE wants in host memory get there as numbers from 0 to 1."""
    decoder = getattr(getattr(host_vae, "first_stage_model", None), "decoder", None)
    decoding = getattr(decoder, "__dict__", {}).get("_nvfp4_decoding")
    if decoding is None or not isinstance(host_vae.process_output, Finished):
        yield
        return
    decoding.finishing = True
    try:
        yield
    finally:
        decoding.finishing, decoding.finished = False, None


class Finished:
    """The host's ``process_output`` of a VAE, but for frames that the decoder has finished already."""

    def __init__(self, decoding: Decoding, process: Callable[[torch.Tensor], torch.Tensor]):
        self.decoding, self.process = decoding, process

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        done = self.decoding.finished
        if done is None or (image.data_ptr(), image.shape) != (done.data_ptr(), done.shape):
            return self.process(image)
        self.decoding.finished = None
        return image


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


def install(decoder: torch.nn.Module, decoding: Decoding) -> None:
    """Let this decoder of the host decode our way."""
    decoder.__dict__["_nvfp4_decoding"] = decoding
    decoder.__class__ = fast_class(type(decoder))
