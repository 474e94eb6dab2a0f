# SPDX-License-Identifier: Apache-2.0
"""Ways to damage or change a stored file: its tensors, names, dtypes, shapes, scales, declarations and sidecars.

``mutants`` lists them all for one file; each keeps what the tensors were meant to be, so a reader has two right answers
only: the weights of the file it was made from, or a refusal. UNDETECTABLE names those that are left out, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .stored_files import (
    FP8_MARKER,
    LIGHTRICKS,
    NVFP4_MARKER,
    WIDTH,
    Entry,
    Stored,
    config_of,
    floats,
    marker,
    sidecar_of,
)

Mutant = tuple[str, Stored]

UNDETECTABLE = {
    "two tensors of one dtype and shape change places": "either is as plausible as the other",
    "a finite positive number becomes another one": "a scale is whatever its writer computed",
    "BF16 becomes F16, or E4M3 becomes E5M2, in name": "any bytes are numbers of both",
    "scales, one a row or a block, are cut to one": "one number is a scale of the whole weight",
    "a `pre_quant_scale` goes": "ModelOpt folds that of some layers into the norm before them",
    "an `input_scale` goes": "then inputs are measured; the weights are right",
    "markers or layer names are added to ModelOpt's tiled file": "they say ComfyUI's layout, and the tensors fit both",
    "a note of ModelOpt's comes to a file that lists its layers": "ModelOpt's tiled export has these two entries",
    "the note of ModelOpt's goes from a file that lists its layers": "what is left is what ComfyUI's files have",
    "`quant_algo` of ModelOpt's names another algorithm of the same tensors": "the tensors are the same",
}
SUFFIXES = (
    *("weight", "weight_scale", "weight_scale_2", "scale_weight", "weight_scale_inv", "input_scale", "scale_input"),
    *("weight_packed", "weight_global_scale", "input_global_scale", "alpha", "comfy_quant", "pre_quant_scale"),
    *("svdquant_lora_a", "weight_zero_point", "qweight", "weight_shape", "input_absmax", "bias", "Weight", "weight_"),
)
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "foo.", "transformer.")
SCALES = ("scale", "scale_2", "scale_inv", "weight", "input", "alpha", "absmax")
_SAME_WIDTH = (
    ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "F4"), ("BF16", "F16", "I16", "U16"), ("F32", "I32", "U32"),
)  # fmt: skip
ADDED = {
    "weight_scale": floats(0.5, "F32"), "weight_scale_2": floats(0.5, "F32"), "scale_weight": floats(0.5, "F32"),
    "weight_scale_inv": floats([[0.5]], "F32"), "weight_global_scale": floats([64.0], "F32"),
    "weight_zero_point": ("I8", (1,), b"\1"), "weight.absmax": floats([0.5, 0.25], "F32"),
    "weight.quant_state.bitsandbytes__nf4": ("U8", (4,), b"{}  "), "lora_A.weight": floats(np.ones((2, 4)), "BF16"),
    "svdquant_lora_a": floats(np.ones((2, 4)), "BF16"), "weight_quantizer._amax": floats(1.0, "F32"),
    "qzeros": ("I32", (1,), b"\1\0\0\0"), "SCB": floats([1.0], "F32"), "weight_packed": ("U8", (2, 8), bytes(16)),
    "qweight": ("I32", (1,), b"\1\0\0\0"), "comfy_quant": marker(b""), "extra": ("U8", (16,), bytes(16)),
    "weight_codebook": floats(np.ones(16), "F32"), "pre_quant_scale": floats([0.5], "F32"),
}  # fmt: skip
MARKERS = (
    b"", b"\0" * 19, b"{", b"null", b"[]", b'"nvfp4"', b"{}", b'{"format": null}', b'{"format": 4}', b"\xff\xfe{}",
    *({"format": name} for name in ("nvfp4", "NVFP4", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise")),
    {"format": "mxfp8"}, {"format": ""},
    *({"format": name} for name in ("convrot_w4a4", "awq_w4a16", "asym_w4a8_int8", "float8_e4m3fn_blockwise")),
    {"Format": "nvfp4"}, {"format": "nvfp4", "more": 1}, b' {"format":"nvfp4"} ', b'{"format":"nvfp4"}\0\0',
)  # fmt: skip


def mutants(stored: Stored) -> Iterator[Mutant]:
    """Every mutant of a file, with what was done to it."""
    for found in (_names, _dtypes, _shapes, _values, _additions, _markers, _header, _beside):
        yield from found(stored)


def _put(stored: Stored, **changes: Entry | None) -> Stored:
    tensors = {name: entry for name, entry in (dict(stored.tensors) | changes).items() if entry is not None}
    return replace(stored, tensors=tensors)


def _layers(stored: Stored) -> list[str]:
    return [name.rpartition(".")[0] for name in stored.tensors if name.endswith((".weight", ".weight_packed"))]


def _renamed(stored: Stored, new) -> Stored | None:
    """The names through a function, or None where it changes none or two become one."""
    names = {name: new(name) for name in stored.tensors}
    same = len(set(names.values())) < len(names) or all(old == changed for old, changed in names.items())
    return None if same else replace(stored, tensors={names[name]: entry for name, entry in stored.tensors.items()})


def _names(stored: Stored) -> Iterator[Mutant]:
    for name in stored.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix != "pre_quant_scale":
            yield f"drop {name}", _put(stored, **{name: None})
        entry = stored.tensors[name]
        for new in SUFFIXES if layer else ():
            if f"{layer}.{new}" not in stored.tensors and suffix != "pre_quant_scale":
                yield f"rename {name} to {new}", _put(stored, **{name: None, f"{layer}.{new}": entry})
        for new in (name + "x", name.upper(), f"foo.{name}", name.replace("blocks", "block"), f"{name}.{suffix}"):
            if new != name and suffix != "pre_quant_scale":
                yield f"rename {name} to {new}", _put(stored, **{name: None, new: entry})
    for layer in _layers(stored):
        own = [name for name in stored.tensors if name.startswith(f"{layer}.")]
        yield f"drop layer {layer}", _put(stored, **dict.fromkeys(own))
        for new in (f"{layer}_", f"foo.{layer}", layer.replace("blocks", "blocs"), f"{layer}.inner", layer.upper()):
            yield f"rename layer {layer} to {new}", _put(
                stored, **dict.fromkeys(own), **{name.replace(layer, new, 1): stored.tensors[name] for name in own}
            )
    for new in PREFIXES:
        for old in PREFIXES:
            if old and not all(name.startswith(old) for name in stored.tensors):
                continue
            changed = _renamed(stored, lambda name, new=new, old=old: new + name[len(old) :])
            if changed:
                yield f"all names from {old!r} to {new!r}", changed
                yield f"all names from {old!r} to {new!r}, declared so", _declared_under(changed, old, new)


def _declared_under(stored: Stored, old: str, new: str) -> Stored:
    entry = json.loads(stored.metadata.get("_quantization_metadata", "{}"))
    if entry:
        entry["layers"] = {new + layer[len(old) :]: content for layer, content in entry["layers"].items()}
        return replace(stored, metadata={**stored.metadata, "_quantization_metadata": json.dumps(entry)})
    return stored


def _dtypes(stored: Stored) -> Iterator[Mutant]:
    for name, (dtype, shape, data) in stored.tensors.items():
        for kinds in _SAME_WIDTH:
            for new in kinds if dtype in kinds else ():
                if new == dtype or {new, dtype} in ({"BF16", "F16"}, {"F8_E4M3", "F8_E5M2"}):
                    continue
                if new == "F4" and shape:
                    yield f"{name} as F4", _put(stored, **{name: (new, (*shape[:-1], shape[-1] * 2), data)})
                elif new != "F4":
                    yield f"{name} as {new}", _put(stored, **{name: (new, shape, data)})
        if dtype in ("F32", "BF16"):
            values = np.frombuffer(data, np.float32) if dtype == "F32" else _of_bf16(data)
            for new in ("F64", "F32", "BF16"):
                if new != dtype and data:
                    yield f"{name} converted to {new}", _put(stored, **{name: floats(values, new, shape)})


def _of_bf16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _shapes(stored: Stored) -> Iterator[Mutant]:
    for name, (dtype, shape, data) in stored.tensors.items():
        count, width = int(np.prod(shape)), WIDTH.get(dtype, 1)
        others = [(count,), (*shape, 1), (1, *shape), (2, count // 2), (count // 2, 2), (count, 1), (1, count)]
        for new in dict.fromkeys([shape[::-1], *others]):
            if new != shape and int(np.prod(new)) == count:
                yield f"{name} as {new}", _put(stored, **{name: (dtype, new, data)})
        for keep in dict.fromkeys([count // 2, count - 1, 0, 1] if shape else [0]):
            rest = int(np.prod(shape[1:])) or 1
            if keep < count and not (keep == 1 and "scale" in name):
                yield f"{name} cut to {keep}", _put(stored, **{name: (dtype, (keep,), data[: keep * width])})
            if len(shape) > 1 and keep < shape[0] and not (keep * rest == 1 and "scale" in name):
                yield f"{name} cut to {keep} rows", _put(
                    stored, **{name: (dtype, (keep, *shape[1:]), data[: keep * rest * width])}
                )
        if shape and count:
            yield f"{name} doubled", _put(stored, **{name: (dtype, (2 * shape[0], *shape[1:]), data * 2)})
            yield f"{name} one more", _put(stored, **{name: (dtype, (count + 1,), data + data[:width])})
        else:
            yield f"{name} twice", _put(stored, **{name: (dtype, (2,), data * 2)})


def _values(stored: Stored) -> Iterator[Mutant]:
    for name, (dtype, shape, data) in stored.tensors.items():
        suffix = name.rpartition(".")[2]
        if not suffix.endswith(("scale", "scale_2", "scale_inv", "scale_weight", "scale_input", "alpha", "absmax")):
            continue
        bad: dict[str, bytes] = {}
        if dtype == "F32":
            bad = {text: np.float32(text).tobytes() for text in ("nan", "0", "-1", "inf", "-inf")}
        elif dtype == "BF16":
            bad = {"nan": b"\xc0\x7f", "0": b"\0\0", "inf": b"\x80\x7f"}
        elif dtype == "F8_E4M3":
            bad = {"nan": b"\x7f", "-nan": b"\xff", "-1": b"\xb8"}
            yield f"{name} all zero", _put(stored, **{name: (dtype, shape, bytes(len(data)))})
        for text, value in bad.items():
            for at in dict.fromkeys([0, len(data) // len(value) - 1] if shape else [0]):
                changed = data[: at * len(value)] + value + data[(at + 1) * len(value) :]
                yield f"{name}[{at}] = {text}", _put(stored, **{name: (dtype, shape, changed)})
            yield f"{name} all {text}", _put(stored, **{name: (dtype, shape, value * (len(data) // len(value)))})


def _additions(stored: Stored) -> Iterator[Mutant]:
    for layer in _layers(stored):
        for suffix, entry in ADDED.items():
            if f"{layer}.{suffix}" not in stored.tensors:
                yield f"add {layer}.{suffix}", _put(stored, **{f"{layer}.{suffix}": entry})
        for prefix in ("foo.", "model.diffusion_model.", "model."):
            twice = {prefix + name: entry for name, entry in stored.tensors.items() if name.startswith(f"{layer}.")}
            if not stored.tensors.keys() & twice:
                yield f"add {layer} again under {prefix}", _put(stored, **twice)
    strays = ("scaled_fp8", "experts.gate_up_proj_blocks", "experts.gate_up_proj_scales", "q_absmax")
    for name in (*strays, "lost.weight_scale", "lost.comfy_quant", "lost.qzeros", "blocks.9.weight_scale_2"):
        for entry in (("U8", (16,), bytes(16)), floats([0.5, 0.5], "F32"), ("F8_E4M3", (2,), b"88")):
            if name not in stored.tensors:
                yield f"add {name} ({entry[0]})", _put(stored, **{name: entry})


def _not_modelopt(stored: Stored) -> bool:
    """Whether a marker would tell no other layout than the file's."""
    return not any("quant_algo" in text for text in (*stored.metadata.values(), *stored.beside.values()))


