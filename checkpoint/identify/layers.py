# SPDX-License-Identifier: Apache-2.0
"""How each layer of a file is stored: the one function that reads it, and the one that accounts for the whole file.

``group_tensors`` {name: TensorInfo} -> {layer: {key suffix: TensorInfo}}; what is beside or below a weight is its.
``read_layer``    (layer, group, what is declared of it, its dialect) -> Layer; CheckpointError names file and layer.
``refuse``        layers that a tool cannot take for what they are.
``account``       the whole file: each tensor is of a layer, is a parameter of the model's, or is named as a stray.
``Layer``         the frozen record: kind, logical shape, the suffixes that were read, the marker the host needs.

``detect`` (dialects.py) calls all of them, and every tool calls ``detect``; values are checked in values.py. A weight
in codes never passes without its scale: what a tool cannot read it refuses by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...kernels.geometry import block_scale_shape, round_up
from ..file.header import MARKER, CheckpointError, Header, TensorInfo, quote
from .declarations import Declared
from .formats import (
    FLOATS,
    FORMATS,
    FP8_BLOCK,
    FP8_FORMATS,
    LOW_RANK,
    OLD_FP8,
    SMOOTHING,
    WEIGHTS,
    Format,
    Group,
    kind_of,
    scale_suffix,
    weight_suffix,
)

_INPUT_SCALES = ("input_scale", "scale_input", "input_global_scale", "input_absmax")
# Scales of an attention's cache, which vLLM keeps beside the projections: they say nothing of the weight.
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale")
_HARMLESS = ("bias", *_CACHE_SCALES)
# What quantisers call the tensors without which a weight means something else.
_SUSPICIOUS = re.compile(
    r"scale|absmax|amax$|zeros?$|zero_point|quant|svd|lora_|packed|codebook|quant_map|g_idx|qweight|_blocks$", re.I
)
_BYTES = ("U8", "I8", "U16", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
_TEXTS = ("spiece_model", "tekken_model", "tokenizer")  # files within files
_IS_TEXT = re.compile(r"(^|[._])(spiece_model|tekken_model|tokenizer\w*)$")  # slow with long names


_NOTHING = Declared()
_OF_INT8 = [kind for kind, form in FORMATS.items() if form.weight == ("I8",)]
_DECLARED = ("int8", "mxfp8")  # read only where a declaration says how: INT8 may be rotated, MXFP8 scales tiled
# Suffixes that make no sense without a weight beside them.
_ORPHANS = {
    *("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "scale_weight", "scale_input"),
    *("input_scale", "input_global_scale", "weight_zero_point", SMOOTHING, MARKER, *LOW_RANK, "qzeros", "g_idx"),
}
_BESIDE = ("_scales", "_blocks", ".absmax", "_absmax", "_quantizer._amax", "weight_scale", "qzeros", "_scale_inv")
_STRAY = "it looks like a part of a quantized layer: take another version of the file"
_AGAIN = "the file is damaged or its writer is not known: download or convert it again"
_BANK = ("weight_scale", "weight_scale_2", "input_scale")
_BY_HOST = {form.host: kind for kind, form in FORMATS.items() if form.host} | dict.fromkeys(FP8_FORMATS.values(), "fp8")
# Formats that convert_to_quant declares and ComfyUI does not know.
_FOREIGN = {"float8_e4m3fn_rowwise": "fp8_rows", "float8_e4m3fn_blockwise": "fp8_blocks"}


@dataclass(frozen=True)
class Layer:
    """How one weight is stored. ``shape``: of the matrix, for NVFP4 with its padding; ``weight``: suffix of its codes.

    ``scale``: suffix of what multiplies FP8 or INT8 codes; ``block``: (rows, columns) that share one of its numbers.
    ``marker``: what ComfyUI has to be told, None for what needs no marker. ``read``: suffixes that were understood and
    say how it is stored; ``ignored``: those that say nothing of the weight. ``fault``: of its marker, "" if none;
    ``foreign``: the format that is declared, where ComfyUI does not know it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: str
    scale: str | None
    block: tuple[int, int] | None
    marker: Mapping[str, object] | None
    read: tuple[str, ...]
    ignored: tuple[str, ...]
    fault: str
    foreign: str = ""

    @property
    def title(self) -> str:
        """The format in words."""
        return FORMATS[self.kind].title

    @property
    def coded(self) -> bool:
        """Whether its numbers are other than its tensor's own."""
        return self.kind not in ("float", "fp8_cast")

    def scaled_by_rows(self, header: Header) -> bool:
        """Whether each row has a scale, which ComfyUI wants in a column: it would multiply columns by a vector."""
        return self.kind in ("fp8_rows", "int8") and header.tensors[f"{self.name}.{self.scale}"].numel > 1

    @property
    def loses_scale(self) -> bool:
        """Whether it is FP8 with a scale that ComfyUI drops: it decodes matrices, and banks of them."""
        return self.kind.startswith("fp8") and self.scale is not None and len(self.shape) not in (2, 3)

    @property
    def undeclared(self) -> bool:
        """Whether it is of a kind that only a declaration explains, and has none."""
        return self.marker is None and FORMATS[self.kind].host is not None

    @property
    def low_rank(self) -> bool:
        """Whether a low-rank product is to be added to it."""
        return LOW_RANK[0] in self.read


