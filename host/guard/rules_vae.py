# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on VAEs: preview decoders, other families', sound for picture, another version than the model's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...checkpoint.identify.vae_signatures import LTX, PREVIEW, Vae, refusal
from .loaders import AUDIO_VAE_LOADERS, OUR_VAE_LOADER
from .names import shown
from .vaes import DECODE, OWN_TILES, PICTURES, SOUND, UPSCALE, UPSCALERS, Use, find_sounds, is_ltx, upscaler_of
from .view import ERROR, WARNING, Finding, View, ids_of

_FULL_VAE = (
    "Take the full VAE of the LTX checkpoint: NVFP4 VAE Loader finds it inside, NVFP4 Split Checkpoint extracts it."
)
# By a model's family, the first words of the versions of LTX VAEs whose latents are not its own.
_FOREIGN_VERSIONS = {
    "LTX-Video": ("2.0", "2.3", "2.5"),
    "LTX-2": ("0.9.0", "0.9.1", "2.3", "2.5"),
    "LTX-2.3": ("0.9.0", "0.9.1", "0.9.5 to 0.9.8, or 2.0", "2.0"),  # of LTX-2.5 too, whose tensors have the same names
}
_FOREIGN_UPSCALERS = {"LTX-Video": ("2", "2.3", "2.5"), "LTX-2": ("0.9", "2.3", "2.5"), "LTX-2.3": ("0.9", "2")}
_UPSCALER = re.compile(r"(?:^|[^a-z])ltx[-_ ]?(v|2[._]?[035]?)(?![.\d]).*upscale", re.IGNORECASE)
_LONGEST_NAME = 300
# Nodes that put pictures into a latent of another's size, where a preview VAE's scale stops them.
_INTO_A_LATENT = ("LTXVImgToVideoInplace", "LTXVAddGuide", "LTXVImgToVideoConditionOnly", "LTXVImgToVideoInplaceKJ",
                  "LTXVAddGuideMulti", "LTXAddVideoICLoRAGuide", "LTXAddVideoICLoRAGuideAdvanced")  # fmt: skip


def wrong_vae(view: View) -> Iterator[Finding]:
    """A preview decoder or another family's VAE where LTX latents are made, decoded or upscaled."""
    for use in view.vaes:
        vae = use.file.vae if use.file is not None else None
        if vae is None or use.kind != PICTURES or use.file.full_vae:
            continue
        if vae.kind == PREVIEW and vae.family == "LTX-2":
            yield from _preview(view, use)
        elif is_ltx(view, use) and (reason := refusal(vae)):
            yield _foreign(use, vae, reason)


def _preview(view: View, use: Use) -> Iterator[Finding]:
    name, kind = use.file.name, use.node.kind
    ours = use.loader.kind == OUR_VAE_LOADER
    if ours and view.graph.value(use.loader.id, "allow_preview") is False:
        yield _of_preview(
            use, ERROR, "NVFP4 VAE Loader will refuse this VAE.", "is a preview decoder by its tensors, and "
            "`allow_preview` is off",
        )  # fmt: skip
    elif use.task == UPSCALE:
        why = "is a preview decoder by its tensors and has no statistics of its latents, which the upscaler needs"
        yield _of_preview(use, ERROR, f"{kind} stops on a preview VAE.", why)
    elif kind in OWN_TILES or kind in _INTO_A_LATENT:
        why = "is a preview decoder by its tensors, and ComfyUI takes its scale for half of what it is"
        yield _of_preview(use, ERROR, f"{kind} stops on a preview VAE: its sizes do not match.", why)
    elif kind == "VAEEncodeTiled":
        why = "is a preview decoder by its tensors, and ComfyUI takes its scale for half of what it is"
        title = "A tiled encode with a preview VAE stops, or makes a latent of twice the size."
        yield _of_preview(use, ERROR, title, why)
    elif use.task != DECODE:
        return
    elif use.tiled and not ours:
        yield _of_preview(
            use, ERROR, "A tiled decode with a preview VAE stops, or gives half the size and too few frames, without "
            "an error.", "is a preview decoder by its tensors; to tile, ComfyUI takes its scale for half of what it is",
        )  # fmt: skip
    elif use.node.id in view.saved:
        yield Finding(
            "preview_vae",
            WARNING,
            "The saved video is decoded with a preview VAE, which is several times softer than the full one.",
            f"{name} is a preview decoder by its tensors; one was reported at 45 against 205 of sharpness (variance of "
            "the Laplacian).",
            _FULL_VAE,
            ids_of(use.node, use.loader),
        )


