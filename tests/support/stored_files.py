# SPDX-License-Identifier: Apache-2.0
"""One small model as every writer would store it, made in NumPy alone, and the weights that each file means.

Nothing of the pack is used here: codes, scales and their order are written down from the definition of each format, and
the weights are what these codes mean, so a reader that is wrong cannot make its own truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

Entry = tuple[str, tuple[int, ...], bytes]  # dtype, shape, content
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
LIGHTRICKS = json.dumps({"transformer": {"_class_name": "AVTransformer3DModel"}})
PREFIX = "model.diffusion_model."
# Layers and what they are: "wide" has no padding, so its scales have one shape in either order; "odd" has some.
FLOAT, WIDE, ODD, ALSO = "blocks.0.q", "blocks.1.q", "blocks.1.k", "blocks.2.q"
ONE, ROWS = "blocks.3.q", "blocks.3.k"
SHAPES = {FLOAT: (24, 32), WIDE: (128, 64), ODD: (20, 48), ALSO: (128, 64), ONE: (24, 32), ROWS: (16, 48)}
PACKED = (WIDE, ODD, ALSO)


@dataclass(frozen=True)
class Stored:
    """A file before it is written. ``beside``: name of a file in the same folder -> its text."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write it and what lies beside it, and nothing else into that folder."""
        for other in path.parent.iterdir():
            if other.is_file():
                other.unlink()
        header, at = {"__metadata__": dict(self.metadata)} if self.metadata else {}, 0
        # Wide elements first, as writers do, so that all are aligned.
        order = sorted(self.tensors, key=lambda name: -WIDTH.get(self.tensors[name][0], 1))
        for name in order:
            dtype, shape, data = self.tensors[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(self.tensors[name][2] for name in order))
        for name, content in self.beside.items():
            path.with_name(name).write_text(content)
        return path