def group_tensors(tensors: Mapping[str, TensorInfo], prefix: str = "") -> dict[str, dict[str, TensorInfo]]:
    """Tensors whose names start with ``prefix``, by the layer they describe: {layer: {key suffix: TensorInfo}}.

    A layer is a name with a weight. What quantisers keep below it counts as its own: `proj.weight.absmax`,
    `proj.weight_quantizer._scale`, `proj.lora_A.weight` are of `proj`.
    """
    names = [name for name in tensors if name.startswith(prefix)]
    owners = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in WEIGHTS}
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        if layer not in owners or _SUSPICIOUS.search(layer.rpartition(".")[2]):
            above = layer.rpartition(".")[0]
            while above and above not in owners:
                above = above.rpartition(".")[0]
            if above and _SUSPICIOUS.search(name[len(above) + 1 :]):
                layer = above
        if layer in owners or last in _ORPHANS:
            groups.setdefault(layer, {})[name[len(layer) + 1 :] if layer else name] = tensors[name]
    return groups


def read_layer(
    where: str,
    name: str,
    members: Group,
    declared: Declared = _NOTHING,
    packed: tuple[tuple[int, int], tuple[str, ...]] | None = None,
    *,
    stated: bool = False,
    weight_only: bool = False,
    block_size: tuple[int, int] | None = None,
) -> Layer:
    """File, layer, its tensors, what is declared of them -> Layer, or CheckpointError naming both.

    ``packed``: shape and suffixes of an NVFP4 layer, as its dialect reads them. ``stated``: the user vouches for the
    layout, so a marker that contradicts NVFP4 tensors is a fault and no error. ``weight_only``: the file asks for
    full-precision multiplications. ``block_size``: that of block-scaled FP8, where the file declares it.
    """

    def error(found: str, expected: str = "", remedy: str = _AGAIN) -> CheckpointError:
        return CheckpointError(
            found, where=f"{where}, layer {name}" if name else where, expected=expected, remedy=remedy
        )

    weight = weight_suffix(members)
    if weight is None:
        raise error(f"it has {_list(members)}, but no `weight`", "the weight that they describe")
    others = [suffix for suffix in WEIGHTS if suffix in members]
    if len(others) > 1:
        raise error(f"it has {_list(others)}, which are two weights", "one")
    bias = members.get("bias")
    if bias is not None and bias.dtype not in (*FLOATS, *FP8_FORMATS):
        raise error(f"its `bias` is {bias.dtype}", "floating point")
    info = members[weight]
    kind, said, fault = _settle(members, info, declared, stated, error)
    form, shape = FORMATS[kind], info.shape
    scale = block = None
    read = {weight, MARKER, *form.keys, *form.optional}
    if kind == "nvfp4":
        if packed is None and (said is None or len(shape) != 3):
            raise error(f"its packed weight has shape {shape}", "a matrix, or a declared bank of them")
        if packed is None:  # a bank of experts, whose smoothing or low-rank part nobody would apply
            _check_bank(shape, members, error)
            read |= {*_BANK}
        else:
            shape, suffixes = packed
            read |= {*suffixes, SMOOTHING, *LOW_RANK}
    elif form.weight and set(form.weight) <= {*FP8_FORMATS, "I8"}:
        scale = scale_suffix(members)
        read |= {scale} if scale else set()
        side = (declared.content or {}).get("group_size") if said in _FOREIGN else None
        block_size = (side, side) if type(side) is int and side > 0 else block_size
        block = _check_scale(kind, shape, scale, members, block_size, error)
    if weight != "weight" and form.loads and kind != "nvfp4":
        raise error(f"its {form.title} weight is called `{weight}`", "`weight`")
    _check_shapes(members, read, shape, error)
    missing = [key for key in form.keys if key not in members]
    if missing:
        raise error(f"it is declared {said} and lacks {_list(missing)}", _list(form.keys))
    unread = _unread(members, read, form)
    if unread:
        found = f"{_list(unread)} beside its weight ({form.title}) {'is' if len(unread) == 1 else 'are'} not understood"
        remedy = "it may change what the weight means: take another version of the file"
        raise error(found, f"{_list(read & members.keys())} alone", remedy)
    marker = None
    if form.host is not None and (said is not None or kind not in _DECLARED):
        more = {} if said is None or said in _FOREIGN else declared.content
        marker = {"format": form.host or FP8_FORMATS[info.dtype]} | dict(more)
        # A scale a row: tensor cores take one scale, or rows on both sides.
        if kind == "fp8_rows" or (weight_only and kind == "fp8"):
            marker["full_precision_matrix_mult"] = True
    present = tuple(suffix for suffix in members if suffix in read)
    ignored = tuple(suffix for suffix in members if suffix in _CACHE_SCALES)
    foreign = said if said in _FOREIGN else ""
    return Layer(name, kind, tuple(shape), weight, scale, block, marker, present, ignored, fault, foreign)


