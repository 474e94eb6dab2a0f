"""Every way NVFP4 weights are written to disk, and how each is brought to the host's own layout.

``DIALECTS`` says how a file's bytes are to be read; ``detect`` finds out from the header alone which entry a file
follows, by what its writer declared, and refuses to guess where that leaves a choice: shapes tell tiled from
row-major block scales only where padding shows, and never the nibble order. ``host_layer`` reads one layer into the
layout of kernels/format.py; tensors of the native dialect pass through untouched, so they stay memory-mapped.

Sources: ComfyUI ``comfy/ops.py`` (comfy), NVIDIA ModelOpt ``unified_export_hf`` and ``_postprocess_safetensors``
(modelopt), vLLM compressed-tensors ``nvfp4-pack-quantized`` (compressed_tensors), ModelTC/LightX2V ``mm_weight.py`` and
``scaled_nvfp4_quant`` (lightx2v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...kernels.format import BLOCK, PackedWeight, block_scale_shape, round_up, swap_nibbles, swizzle
from ..file.header import HEADER_ENTRY, CheckpointError, Header, TensorInfo, open_regular
from .signatures import transformer_config

AUTO = "auto"
FP8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
MARKER = "comfy_quant"
_MOST_SIDECAR = 1 << 24
SIDECAR = "hf_quant_config.json beside the file"
STATED = "stated by the user"

Get = Callable[[str], torch.Tensor]  # key suffix of one layer -> tensor
Group = Mapping[str, TensorInfo]  # key suffix of one layer -> header entry


def _scale_2(get: Get) -> torch.Tensor:
    return get("weight_scale_2").float()


def _reciprocal(get: Get) -> torch.Tensor:
    divisor = get("weight_global_scale").float()
    return 1.0 / divisor if divisor.isfinite().all() else divisor  # not 1 / inf: a factor of zero would pass


def _alpha(get: Get) -> torch.Tensor:
    return get("alpha").float() * get("input_global_scale").float()


@dataclass(frozen=True)
class Dialect:
    """How one writer lays out a weight: key names, nibble order, block-scale order, global scale."""

    title: str
    weight: str  # key suffix of the packed bytes
    low_nibble_first: bool
    tiled_scales: bool
    global_scales: tuple[tuple[tuple[str, ...], Callable[[Get], torch.Tensor]], ...]  # first set of keys present counts

    def global_scale(self, group: Group) -> Callable[[Get], torch.Tensor] | None:
        """The function that computes the multiplying global scale from the keys ``group`` has, or None."""
        return next((read for keys, read in self.global_scales if all(key in group for key in keys)), None)


_SCALE_2 = ((("weight_scale_2",), _scale_2),)
_LIGHTX2V = ((("alpha", "input_global_scale"), _alpha), (("weight_global_scale",), _reciprocal))
DIALECTS = {
    "comfy": Dialect("ComfyUI", "weight", False, True, _SCALE_2),
    "modelopt": Dialect("NVIDIA ModelOpt, row-major scales", "weight", True, False, _SCALE_2),
    "modelopt_swizzled": Dialect("NVIDIA ModelOpt, tiled scales", "weight", True, True, _SCALE_2),
    "compressed_tensors": Dialect(
        "compressed-tensors nvfp4-pack-quantized",
        "weight_packed",
        True,
        False,
        ((("weight_global_scale",), _reciprocal),),
    ),
    "lightx2v": Dialect("LightX2V", "weight", True, True, _LIGHTX2V),
}
_INPUT_SCALES = (
    ("input_scale", lambda value: value),
    ("input_global_scale", lambda value: 1.0 / value),
    ("input_absmax", lambda value: value / 2688.0),  # 448 * 6
)
# Key suffixes that, beside `weight`, say how a quantised layer is stored, in any dialect.
STORAGE_KEYS = (
    *("weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape", "alpha"),
    *("input_scale", "input_global_scale", "input_absmax"),
)
OLD_FP8_KEYS = ("scale_weight", "scale_input")
# Key suffixes that only describe how a layer's weight is stored.
AUXILIARY = (*STORAGE_KEYS, "pre_quant_scale", *OLD_FP8_KEYS, MARKER)
_SUFFIXES = ("weight", *AUXILIARY)


@dataclass(frozen=True)
class DialectPlan:
    """What ``detect`` found. ``nvfp4``: layer -> (N, K) as stored, padded or not. ``formats``: layer -> marker."""

    header: Header
    dialect: str | None  # None: no NVFP4 layer
    evidence: str
    nvfp4: Mapping[str, tuple[int, int]]
    groups: Mapping[str, Group]
    formats: Mapping[str, dict]

    @property
    def native(self) -> bool:
        """Whether the tensors already have the host's layout."""
        return self.dialect in (None, "comfy")