@dataclass
class Meant:
    """The model: ``weights``, by layer, with what multiplies the input in them; ``plain``: all other tensors."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    plain: dict[str, np.ndarray] = field(default_factory=dict)

    def source(self) -> Stored:
        """The original: the same model in FP32."""
        tensors = {PREFIX + name: floats(value, "F32") for name, value in self.plain.items()}
        tensors |= {f"{PREFIX}{layer}.weight": floats(value, "F32") for layer, value in self.weights.items()}
        return Stored(tensors)


def floats(values, dtype: str, shape: tuple[int, ...] | None = None) -> Entry:
    values = np.asarray(values, np.float32)
    shape = values.shape if shape is None else shape
    if dtype == "BF16":
        return dtype, shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return dtype, shape, values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).tobytes()


def raw(values: np.ndarray, dtype: str) -> Entry:
    return dtype, values.shape, np.ascontiguousarray(values).tobytes()


def marker(content: object) -> Entry:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return "U8", (len(data),), data


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Cut to what BF16 holds."""
    return (np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """A sign, four bits of exponent with bias 7, three of mantissa; no code of NaN is used here."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return np.where(codes & 0x80, -values, values).astype(np.float32)


def e5m2(codes: np.ndarray) -> np.ndarray:
    """E5M2 is the upper byte of an FP16."""
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def tiled(scales: np.ndarray) -> np.ndarray:
    """(N, C) -> tiles of 128 rows and 4 columns; in one, 32 groups of four rows, 32 apart, by four columns."""
    rows, cols = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    out = np.zeros(rows * cols, scales.dtype)
    r, c = np.indices(scales.shape)
    out[(r // 128 * (cols // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales
    return out.reshape(rows, cols)


class Writer:
    """Makes the layers of one file, and remembers what they mean."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.meant = Meant()

    def nvfp4(self, layer: str, low_first: bool, tile: bool, pad: bool = False) -> tuple[Entry, Entry, float]:
        """-> packed codes, block scales, global scale."""
        rows, cols = SHAPES[layer]
        codes = self.rng.integers(0, 16, (rows, cols), dtype=np.uint8)
        scales = self.rng.integers(0x28, 0x70, (rows, cols // 16), dtype=np.uint8)
        factor = float(2.0 ** -self.rng.integers(12, 15))
        self.meant.weights[layer] = E2M1[codes] * np.repeat(e4m3(scales), 16, 1) * np.float32(factor)
        even, odd = codes[:, ::2], codes[:, 1::2]
        packed = odd << 4 | even if low_first else even << 4 | odd
        if pad:
            packed = np.pad(packed, ((0, -rows % 16), (0, 0)))
        return raw(packed, "U8"), raw(tiled(scales) if tile else scales, "F8_E4M3"), factor

    def fp8(self, layer: str, kind: str = "one", wide: bool = False) -> tuple[Entry, np.ndarray]:
        """-> codes, and the scale that multiplies them: one number, or one a row."""
        rows, cols = SHAPES[layer]
        codes = self.rng.integers(0, 256, (rows, cols), dtype=np.uint8)
        codes = np.where(codes & (0x7C if wide else 0x78) == (0x7C if wide else 0x78), codes & 0x8F, codes)
        codes = codes.astype(np.uint8)
        scale = as_bf16(2.0 ** -self.rng.integers(9, 12, (rows, 1) if kind == "rows" else ()).astype(np.float32))
        self.meant.weights[layer] = (e5m2 if wide else e4m3)(codes) * scale
        return raw(codes, "F8_E5M2" if wide else "F8_E4M3"), scale

    def plain(self, name: str, shape: tuple[int, ...]) -> Entry:
        values = as_bf16(self.rng.standard_normal(shape).astype(np.float32) * 0.1)
        self.meant.plain[name] = values
        return floats(values, "BF16")

    def float_layer(self, layer: str) -> Entry:
        entry = self.plain(layer, SHAPES[layer])
        self.meant.weights[layer] = self.meant.plain.pop(layer)
        return entry

    def smoothing(self, layer: str) -> Entry:
        """What the layer's input is multiplied by; it counts as a part of the weight."""
        values = as_bf16(self.rng.uniform(0.5, 2, SHAPES[layer][1]).astype(np.float32))
        self.meant.weights[layer] = self.meant.weights[layer] * values
        return floats(values, "BF16")

    def low_rank(self, layer: str) -> tuple[Entry, Entry]:
        """(r, K) and (N, r), whose product is added to the weight."""
        rows, cols = SHAPES[layer]
        down, up = (as_bf16(self.rng.standard_normal(s).astype(np.float32)) * 0.125 for s in ((4, cols), (rows, 4)))
        self.meant.weights[layer] = self.meant.weights[layer] + up @ down
        return floats(down, "BF16"), floats(up, "BF16")


INPUT = 1 / 128
Layer = Callable[[Writer, str], dict[str, Entry]]


def _comfy(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, False, True, pad=True)
    found = {"weight": packed, "weight_scale": scales, "weight_scale_2": floats(factor, "F32")}
    found |= {"input_scale": floats(INPUT, "F32")} if layer == WIDE else {}
    return found | ({"pre_quant_scale": w.smoothing(layer)} if layer == ALSO else {})


def _lightricks(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, False, True, pad=True)
    found = {"weight": packed, "weight_scale": scales, "weight_scale_2": floats(factor, "F32")}
    return found | {"input_scale": floats(INPUT, "F32")}


def _modelopt(w: Writer, layer: str, tile: bool = False) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, True, tile, pad=tile)
    found = {"weight": packed, "weight_scale": scales, "weight_scale_2": floats(factor, "F32")}
    found |= {"input_scale": floats(INPUT, "F32")}
    return found | ({"pre_quant_scale": w.smoothing(layer)} if layer == ALSO and not tile else {})


def _modelopt_tiled(w: Writer, layer: str) -> dict[str, Entry]:
    return _modelopt(w, layer, tile=True)


def _modelopt_svd(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, True, False)
    found = {"weight": packed, "weight_scale": scales, "weight_scale_2": floats(factor, "F32")}
    found["svdquant_lora_a"], found["svdquant_lora_b"] = w.low_rank(layer)
    return found | {"pre_quant_scale": w.smoothing(layer), "input_scale": floats(INPUT, "F32")}


def _compressed(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, True, False)
    found = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": floats([1 / factor], "F32")}
    return found | {"input_global_scale": floats([1 / INPUT], "F32")}


def _lightx2v(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, True, True)
    found = {"weight": packed, "weight_scale": scales, "alpha": floats(factor * INPUT, "F32")}
    return found | {"input_global_scale": floats(1 / INPUT, "F32")}


def _lightx2v_absmax(w: Writer, layer: str) -> dict[str, Entry]:
    packed, scales, factor = w.nvfp4(layer, True, True)
    found = {"weight": packed, "weight_scale": scales, "weight_global_scale": floats(1 / factor, "F32")}
    return found | {"input_absmax": floats(INPUT * 2688, "F32")}


def _fp8(w: Writer, layer: str) -> dict[str, Entry]:
    codes, scale = w.fp8(layer, "rows" if layer in (ROWS, ODD) else "one")
    found = {"weight": codes, "weight_scale": floats(scale, "F32")}
    return found if layer == ROWS else found | {"input_scale": floats(INPUT, "F32")}


def _old_fp8(w: Writer, layer: str) -> dict[str, Entry]:
    codes, scale = w.fp8(layer, wide=layer == ROWS)
    return {"weight": codes, "scale_weight": floats(scale, "F32"), "scale_input": floats(INPUT, "F32")}


def _blocks(w: Writer, layer: str) -> dict[str, Entry]:
    """FP8 with a scale for each block of 128 x 128, as DeepSeek's files have it; here each layer has one column."""
    codes, _ = w.fp8(layer)
    rows, cols = SHAPES[layer]
    scale = as_bf16(2.0 ** -w.rng.integers(9, 12, (-(-rows // 16), -(-cols // 16))).astype(np.float32))
    full = np.repeat(np.repeat(scale, 16, 0)[:rows], 16, 1)[:, :cols]
    w.meant.weights[layer] = e4m3(np.frombuffer(codes[2], np.uint8).reshape(rows, cols)) * full
    return {"weight": codes, "weight_scale_inv": floats(scale, "F32")}


def _int8(w: Writer, layer: str) -> dict[str, Entry]:
    rows, cols = SHAPES[layer]
    codes = w.rng.integers(-127, 128, (rows, cols), dtype=np.int8)
    scale = as_bf16(w.rng.uniform(0.001, 0.01, (rows, 1)).astype(np.float32))
    w.meant.weights[layer] = codes.astype(np.float32) * scale
    return {"weight": raw(codes, "I8"), "weight_scale": floats(scale, "F32")}


FP8_MARKER, NVFP4_MARKER = {"format": "float8_e4m3fn"}, {"format": "nvfp4"}
_FORMATS = {_int8: {"format": "int8_tensorwise"}, _fp8: FP8_MARKER}


def make(name: str) -> tuple[Stored, Meant]:
    """A name of DIALECTS -> the file, and what it means."""
    build, prefix, declare = DIALECTS[name]
    writer = Writer(sum(name.encode()))
    tensors, formats = {}, {}
    for layer in SHAPES:
        how: Layer = build if layer in PACKED else {"old_fp8": _old_fp8, "blocks": _blocks}.get(name, _fp8)
        if name == "int8" and layer == ONE:
            how = _int8
        if layer == FLOAT:
            parts = {"weight": writer.float_layer(layer)}
        else:
            parts = how(writer, layer)
            formats[layer] = _FORMATS.get(how, NVFP4_MARKER)
        if layer != ROWS:
            parts |= {"bias": writer.plain(f"{layer}.bias", SHAPES[layer][:1])}
        tensors |= {f"{prefix}{layer}.{suffix}": entry for suffix, entry in parts.items()}
    tensors[f"{prefix}table"] = writer.plain("table", (2, 32))
    tensors[f"{prefix}blocks.1.norm.weight"] = writer.plain("blocks.1.norm.weight", (64,))
    return declare(tensors, {prefix + layer: content for layer, content in formats.items()}), writer.meant


def _marked(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    return Stored(tensors | {f"{layer}.comfy_quant": marker(content) for layer, content in formats.items()})


def _listed(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    return Stored(tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})})


def _ltx(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    return Stored(tensors, {"config": LIGHTRICKS})


def _silent(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    return Stored(tensors)


def config_of(algorithm: str) -> str:
    return json.dumps({"quant_algo": algorithm, "quant_method": "modelopt", "group_size": 16, "producer": PRODUCER})


def sidecar_of(algorithm: str) -> dict[str, str]:
    text = json.dumps({"producer": PRODUCER, "quantization": {"quant_algo": algorithm, "group_size": 16}})
    return {"hf_quant_config.json": text}


def _noted(algorithm: str):
    return lambda tensors, formats: Stored(tensors, {"quantization_config": config_of(algorithm)})


def _beside(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    return Stored(tensors, {}, sidecar_of("NVFP4"))


def _both(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    listed = _listed(tensors, formats)
    return replace(listed, metadata={**listed.metadata, "quantization_config": config_of("NVFP4")})


def _scaled_fp8(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    return Stored(tensors | {f"{prefix}scaled_fp8": ("F8_E4M3", (2,), b"\0\0")})


def _block_size(tensors: dict, formats: Mapping[str, dict]) -> Stored:
    about = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    return Stored(tensors, {"quantization_config": json.dumps(about)})


# Name -> how its packed layers are written, prefix of its names, what declares it.
DIALECTS = {
    "comfy_markers": (_comfy, PREFIX, _marked),
    "comfy_header": (_comfy, "", _listed),
    "int8": (_comfy, PREFIX, _marked),
    "lightricks": (_lightricks, "", _ltx),
    "modelopt": (_modelopt, "", _noted("NVFP4_AWQ")),
    "modelopt_sidecar": (_modelopt, PREFIX, _beside),
    "modelopt_swizzled": (_modelopt_tiled, "", _both),
    "modelopt_svd": (_modelopt_svd, "", _noted("NVFP4_SVD")),
    "compressed_tensors": (_compressed, PREFIX, _silent),
    "lightx2v": (_lightx2v, "", _silent),
    "lightx2v_absmax": (_lightx2v_absmax, PREFIX, _silent),
    "fp8": (_fp8, PREFIX, _marked),
    "old_fp8": (_old_fp8, "", _scaled_fp8),
    "blocks": (_blocks, PREFIX, _block_size),
}
