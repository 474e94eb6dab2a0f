# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that are wrong in ways a writer, a disk or an enemy makes them wrong: sound ones, changed in parts.

A ``Draft`` is a file in three stages: tensors and metadata, from which a sound header follows; the header's JSON
object; the bytes. ``DAMAGE`` has one function for each way to change a stage. Most leave the header sound, so that the
readers behind it meet what the header says. All is chosen by the given random numbers: the same ones, the same file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from ..checkpoint.file.dtypes import BITS
from ..checkpoint.file.header import HEADER_ENTRY, MARKER, METADATA_KEY
from ..checkpoint.identify.declarations import SIDECAR
from ..checkpoint.identify.dialects import AUXILIARY
from ..checkpoint.identify.formats import FORMATS, LOW_RANK, OLD_FP8, WEIGHTS

# What json.dumps cannot write, in the place of a text: a number of 4,400 digits and a nest of 50,000 lists.
_DIGITS, _DEEP = "\0digits", "\0deep"
_RAW = {_DIGITS: "9" * 4400, _DEEP: "[" * 50_000 + "]" * 50_000}
WILD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 16, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"),
    _DIGITS, _DEEP, "", "nvfp4", "NVFP4", "modelopt", "float8_e4m3fn", "a\0b", "\x1b[31m\x07", "\ud800", "x" * 5000,
    "../../x", "<img src=x onerror=alert(1)>", "**/*", [], {}, [[]], [1, 2, 3], ["x"], {"": {}}, {"format": "nvfp4"},
    {"format": {}}, {"format": "int8_tensorwise", "convrot": "x"}, {"group_size": 0}, {"layers": []},
)  # fmt: skip
_WORDS = (
    *AUXILIARY, *WEIGHTS, *LOW_RANK, *(key for form in FORMATS.values() for key in form.keys + form.optional),
    OLD_FP8, "bias", "SCB", "g_idx", "qzeros", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "lora_A.weight",
    "alpha", "decoder.1.weight", "encoder.conv_in.weight", "per_channel_statistics.std-of-means",
)  # fmt: skip
_PREFIXES = (
    "", "model.diffusion_model.", "model.", "diffusion_model.", "vae.", "first_stage_model.", "audio_vae.", "vocoder.",
    "text_embedding_projection.", "base_model.model.transformer.", ".", "..", "a b.", "W." * 300, "é.", "\x1b[2J.",
)  # fmt: skip
_ODD_NAMES = (
    "", ".", "weight", "comfy_quant", "a..weight", ".weight", "transformer_blocks.weight", "x" * 9000, "\ud800.weight",
    f"transformer_blocks.{'9' * 4400}.attn1.to_q.weight", "transformer_blocks.-1.ff.weight", "a\nb.weight",
    "transformer_blocks.٣.attn1.to_q.weight", "transformer_blocks.999999999.attn1.to_q.weight", METADATA_KEY + "x",
)  # fmt: skip
_BESIDE = (SIDECAR, "config.json", "{stem}.safetensors.index.json", "model.safetensors.index.json", "{stem}.json")
_KEYS = ("config", HEADER_ENTRY, "quantization_config", "format", "license", "modelspec.title", "", "x" * 300)
_MOST_BYTES = 1 << 16  # of a tensor that is given another shape

Tensor = tuple[str, tuple[int, ...], bytes]
Change = Callable[["Draft", Random], None]


