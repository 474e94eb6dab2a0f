# SPDX-License-Identifier: Apache-2.0
"""Every way NVFP4 weights are written to disk, and how each is brought to the host's own layout.

``DIALECTS`` says how a file's bytes are to be read; ``detect`` finds out from the header alone which entry a file
follows, by what its writer declared, and refuses to guess where that leaves a choice: shapes tell tiled from
row-major block scales only where padding shows, and never the nibble order. host_layer.py reads layers by it. Nothing
here needs torch before scales are measured.

Sources: ComfyUI ``comfy/ops.py`` (comfy), NVIDIA ModelOpt ``unified_export_hf`` and ``_postprocess_safetensors``
(modelopt), vLLM compressed-tensors ``nvfp4-pack-quantized`` (compressed_tensors), ModelTC/LightX2V ``mm_weight.py`` and
``scaled_nvfp4_quant`` (lightx2v).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from ...kernels.geometry import BLOCK
from ..file.header import HEADER_ENTRY, MARKER, CheckpointError, Header, quote
from .declarations import (
    IN_HEADER,
    SIDECAR,
    check_quantization_config,
    declared_of,
    match_entries,
    modelopt_declaration,
    quantization,
)
from .formats import FLOATS, OLD_FP8, Group, kind_of, weight_suffix
from .layers import Layer, account, group_tensors, read_layer, refuse
from .scale_order import ROW_MAJOR, TILED, Order, Read, measure, proven_layouts, scale_shapes
from .signatures import transformer_config
from .together import check_together

AUTO = "auto"
STATED = "stated by the user"

Get = Callable[[str], "torch.Tensor"]  # key suffix of one layer -> tensor


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
    input_scales: tuple[str, ...] = ("input_scale",)  # keys of INPUT_SCALES, one of which a layer may have

    def keys(self, group: Group) -> tuple[str, ...]:
        """The key suffixes by which a layer of ``group`` is read."""
        used = next((keys for keys, _ in self.global_scales if all(key in group for key in keys)), ())
        inputs = [key for key in self.input_scales if key in group][:1]
        return (self.weight, "weight_scale", "weight_shape", *used, *inputs)

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
        ("input_global_scale",),
    ),
    "lightx2v": Dialect(
        "LightX2V", "weight", True, True, _LIGHTX2V, ("input_scale", "input_global_scale", "input_absmax")
    ),
}
# Of the same layout; NVFP4_AWQ has `pre_quant_scale`, NVFP4_SVD a low-rank part too. MIXED_PRECISION lists its layers.
_MODELOPT_ALGORITHMS = (None, "NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "MIXED_PRECISION")
INPUT_SCALES = (
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


@dataclass(frozen=True)
class DialectPlan:
    """What ``detect`` found.

    ``layers``: how every layer is stored. ``nvfp4``: layer -> (N, K) as stored, padded or not. ``formats``: layer ->
    content of the marker that ComfyUI needs. ``misnamed``, ``absent``: names in the header entry that are a layer's but
    for a prefix, or nobody's. ``stated``: the user named the dialect. ``order``: what the block scales show, if asked.
    ``strays``: tensors that belong to no layer and are no parameters, each with what is to be said of it.
    """

    header: Header
    dialect: str | None  # None: no NVFP4 layer
    evidence: str
    nvfp4: Mapping[str, tuple[int, int]]
    groups: Mapping[str, Group]
    formats: Mapping[str, dict]
    layers: Mapping[str, Layer]
    misnamed: Mapping[str, str]
    absent: tuple[str, ...]
    stated: bool
    order: Order | None = None
    strays: Mapping[str, str] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether the NVFP4 tensors already have the host's layout."""
        return self.dialect in (None, "comfy")

    def faults(self) -> dict[str, str]:
        """Layer -> what is wrong with its marker, though its tensors are clear."""
        return {name: layer.fault for name, layer in self.layers.items() if layer.fault}

    def markers_to_drop(self) -> set[str]:
        """Layers whose marker tells ComfyUI nothing: damaged or foreign ones, and empty ones of plain weights."""
        marked = {name: layer for name, layer in self.layers.items() if MARKER in layer.read}
        return {name for name, layer in marked.items() if layer.marker is None or layer.foreign} | self.faults().keys()