def _of_preview(use: Use, severity: str, title: str, why: str) -> Finding:
    return Finding("preview_vae", severity, title, f"{use.file.name} {why}.", _FULL_VAE, ids_of(use.node, use.loader))


def _foreign(use: Use, vae: Vae, reason: str) -> Finding:
    does = "decode" if use.task == DECODE else "make"
    title = f"{use.file.name} cannot {does} LTX latents: it is a {vae.title}."
    return Finding("foreign_vae", ERROR, title, f"By its tensors, {reason}.", _FULL_VAE, ids_of(use.node, use.loader))


def confused_vaes(view: View) -> Iterator[Finding]:
    """The audio VAE where pictures are made, a video VAE where sound is, and an audio VAE from a file without one."""
    for use in view.vaes:
        if use.kind == SOUND:
            yield Finding(
                "confused_vae",
                ERROR,
                f"{use.node.kind} gets the audio VAE, and stops.",
                f"It works on pictures; {use.loader.kind} hands on a VAE of sound.",
                f"Connect its `vae` with the video VAE. {_FULL_VAE}",
                ids_of(use.node, use.loader),
            )
    for node, loader, kind in find_sounds(view):
        if kind == PICTURES:
            yield Finding(
                "confused_vae",
                ERROR,
                f"{node.kind} gets a video VAE for its `audio_vae`, and stops.",
                f"It works on sound; {loader.kind} hands on a VAE of pictures.",
                f"Connect {shown('LTXVAudioVAELoader')}, or NVFP4 VAE Loader with `kind` audio.",
                ids_of(node, loader),
            )
    for loader in view.graph.of_kind(*AUDIO_VAE_LOADERS):
        file = view.file(loader, AUDIO_VAE_LOADERS)
        if file is not None and file.sound is None:
            yield Finding(
                "no_audio_vae",
                ERROR,
                f"{file.name} has no audio VAE in it, and {shown(loader.kind)} stops.",
                "It has no tensors that begin with `audio_vae.`; ComfyUI says: VAE is invalid.",
                "Choose the full LTX-2 checkpoint, or a file with its audio VAE (NVFP4 Split Checkpoint makes one).",
                (loader.id,),
            )


def other_versions(view: View) -> Iterator[Finding]:
    """A VAE or a latent upscaler of another version than the one LTX model of the prompt; ComfyUI says nothing."""
    family = _family(view)
    if family is None:
        return
    model = f"{family}{' (or 2.5)' if family == 'LTX-2.3' else ''}"
    for use in view.vaes:
        vae = use.file.vae if use.file is not None and use.kind == PICTURES else None
        if vae is None or vae.family != LTX or not vae.version.startswith(_FOREIGN_VERSIONS[family]):
            continue
        yield Finding(
            "other_version",
            WARNING,
            f"{use.file.name} is the VAE of another LTX than the model: {vae.version}, with {model}.",
            "Their latents have the same shape and another meaning, so that ComfyUI runs and the picture is wrong.",
            _FULL_VAE,
            ids_of(use.node, use.loader),
        )
    for node in view.graph.of_kind(*UPSCALERS):
        loader, name = upscaler_of(view, node)
        version = _version_of_upscaler(name)
        if version in _FOREIGN_UPSCALERS[family]:
            yield Finding(
                "other_version",
                WARNING,
                f"{name} is by its name the latent upscaler of LTX {version}, with {model}.",
                "It was trained on that version's latents, which have the same shape and another meaning, so that "
                "ComfyUI runs and the picture is wrong.",
                "Take the upscaler of the model's own version.",
                ids_of(node, loader),
            )


def _family(view: View) -> str | None:
    """The one family of LTX that all of a prompt's samplers have; None if there are more, or a file is unknown."""
    found = set()
    for sampler in view.samplers:
        file = view.model_file(sampler)
        family = file.family if file is not None else None
        if family in _FOREIGN_VERSIONS:
            found.add(family)
        elif family is None:
            return None
    return found.pop() if len(found) == 1 else None


def _version_of_upscaler(name: str | None) -> str | None:
    """The version that the file name of a latent upscaler says: 0.9, 2, 2.3 or 2.5; None if it says none."""
    if name is None or len(name) > _LONGEST_NAME:
        return None
    found = _UPSCALER.search(re.split(r"[/\\]", name)[-1])
    if found is None:
        return None
    return {"v": "0.9", "3": "2.3", "5": "2.5"}.get(found.group(1).lower()[-1], "2")
