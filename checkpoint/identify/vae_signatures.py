# SPDX-License-Identifier: Apache-2.0
"""Which VAE a file holds, where, and what is wrong with it: from the names, shapes and dtypes in its header.

``_ROWS`` is read from top to bottom, LTX first and the specific before the general, because the families share names:
LTX-2.5 has FLUX's `decoder.conv_in.weight`, every LTX has Hunyuan's `decoder.conv_in.conv.weight`. A VAE may lie under
any prefix: ``vae.`` in a full checkpoint or left on by mistake, ``first_stage_model.`` in older ones, none in a file of
its own.

Sources: ComfyUI ``comfy/sd.py`` (class VAE), and the key lists of LTX-2.3 and of taehv.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..file.header import CheckpointError, Header, TensorInfo, quote
from .formats import kind_of, title_of, weight_suffix
from .layers import group_tensors
from .signatures import MODEL_PREFIXES, longest_prefixes

VIDEO, AUDIO = "video VAE", "audio VAE"
PREVIEW, TAESD, IMAGE = "preview TAE", "image TAESD", "image VAE"
FULL = "full checkpoint"
LTX = "LTX"

AUDIO_STARTS = ("audio_vae.", "vocoder.")
STATISTICS = ("per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means")
# Prefixes below which a VAE's names mean something else.
_ELSEWHERE = (*MODEL_PREFIXES, "text_encoders.", "cond_stage_model.", "conditioner.", "text_embedding_projection.")
_RESIDUAL = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
_LAST_DOWN = "encoder.down_blocks.7.conv.conv.weight"
_CAUSAL_IN, _IMAGE_IN = "decoder.conv_in.conv.weight", "decoder.conv_in.weight"
_WAN, _TAE_IN, _TAE_OUT = "decoder.middle.0.residual.0.gamma", "decoder.1.weight", "decoder.22.bias"
_MOST_NAMED = 8
_MOST_VAES = 1000


@dataclass(frozen=True)
class Problem:
    """What keeps a VAE from being used as it is. ``code``: config, statistics, quantised, prefix, vocoder or layout."""

    code: str
    text: str


@dataclass(frozen=True)
class Vae:
    """A VAE in a file. ``kind``: a constant of this module. ``quantised``: format -> number of weights stored in it."""

    kind: str
    family: str
    version: str
    latent_channels: int | None
    prefix: str
    quantised: Mapping[str, int]
    problems: tuple[Problem, ...]

    @property
    def title(self) -> str:
        """Family, version and kind in one phrase."""
        return " ".join(part for part in (self.family, self.version, self.kind) if part)

    @property
    def preview(self) -> bool:
        """Whether it is a small decoder made for previews, far softer than the full one."""
        return self.kind in (PREVIEW, TAESD)

    @property
    def final_decoder(self) -> bool:
        """Whether LTX latents can be decoded with it in full quality, once the problems named are solved."""
        return self.family == LTX and self.kind == VIDEO and not self.has("layout")

    def has(self, code: str) -> bool:
        """Whether it has the problem ``code``."""
        return any(problem.code == code for problem in self.problems)


@dataclass(frozen=True)
class Identity:
    """What a file is as a whole. ``kind``: FULL, the kind of its only VAE, or None. ``vaes``: all VAEs in it."""

    kind: str | None
    vaes: tuple[Vae, ...]


@dataclass(frozen=True)
class _Row:
    """One signature. A key that ends with a dot stands for all names that begin with it.

    ``keys``: all present; ``absent``: none present; ``size``: (key, dimension, length).
    """

    kind: str
    family: str
    version: str
    keys: tuple[str, ...]
    size: tuple[str, int, int] | None = None
    absent: tuple[str, ...] = ()
    channels: int | str | None = None  # a number, or the key whose second dimension it is
    needs_config: bool = False


_TIMESTEPS = "decoder.last_time_embedder."
_COG_NORM = "decoder.mid_block.resnets.0.norm1.norm_layer.weight"
_ROWS = (
    _Row(VIDEO, LTX, "2.5 (diffusion decoder)", ("decoder.conv_in_x_t.weight",), channels=128, needs_config=True),
    _Row(VIDEO, LTX, "2.3", (_RESIDUAL, _LAST_DOWN), (_LAST_DOWN, 0, 128), (_TIMESTEPS,), 128, True),
    _Row(VIDEO, LTX, "0.9.5 to 0.9.8, or 2.0", (_RESIDUAL, _LAST_DOWN, _TIMESTEPS), (_LAST_DOWN, 0, 256), channels=128),
    _Row(VIDEO, LTX, "2.0", (_RESIDUAL, _LAST_DOWN), (_LAST_DOWN, 0, 256), (_TIMESTEPS,), 128, True),
    _Row(
        VIDEO, LTX, "0.9.5 or later", (_RESIDUAL, "encoder.down_blocks.1.conv.conv.bias"), (_RESIDUAL, 0, 1024),
        channels=128, needs_config=True,
    ),
    _Row(VIDEO, LTX, "decoder only", (_RESIDUAL,), (_RESIDUAL, 0, 1024), ("encoder.",), 128, True),
    _Row(VIDEO, LTX, "0.9.1", (_RESIDUAL,), (_RESIDUAL, 0, 1024), channels=128),
    _Row(VIDEO, LTX, "0.9.0", (_RESIDUAL,), (_RESIDUAL, 0, 512), channels=128),
    _Row(VIDEO, LTX, "of unknown version", (_RESIDUAL,), channels=128, needs_config=True),
    _Row(
        AUDIO, LTX, "2.3", ("vocoder.vocoder.resblocks.0.convs1.0.weight",),
        channels="audio_vae.decoder.conv_in.conv.weight", needs_config=True,
    ),
    _Row(
        AUDIO, LTX, "2.0", ("vocoder.resblocks.0.convs1.0.weight", "audio_vae."),
        channels="audio_vae.decoder.conv_in.conv.weight", needs_config=True,
    ),
    _Row(AUDIO, LTX, "", ("audio_vae.",), channels="audio_vae.decoder.conv_in.conv.weight", needs_config=True),
    _Row(PREVIEW, "LTX-2", "", (_TAE_OUT, _TAE_IN), (_TAE_IN, 1, 128), channels=128),
    _Row(PREVIEW, "Wan", "2.2", (_TAE_OUT, _TAE_IN), (_TAE_IN, 1, 48), channels=48),
    _Row(PREVIEW, "Hunyuan", "1.5", (_TAE_OUT, _TAE_IN), (_TAE_IN, 1, 32), channels=32),
    _Row(PREVIEW, "Hunyuan or Wan", "2.1", (_TAE_OUT, _TAE_IN), (_TAE_IN, 1, 16), channels=16),
    _Row(PREVIEW, "unknown", "", (_TAE_OUT, _TAE_IN), channels=_TAE_IN),
    _Row(TAESD, "image", "", ("taesd_decoder.1.weight",), channels="taesd_decoder.1.weight"),
    _Row(TAESD, "image", "", (_TAE_IN,), channels=_TAE_IN),
    _Row(VIDEO, "Wan", "2.2", (_WAN, "decoder.upsamples.0.upsamples.0.residual.2.weight"), channels=48),
    _Row(VIDEO, "Wan", "2.1", (_WAN,), channels=16),
    _Row(VIDEO, LTX, "(diffusers layout)", (_CAUSAL_IN,), (_CAUSAL_IN, 1, 128), channels=128),
    _Row(VIDEO, "CogVideoX", "", (_CAUSAL_IN, _COG_NORM), channels=_CAUSAL_IN),
    _Row(VIDEO, "Hunyuan", "1.5", (_CAUSAL_IN,), (_CAUSAL_IN, 1, 32), channels=32),
    _Row(VIDEO, "Hunyuan", "", (_CAUSAL_IN,), channels=_CAUSAL_IN),
    _Row(IMAGE, "FLUX or SD3", "", (_IMAGE_IN,), (_IMAGE_IN, 1, 16), channels=16),
    _Row(IMAGE, "Stable Diffusion", "", (_IMAGE_IN,), (_IMAGE_IN, 1, 4), channels=4),
    _Row(IMAGE, "unknown", "", (_IMAGE_IN,), channels=_IMAGE_IN),
)  # fmt: skip
_ANCHORS = tuple(dict.fromkeys(row.keys[0] for row in _ROWS if row.kind != AUDIO))


def find_vaes(header: Header, config: str | None = None) -> tuple[Vae, ...]:
    """Header -> all VAEs in the file, each made of the names under its prefix and under no longer one.

    ``config``: the header entry to judge by, where another file provides it. CheckpointError for more than 1,000 VAEs.
    """
    config = header.metadata.get("config") if config is None else config
    found = []
    sections = _sections(config)
    prefixes = _prefixes(header)
    if len(prefixes) > _MOST_VAES:
        found, expected = f"names of {len(prefixes):,} VAEs are in it", f"at most {_MOST_VAES:,}"
        raise CheckpointError(found, where=header.path.name, expected=expected, remedy="check how it was made")
    parts: dict[str, dict[str, TensorInfo]] = {prefix: {} for prefix in prefixes}
    for name, prefix in longest_prefixes(header.tensors, prefixes).items():
        if prefix or not name.startswith(_ELSEWHERE):
            parts[prefix][name[len(prefix) :]] = header.tensors[name]
    for prefix, part in parts.items():
        is_audio = any(name.startswith(AUDIO_STARTS[0]) for name in part)
        sound = {name: info for name, info in part.items() if is_audio and name.startswith(AUDIO_STARTS)}
        sight = {name: info for name, info in part.items() if name not in sound}
        found += [_describe(row, names, prefix, sections) for names in (sight, sound) if (row := _match(names))]
    return tuple(found)


def identify(header: Header, config: str | None = None) -> Identity:
    """Header -> what the file is as a whole."""
    vaes = find_vaes(header, config)
    if vaes and any(name.startswith(MODEL_PREFIXES) for name in header.tensors):
        return Identity(FULL, vaes)
    return Identity(vaes[0].kind if vaes else None, vaes)


def pick_vae(header: Header, audio: bool = False, prefix: str | None = None, config: str | None = None) -> Vae:
    """The one video (or audio) VAE of a file; ``prefix`` chooses among several. CheckpointError for none or more.

    A preview decoder beside a full VAE does not count; alone it is returned, and ``refusal`` says what is wrong.
    """
    where = header.path.name
    wanted = AUDIO if audio else VIDEO
    vaes = [vae for vae in find_vaes(header, config) if (vae.kind == AUDIO) == audio]
    if prefix is not None:
        vaes = [vae for vae in vaes if vae.prefix == prefix]
    vaes = [vae for vae in vaes if not vae.preview] or vaes
    if not vaes:
        remedy = "choose a full checkpoint or a VAE file"
        raise CheckpointError(f"there is no {wanted} in it", where=where, remedy=remedy)
    if len(vaes) > 1:
        names = ", ".join(f"{vae.title} under {quote(vae.prefix + '*')}" for vae in vaes[:_MOST_NAMED])
        names += ", ..." if len(vaes) > _MOST_NAMED else ""
        remedy = "name the prefix of the one you mean"
        raise CheckpointError(f"{len(vaes)} VAEs are in it: {names}", where=where, expected="one", remedy=remedy)
    return vaes[0]


def refusal(vae: Vae, audio: bool = False, allow_preview: bool = False) -> str | None:
    """Why this VAE must not decode LTX latents, and the remedy; None if it may. Quantised weights are no reason."""
    full = "take the full VAE of the LTX checkpoint (NVFP4 Split Checkpoint extracts it)"
    if audio != (vae.kind == AUDIO):
        return f"this is an {vae.title}; choose {'the audio' if audio else 'a video'} VAE"
    if vae.preview and not (allow_preview and vae.family == "LTX-2"):
        if vae.family == "LTX-2":
            return f"this is a preview decoder, several times softer than the full VAE; {full}, or set allow_preview"
        return f"this is a {vae.title}, which cannot decode LTX latents; {full}"
    if not (audio or vae.preview or vae.final_decoder):
        if vae.has("layout"):
            return f"this VAE has the layout of diffusers, which ComfyUI cannot read; {full}"
        channels = f" ({vae.latent_channels} latent channels, LTX has 128)" if vae.latent_channels else ""
        return f"this is a {vae.title}{channels}, which cannot decode LTX latents; {full}"
    fatal = [problem.text for problem in vae.problems if problem.code in ("config", "statistics", "vocoder")]
    return "; ".join(fatal) or None


def _prefixes(header: Header) -> list[str]:
    """Everything that precedes a signature's first key, in the order of the file."""
    found: dict[str, None] = {}
    for name in header.tensors:
        if name.startswith(_ELSEWHERE):
            continue
        outer, audio, _ = name.partition(AUDIO_STARTS[0])
        if audio and (not outer or outer.endswith(".")):
            found[outer] = None
            continue
        if name.startswith("vocoder."):
            continue
        stem = name.removesuffix("_packed")
        for anchor in _ANCHORS if stem.endswith(_ANCHORS) else ():
            outer = stem.removesuffix(anchor)
            if len(outer) < len(stem) and (not outer or outer.endswith(".")):
                found[outer] = None
    return list(found)