def detect(
    header: Header, requested: str = AUTO, prefix: str = "", read: Read | None = None, *, shown: bool = False
) -> DialectPlan:
    """Header -> DialectPlan for the tensors whose names start with ``prefix``.

    ``requested``: "auto" or a name of DIALECTS, which then decides. ``read``: name -> tensor; with it, a few block
    scales are looked at where their order is open. ``shown``: tensors that belong to nothing are listed in ``strays``
    and no error, for tools that only tell, or that copy them as they are. Raises CheckpointError for a file that is
    damaged, contradicts the dialect asked for, leaves it open, or has a tensor or a declaration that nobody reads.
    """
    name = header.path.name
    if requested not in (AUTO, *DIALECTS):
        raise CheckpointError(f"unknown dialect {requested!r}", where=name, expected=f"auto or {', '.join(DIALECTS)}")
    groups = group_tensors(header.tensors, prefix)
    strays = account(header, groups, prefix)
    if not shown:
        refuse(name, {}, strays=tuple(strays.values()))
    packed = {layer: members for layer, members in groups.items() if _is_packed(members)}
    entries = match_entries(header, groups, prefix)
    stated, order = bool(packed) and requested != AUTO, None
    if not packed:
        dialect, evidence = None, "no NVFP4 layer"
    elif stated:
        dialect, evidence = requested, STATED
    else:
        dialect, evidence, order = _declared(header, packed, packed.keys() & entries.layers, read)
    nvfp4 = {layer: _check_layer(name, layer, members, dialect) for layer, members in packed.items()}
    if dialect:
        _check_scale_layout(name, packed, DIALECTS[dialect], dialect)
    if dialect == "comfy" and not stated:
        _check_all(header, packed, entries.layers)
    if stated:
        evidence, order = _measured(header, packed, dialect, read)
    old = {key.removesuffix(OLD_FP8): info for key, info in header.tensors.items() if key.split(".")[-1] == OLD_FP8}
    asks = quantization(header, sidecar=False)
    layers = {}
    for layer, members in groups.items():
        shapes = (nvfp4[layer], DIALECTS[dialect].keys(members)) if layer in nvfp4 else None
        layers[layer] = read_layer(
            name, layer, members, declared_of(header, layer, entries.layers.get(layer)), shapes,
            stated=requested != AUTO, block_size=_block_size(asks),
            weight_only=any(layer.startswith(start) and info.numel == 2 for start, info in old.items()),
        )  # fmt: skip
    svd = quantization(header).get("quant_algo") == "NVFP4_SVD" and (dialect or "").startswith("modelopt")
    check_together(name, layers, dialect, old, svd)
    formats = {layer: dict(found.marker) for layer, found in layers.items() if found.marker is not None}
    absent = tuple(entries.absent)
    return DialectPlan(
        header, dialect, evidence, nvfp4, groups, formats, layers, entries.misnamed, absent, requested != AUTO, order,
        strays,
    )  # fmt: skip


def packed_layers(header: Header, prefix: str = "") -> list[str]:
    """Layers whose names start with ``prefix`` and whose tensors are NVFP4's, declared or not, matrices or banks."""
    groups = group_tensors(header.tensors, prefix).items()
    return [layer for layer, members in groups if weight_suffix(members) is not None and kind_of(members) == "nvfp4"]


def _is_packed(members: Group) -> bool:
    """Whether a layer's tensors are those of an NVFP4 matrix, in whatever dialect."""
    weight = weight_suffix(members)
    return weight is not None and len(members[weight].shape) == 2 and kind_of(members) == "nvfp4"


def _block_size(asks: Mapping) -> tuple[int, int] | None:
    size = asks.get("weight_block_size")
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return tuple(size) if whole else None


