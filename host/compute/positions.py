# SPDX-License-Identifier: Apache-2.0
"""What LTX makes anew before the blocks of every step though it is the same in each, kept; the bits are the host's.

The GPU waits for the CPU there, a hundred small kernels for the tables of rotations alone.

* The tables follow from the tokens' coordinates, which are compared with those of the step before. To compare the CPU
  waits for the GPU, as the host does in each step too, when it copies the frequencies. They are kept for a sampling.
* The frequencies of a timestep's embedding follow from numbers of the module.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from comfy import patcher_extension

from .fused_attention import is_apart
from .fusions import fingerprint
from .graph_key import host_class

KEY = "nvfp4_video.positions"
_KEPT, _FREQUENCIES = "_nvfp4_positions", "_nvfp4_frequencies"
_MAX_PERIOD = 10000
_EMBEDDING = "24709fc251415a22"  # ``fusions.fingerprint`` of the host's Timesteps, in ComfyUI 0.33 and 0.38
_ATTRIBUTES = ("positional_embedding_max_pos", "audio_positional_embedding_max_pos", "use_middle_indices_grid")


@functools.cache
def model_class(found: type) -> type:
    """The host's LTXAVModel -> a class derived from it."""

    class KeepsPositions(found):
        host_class = found

        def _prepare_positional_embeddings(self, pixel_coords, frame_rate, x_dtype):
            make = functools.partial(super()._prepare_positional_embeddings, pixel_coords, frame_rate, x_dtype)
            known = _are_tensors(pixel_coords) and isinstance(frame_rate, int | float)
            if not known or torch.compiler.is_compiling() or torch.is_grad_enabled():
                return make()
            # Whatever else the tables follow from: another node may set it on the model or its class.
            key = (frame_rate, x_dtype, *(repr(getattr(self, name, None)) for name in _ATTRIBUTES),
                   found._prepare_positional_embeddings, found._precompute_freqs_cis)  # fmt: skip
            kept = self.__dict__.get(_KEPT)
            if kept is not None and kept[0] == key and all(map(_same, kept[1], pixel_coords)):
                return kept[2]
            self.__dict__.pop(_KEPT, None)  # its memory is for the new ones
            coords = [one.clone() for one in pixel_coords]  # the host writes to its own
            made = make()
            self.__dict__[_KEPT] = key, coords, made
            return made

    KeepsPositions.__name__, KeepsPositions.__qualname__ = found.__name__, found.__qualname__  # others ask for them
    return KeepsPositions


@functools.cache
def embedding_class(found: type) -> type:
    """The host's Timesteps -> a class derived from it, for an even number of channels."""

    class KeepsFrequencies(found):
        host_class, host_forward = found, found.forward

        def forward(self, timesteps):
            if is_apart(self):
                return super().forward(timesteps)
            half, kept = self.num_channels // 2, self.__dict__.get(_FREQUENCIES)
            if kept is None or kept.device != timesteps.device:
                exponent = -math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
                kept = torch.exp(exponent / (half - self.downscale_freq_shift))
                self.__dict__[_FREQUENCIES] = kept
            angles = timesteps[:, None].float() * kept[None, :]
            angles = angles if self.scale == 1 else self.scale * angles
            waves = [angles.sin(), angles.cos()]
            return torch.cat(waves[::-1] if self.flip_sin_to_cos else waves, dim=-1)

    return KeepsFrequencies


def _known_embedding() -> type | None:
    """The host's Timesteps if its source is as known."""
    try:
        host = importlib.import_module("comfy.ldm.lightricks.model")
        known = fingerprint(host.Timesteps.forward, host.get_timestep_embedding) == _EMBEDDING
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return None
    return host.Timesteps if known else None


def use_positions(patcher: Any) -> None:
    """Let a loaded model keep what does not change, if it is the host's audio and video transformer."""
    model, found = patcher.model.diffusion_model, host_class("LTXAVModel")
    if found is not None and type(model) is found:
        embedding = _known_embedding()
        for module in model.modules():
            if type(module) is embedding and module.num_channels % 2 == 0:
                module.__class__ = embedding_class(embedding)
        model.__class__ = model_class(found)
        patcher.add_callback_with_key(patcher_extension.CallbacksMP.ON_CLEANUP, KEY, _drop)


def _drop(patcher: Any) -> None:
    """The host's ON_CLEANUP: sampling is over, and its memory is wanted for the decode."""
    patcher.model.diffusion_model.__dict__.pop(_KEPT, None)


def _are_tensors(coords: Any) -> bool:
    return type(coords) is list and all(type(one) is torch.Tensor for one in coords)


def _same(kept: torch.Tensor, given: torch.Tensor) -> bool:
    alike = kept.shape == given.shape and kept.dtype == given.dtype and kept.device == given.device
    return alike and torch.equal(kept, given)