def _settle(members: Group, info: TensorInfo, declared: Declared, stated: bool, error) -> tuple[str, str | None, str]:
    """Tensors and declaration together -> kind, the format that is declared if it holds, what is wrong with it."""
    kind, fault = kind_of(members), declared.fault
    said = None if declared.content is None else str(declared.content["format"])
    vouched = stated and kind == "nvfp4"
    if said in _FOREIGN and info.dtype == "F8_E4M3" and kind == _FOREIGN[said]:
        return kind, said, fault
    if said is not None and said not in _BY_HOST:
        if not vouched:
            near = next((known for known in _BY_HOST if known.lower() == said.lower()), ", ".join(_BY_HOST))
            if said in _FOREIGN:
                found = f"{_of(members)} says {said}, its tensors are {FORMATS[kind].title}"
                raise error(found, FORMATS[_FOREIGN[said]].title)
            raise error(f"{_of(members)} names the format {quote(said)}, which nothing knows", near)
        return kind, None, f"names the format {quote(said)}, which nothing knows"
    if said is None:
        if kind == "float" and fault and not declared.blank and not stated:
            raise error(f"its `{MARKER}` marker {fault}", "none, or a format")
        return kind, None, fault if kind != "float" else ""
    meant = _BY_HOST[said]
    if info.dtype == "I8" and meant in _OF_INT8:
        return meant, said, fault
    if kind == meant == "fp8" or (kind, meant) == ("fp8_rows", "fp8"):
        agree = FP8_FORMATS[info.dtype] == said
    else:
        agree = kind == meant
    if agree:
        return kind, said, fault
    if vouched:
        return kind, None, f"says {said}, its tensors are NVFP4"
    found = f"{_of(members)} says {said}, its tensors are {FORMATS[kind].title} ({info.dtype} with {_list(members)})"
    raise error(found, "a declaration that fits them")


