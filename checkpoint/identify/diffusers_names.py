# SPDX-License-Identifier: Apache-2.0
"""Diffusion models whose tensors have the names of the diffusers library where ComfyUI has its own.

ComfyUI's loader for diffusion models renames and joins the weights and biases of some families (query, key and value
become one matrix: comfy/model_detection.py, convert_diffusers_mmdit and model_config_from_diffusers_unet). It does not
take their scales along, so of such files it can load plain ones only. This pack refuses all of them by that word.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..file.header import CheckpointError, Header
from .formats import FLOATS

# (family, names that all must be present, up to the last component; whether ComfyUI renames them), specific ones first.
_FAMILIES = (
    ("AuraFlow", {"joint_transformer_blocks.0.attn.add_k_proj"}, True),
    ("PixArt", {"adaln_single.emb.timestep_embedder.linear_1", "pos_embed.proj"}, True),
    ("Z-Image", {"noise_refiner.0.attention.to_k", "noise_refiner.0.attention.norm_k"}, True),
    ("FLUX", {"single_transformer_blocks.0.attn.to_q", "x_embedder"}, True),
    ("FLUX.2", {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", "x_embedder"}, False),
    ("SD3", {"transformer_blocks.0.attn.add_q_proj", "pos_embed.proj"}, True),
    ("UNet", {"conv_in", "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"}, True),
    ("HunyuanVideo", {"context_embedder.token_refiner.refiner_blocks.0.attn.to_q", "x_embedder.proj"}, False),
    ("Wan", {"condition_embedder.time_embedder.linear_1", "blocks.0.attn1.to_q"}, False),
    ("LTX-Video", {"time_embed.emb.timestep_embedder.linear_1", "transformer_blocks.0.attn1.to_q", "proj_in"}, False),
)
# What diffusers pipelines call the model; ComfyUI strips none of them. The empty one stands for its own prefixes.
_PREFIXES = ("", "transformer.", "unet.")


@dataclass(frozen=True)
class DiffusersNames:
    """``converts``: whether ComfyUI renames them, behind this prefix; ``coded``: whether the weights have scales."""

    family: str
    converts: bool
    coded: bool

    @property
    def loads(self) -> bool:
        """Whether ComfyUI's UNETLoader loads the file rightly."""
        return self.converts and not self.coded

    @property
    def found(self) -> str:
        """In words."""
        return f"its tensors have diffusers names ({self.family})"

    @property
    def stock(self) -> str:
        """What ComfyUI's own loaders do with it."""
        if self.loads:
            return "loads it with Load Diffusion Model, which renames the tensors"
        if self.converts:
            return "renames the weights and leaves their scales behind: a size mismatch, or noise without an error"
        return "does not load it"

    def error(self, header: Header) -> CheckpointError:
        """The refusal."""
        remedy = "take the version of the model made for ComfyUI"
        if self.loads:
            remedy += ", or load this one with Load Diffusion Model, which renames them"
        return CheckpointError(self.found, where=header.path.name, expected="ComfyUI's own names", remedy=remedy)


def find_diffusers_names(header: Header, prefix: str = "") -> DiffusersNames | None:
    """Header, the prefix that ComfyUI would strip -> DiffusersNames, or None if the names are no such."""
    own = [name for name in header.tensors if name.startswith(prefix)]
    for further in _PREFIXES:
        start = len(prefix + further)
        modules = {name[start:].rpartition(".")[0] for name in own if name.startswith(prefix + further)}
        for family, wanted, converts in _FAMILIES:
            if modules.issuperset(wanted):
                return DiffusersNames(family, converts and not further, _coded(header, own))
    return None


def _coded(header: Header, names: Collection[str]) -> bool:
    """Whether a matrix is in anything but plain floating point."""
    return any(header.tensors[name].dtype not in FLOATS for name in names if name.rpartition(".")[2] == "weight")