@dataclass
class Draft:
    """A file to be: name -> (dtype, shape, data); ``beside``: files of its folder; later stages as functions."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    beside: dict[str, bytes] = field(default_factory=dict)
    in_object: list[Callable[[dict], Any]] = field(default_factory=list)
    in_bytes: list[Callable[[bytes], bytes]] = field(default_factory=list)

    def copy(self) -> Draft:
        """A draft that can be changed by itself."""
        return replace(
            self, tensors=dict(self.tensors), metadata=dict(self.metadata), beside=dict(self.beside),
            in_object=list(self.in_object), in_bytes=list(self.in_bytes),
        )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """The file and those beside it -> its path."""
        entries: Any = {METADATA_KEY: self.metadata} if self.metadata else {}
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
            end += len(data)
        for change in self.in_object:
            entries = changed if (changed := change(entries)) is not None else entries
        text = dump(entries).encode()
        raw = len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in self.tensors.values())
        for change in self.in_bytes:
            raw = change(raw)
        for name, content in self.beside.items():
            (folder / name.format(stem=self.name)).write_bytes(content)
        path = folder / f"{self.name}.safetensors"
        path.write_bytes(raw)
        return path


def read_draft(path: Path) -> Draft:
    """A sound file, and the JSON files beside it, as a draft."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    metadata = entries.pop(METADATA_KEY, {})
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    beside = {other.name: other.read_bytes() for other in path.parent.glob("*.json")}
    return Draft(path.stem, tensors, metadata, beside)


def dump(value: Any) -> str:
    """JSON text, of what json.dumps would refuse, too."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def damaged(draft: Draft, changes: list[tuple[str, int]]) -> Draft:
    """``changes``: names of DAMAGE, each with the seed of its choices."""
    found = draft.copy()
    for name, seed in changes:
        DAMAGE[name](found, Random(seed))  # noqa: S311  (nothing secret)
    return found


def _wild(rng: Random) -> Any:
    """One of WILD, as a value of its own: a later damage may change it."""
    return deepcopy(rng.choice(WILD))


def damage_json(value: Any, rng: Random) -> Any:
    """A value of JSON with one part of it gone, doubled, wrapped, or something else."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        found: Any = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        how = rng.random()
        if how < 0.1:
            del found[key]
        elif how < 0.2 and isinstance(found, dict):
            found[str(rng.choice((key + "x", "", rng.choice(WILD))))] = found.pop(key)
        else:
            found[key] = damage_json(found[key], rng)
        return found
    return deepcopy(rng.choice(([value], {"x": value}, str(value), *WILD)))


def _any(draft: Draft, rng: Random, like: str = "") -> str | None:
    names = [name for name in draft.tensors if re.search(like, name)] or list(draft.tensors)
    return rng.choice(names) if names else None