def _find(part: Mapping[str, TensorInfo], key: str) -> TensorInfo | None:
    return part.get(key) or part.get(f"{key}_packed")


def _has(part: Mapping[str, TensorInfo], key: str) -> bool:
    return any(name.startswith(key) for name in part) if key.endswith(".") else _find(part, key) is not None


def _length(part: Mapping[str, TensorInfo], key: str, dimension: int) -> int | None:
    info = _find(part, key)
    if info is None or len(info.shape) <= dimension or (dimension and info.dtype == "U8"):  # packed: columns are bytes
        return None
    return info.shape[dimension]


def _match(part: Mapping[str, TensorInfo]) -> _Row | None:
    for row in _ROWS:
        if not _has(part, row.keys[0]):  # most rows end here
            continue
        if not all(_has(part, key) for key in row.keys) or any(_has(part, key) for key in row.absent):
            continue
        if row.size is None or _length(part, *row.size[:2]) == row.size[2]:
            return row
    return None


def _describe(row: _Row, part: Mapping[str, TensorInfo], prefix: str, sections: set[str] | str) -> Vae:
    channels = _length(part, row.channels, 1) if isinstance(row.channels, str) else row.channels
    quantised = count_quantised(part)
    problems = tuple(_problems(row, part, prefix, sections, quantised))
    return Vae(row.kind, row.family, row.version, channels, prefix, quantised, problems)


