# SPDX-License-Identifier: Apache-2.0
"""What LTX makes anew before the blocks of every step though it is the same in each, kept; the bits are the host's.

The GPU waits for the CPU there, a hundred small kernels for the tables of rotations alone, and the CPU for the GPU: the
host copies numbers to it from pageable memory, which ends when the whole step before has been computed.

* Without keyframes and reference audio the tokens' coordinates follow from the latents' shapes and numbers of the
  module. They are made once, and nobody waits for them (``_process_input``).
* The tables follow from the coordinates. Those of unknown origin are compared with those of the step before, for which
  the CPU waits. They are kept for a sampling.
* The frequencies of a timestep's embedding follow from numbers of the module.

Where somebody's function stands in the place of one of the host's, nothing is kept of what it makes: it may give
something else in each step.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from typing import Any, NamedTuple

import torch
from comfy import patcher_extension

from .fused_attention import is_apart
from .fusions import fingerprint
from .graph_key import host_class

KEY = "nvfp4_video.positions"
_KNOWN, _COORDS, _TABLES, _BEGUN = (f"_nvfp4_{name}" for name in ("known_code", "coordinates", "positions", "begun"))
_FREQUENCIES = "_nvfp4_frequencies"
_MAX_PERIOD = 10000
# ``fusions.fingerprint`` of the host's Timesteps and of the functions of ``_code``, in ComfyUI 0.33 and 0.38.
_EMBEDDING, _CODE = "24709fc251415a22", "c6eb5a99d413309f"
_ATTRIBUTES = (
    "positional_embedding_max_pos", "audio_positional_embedding_max_pos", "use_middle_indices_grid",
    "split_positional_embedding", "freq_grid_generator",
)  # fmt: skip
_METHODS = ("_prepare_positional_embeddings", "_precompute_freqs_cis")
_FUNCTIONS = ("generate_freqs", "get_fractional_positions", "freqs_cis_matrix")


class _Coordinates:
    """Coordinates of video's and audio's tokens, made by the host for latents and modules as ``key`` says."""

    def __init__(self, key: tuple, made: list[torch.Tensor]):
        self.key = key
        with torch.inference_mode(False):  # tensors made in it do not count what is written to them
            self.tensors = [one.clone() for one in made]
        self._versions = self._count()

    def _count(self) -> list[int]:
        return [one._version for one in self.tensors]

    def are(self, given: list[torch.Tensor]) -> bool:
        """Whether these very tensors are given, and nobody has written to them."""
        same = len(given) == len(self.tensors) and all(map(operator.is_, given, self.tensors))
        return same and self._versions == self._count()


class _Tables(NamedTuple):
    key: tuple  # what they follow from besides coordinates
    source: _Coordinates | None
    coords: list[torch.Tensor]
    made: Any


@functools.cache
def model_class(found: type) -> type:
    """The host's LTXAVModel -> a class derived from it."""

    class KeepsPositions(found):
        host_class = found

        def _process_input(self, x, keyframe_idxs, denoise_mask, **kwargs):
            plain = keyframe_idxs is None and kwargs.get("ref_audio") is None and not _is_recorded()
            key = _input_key(self, x, denoise_mask) if plain else None
            if key is None:
                return super()._process_input(x, keyframe_idxs, denoise_mask, **kwargs)
            kept = self.__dict__.get(_COORDS)
            if kept is None or kept.key != key or not kept.are(kept.tensors):
                self.__dict__.pop(_COORDS, None)
                out, made, more = super()._process_input(x, keyframe_idxs, denoise_mask, **kwargs)
                kept = self.__dict__[_COORDS] = _Coordinates(key, made)
                return out, list(kept.tensors), more
            _keep_pace(self, x[0].device)
            video, audio = self.separate_audio_and_video_latents(x, kwargs.get("audio_length", 0))
            coords, shape = list(kept.tensors), list(video.shape)
            video = self.patchify_proj(video.permute(0, 2, 3, 4, 1).flatten(1, 3))
            video = self.apply_keyframes_abs_pos_embedding(
                video, coords[0], orig_shape=shape, grid_mask=None, num_guide_tokens=0,
                generated_keyframes=kwargs.get("generated_keyframes"),
            )  # fmt: skip
            audio = self.audio_patchify_proj(audio.transpose(1, 2).flatten(2))
            return [video, audio], coords, {"orig_shape": shape, "has_spatial_mask": _vary_in_frames(denoise_mask)}

        def _prepare_positional_embeddings(self, pixel_coords, frame_rate, x_dtype):
            plain = _are_tensors(pixel_coords) and isinstance(frame_rate, int | float) and not _is_recorded()
            if not plain or not _is_as_known(self):
                return super()._prepare_positional_embeddings(pixel_coords, frame_rate, x_dtype)
            key = (frame_rate, x_dtype, *(repr(getattr(self, name, None)) for name in _ATTRIBUTES))
            kept, source = self.__dict__.get(_TABLES), self.__dict__.get(_COORDS)
            source = source if source is not None and source.are(pixel_coords) else None
            if kept is not None and kept.key == key:
                if source is not None and kept.source is source:
                    return kept.made
                if all(map(_same, kept.coords, pixel_coords)):
                    self.__dict__[_TABLES] = kept._replace(source=source)
                    return kept.made
            del kept
            self.__dict__.pop(_TABLES, None)  # its memory is for the new ones
            coords, given = ([one.clone() for one in pixel_coords] for _ in range(2))  # the host writes to what it gets
            made = super()._prepare_positional_embeddings(given, frame_rate, x_dtype)
            self.__dict__[_TABLES] = _Tables(key, source, coords, made)
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
        model.__dict__[_KNOWN] = _known_code(found)
        patcher.add_callback_with_key(patcher_extension.CallbacksMP.ON_CLEANUP, KEY, _drop)