def detect(header: Header, requested: str = AUTO, prefix: str = "") -> DialectPlan:
    """Header -> DialectPlan for the tensors whose names start with ``prefix``; nothing but the header is read.

    ``requested``: "auto" or a name of DIALECTS, which then decides. Raises CheckpointError for a file that is damaged,
    contradicts the dialect asked for, or leaves the dialect open.
    """
    name = header.path.name
    if requested not in (AUTO, *DIALECTS):
        raise CheckpointError(f"unknown dialect {requested!r}", where=name, expected=f"auto or {', '.join(DIALECTS)}")
    groups = _group(header, prefix)
    packed = {layer: group for layer, group in groups.items() if _packed_suffix(group)}
    if packed and requested == AUTO:
        dialect, evidence = _declared(header, packed)
    elif packed:
        dialect, evidence = requested, STATED
    else:
        dialect, evidence = None, "no NVFP4 layer"
    nvfp4 = {layer: _check_layer(name, layer, group, dialect) for layer, group in packed.items()}
    if dialect:
        _check_scale_layout(name, packed, DIALECTS[dialect], dialect)
    formats = {layer: {"format": "nvfp4"} for layer in nvfp4}
    formats |= {layer: {"format": FP8_FORMATS[group["weight"].dtype]} for layer, group in groups.items() if _fp8(group)}
    for layer, content in _layer_metadata(header).items():
        matches = [layer, prefix + layer]
        match = next((candidate for candidate in matches if candidate in groups), None)
        if match in nvfp4 and content["format"] != "nvfp4":
            found = f"the header entry {HEADER_ENTRY} calls it {content['format']}, its tensors are packed as NVFP4"
            raise CheckpointError(found, where=f"{name}, layer {match}", remedy="convert the file again")
        if match is not None:
            formats[match] = formats.get(match, {}) | content
    return DialectPlan(header, dialect, evidence, nvfp4, groups, formats)


def _group(header: Header, prefix: str) -> dict[str, dict[str, TensorInfo]]:
    groups: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.tensors.items():
        layer, _, suffix = key.rpartition(".")
        if suffix in _SUFFIXES and key.startswith(prefix):
            groups.setdefault(layer, {})[suffix] = info
    return groups


def _packed_suffix(group: Group) -> str | None:
    """Key suffix of the packed bytes if the layer is NVFP4, by its dtypes: bytes with one E4M3 scale per 16 columns."""
    for suffix in ("weight_packed", "weight"):
        info = group.get(suffix)
        if info is not None and info.dtype == "U8" and len(info.shape) == 2:
            return suffix
    return None


def _fp8(group: Group) -> bool:
    """An FP8 weight with the one scale the host's own FP8 layers have."""
    weight, scale = group.get("weight"), group.get("weight_scale")
    return weight is not None and weight.dtype in FP8_FORMATS and scale is not None and scale.numel == 1


