# SPDX-License-Identifier: Apache-2.0
"""Which nodes load a file, the inputs that name it, and the model folders it is looked up in; LoRAs on the way.

ComfyUI's own loaders, this pack's, and those of ComfyUI-GGUF, ComfyUI-KJNodes, ComfyUI-LTXVideo (low VRAM) and
ComfyUI-MultiGPU, whose loaders take the inputs of the one whose name they begin with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..files import VAE_FOLDERS
from .files import name_says_distilled
from .links import Node
from .prompt_graph import PromptGraph

OUR_MODEL_LOADER, OUR_VAE_LOADER = "NVFP4ModelLoader", "NVFP4VAELoader"
_MULTI_GPU = "MultiGPU"
_BEFORE_IT = re.compile(r"(?:Advanced)?(?:DisTorch2?)?MultiGPU$")
_POWER_LORAS = "Power Lora Loader"
_POWER_LORA = re.compile(r"lora_\d{1,4}")
_MOST_LORAS = 64  # of one node


class Names(NamedTuple):
    """``inputs`` that name files, the first one the file that the node is about; ``folders`` they are in."""

    inputs: tuple[str, ...]
    folders: tuple[str, ...]


_CHECKPOINT = Names(("ckpt_name",), ("checkpoints",))
_CHECKPOINTS = {
    "CheckpointLoaderSimple": _CHECKPOINT,
    "CheckpointLoader": _CHECKPOINT,
    "CheckpointLoaderKJ": _CHECKPOINT,
    "LowVRAMCheckpointLoader": _CHECKPOINT,
}
_TEXT = ("text_encoders",)
_PAIR, _THREE = ("clip_name1", "clip_name2"), ("clip_name1", "clip_name2", "clip_name3")
MODEL_LOADERS = {
    OUR_MODEL_LOADER: Names(("model_name",), ("diffusion_models", "checkpoints")),
    "UNETLoader": Names(("unet_name",), ("diffusion_models",)),
    "DiffusionModelLoaderKJ": Names(("model_name",), ("diffusion_models",)),
    "UnetLoaderGGUF": Names(("unet_name",), ("unet_gguf", "diffusion_models")),
    "UnetLoaderGGUFAdvanced": Names(("unet_name",), ("unet_gguf", "diffusion_models")),
    "GGUFLoaderKJ": Names(("model_name",), ("unet_gguf", "diffusion_models")),
    **_CHECKPOINTS,
}
TEXT_LOADERS = {
    "LTXAVTextEncoderLoader": Names(("text_encoder",), _TEXT),
    "CLIPLoader": Names(("clip_name",), _TEXT),
    "DualCLIPLoader": Names(_PAIR, _TEXT),
    "TripleCLIPLoader": Names(_THREE, _TEXT),
    "QuadrupleCLIPLoader": Names((*_THREE, "clip_name4"), _TEXT),
    "CLIPLoaderGGUF": Names(("clip_name",), (*_TEXT, "clip_gguf")),
    "DualCLIPLoaderGGUF": Names(_PAIR, (*_TEXT, "clip_gguf")),
}
VAE_LOADERS = {
    OUR_VAE_LOADER: Names(("vae_name",), VAE_FOLDERS),
    "VAELoader": Names(("vae_name",), ("vae", "vae_approx")),
    "VAELoaderKJ": Names(("vae_name",), ("vae", "vae_approx")),
    **_CHECKPOINTS,
}

AUDIO_VAE_LOADERS = {
    "LTXVAudioVAELoader": Names(("ckpt_name",), ("checkpoints", "vae")),
    "LowVRAMAudioVAELoader": _CHECKPOINT,
}
_UPSCALER = Names(("model_name",), ("latent_upscale_models",))
UPSCALER_LOADERS = {"LatentUpscaleModelLoader": _UPSCALER, "LowVRAMLatentUpscaleModelLoader": _UPSCALER}
ALL_LOADERS = {**MODEL_LOADERS, **TEXT_LOADERS, **VAE_LOADERS, **AUDIO_VAE_LOADERS, **UPSCALER_LOADERS}


def names_of(kind: str, table: Mapping[str, Names]) -> Names | None:
    """What a loader class names in its inputs; None for a class that is not of this table."""
    found = table.get(kind)
    return found if found is not None or not kind.endswith(_MULTI_GPU) else table.get(_BEFORE_IT.sub("", kind))


class Lora(NamedTuple):
    """A LoRA that a node puts on a model: its file's name, and its strength, None where that is not known."""

    name: str
    strength: float | None


def distilling_loras(graph: PromptGraph, node: Node) -> list[Lora]:
    """The LoRAs of a node whose names say that they distil: LoraLoader and its kin, rows of Power Lora Loader."""
    found = []
    if "lora_name" in node.inputs and name_says_distilled(name := graph.value(node.id, "lora_name")):
        found.append(Lora(name, graph.number(node.id, "strength_model")))
    if not node.kind.startswith(_POWER_LORAS):  # of other nodes the inputs may be very many
        return found
    rows = ((key, row) for key, row in node.inputs.items() if _is_row(key, row))
    for _, (_, row) in zip(range(_MOST_LORAS), rows, strict=False):
        strength = row.get("strength")
        known = isinstance(strength, (int, float)) and not isinstance(strength, bool) and abs(strength) < 1e6
        if row.get("on") is True and name_says_distilled(row.get("lora")):
            found.append(Lora(row["lora"], float(strength) if known else None))
    return found


def _is_row(key: Any, row: Any) -> bool:
    return isinstance(key, str) and isinstance(row, dict) and bool(_POWER_LORA.fullmatch(key.lower())) and "lora" in row