def _of(members: Group) -> str:
    return f"its `{MARKER}` marker" if MARKER in members else "its entry in the header"


def _check_scale(kind: str, shape, scale: str | None, members: Group, declared, error) -> tuple[int, int] | None:
    """The scale of FP8 or INT8 codes has a shape that says which of them each number multiplies -> its blocks."""
    found = members.get(scale or "")
    if found is None:
        return None
    text = f"its `{scale}` has shape {found.shape} for a weight of shape {shape}"
    if kind == "mxfp8":
        if found.shape[-2:] != _mxfp8_scales(shape):
            raise error(text, f"{_mxfp8_scales(shape)}, tiled, for a weight padded to multiples of 32")
        return None
    if found.dtype not in FLOATS:
        raise error(f"its `{scale}` is {found.dtype}", "floating point")
    if kind == "int8" and found.numel != 1 and found.shape not in (shape[:1], (*shape[:1], 1)):
        raise error(text, "one number, or one a row")
    if kind != "fp8_blocks":
        return None
    block = _block_size(shape, found.shape, declared)
    if block is None:
        raise error(text, f"one number, one a row, or one for each {FP8_BLOCK} x {FP8_BLOCK}")
    return block


def _check_bank(shape: tuple[int, ...], members: Group, error) -> None:
    """Scales of an NVFP4 bank (E, N, K/2): tiled ones of each expert, and one global scale or one an expert."""
    experts, rows, width = shape
    missing = [suffix for suffix in ("weight_scale", "weight_scale_2") if suffix not in members]
    if missing:
        raise error(f"it is a bank of {experts} experts without `{missing[0]}`", "both scales")
    blocks, factors = members["weight_scale"].shape, members["weight_scale_2"]
    wanted = (experts, *block_scale_shape((rows, 2 * width)))
    if blocks != wanted:
        raise error(f"its `weight_scale` has shape {blocks} for {experts} experts", f"{wanted}, tiled")
    if factors.numel not in (1, experts):
        raise error(f"its `weight_scale_2` has shape {factors.shape}", f"one number, or {experts}")


def _check_shapes(members: Group, read: set[str], shape: tuple[int, ...], error) -> None:
    """What goes with a layer's input, and the low-rank pair: ``svdquant_lora_a`` (r, K), ``svdquant_lora_b`` (N, r)."""
    for suffix in (*_INPUT_SCALES, SMOOTHING):
        wanted = shape[-1] if suffix == SMOOTHING and shape else 1
        found = members[suffix].shape if suffix in members and suffix in read and len(shape) == 2 else None
        if found is not None and (math.prod(found) != wanted or suffix == SMOOTHING and found[-1:] != (wanted,)):
            count = f"{wanted} numbers" if wanted > 1 else "one number"
            raise error(f"its `{suffix}` has shape {members[suffix].shape}", count)
        if suffix in members and suffix in read and members[suffix].dtype not in FLOATS:
            raise error(f"its `{suffix}` is {members[suffix].dtype}", "floating point")
    down, up = (members.get(suffix) for suffix in LOW_RANK)
    if down is None and up is None or LOW_RANK[0] not in read:
        return
    if down is None or up is None:
        raise error(f"of {_list(LOW_RANK)} it has one", "both")
    fits = len(shape) == len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1]
    if not fits or down.shape[1] != shape[-1] or round_up(up.shape[0], 16) != round_up(shape[0], 16):
        found = f"its low-rank tensors have shapes {down.shape} and {up.shape}"
        raise error(found, f"(r, K) and (N, r) for a weight of shape {shape}")
    if down.dtype not in FLOATS or up.dtype not in FLOATS:
        raise error(f"its low-rank tensors are {down.dtype} and {up.dtype}", "floating point")