def _check_layer(name: str, layer: str, group: Group, dialect: str) -> tuple[int, int]:
    """Refuse a layer that lacks something or has an impossible shape -> (N, K) as stored."""
    kind = DIALECTS[dialect]
    where = f"{name}, layer {layer}"

    def error(found: str, expected: str) -> CheckpointError:
        remedy = f"the file is damaged or its dialect is not {dialect}: download it again or choose another dialect"
        return CheckpointError(found, where=where, expected=expected, remedy=remedy)

    if kind.weight not in group:
        raise error(f"it has no `{kind.weight}`, only {', '.join(sorted(group))}", f"the keys of {kind.title}")
    rows, width = group[kind.weight].shape
    if width == 0 or width % (BLOCK // 2):
        raise error(f"its packed rows have {width} bytes, {2 * width} columns", "a multiple of 16 columns")
    if dialect == "comfy" and rows % 16:
        raise error(f"it has {rows} packed rows", "a multiple of 16, as ComfyUI pads them")
    scale = group.get("weight_scale")
    if scale is None:
        raise error("it has no `weight_scale`", "the block scales")
    if scale.dtype not in ("F8_E4M3", "U8"):
        raise error(f"its `weight_scale` is {scale.dtype}", "F8_E4M3 (or its bytes as U8)")
    shapes = _scale_shapes((rows, 2 * width))
    if scale.shape not in shapes.values():
        expected = f"{shapes['tiled']} (tiled) or {shapes['row-major']} (row-major)"
        raise error(f"its `weight_scale` has shape {scale.shape} for {rows} x {2 * width} weights", expected)
    if kind.global_scale(group) is None:
        expected = " or ".join(" + ".join(f"`{key}`" for key in keys) for keys, _ in kind.global_scales)
        raise error(f"it has no global scale, only {', '.join(sorted(group))}", expected)
    for suffix in ("weight_scale_2", "weight_global_scale", "alpha", "input_global_scale"):
        if suffix in group and group[suffix].numel != 1:
            raise error(f"its `{suffix}` has shape {group[suffix].shape}", "one number")
    return rows, 2 * width


def _scale_shapes(shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {"tiled": block_scale_shape(shape), "row-major": (shape[0], shape[1] // BLOCK)}


def _scale_layouts(packed: Mapping[str, Group]) -> dict[str, str]:
    """Layouts that padding proves, each with a layer that proves it."""
    proofs: dict[str, str] = {}
    for layer, group in packed.items():
        info = group[_packed_suffix(group)]
        scale = group.get("weight_scale")
        if scale is None:
            continue
        shapes = _scale_shapes((info.shape[0], info.shape[1] * 2))
        fitting = [layout for layout, shape in shapes.items() if shape == scale.shape]
        if len(fitting) == 1:
            proofs.setdefault(fitting[0], layer)
    return proofs


def _check_scale_layout(name: str, packed: Mapping[str, Group], kind: Dialect, dialect: str) -> None:
    wrong = "row-major" if kind.tiled_scales else "tiled"
    proof = _scale_layouts(packed).get(wrong)
    if proof is not None:
        found = f"its `weight_scale` has the shape of {wrong} scales"
        expected = f"{'tiled' if kind.tiled_scales else 'row-major'} ones, as {dialect} has"
        raise CheckpointError(found, where=f"{name}, layer {proof}", expected=expected, remedy="choose another dialect")


def _layer_metadata(header: Header) -> dict[str, dict]:
    """Content of ComfyUI's header entry: layer name as written there -> marker content."""
    layers = header.listed_layers()
    try:
        if not all(isinstance(content["format"], str) for content in layers.values()):
            raise TypeError("a format is no string")
    except (KeyError, TypeError) as error:
        raise header.unreadable(HEADER_ENTRY, error, '{"layers": {name: {"format": ...}}}') from error
    return layers


def modelopt_declaration(header: Header) -> str | None:
    """Where ModelOpt declares itself the producer: in the header, in hf_quant_config.json beside the file, or None."""
    entry = header.metadata.get("quantization_config")
    if entry is not None and "modelopt" in entry.lower():
        return "header entry quantization_config"
    sidecar = header.path.with_name("hf_quant_config.json")
    if sidecar.is_file():
        with open_regular(sidecar) as file:
            text = file.read(_MOST_SIDECAR)
        if b"modelopt" in text.lower():
            return SIDECAR
    return None


def _lightricks(header: Header) -> bool:
    """Whether Lightricks wrote the header: a `config` of one of its transformers."""
    try:
        transformer = transformer_config(header) or {}
    except CheckpointError:
        return False
    # LTX video transformers are `AVTransformer3DModel` and `Transformer3DModel`.
    return "Transformer3DModel" in str(transformer.get("_class_name", ""))


def _declared(header: Header, packed: Mapping[str, Group]) -> tuple[str, str]:
    """-> (dialect, evidence), the specific marks before the general ones."""
    group = next(iter(packed.values()))
    if "weight_packed" in group:
        return "compressed_tensors", "keys `weight_packed`"
    if "alpha" in group or "weight_global_scale" in group:
        return "lightx2v", "keys `alpha` + `input_global_scale`" if "alpha" in group else "key `weight_global_scale`"
    layouts = _scale_layouts(packed)
    modelopt = modelopt_declaration(header)
    marked = any(MARKER in group for group in packed.values())
    if modelopt == SIDECAR and marked and "row-major" not in layouts:
        raise CheckpointError(
            f"its layers have `{MARKER}` markers, which ModelOpt never writes, yet there is {SIDECAR}",
            where=header.path.name,
            expected="one declaration: the two differ in nibble order, which does not show in shapes",
            remedy="set the loader's `dialect`: comfy if that file belongs to another model, modelopt or "
            "modelopt_swizzled if somebody added the markers to a ModelOpt export",
        )
    if modelopt:
        return _modelopt_layout(header, layouts, modelopt)
    if marked:
        return "comfy", "`comfy_quant` markers"
    if HEADER_ENTRY in header.metadata:
        return "comfy", f"header entry {HEADER_ENTRY}"
    if "row-major" not in layouts and _lightricks(header):
        proof = f", tiled scales in {layouts['tiled']}" if "tiled" in layouts else ""
        return "comfy", f"no mark; Lightricks' own header, whose NVFP4 files have this layout{proof}"
    if "row-major" in layouts:
        likely = "its scales are row-major, as ModelOpt's are by default: dialect modelopt is the likely one"
    else:
        likely = "comfy if ComfyUI or Lightricks' tools wrote it, modelopt or modelopt_swizzled if ModelOpt did"
    raise CheckpointError(
        "it holds NVFP4 weights, but neither markers nor the header say in which layout",
        where=header.path.name,
        expected="a declared dialect: nibble order does not show in shapes, and a wrong one gives noise, no error",
        remedy=f"set the loader's `dialect` ({likely})",
    )


def _modelopt_layout(header: Header, layouts: Mapping[str, str], evidence: str) -> tuple[str, str]:
    """Tiled or row-major: by padding, else by ModelOpt's default. Tiling and layer metadata are separate options."""
    if "row-major" in layouts:
        return "modelopt", f"{evidence}, row-major scales in {layouts['row-major']}"
    if "tiled" in layouts:
        return "modelopt_swizzled", f"{evidence}, tiled scales in {layouts['tiled']}"
    if HEADER_ENTRY not in header.metadata:
        return "modelopt", f"{evidence}; row-major scales, its default"
    raise CheckpointError(
        "ModelOpt wrote it for ComfyUI, with or without its option that tiles the block scales",
        where=header.path.name,
        expected="a stated layout: no layer of this file has a shape that tells",
        remedy="set the loader's `dialect` to modelopt_swizzled if the export tiled its scales, else modelopt",
    )


def host_layer(plan: DialectPlan, layer: str, get: Get) -> PackedWeight:
    """One NVFP4 layer of ``plan`` in the host's layout, on the device where ``get`` puts its tensors.

    ``get(suffix)`` returns the layer's tensor of that key suffix. The shape of the record is the stored one. Native
    bytes are returned as they are. Raises CheckpointError if the global scale is not a finite number.
    """
    kind = DIALECTS[plan.dialect]
    group = plan.groups[layer]
    global_scale = kind.global_scale(group)(get).reshape(())
    if not torch.isfinite(global_scale) or global_scale < 0:
        raise CheckpointError(
            f"its global scale is {global_scale.item()}",
            where=f"{plan.header.path.name}, layer {layer}",
            expected="a finite number, not negative",
            remedy="the file is damaged: download or quantise it again",
        )
    rows, cols = plan.nvfp4[layer]
    packed, scale = get(kind.weight), get("weight_scale").view(torch.float8_e4m3fn)
    if kind.low_nibble_first:
        packed = swap_nibbles(packed)
    if rows % 16:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, round_up(rows, 16) - rows))
    return PackedWeight(packed, scale if kind.tiled_scales else swizzle(scale), global_scale, (rows, cols))


def input_scale(plan: DialectPlan, layer: str, get: Get) -> torch.Tensor | None:
    """Static activation scale of a layer, () fp32, multiplying, whatever key and convention it has; None if dynamic."""
    for suffix, convert in _INPUT_SCALES:
        if suffix in plan.groups[layer]:
            return convert(get(suffix).float().reshape(()))
    return None