def _drop(patcher: Any) -> None:
    """The host's ON_CLEANUP: sampling is over, and its memory is wanted for the decode."""
    for name in (_COORDS, _TABLES, _BEGUN):
        patcher.model.diffusion_model.__dict__.pop(name, None)


def _code(found: type) -> tuple[tuple[type, type], tuple]:
    """The host's classes of patchifiers, and the functions from latents to tables, as they are now."""
    host, base = importlib.import_module(found.__base__.__module__), found.__base__
    video, audio = host.SymmetricPatchifier, importlib.import_module(found.__module__).AudioPatchifier
    return (video, audio), (
        found._process_input, base._process_input, host.latent_to_pixel_coords, video.patchify,
        video.get_latent_coords, audio.patchify, audio._get_audio_latent_time_in_sec,
        *(getattr(place, name) for name in _METHODS for place in (found, base)),
        *(getattr(host, name) for name in _FUNCTIONS),
    )  # fmt: skip


def _known_code(found: type) -> tuple | None:
    """``_code`` if its source is as known."""
    try:
        code = _code(found)
        return code if fingerprint(*code[1]) == _CODE else None
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return None


def _is_as_known(model: torch.nn.Module) -> bool:
    """Whether no function from latents to tables was exchanged since the model was loaded."""
    known = model.__dict__.get(_KNOWN)
    exchanged = any(name in model.__dict__ for name in _METHODS)
    return known is not None and not exchanged and known == _code(type(model).host_class)


def _input_key(model: torch.nn.Module, x: Any, denoise_mask: torch.Tensor | None) -> tuple | None:
    """What coordinates follow from, of latents of video and audio; None: the host has to make them each time."""
    if not _is_as_known(model):
        return None
    patchifiers = model.patchifier, model.a_patchifier
    if tuple(map(type, patchifiers)) != model.__dict__[_KNOWN][0] or model.patchifier.patch_size != (1, 1, 1):
        return None
    if any(hasattr(type(one), name) for one in patchifiers for name in vars(one)):
        return None  # somebody's function stands in the place of a method
    if not _are_tensors(x) or [one.dim() for one in x] != [5, 4]:
        return None
    if denoise_mask is not None and (denoise_mask.dim() != 5 or not denoise_mask.numel()):
        return None
    numbers = (*map(vars, patchifiers), model.vae_scale_factors, model.causal_temporal_positioning)
    return repr(numbers), *((one.shape, one.device) for one in x)


def _keep_pace(model: torch.nn.Module, device: torch.device) -> None:
    """Wait until the GPU has begun the call of the model before this one; the CPU is never ahead by more.

    So the GPU has always work, and progress and interruption are those of the step.
    """
    if device.type == "cuda":
        begun, before = torch.cuda.Event(), model.__dict__.get(_BEGUN)
        begun.record(torch.cuda.current_stream(device))
        model.__dict__[_BEGUN] = begun
        if before is not None:
            before.synchronize()


def _vary_in_frames(mask: torch.Tensor | None) -> bool:
    """Whether a mask of noise, (batch, 1, frames, height, width), differs within a frame of the first: one wait."""
    if mask is None:
        return False
    frames = mask[0, 0].flatten(1)
    return bool((frames.amin(1) != frames.amax(1)).any())


def _is_recorded() -> bool:
    """Whether operations are recorded, by torch.compile or for gradients: that is for the host's own code."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _are_tensors(found: Any) -> bool:
    return type(found) is list and all(type(one) is torch.Tensor for one in found)


def _same(kept: torch.Tensor, given: torch.Tensor) -> bool:
    alike = kept.shape == given.shape and kept.dtype == given.dtype and kept.device == given.device
    return alike and torch.equal(kept, given)
