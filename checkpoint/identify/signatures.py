# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, from the names and shapes in its header: its kind, its model family, the prefix of its model.

Names are tested from the specific to the general. An unknown family is no error: the host may know more families than
this file, which only has to tell models from what people pick by mistake, and to know what the tuned families need.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..file.header import CheckpointError, Header
from .diffusers_names import DiffusersNames, find_diffusers_names

# Where full checkpoints and re-saved models keep the diffusion model. The host knows the first one only.
MODEL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_MOST_PARTS, _FEWEST_NAMES = 3, 6  # of a prefix that nobody expects

# Family -> names that all must be present, without prefix and up to the last component that quantisation may change.
_FAMILIES = {
    "LTX-2.3": ("adaln_single.linear", "audio_adaln_single.linear", "transformer_blocks.0.attn1.to_gate_logits"),
    "LTX-2": ("adaln_single.linear", "audio_adaln_single.linear"),
    "LTX-Video": ("adaln_single.emb.timestep_embedder.linear_1", "patchify_proj"),
    "FLUX": ("double_blocks.0.img_attn.qkv", "img_in"),
    "Wan": ("blocks.0.cross_attn.k", "head.head"),
    "Qwen-Image": ("transformer_blocks.0.img_mod.1", "txt_norm"),
    "Z-Image": ("noise_refiner.0.attention.qkv", "cap_embedder.1"),
    "HunyuanVideo": ("txt_in.individual_token_refiner.blocks.0.self_attn.qkv",),
}
_TAILS = tuple(dict.fromkeys(name for wanted in _FAMILIES.values() for name in wanted))
_NEEDS_CONFIG = ("LTX-2.3", "LTX-2")
_VAE_STARTS = {"decoder", "encoder", "per_channel_statistics", "quant_conv", "post_quant_conv"}
# How names end in LoRAs and their kin: comfy/lora.py and comfy/weight_adapter.
_LORA_ENDINGS = (
    *(f"{a}{b}.weight" for a in (".lora_", "_lora.", ".lora.", ".lora_linear_layer.") for b in ("up", "down")),
    *(f".lora_{one}{ending}" for one in "AB" for ending in ("", ".weight", ".default.weight")),
    *(f".{kind}{part}" for kind in ("lokr_w", "hada_w") for part in ("1", "1_a", "1_b", "2", "2_a", "2_b")),
    *(".oft_blocks", ".diff", ".diff_b", ".set_weight", ".dora_scale"),
)
_CALIBRATION_ENDINGS = (".mean_square", ".gram", ".held_out")  # as checkpoint/write/calibration.py writes them
_LORA = ("this is a LoRA", "put it into models/loras and use LoraLoaderModelOnly after the model loader")
_TEXT_ENCODER_STARTS = ("model.layers.", "model.language_model.", "language_model.", "text_model.", "encoder.block.")


@dataclass(frozen=True)
class Model:
    """A diffusion model in a file. ``family``: a name of this module's table, or None where only the host may know."""

    family: str | None
    prefix: str

    @property
    def needs_config(self) -> bool:
        """Whether the host misbuilds it without the header entry `config`."""
        return self.family in _NEEDS_CONFIG


def find_model(header: Header) -> Model:
    """Header -> the diffusion model it holds; one of a known family under any prefix of up to three parts.

    CheckpointError for a LoRA, a VAE, a text encoder, an empty file, or a model with the names of diffusers.
    """
    names = header.tensors.keys()
    prefix = _prefix(names)
    own = [name for name in names if not name.endswith(_LORA_ENDINGS)]
    family = _family({name[len(prefix) :].rpartition(".")[0] for name in own if name.startswith(prefix)})
    if family is None:
        other, family = _unexpected(own)
        prefix = prefix if family is None else other
    if family is None:
        mistake = _mistaken_for_a_model(names)
        # Beside a prefixed model a full checkpoint may hold anything; a LoRA has the same prefix and nothing else.
        if mistake is not None and (not prefix or mistake is _LORA):
            found, remedy = mistake
            raise CheckpointError(found, where=header.path.name, expected="a diffusion model", remedy=remedy)
        diffusers = find_diffusers_names(header, prefix)
        if diffusers is not None:
            raise diffusers.error(header)
    return Model(family, prefix)


def diffusers_names(header: Header) -> DiffusersNames | None:
    """The names of diffusers for which ``find_model`` refuses a file, or None."""
    prefix = _prefix(header.tensors)
    own = {name[len(prefix) :].rpartition(".")[0] for name in header.tensors if name.startswith(prefix)}
    return None if _family(own) is not None else find_diffusers_names(header, prefix)


