# SPDX-License-Identifier: Apache-2.0
"""What a file says of its layers: `comfy_quant` markers, the header entry `_quantization_metadata`, ModelOpt's notes.

Who wins: markers and header entries speak of single layers and win over `quantization_config`, which may be left over
from the file that was converted; a file beside the checkpoint speaks only where the checkpoint itself says nothing. A
marker and a header entry that differ about one layer are an error, and so is a declaration of no known format.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..file.header import HEADER_ENTRY, MARKER, CheckpointError, Header, open_regular, quote

SIDECAR = "hf_quant_config.json beside the file"
IN_HEADER = "header entry quantization_config"
# What names of a diffusion model may begin with, in tensors and in declarations: the two need not agree.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.", "transformer.")
_SIDECAR_BYTES = 1 << 24
_SAYS_HOW = ("quant_method", "quant_algo", "producer", "config_groups", "weight_block_size", "format")


@dataclass(frozen=True)
class Declared:
    """What is declared of a layer. ``content``: a marker's JSON, None if nothing is; ``fault``: what is wrong with it.

    ``blank``: there is a marker of no bytes, or of nothing but NUL.
    """

    content: Mapping[str, object] | None = None
    fault: str = ""
    blank: bool = False


def layer_entries(header: Header) -> dict[str, dict]:
    """Content of ComfyUI's header entry: layer name as written there -> marker content."""
    layers, where = header.listed_layers(), header.path.name
    for layer, content in layers.items():
        if not isinstance(content, dict) or not isinstance(content.get("format"), str):
            found = f"its header entry {HEADER_ENTRY} says {quote(content)} of it"
            raise CheckpointError(found, where=f"{where}, layer {quote(layer)[1:-1]}", expected='{"format": "..."}')
    return layers


@dataclass(frozen=True)
class Entries:
    """Header entries by the layers they speak of. ``misnamed``: name written there -> the layer's; ``absent``: neither.

    ``absent``: names of layers that the file does not have.
    """

    layers: Mapping[str, dict]
    misnamed: Mapping[str, str]
    absent: tuple[str, ...]


def match_entries(header: Header, layers: Collection[str], prefix: str) -> Entries:
    """Which of ``layers`` each header entry means: by its name, or with prefixes that one of the two lacks."""
    found: dict[str, dict] = {}
    misnamed: dict[str, str] = {}
    absent = []
    everywhere = None
    for name, content in layer_entries(header).items():
        bare = [name[len(start) :] for start in PREFIXES if name.startswith(start)]
        candidates = [name, prefix + name, *(put + rest for rest in bare for put in (prefix, "", *PREFIXES[1:]))]
        match = next((candidate for candidate in candidates if candidate in layers), None)
        if match is None:
            everywhere = everywhere or {tensor.rpartition(".")[0] for tensor in header.tensors}
            absent += [] if not everywhere.isdisjoint(candidates) else [name]
            continue
        if match in found and found[match] != content:
            text = f"its header entry {HEADER_ENTRY} speaks of it under two names: {quote(found[match])}, {content}"
            raise CheckpointError(text, where=f"{header.path.name}, layer {match}", expected="one declaration")
        found[match] = content
        if match != name:
            misnamed[name] = match
    return Entries(found, misnamed, tuple(absent))


def declared_of(header: Header, layer: str, entry: Mapping[str, object] | None) -> Declared:
    """Layer, its header entry if any -> what both declare together; the entry's options win, as on ComfyUI.

    CheckpointError if the two name different formats.
    """
    name = f"{layer}.{MARKER}"
    if name not in header.tensors:
        return Declared(entry)
    raw = header.markers.get(name)
    marker, fault = _content(raw, header.tensors[name].nbytes)
    if entry is not None:
        if marker is not None and marker["format"] != entry["format"]:
            text = f"its marker says {quote(marker['format'])}, the header {quote(entry['format'])}"
            raise CheckpointError(text, where=f"{header.path.name}, layer {layer}", expected="one declaration")
        return Declared({**(marker or {}), **entry})
    return Declared(marker, fault, raw is not None and _is_blank(raw))


def _is_blank(raw: bytes) -> bool:
    return not raw.strip(b"\0 \t\r\n")


def _content(raw: bytes | None, nbytes: int) -> tuple[dict | None, str]:
    """Bytes of a marker -> its JSON, or what is wrong with it."""
    if raw is None:
        return None, f"has {nbytes:,} bytes"
    if _is_blank(raw):
        return None, "holds nothing but NUL bytes" if raw else "is empty"
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None, "holds no JSON"
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        return None, f"holds no JSON with a `format`, but {quote(content)}"
    return content, ""


def modelopt_declaration(header: Header) -> str | None:
    """Where ModelOpt declares itself the producer: in the header, in hf_quant_config.json beside the file, or None."""
    if "modelopt" in header.metadata.get("quantization_config", "").lower():
        return IN_HEADER
    text = _sidecar(header)
    return SIDECAR if "modelopt" in text.lower() and _object(text) else None


def quantization(header: Header, sidecar: bool = True) -> dict:
    """`quantization_config` of the header, else of the file beside it, as far as it is JSON: {} where there is none."""
    text = header.metadata.get("quantization_config") or (_sidecar(header) if sidecar else "")
    found = _object(text)
    inner = found.get("quantization")
    return found | inner if isinstance(inner, dict) else found


def _object(text: str) -> dict:
    """A JSON object, {} for whatever is none."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_quantization_config(header: Header) -> None:
    """CheckpointError for a header entry of this name that says nothing: it may have declared another layout."""
    text = header.metadata.get("quantization_config")
    if text is not None and not quantization(header, sidecar=False).keys() & _SAYS_HOW:
        found = f"its header entry quantization_config is {quote(text)}"
        remedy = "state the loader's `dialect` if you know which tool wrote it"
        raise CheckpointError(found, where=header.path.name, expected="JSON that names a method", remedy=remedy)


def _sidecar(header: Header) -> str:
    sidecar = header.path.with_name("hf_quant_config.json")
    if not sidecar.is_file():
        return ""
    with open_regular(sidecar) as file:
        return file.read(_SIDECAR_BYTES).decode("utf-8", errors="replace")