def _check_layer(name: str, layer: str, group: Group, dialect: str) -> tuple[int, int]:
    """Refuse a layer that lacks something or has an impossible shape -> (N, K) as stored."""
    kind = DIALECTS[dialect]
    where = f"{name}, layer {layer}"

    def error(found: str, expected: str) -> CheckpointError:
        remedy = f"the file is damaged or its dialect is not {dialect}: download it again or choose another dialect"
        return CheckpointError(found, where=where, expected=expected, remedy=remedy)

    if kind.weight not in group:
        raise error(f"it has no `{kind.weight}`, only {', '.join(sorted(group))}", f"the keys of {kind.title}")
    if len(group[kind.weight].shape) != 2:
        raise error(f"its `{kind.weight}` has shape {group[kind.weight].shape}", "a matrix")
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
    shapes = scale_shapes((rows, 2 * width))
    if scale.shape not in shapes.values():
        expected = f"{shapes[TILED]} (tiled) or {shapes[ROW_MAJOR]} (row-major)"
        raise error(f"its `weight_scale` has shape {scale.shape} for {rows} x {2 * width} weights", expected)
    if kind.global_scale(group) is None:
        expected = " or ".join(" + ".join(f"`{key}`" for key in keys) for keys, _ in kind.global_scales)
        raise error(f"it has no global scale, only {', '.join(sorted(group))}", expected)
    for suffix in ("weight_scale_2", "weight_global_scale", "alpha", "input_global_scale"):
        if suffix in group and (group[suffix].numel != 1 or group[suffix].dtype not in FLOATS):
            found = f"has shape {group[suffix].shape}" if group[suffix].numel != 1 else f"is {group[suffix].dtype}"
            raise error(f"its `{suffix}` {found}", "one number, in floating point")
    return rows, 2 * width


def _check_scale_layout(name: str, packed: Mapping[str, Group], kind: Dialect, dialect: str) -> None:
    wrong = ROW_MAJOR if kind.tiled_scales else TILED
    proof = proven_layouts(packed).get(wrong)
    if proof is not None:
        found = f"its `weight_scale` has the shape of {wrong} scales"
        expected = f"{'tiled' if kind.tiled_scales else 'row-major'} ones, as {dialect} has"
        raise CheckpointError(found, where=f"{name}, layer {proof}", expected=expected, remedy="choose another dialect")


def _lightricks(header: Header) -> bool:
    """Whether Lightricks wrote the header: a `config` of one of its transformers."""
    try:
        transformer = transformer_config(header) or {}
    except CheckpointError:
        return False
    # LTX video transformers are `AVTransformer3DModel` and `Transformer3DModel`.
    return "Transformer3DModel" in str(transformer.get("_class_name", ""))


def _declared(
    header: Header, packed: Mapping[str, Group], listed: Collection[str], read: Read | None
) -> tuple[str, str, Order | None]:
    """-> (dialect, evidence, what was measured), the specific marks before the general ones.

    ``listed``: those of them that the header entry of ComfyUI speaks of.
    """
    group = next(iter(packed.values()))
    if "weight_packed" in group:
        return "compressed_tensors", "keys `weight_packed`", None
    if "alpha" in group or "weight_global_scale" in group:
        keys = "keys `alpha` + `input_global_scale`" if "alpha" in group else "key `weight_global_scale`"
        return "lightx2v", keys, None
    layouts = proven_layouts(packed)
    modelopt = modelopt_declaration(header)
    marked = [layer for layer, group in packed.items() if MARKER in group]
    if marked and modelopt == IN_HEADER and not any(declared_of(header, layer, None).content for layer in marked):
        found = f"ModelOpt is declared in the header, while the `{MARKER}` markers, ComfyUI's, say nothing"
        where, remedy = f"{header.path.name}, layer {marked[0]}", "state the loader's `dialect`"
        raise CheckpointError(found, where=where, expected="one declaration", remedy=remedy)
    if marked:
        return "comfy", "`comfy_quant` markers", None
    check_quantization_config(header)
    if modelopt == SIDECAR and HEADER_ENTRY in header.metadata:
        modelopt = None  # ModelOpt writes that entry and its own into one header, or neither
    if modelopt:
        algorithm = quantization(header).get("quant_algo")
        if algorithm not in _MODELOPT_ALGORITHMS:
            found = f"ModelOpt's quant_algo is {quote(algorithm)}, its tensors are NVFP4"
            expected = ", ".join(name for name in _MODELOPT_ALGORITHMS if name)
            remedy = "state `dialect` if that entry is left over from another file"
            raise CheckpointError(found, where=header.path.name, expected=expected, remedy=remedy)
        layout = _modelopt_layout(header, packed, layouts, modelopt, read)
        if layout[0] == "modelopt_swizzled" and modelopt == SIDECAR and _lightricks(header):
            found = f"its scales are tiled, as Lightricks' own header has them, and {SIDECAR} says ModelOpt"
            remedy = "set `dialect` (comfy if that file came with another model, modelopt_swizzled if with this)"
            raise CheckpointError(found, where=header.path.name, expected="one declaration", remedy=remedy)
        return layout
    if listed:
        return "comfy", f"header entry {HEADER_ENTRY}", None
    if ROW_MAJOR not in layouts and _lightricks(header):
        proof = f", tiled scales in {layouts[TILED]}" if TILED in layouts else ""
        return "comfy", f"no mark; Lightricks' own header, whose NVFP4 files have this layout{proof}", None
    if ROW_MAJOR in layouts:
        likely = "its scales are row-major, as ModelOpt's are by default: dialect modelopt is the likely one"
    else:
        likely = "comfy if ComfyUI or Lightricks' tools wrote it, modelopt or modelopt_swizzled if ModelOpt did"
    raise CheckpointError(
        "it holds NVFP4 weights, but neither markers nor the header say in which layout",
        where=header.path.name,
        expected="a declared dialect: nibble order does not show in shapes, and a wrong one gives noise, no error",
        remedy=f"set `dialect` ({likely})",
    )