def _prefix(names: Collection[str]) -> str:
    return next((prefix for prefix in MODEL_PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _unexpected(names: Collection[str]) -> tuple[str, str | None]:
    """The shortest beginning of up to three parts that many names share and below which a known family lies."""
    families = _families_under(names)
    counts = dict.fromkeys(families, 0)
    for name in names if families else ():
        end = 0
        for _ in range(_MOST_PARTS):
            end = name.find(".", end) + 1
            if not end:
                break
            prefix = name[:end]
            if prefix in counts:
                counts[prefix] += 1
                if name.startswith(MODEL_PREFIXES, end):  # then the model's prefix is a longer one
                    counts[prefix] = -len(names)
    found = [prefix for prefix, count in counts.items() if count >= _FEWEST_NAMES]
    prefix = min(found, key=lambda prefix: (prefix.count("."), prefix), default="")
    return prefix, families.get(prefix) if found else None


def _families_under(names: Collection[str]) -> dict[str, str]:
    """Prefix -> family, for every prefix below which lie all the names that tell a family."""
    found: dict[str, set[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        for tail in _TAILS if module.endswith(_TAILS) else ():
            prefix = module.removesuffix(tail)
            if len(prefix) < len(module) and (not prefix or prefix.endswith(".")):
                found.setdefault(prefix, set()).add(tail)
    families = {prefix: _family(tails) for prefix, tails in found.items()}
    return {prefix: family for prefix, family in families.items() if family is not None}


def longest_prefixes(names: Collection[str], prefixes: Collection[str]) -> dict[str, str]:
    """Names that begin with one of ``prefixes`` -> the longest one, in the order of ``names``; the others are absent.

    One pass over both in alphabetical order, in which the names that have a prefix follow it without a gap. ``under``
    holds the prefixes of the name at hand, each one that of the next.
    """
    found: dict[str, str] = {}
    under: list[str] = []
    waiting = sorted(set(prefixes), reverse=True)
    for name in sorted(names):
        while waiting and waiting[-1] <= name:
            prefix = waiting.pop()
            while under and not prefix.startswith(under[-1]):
                under.pop()
            under.append(prefix)
        while under and not name.startswith(under[-1]):
            under.pop()
        if under:
            found[name] = under[-1]
    return {name: found[name] for name in names if name in found}


def _family(modules: set[str]) -> str | None:
    return next((family for family, wanted in _FAMILIES.items() if modules.issuperset(wanted)), None)


def is_lora(names: Collection[str]) -> bool:
    """Whether a file is a LoRA, or of another kind that changes a model's weights."""
    return any(name.endswith(_LORA_ENDINGS) for name in names)


def _mistaken_for_a_model(names: Collection[str]) -> tuple[str, str] | None:
    """-> (what was found, which node takes it), or None if the names do not say."""
    if not names:
        return "the file holds no tensors", "download it again"
    if is_lora(names):
        return _LORA
    if all(name.endswith(_CALIBRATION_ENDINGS) for name in names):
        return "this is a calibration file", "name it as the `calibration` of NVFP4 Quantize; choose the model itself"
    starts = {name.split(".")[0] for name in names}
    if starts & {"vocoder", "audio_vae"}:
        return "this is an audio VAE", "put it into models/vae and use the loader for audio VAEs"
    if "decoder" in starts and starts <= _VAE_STARTS:
        return "this is a VAE", "put it into models/vae and use a VAE loader"
    if any(name.startswith(_TEXT_ENCODER_STARTS) for name in names) or "shared" in starts:
        return "this is a text encoder", "put it into models/text_encoders and use a text encoder loader"
    return None


def transformer_config(header: Header) -> dict | None:
    """The `transformer` section of the header entry `config`, or None. CheckpointError if the entry is no such JSON."""
    text = header.metadata.get("config")
    if text is None:
        return None
    try:
        section = json.loads(text).get("transformer")
    except (ValueError, AttributeError, RecursionError) as error:
        raise header.unreadable("`config`", error, "a JSON object") from error
    return section if isinstance(section, dict) else None


def config_fault(header: Header) -> str:
    """What keeps the header from describing the transformer, from which the host builds LTX-2; "" if nothing does."""
    try:
        if transformer_config(header):
            return ""
    except CheckpointError:
        return "the header's `config` is no JSON object"
    if "config" not in header.metadata:
        return "the header has no `config`"
    return "the header's `config` has no section transformer, or an empty one"


def context_width(config: Mapping, where: str = "") -> int:
    """Transformer config -> width of a text context: LTX-2.3 joins the two contexts, LTX-2.0 projects in the model.

    CheckpointError, naming the file ``where``, for a config that does not say.
    """
    joined = config.get("caption_proj_before_connector")
    names = ("cross_attention_dim", "audio_cross_attention_dim") if joined else ("caption_channels",)
    widths = [config.get(name) for name in names]
    if not all(isinstance(width, int) for width in widths):
        found, expected = f"its `config` gives the transformer no {' and '.join(names)}", "whole numbers"
        remedy = "take the `config` of the released checkpoint"
        raise CheckpointError(found, where=where, expected=expected, remedy=remedy)
    return sum(widths) if joined else 2 * widths[0]
