# SPDX-License-Identifier: Apache-2.0
"""The VAE in a file, told by its signature -> the host's VAE, whole on its device when it decodes, and a report.

The host builds and runs the VAE. This module picks the tensors of the one VAE, gives them the names the host looks for,
restores quantised weights once, and refuses what would decode badly.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ...checkpoint.file.header import CheckpointError, Header
from ...checkpoint.file.shards import Checkpoint, Source, open_checkpoint
from ...checkpoint.identify.components import AUDIO_VAE, VIDEO_VAE, Component, find_components
from ...checkpoint.identify.dialects import AUTO
from ...checkpoint.identify.vae_signatures import AUDIO, Vae, find_vaes, pick_vae, refusal
from ...checkpoint.identify.values import check_bare
from ...checkpoint.write.restore import plan_restoration
from ...checkpoint.write.split import metadata_of, with_config
from ...kernels.errors import PackError
from ...measure.escape import report as text_report
from ..decode.decoder import finishing
from ..decode.trial import install_in
from .built import stop

logger = logging.getLogger(__name__)

KINDS = ("auto", "video", "audio")
_TRAINED = (".weight", ".bias", "scale_shift_table")
EXACT, FAST = DECODES = ("exact", "fast")
PREVIEW_WARNING = (
    "this is a preview decoder, several times softer than the full VAE, and it decodes without tiles. Take the full "
    "VAE for a final video."
)


class ResidentVAE(comfy.sd.VAE):
    """The host's VAE under its patcher that puts all weights on the device before decoding.

    DynamicVRAM's patcher leaves the parameters on the CPU and casts each layer to where its input is, so a node that
    asks a parameter for the device decodes on the CPU. ``disable_offload`` is the host's own switch against it, which
    its constructor turns off for most VAEs before it reads it; here it stays on.
    """

    disable_offload = property(lambda self: True, lambda self, value: None)

    def decode(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """The host's own, which a fast decoder may hand finished frames."""
        with finishing(self):
            return super().decode(*arguments, **options)


class PreviewVAE(ResidentVAE):
    """A preview decoder of LTX-2, which the host takes for one of half the scale and cuts to wrong tiles."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.upscale_ratio = (lambda frames: max(0, frames * 8 - 7), 32, 32)
        self.upscale_index_formula = (8, 32, 32)

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The whole latent at once, whatever tiles are asked for: it is small, and tiles would lose its memory."""
        logger.warning("the preview decoder decodes without tiles")
        return self.decode(samples)


@dataclass(frozen=True)
class VaeReport:
    """What was loaded and where it decodes; ``str()`` is the text shown to the user."""

    file: str
    title: str
    prefix: str
    tensors: int
    gigabytes: float
    restored: Mapping[str, int]  # format in the file -> number of weights that are BF16 now
    device: str
    dtype: str
    config_from: str | None
    decode: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        place = f"its {self.prefix}* tensors" if self.prefix else "names without prefix"
        lines = [
            f"{self.file}: {self.title}, {place}, {self.tensors:,} tensors, {self.gigabytes:.2f} GB",
            f"device: {self.device}, dtype: {self.dtype}, all weights on the device while it decodes",
        ]
        lines.append(f"decode: {self.decode}")
        if self.restored:
            formats = ", ".join(f"{count:,} from {name}" for name, count in self.restored.items())
            lines.append(f"restored to BF16: {formats}")
        if self.config_from:
            lines.append(f"config taken from {self.config_from}")
        return text_report([*lines, *(f"warning: {text}" for text in self.warnings)])


