# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint consists of: video VAE, audio VAE and vocoder, text projection, diffusion model, everything else.

Names in a full LTX-2.x checkpoint, and in a file of the component's own:

* video VAE         ``vae.*`` -> without prefix
* audio VAE         ``audio_vae.*``, ``vocoder.*`` -> the same names, which ComfyUI wants there too
* text projection   ``text_embedding_projection.*`` -> the same
* diffusion model   ``model.diffusion_model.*`` (embeddings connectors included) -> without prefix
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..file.header import CheckpointError, Header
from .signatures import MODEL_PREFIXES, Model, diffusers_names, find_model, longest_prefixes
from .vae_signatures import AUDIO, AUDIO_STARTS, Vae, find_vaes

VIDEO_VAE, AUDIO_VAE, TEXT_PROJECTION = "video_vae", "audio_vae", "text_projection"
DIFFUSION_MODEL, REST = "diffusion_model", "rest"
COMPONENTS = {
    VIDEO_VAE: "video VAE",
    AUDIO_VAE: "audio VAE and vocoder",
    TEXT_PROJECTION: "text projection",
    DIFFUSION_MODEL: "diffusion model",
    REST: "everything else",
}
_TEXT_PROJECTION_START = "text_embedding_projection."
# First parts of the names in a VAE without prefix, of whatever family.
_VAE_PARTS = {
    *("encoder", "decoder", "per_channel_statistics", "quant_conv", "post_quant_conv", "conv1", "conv2", "bn"),
    *("taesd_encoder", "taesd_decoder", "vae_scale", "vae_shift", "scaled_fp8"),
}


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint. ``names``: name in the checkpoint -> name in a file of its own, without ``prefix``."""

    name: str
    prefix: str
    names: Mapping[str, str]

    @property
    def title(self) -> str:
        """The component in words."""
        return COMPONENTS[self.name]

    def nbytes(self, header: Header) -> int:
        """Bytes of its tensors in the checkpoint."""
        return sum(header.tensors[name].nbytes for name in self.names)


def find_components(header: Header, vae_prefix: str | None = None) -> dict[str, Component]:
    """Header -> the components it has, in the order of COMPONENTS; every tensor belongs to exactly one.

    Of several VAEs all count as the video VAE, unless ``vae_prefix`` names one; the others are then part of the rest.
    """
    vaes = find_vaes(header)
    model = model_of(header, vaes)
    names: dict[str, dict[str, str]] = {name: {} for name in COMPONENTS}
    prefixes = dict.fromkeys(COMPONENTS, "")
    if model is not None:
        prefixes[DIFFUSION_MODEL] = model.prefix
    visual = [vae for vae in vaes if vae.kind != AUDIO and vae_prefix in (None, vae.prefix)]
    if visual:
        prefixes[VIDEO_VAE] = visual[0].prefix
    sound = next((vae.prefix for vae in vaes if vae.kind == AUDIO), "")
    starts = tuple(sound + start for start in AUDIO_STARTS)
    under = longest_prefixes(header.tensors, {vae.prefix for vae in visual if vae.prefix})
    bare = any(not vae.prefix for vae in visual)
    for name in header.tensors:
        component, own = _place(name, model, under.get(name), bare, sound, starts)
        names[component][name] = own
    # A diffusion model without prefix owns all that no other component claims.
    if model is not None and not model.prefix:
        names[DIFFUSION_MODEL] |= names[REST]
        names[REST] = {}
    return {key: Component(key, prefixes[key], found) for key, found in names.items() if found}


def model_of(header: Header, vaes: Sequence[Vae]) -> Model | None:
    """The diffusion model of a checkpoint, or None if what it holds is no such thing. ``vaes``: those in it."""
    try:
        model = find_model(header)
    except CheckpointError:
        if diffusers_names(header) is not None:
            return None
        # A family unknown to the table, beside a VAE: the prefix is evidence enough.
        prefix = next((p for p in MODEL_PREFIXES if any(name.startswith(p) for name in header.tensors)), None)
        return Model(None, prefix) if prefix and vaes else None
    if model.prefix or model.family is not None:
        return model
    if any(name.startswith((*AUDIO_STARTS, _TEXT_PROJECTION_START)) for name in header.tensors):
        return None
    return None if any(vae.prefix for vae in vaes) else model


def _place(
    name: str, model: Model | None, prefix: str | None, bare: bool, sound: str, starts: tuple[str, ...]
) -> tuple[str, str]:
    """-> (component, name in a file of its own).

    ``prefix``: of the video VAE that the name would belong to; ``bare``: whether there is one without a prefix;
    ``starts``: how names of the audio VAE begin, below its prefix ``sound``.
    """
    if model is not None and model.prefix and name.startswith(model.prefix):
        return DIFFUSION_MODEL, name[len(model.prefix) :]
    if name.startswith(MODEL_PREFIXES):
        return REST, name
    if name.startswith(_TEXT_PROJECTION_START):
        return TEXT_PROJECTION, name
    if name.startswith(starts):
        return AUDIO_VAE, name[len(sound) :]
    if prefix is not None:
        return VIDEO_VAE, name[len(prefix) :]
    return (VIDEO_VAE if bare and name.partition(".")[0] in _VAE_PARTS else REST), name