def refuse(where: str, layers: Mapping[str, Layer], repair: bool = False, strays: Sequence[str] = ()) -> None:
    """CheckpointError for the first layer that the loader, or ``repair``, cannot take for what it is, or stray."""
    for stray in strays:
        raise CheckpointError(stray, where=where, expected="tensors of a known format", remedy=_STRAY)
    for name, layer in layers.items():
        form = FORMATS[layer.kind]
        found = f"its weight is {form.title}"
        remedy = "take a BF16, FP8 or NVFP4 version of the model"
        if layer.undeclared:
            found += ", and nothing declares how its numbers are to be read"
            remedy = "convert the original again with a tool that writes `comfy_quant` markers"
        elif repair and layer.low_rank:
            found += " with a low-rank part, which ComfyUI's own loaders would leave out"
            remedy = "load it with NVFP4 Model Loader as it is"
        elif repair and not form.repairs and form.loads:
            remedy = "load it with NVFP4 Model Loader as it is, or quantize it"
        elif form.loads:
            continue
        raise CheckpointError(found, where=f"{where}, layer {name}", expected="a format of ComfyUI's", remedy=remedy)


def account(header: Header, groups: Mapping[str, Group], prefix: str = "") -> dict[str, str]:
    """Tensors outside of all layers that no model's own parameters look like -> what is wrong with each.

    Inside of layers ``read_layer`` answers for each tensor; floating-point tensors elsewhere are parameters.
    """
    inside = {f"{layer}.{suffix}" if layer else suffix for layer, members in groups.items() for suffix in members}
    strays = {}
    for name, info in header.tensors.items():
        last = name.rpartition(".")[2]
        if not name.startswith(prefix) or name in inside or last == OLD_FP8:
            continue
        if any(text in last for text in _TEXTS) and _IS_TEXT.search(name):
            continue
        partner = next((end for end in _BESIDE if last.endswith(end)), None)
        if info.dtype in _BYTES or partner is not None:
            found = f"tensor {quote(name)} ({info.dtype} of shape {info.shape}) belongs to no weight"
            scales = f"{name.removesuffix('blocks')}scales"
            if name.endswith("_blocks") and info.dtype == "U8" and scales in header.tensors:
                found = f"tensor {quote(name)} is MXFP4 in blocks, with its scales beside it, as gpt-oss has them"
            strays[name] = found
    return strays


def _unread(members: Group, read: set[str], form: Format) -> list[str]:
    """Suffixes that were not read and may change what the weight means; what nobody loads is named by its kind."""
    if not form.loads:
        return []
    left = [suffix for suffix in members if suffix not in read and suffix not in _HARMLESS]
    if form not in (FORMATS["float"], FORMATS["fp8_cast"]):
        return left
    return [suffix for suffix in left if _SUSPICIOUS.search(suffix) or members[suffix].dtype in _BYTES]


def _block_size(
    shape: tuple[int, ...], scale: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, int] | None:
    """(N, K), shape of the scales -> rows and columns that share one, None if it cannot be told."""
    if len(shape) != 2 or len(scale) != 2:
        return None
    for rows, cols in (*([declared] if declared else []), (FP8_BLOCK, FP8_BLOCK)):
        if scale == (-(-shape[0] // rows), -(-shape[1] // cols)):
            return rows, cols
    if scale[0] == shape[0] and scale[1] and shape[1] % scale[1] == 0:  # groups along a row
        return 1, shape[1] // scale[1]
    return None


def _mxfp8_scales(shape: tuple[int, ...]) -> tuple[int, int]:
    return round_up(shape[-2], 128), round_up(shape[-1] // 32, 4)


def _list(names) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