def load_vae(
    path: str,
    kind: str = "auto",
    allow_preview: bool = False,
    config_from: str | None = None,
    dialect: str = AUTO,
    prefix: str | None = None,
    decode: str = EXACT,
) -> tuple[Any, VaeReport]:
    """VAE file or full checkpoint -> (the host's VAE, VaeReport).

    ``kind``: "video", "audio", or "auto", which is the video VAE where there is one. ``config_from``: a file whose
    `config` is used where ``path`` lacks it. ``prefix``: which of several VAEs. ``dialect``: for packed weights that do
    not declare it. ``decode``: "exact", ComfyUI's own decoder, or "fast" (host/decode), where that can be; the report
    says why not. Raises CheckpointError, with the remedy, for a file that cannot decode LTX latents well.
    """
    if decode not in DECODES:
        raise PackError(f"unknown decode {decode!r}; expected {' or '.join(DECODES)}")
    if kind not in KINDS:
        raise PackError(f"unknown kind of VAE {kind!r}; expected {', '.join(KINDS)}")
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    audio = kind == "audio" or (kind == "auto" and {vae.kind for vae in find_vaes(header)} == {AUDIO})
    vae, config_source = pick_vae(header, audio, prefix), None
    if config_from is not None and vae.has("config"):
        header = with_config(header, config_from)
        vae, config_source = pick_vae(header, audio, prefix), open_checkpoint(config_from).header.path.name
    reason = refusal(vae, audio, allow_preview)
    if reason is not None:
        remedy = "set `config_from` to such a file" if vae.has("config") and config_from is None else ""
        raise CheckpointError(reason, where=header.path.name, remedy=remedy)
    component = find_components(header, None if audio else vae.prefix)[AUDIO_VAE if audio else VIDEO_VAE]
    state_dict, restored = _read(checkpoint, header, component, dialect)
    host_vae = _build(vae, state_dict, metadata_of(header, component), header.path.name)
    patcher = _patcher_of(host_vae)
    if hasattr(patcher, "cached_patcher_init"):  # since 0.15.1
        patcher.cached_patcher_init = (_reload, (path, kind, allow_preview, config_from, dialect, prefix, decode))
    way = _way(host_vae, decode)
    report = _report(vae, header, component, restored, patcher.load_device, host_vae, config_source, way)
    logger.log(logging.WARNING if report.warnings else logging.INFO, "%s", str(report).replace("\n", "; "))
    return host_vae, report


def _reload(path, kind, allow_preview, config_from, dialect, prefix, decode, disable_dynamic: bool = False):
    """The host's factory for clones that need weights of their own, on another GPU."""
    return _patcher_of(load_vae(path, kind, allow_preview, config_from, dialect, prefix, decode)[0])


def _way(host_vae: Any, decode: str) -> str:
    """How the VAE decodes, ``decode`` having been asked for, in words."""
    if decode == EXACT:
        return "exact (ComfyUI's own)"
    reason = install_in(host_vae)
    if reason:
        return f"exact (ComfyUI's own), not fast: {reason}"
    return "fast (channels_last_3d, norms fused in Triton); differs from exact by rounding"


def _read(checkpoint: Checkpoint, header: Header, component: Component, dialect: str) -> tuple[dict, dict[str, int]]:
    """-> ({name for the host: tensor on the CPU}, format -> number of weights restored from it)."""
    restoration = plan_restoration(header, component.names, dialect)
    device = comfy.model_management.vae_device()
    state_dict: dict[str, torch.Tensor] = {}
    formats: dict[str, int] = {}
    with Source(checkpoint) as reader:
        for name in sorted(component.names, key=reader.place):
            comfy.model_management.throw_exception_if_processing_interrupted()
            own = component.names[name]
            weight = name.removesuffix("_packed") if name.endswith(".weight_packed") else name
            if weight in restoration.weights:
                made = restoration.weights[weight]
                value = made.produce(lambda key: reader.tensor(key).to(device))
                state_dict[own.removesuffix("_packed") if weight != name else own] = value.cpu()
                formats[made.stored_as] = formats.get(made.stored_as, 0) + 1
            elif name not in restoration.leftover:
                state_dict[own] = reader.tensor(name)
                check_bare(header.path.name, name, state_dict[own])
    return state_dict, formats