def _problems(
    row: _Row, part: Mapping[str, TensorInfo], prefix: str, sections: set[str] | str, quantised: Mapping[str, int]
) -> Iterator[Problem]:
    if row.needs_config:
        needed = ("audio_vae", "vocoder") if row.kind == AUDIO else ("vae",)
        missing = sections
        if isinstance(sections, set):
            absent = [name for name in needed if name not in sections]
            missing = f"the header's `config` has no section {' and '.join(absent)}" if absent else ""
        if missing:
            yield Problem("config", f"{missing}; take it from a file of the same model that has one")
    if row.family == LTX and not row.version.startswith("("):
        inner = "audio_vae." if row.kind == AUDIO else ""
        missing = [key for key in STATISTICS if inner + key not in part]
        if missing:
            consequence = "without them ComfyUI only warns and decodes garbage"
            yield Problem("statistics", f"it lacks {' and '.join(f'`{inner}{key}`' for key in missing)}; {consequence}")
    if row.kind == AUDIO and not _has(part, "vocoder."):
        yield Problem("vocoder", "it has no `vocoder.*`, without which ComfyUI finds no audio VAE in it")
    if row.family == LTX and row.version.startswith("("):
        yield Problem("layout", "its names are those of diffusers, which ComfyUI does not read")
    if quantised:
        formats = ", ".join(f"{count} as {name}" for name, count in quantised.items())
        yield Problem("quantized", f"weights stored quantized: {formats}; ComfyUI does not dequantize a VAE")
    if prefix:
        yield Problem("prefix", f"its names begin with `{prefix}`; a VAE file of its own has none")


def _sections(config: str | None) -> set[str] | str:
    """The sections that a header's `config` has, or what is wrong with it."""
    if config is None:
        return "the header has no `config`, from which ComfyUI builds this VAE"
    try:
        content = json.loads(config)
    except (ValueError, RecursionError) as error:
        return f"the header's `config` cannot be read ({error})"
    return {name for name, value in content.items() if isinstance(value, dict)} if isinstance(content, dict) else set()


def count_quantised(part: Mapping[str, TensorInfo]) -> dict[str, int]:
    """{name: tensor} -> format -> number of weights in it, for those that are not plain floating point."""
    groups = [members for members in group_tensors(part).values() if weight_suffix(members)]
    return dict(Counter(title_of(members) for members in groups if kind_of(members) != "float"))
