# SPDX-License-Identifier: Apache-2.0
"""LTX's tables of rotations, made once a sampling: the host makes them anew, a hundred small kernels, in every step.

They follow from the tokens' coordinates, which are compared with those of the step before; the bits are the host's. To
compare the CPU waits for the GPU, as the host does in each step too, when it copies the frequencies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy import patcher_extension

from .graph_key import host_class

KEY = "nvfp4_video.positions"
_KEPT = "_nvfp4_positions"
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

    return KeepsPositions


def use_positions(patcher: Any) -> None:
    """Let a loaded model keep its tables while it samples, if it is the host's audio and video transformer."""
    model, found = patcher.model.diffusion_model, host_class("LTXAVModel")
    if found is not None and type(model) is found:
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
