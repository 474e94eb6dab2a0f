# SPDX-License-Identifier: Apache-2.0
"""LTX's video decoder by the layers of stream.py, in the place of the host's forward on the model's own decoder.

Nothing of the host is patched: the decoder of this model gets a class derived from its own. It looks at every call
whether its modules are still the host's own, in nobody else's hands, and else decodes the host's way. What the host's
classes compute is not taken on trust: trial.py decodes a scaled-down model of the same config by both.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.model_management
import torch

from ...kernels import video_reference
from ...kernels.backends import pick_backend, triton_module
from .frames import FrameCopy
from .known import host_module, unknown
from .stream import Clip, Frames, Kernels, convolve, residual_block, upsample

logger = logging.getLogger(__name__)


def kernels_for(device: torch.device) -> Kernels:
    """The operations between the convolutions, by the backend that runs on ``device``."""
    if pick_backend(device)[0] == "triton":
        return Kernels(*map(triton_module, ("norm_silu", "depth_to_space", "to_pixels")))
    return Kernels(video_reference, video_reference, video_reference)


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
    return unknown(decoder)


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


@contextlib.contextmanager
def finishing(host_vae: Any) -> Iterator[None]:
    """Meanwhile the frames that the host's VAE wants in host memory get there as numbers from 0 to 1."""
    decoder = getattr(getattr(host_vae, "first_stage_model", None), "decoder", None)
    decoding = getattr(decoder, "__dict__", {}).get("_nvfp4_decoding")
    process = getattr(host_vae, "process_output", None)
    if decoding is None or not isinstance(process, Finished) or process.decoding is not decoding:
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


def install(decoder: torch.nn.Module, decoding: Decoding) -> None:
    """Let this decoder of the host decode our way."""
    decoder.__dict__["_nvfp4_decoding"] = decoding
    decoder.__class__ = fast_class(type(decoder))