def _check_all(header: Header, packed: Mapping[str, Group], listed: Collection[str]) -> None:
    """Markers and the header entry speak of single layers: CheckpointError if of some NVFP4 layers only."""
    silent = [layer for layer, members in packed.items() if MARKER not in members and layer not in listed]
    if silent and len(silent) < len(packed):
        raise CheckpointError(
            f"{len(silent):,} of its {len(packed):,} NVFP4 layers are declared neither by markers nor by the header, "
            f"{silent[0]} for one",
            where=header.path.name,
            expected="a declaration of each: another tool may have written these, in another layout",
            remedy="set `dialect` (comfy if tools for ComfyUI wrote them all)",
        )


def _modelopt_layout(
    header: Header, packed: Mapping[str, Group], layouts: Mapping[str, str], evidence: str, read: Read | None
) -> tuple[str, str, Order | None]:
    """Tiled or row-major: by padding, else by what the scales show. Tiling and layer metadata are separate options."""
    if ROW_MAJOR in layouts:
        return "modelopt", f"{evidence}, row-major scales in {layouts[ROW_MAJOR]}", None
    if TILED in layouts:
        return "modelopt_swizzled", f"{evidence}, tiled scales in {layouts[TILED]}", None
    order = measure(header, packed, read) if read is not None else None
    if order is not None and order.decided:
        return "modelopt" if order.found == ROW_MAJOR else "modelopt_swizzled", f"{evidence}; {order}", order
    raise CheckpointError(
        f"ModelOpt wrote it, with or without its option that tiles the block scales ({order or 'not measured'})",
        where=header.path.name,
        expected="a stated layout: no layer of this file has a shape that tells",
        remedy="set `dialect` to modelopt_swizzled if the export tiled its scales, else modelopt",
    )


def _measured(
    header: Header, packed: Mapping[str, Group], dialect: str, read: Read | None
) -> tuple[str, Order | None]:
    """The user's word and what the block scales say to it. CheckpointError where they clearly say otherwise."""
    if proven_layouts(packed) or read is None:
        return STATED, None
    order = measure(header, packed, read)
    wanted = TILED if DIALECTS[dialect].tiled_scales else ROW_MAJOR
    if order.decided and order.found != wanted:
        raise CheckpointError(
            f"its block scales are {order.found}, not {wanted} as {dialect} has them ({order})",
            where=header.path.name,
            expected="the dialect that the file has",
            remedy="choose another dialect, or auto",
        )
    return f"{STATED}; {order}", order