def _markers(stored: Stored) -> Iterator[Mutant]:
    for layer in _layers(stored):
        for content in MARKERS:
            name = f"{layer}.comfy_quant"
            if name in stored.tensors or _not_modelopt(stored):
                yield f"{name} = {content}", _put(stored, **{name: marker(content)})
        if f"{layer}.comfy_quant" in stored.tensors:
            _, (count,), data = stored.tensors[f"{layer}.comfy_quant"]
            for entry in (("I8", (count,), data), ("U8", (1, count), data), floats(np.ones(4), "F32")):
                yield f"{layer}.comfy_quant as {entry[:2]}", _put(stored, **{f"{layer}.comfy_quant": entry})
    own = [name for name in stored.tensors if name.endswith("comfy_quant")]
    for content in (b"\0" * 20, None) if own else ():
        changed = {name: None if content is None else marker(content) for name in own}
        yield f"all markers {content}", _put(stored, **changed)
        one = {name: entry for name, entry in changed.items() if name != own[0]}
        yield f"all markers but one {content}", _put(stored, **one)


def _header(stored: Stored) -> Iterator[Mutant]:
    def about(**changes: str | None) -> Stored:
        metadata = {key: text for key, text in (dict(stored.metadata) | changes).items() if text is not None}
        return replace(stored, metadata=metadata)

    for key in stored.metadata:
        if not (key == "quantization_config" and "_quantization_metadata" in stored.metadata):
            yield f"drop entry {key}", about(**{key: None})
        for text in ("", "{", "null", "[]", "{}", '{"layers": []}', '{"layers": {"x": {}}}', '"modelopt"', "nvfp4"):
            yield f"entry {key} = {text}", about(**{key: text})
    key = "_quantization_metadata"
    entry = json.loads(stored.metadata.get(key, '{"layers": {}}'))["layers"]
    said = lambda layers: about(**{key: json.dumps({"format_version": "1.0", "layers": layers})})  # noqa: E731
    for layer in entry:
        yield f"entry without {layer}", said({name: content for name, content in entry.items() if name != layer})
        for content in (*(content for content in MARKERS if isinstance(content, dict)), None, [], "nvfp4"):
            yield f"entry of {layer} = {content}", said(entry | {layer: content})
    for new in PREFIXES:
        bare = {layer.removeprefix("model.diffusion_model."): content for layer, content in entry.items()}
        yield f"entry under {new!r}", said({new + layer: content for layer, content in bare.items()})
        both = {new + layer: FP8_MARKER for layer in bare}
        yield f"entry also under {new!r}, as FP8", said(both | entry)
    for layer in _layers(stored) if _not_modelopt(stored) else ():
        for content in (NVFP4_MARKER, FP8_MARKER, {"format": "int8_tensorwise"}, {"format": "mxfp8"}, {}, "x"):
            yield f"entry of {layer} added: {content}", said(entry | {layer: content})
    yield "entry of a layer that is not there", said(entry | {"gone.layer": NVFP4_MARKER})
    if "quantization_config" not in stored.metadata:
        for algorithm in ("NVFP4", "NVFP4_AWQ", "FP8", "NVFP4_SVD"):
            if any(name.endswith("comfy_quant") for name in stored.tensors):
                yield f"a left-over quantization_config of {algorithm}", about(quantization_config=config_of(algorithm))
    else:
        for algorithm in ("FP8", "W4A8", "INT4_AWQ", "nvfp4", "", None, "NVFP4_SVD", 4):
            yield f"quant_algo {algorithm}", about(quantization_config=config_of(algorithm))
    if "config" not in stored.metadata and _not_modelopt(stored):
        yield "a `config` of Lightricks'", about(config=LIGHTRICKS)
        yield "a `config` that is no JSON", about(config="{")


def _beside(stored: Stored) -> Iterator[Mutant]:
    marked = any(name.endswith("comfy_quant") for name in stored.tensors) or "_quantization_metadata" in stored.metadata
    for algorithm in ("NVFP4", "NVFP4_SVD", "FP8", "x") if marked or stored.beside else ():
        yield f"hf_quant_config.json of {algorithm}", replace(stored, beside=sidecar_of(algorithm))
    for text in ("", "{", "null", "modelopt", '{"producer": {"name": "other"}}'):
        yield f"hf_quant_config.json = {text}", replace(stored, beside={"hf_quant_config.json": text})
    if stored.beside:
        yield "no file beside it", replace(stored, beside={})