def _filled(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """A sound tensor: the data repeated or cut to what dtype and shape need."""
    size = math.prod(shape) * BITS[dtype] // 8
    return dtype, shape, ((data or b"\0") * (size // max(len(data), 1) + 1))[:size]


def _shape(draft: Draft, rng: Random) -> None:
    name = _any(draft, rng, rng.choice(("", "scale", "weight$", "alpha|absmax|global")))
    if name is None:
        return
    dtype, shape, data = draft.tensors[name]
    sides = list(shape)
    how = rng.randrange(7)
    if how == 0:
        sides = []
    elif how == 1:
        sides = [1, *sides]
    elif how == 2:
        sides = [*sides, rng.choice((1, 2))]
    elif how == 3 and sides:
        sides[rng.randrange(len(sides))] = rng.choice((0, 1, 2, 3, 15, 16, 17, 64, 129))
    elif how == 4:
        sides = sides[::-1]
    elif how == 5:
        sides = [math.prod(sides)]
    else:
        sides = [rng.choice((0, 1, 2, 7))] * rng.choice((1, 2, 3, 5, 64))
    if math.prod(sides) * BITS[dtype] // 8 <= _MOST_BYTES:
        draft.tensors[name] = _filled(dtype, tuple(sides), data)


def _dtype(draft: Draft, rng: Random) -> None:
    if name := _any(draft, rng, rng.choice(("", "scale", "weight$", MARKER))):
        _, shape, data = draft.tensors[name]
        draft.tensors[name] = _filled(rng.choice(list(BITS)), shape, data)


def _values(draft: Draft, rng: Random) -> None:
    if name := _any(draft, rng, rng.choice(("", "scale", "alpha|absmax|global", "weight$"))):
        dtype, shape, data = draft.tensors[name]
        pattern = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\x80\x7f", b"\0\0\x80\xff", rng.randbytes(64)))
        draft.tensors[name] = _filled(dtype, shape, pattern)


def _rename(draft: Draft, rng: Random) -> None:
    if (name := _any(draft, rng)) is None:
        return
    start, _, end = name.rpartition(".")
    new = rng.choice((rng.choice(_ODD_NAMES), f"{start}.{rng.choice(_WORDS)}", rng.choice(_WORDS), f"{name}.{end}"))
    new = re.sub(r"\d+", rng.choice(("7", "47", "9" * 30)), name, count=1) if rng.random() < 0.15 else new
    tensor = draft.tensors.pop(name) if rng.random() < 0.6 else draft.tensors[name]
    draft.tensors[new] = tensor


def _drop(draft: Draft, rng: Random) -> None:
    if name := _any(draft, rng, rng.choice(("", "scale", "weight$", "norm|adaln|embed"))):
        del draft.tensors[name]


def _add(draft: Draft, rng: Random) -> None:
    if (name := _any(draft, rng, "weight")) is None:
        return
    dtype, shape = rng.choice(list(BITS)), rng.choice(((), (1,), (2,), (8, 8), (128, 4), (0,), (1, 1, 1)))
    draft.tensors[f"{name.rpartition('.')[0]}.{rng.choice(_WORDS)}"] = _filled(dtype, shape, rng.randbytes(8))


def _prefix(draft: Draft, rng: Random) -> None:
    start, share = rng.choice(_PREFIXES), rng.choice((1.0, 0.5))
    draft.tensors = {start + name if rng.random() < share else name: part for name, part in draft.tensors.items()}


def _many(draft: Draft, rng: Random) -> None:
    start, end = rng.choice(_PREFIXES), rng.choice(_WORDS)
    for i in range(rng.choice((3, 30, 200))):
        draft.tensors[f"{start}{rng.choice(('p', 'blocks.', 'layers.'))}{i}.{end}"] = ("U8", (1,), b"\0")


def _marker(draft: Draft, rng: Random) -> None:
    if (name := _any(draft, rng, "weight$|weight_packed$")) is None:
        return
    good = {"format": rng.choice([form.host or "nvfp4" for form in FORMATS.values()])}
    text = rng.choice((dump(damage_json(good, rng)).encode(), dump(good).encode(), rng.randbytes(9), b"", b"{"))
    dtype = rng.choice(("U8", "U8", "U8", "I8", "BF16", "F32"))
    text = text[: len(text) // 8 * 8] if dtype in ("BF16", "F32") else text
    draft.tensors[f"{name.rpartition('.')[0]}.{MARKER}"] = (dtype, (len(text) * 8 // BITS[dtype],), text)


def _metadata(draft: Draft, rng: Random) -> None:
    key = rng.choice((*_KEYS, *draft.metadata))
    try:
        inner = json.loads(draft.metadata.get(key, "{}"))
    except (ValueError, TypeError, RecursionError):
        inner = {}
    text = dump(damage_json(inner, rng)) if rng.random() < 0.7 else str(rng.choice(WILD))
    draft.metadata[key] = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def _beside(draft: Draft, rng: Random) -> None:
    name = rng.choice((*_BESIDE, *draft.beside))
    try:
        inner = json.loads(draft.beside.get(name, b"null")) or {
            "weight_map": {key: f"{draft.name}.safetensors" for key in draft.tensors},
            "quantization": {"quant_algo": "NVFP4", "exclude_modules": []},
            "quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        }
    except (ValueError, RecursionError):
        inner = {}
    for _ in range(rng.choice((1, 1, 3))):
        inner = damage_json(inner, rng)
    text = dump(inner).encode()
    others = (b"", rng.randbytes(40), text[: len(text) // 2], b"\xef\xbb\xbf{}")
    draft.beside[name] = rng.choice((text, text, text, *others))


def _entry(draft: Draft, rng: Random) -> None:
    name, wild = _any(draft, rng), _wild(rng)
    key = rng.choice(("dtype", "shape", "data_offsets", ""))
    how, by = rng.randrange(4), rng.choice((1, -1, 8, 2**40, -(2**40)))

    def change(entries: Any) -> None:
        if not isinstance(entries, dict):
            return
        entry = entries.get(name)
        if not isinstance(entry, dict) or not key or key not in entry:
            entries[name or "x"] = list(entry.items()) if isinstance(entry, dict) and how == 0 else deepcopy(wild)
        elif how == 1:
            del entry[key]
        elif how == 2 and isinstance(entry[key], list) and entry[key] and type(entry[key][-1]) is int:
            entry[key][-1] += by
        else:
            entry[key] = deepcopy(wild)

    draft.in_object.append(change)


def _object(draft: Draft, rng: Random) -> None:
    draft.in_object.append(lambda entries: damage_json(entries, rng))


def _metadata_entry(draft: Draft, rng: Random) -> None:
    wild = deepcopy(rng.choice((*WILD, {"a": 1}, {"a": {}})))
    draft.in_object.append(lambda entries: entries | {METADATA_KEY: wild} if isinstance(entries, dict) else entries)


def _bytes(draft: Draft, rng: Random) -> None:
    def change(raw: bytes) -> bytes:
        end = min(8 + int.from_bytes(raw[:8], "little"), len(raw)) if rng.random() < 0.7 else len(raw)
        found = bytearray(raw)
        for _ in range(rng.choice((1, 1, 4, 40))):
            if end:
                found[rng.randrange(end)] = rng.randrange(256)
        return bytes(found)

    draft.in_bytes.append(change)


def _cut(draft: Draft, rng: Random) -> None:
    share = rng.random()
    draft.in_bytes.append(lambda raw: raw[: int(len(raw) * share)])


def _longer(draft: Draft, rng: Random) -> None:
    more = rng.randbytes(rng.choice((1, 8, 500)))
    draft.in_bytes.append(lambda raw: raw + more)


def _length(draft: Draft, rng: Random) -> None:
    by = rng.choice((1, -1, 7, 10**8, 2**63, -8))

    def change(raw: bytes) -> bytes:
        return ((int.from_bytes(raw[:8], "little") + by) % 2**64).to_bytes(8, "little") + raw[8:]

    draft.in_bytes.append(change)


def _twice(draft: Draft, rng: Random) -> None:
    def change(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + size].replace(b'{"', b'{"x": 1, "', 1) if rng.random() < 0.3 else raw[8 : 8 + size]
        end = text.find(b"}") + 1
        text = text[:end] + b"," + text[1:] if rng.random() < 0.7 else text.replace(b'"shape"', b'"dtype"', 1)
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    draft.in_bytes.append(change)


DAMAGE: Mapping[str, Change] = {
    made.__name__.strip("_"): made
    for made in (
        _shape, _dtype, _values, _rename, _drop, _add, _prefix, _many, _marker, _metadata, _beside, _entry, _object,
        _metadata_entry, _bytes, _cut, _longer, _length, _twice,
    )
}  # fmt: skip
# Those that leave a sound header count more: behind it is most of the code.
_WEIGHTS = {"shape": 4, "dtype": 3, "values": 3, "rename": 5, "add": 4, "marker": 4, "metadata": 5, "beside": 4}


def choose(rng: Random) -> list[tuple[str, int]]:
    """One to four changes, as ``damaged`` takes them."""
    names = rng.choices(list(DAMAGE), [_WEIGHTS.get(name, 1) for name in DAMAGE], k=rng.choice((1, 1, 2, 3, 4)))
    return [(name, rng.getrandbits(32)) for name in names]