def _build(vae: Vae, state_dict: dict, metadata: dict[str, str], file: str) -> Any:
    """Tensors of one VAE -> the host's object for it, checked to be complete."""
    names = set(state_dict)
    if vae.kind == AUDIO and "bwe" in metadata["config"] and not hasattr(_audio_classes(), "VocoderWithBWE"):
        raise CheckpointError(f"this ComfyUI does not know the {vae.title}", where=file, remedy="update ComfyUI")
    try:
        host_vae = _construct(vae, state_dict, metadata)
    except (RuntimeError, AssertionError, KeyError, TypeError, ValueError) as error:
        found = f"ComfyUI could not build the {vae.title} ({' '.join(str(error).split())[:300]})"
        expected = "a `config` that belongs to the weights, and a ComfyUI that knows this version"
        remedy = "take the `config` from a file of the same model version, or update ComfyUI"
        raise CheckpointError(found, where=file, expected=expected, remedy=remedy) from error
    model = getattr(host_vae, "first_stage_model", host_vae)
    if model is None:
        remedy = "update ComfyUI"
        raise CheckpointError(f"this ComfyUI does not know the {vae.title}", where=file, remedy=remedy)
    if not vae.preview:
        _check_whole(model, names, file)
    return host_vae


def _check_whole(model: Any, names: set[str], file: str) -> None:
    """Refuse a VAE that lacks weights of its decoder or vocoder; what its encoder lacks is an error once it is used.

    Without initial values of their own, such weights would be whatever the memory held, or drawn at random.
    """
    stored = {key: key.replace("autoencoder.", "audio_vae.", 1) for key, _ in model.named_parameters()}
    for key, name in stored.items():
        if name in names or not key.endswith(_TRAINED):
            continue
        part = next((part for part in key.split(".") if part in ("encoder", "decoder", "vocoder")), None)
        layer = name.rpartition(".")[0]
        if part == "encoder":
            user = model.get_submodule(key.rpartition(".")[0])
            user.register_forward_pre_hook(functools.partial(stop, name=file, layer=layer))
        elif part is not None:
            found = f"weights of its {part} are missing, `{name}` for one"
            raise CheckpointError(found, where=file, remedy="download or convert it again, or check its `config`")


def _construct(vae: Vae, state_dict: dict, metadata: dict[str, str]) -> Any:
    if vae.kind != AUDIO:
        return (PreviewVAE if vae.preview else ResidentVAE)(sd=state_dict, metadata=metadata)
    audio_class = _audio_classes().AudioVAE
    if "state_dict" in inspect.signature(audio_class).parameters:  # up to 0.15 it was no VAE of the host's class
        return audio_class(state_dict, metadata)
    # The one dtype that the host lists for it. --bf16-vae and --fp16-vae overrule the list, and its encoder then stops.
    return ResidentVAE(sd=state_dict, metadata=metadata, dtype=torch.float32)


def _audio_classes() -> ModuleType:
    """The host's module of the audio VAE, imported late: it needs torchaudio, which an older host may run without."""
    return importlib.import_module("comfy.ldm.lightricks.vae.audio_vae")


def _patcher_of(host_vae: Any) -> Any:
    return host_vae.patcher if hasattr(host_vae, "patcher") else host_vae.device_manager.patcher


def _report(
    vae: Vae,
    header: Header,
    component: Component,
    restored: dict[str, int],
    device: torch.device,
    host_vae: Any,
    config_source: str | None,
    way: str,
) -> VaeReport:
    warnings = [PREVIEW_WARNING] if vae.preview else []
    management = comfy.model_management
    if management.is_device_cpu(device) and not management.is_device_cpu(management.get_torch_device()):
        warnings.append("decoding runs on the CPU, which is slow: start ComfyUI without --cpu-vae.")
    dtype = getattr(host_vae, "vae_dtype", None) or next(host_vae.parameters()).dtype
    return VaeReport(
        file=header.path.name,
        title=vae.title,
        prefix=vae.prefix or ("audio_vae." if vae.kind == AUDIO else ""),
        tensors=len(component.names),
        gigabytes=component.nbytes(header) / 1e9,
        restored=restored,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        config_from=config_source,
        decode=way,
        warnings=tuple(warnings),
    )
