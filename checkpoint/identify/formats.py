# SPDX-License-Identifier: Apache-2.0
"""The ways to store a weight: what each is called, how its tensors show it, and which tools take it.

``FORMATS`` is the table, ``kind_of`` tells from the tensors of a layer which of its rows they are. How a layer is read
is in layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..file.header import TensorInfo

Group = Mapping[str, TensorInfo]  # key suffix of one layer -> header entry

FLOATS = ("F64", "F32", "F16", "BF16")
FP8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FP8_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
FP8_BLOCK = 128
OLD_FP8 = "scaled_fp8"  # the key by which ComfyUI's older FP8 files declare their layers
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")
SMOOTHING = "pre_quant_scale"
WEIGHTS = ("weight", "weight_packed", "qweight")
_NVFP4_SCALES = {"weight_scale", "weight_scale_2", "weight_global_scale", "alpha"}


@dataclass(frozen=True)
class Format:
    """One way to store a weight. ``host``: ComfyUI's `format` for it, "" if by dtype, None if it has none.

    ``keys``: suffixes that must be there beside the weight; ``optional``: those that may. ``loads``, ``quantises``:
    whether the loader, the quantiser can take it; ``repairs``: whether ``repair`` can declare it for ComfyUI.
    """

    title: str
    weight: tuple[str, ...]
    host: str | None
    keys: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    loads: bool = True
    quantises: bool = False
    repairs: bool = True


_FP8, _SCALE, _INPUTS = tuple(FP8_FORMATS), ("weight_scale",), ("input_scale", "scale_input")
FORMATS = {
    "float": Format("floating point", FLOATS, None, quantises=True),
    "nvfp4": Format("NVFP4", ("U8",), "nvfp4"),
    "fp8": Format("scaled FP8", _FP8, "", optional=_INPUTS, quantises=True),
    "fp8_rows": Format("FP8 scaled by rows", _FP8, "", optional=_INPUTS, quantises=True),
    "fp8_blocks": Format("FP8 scaled in blocks", _FP8, None, (), _INPUTS, quantises=True, repairs=False),
    "fp8_cast": Format("FP8", _FP8, None, quantises=True),
    "int8": Format("scaled INT8", ("I8",), "int8_tensorwise", _SCALE, ("input_scale",)),
    "mxfp8": Format("MXFP8", ("F8_E4M3",), "mxfp8", _SCALE, ("input_scale",)),
    "convrot_w4a4": Format("ConvRot INT4", ("I8",), "convrot_w4a4", _SCALE),
    "asym_w4a8_int8": Format(
        "asymmetric INT4", ("I8",), "asym_w4a8_int8", ("weight_s_rel", "weight_s_channel"), ("weight_codebook",)
    ),
    "awq_w4a16": Format("AWQ INT4", ("I8",), "awq_w4a16", ("weight_scale", "weight_zeros")),
    "bitsandbytes": Format("bitsandbytes 4-bit", ("U8",), None, loads=False, repairs=False),
    "bitsandbytes_nf4": Format("bitsandbytes NF4, 4-bit", ("U8",), None, loads=False, repairs=False),
    "bitsandbytes_fp4": Format("bitsandbytes FP4, 4-bit", ("U8",), None, loads=False, repairs=False),
    "bitsandbytes_int8": Format("bitsandbytes INT8", ("I8",), None, loads=False, repairs=False),
    "nvfp4_f4": Format("NVFP4 of the dtype F4", ("F4",), None, loads=False, repairs=False),
    "fp4": Format("FP4 without scales", ("F4",), None, loads=False, repairs=False),
    "mxfp4": Format("MXFP4", ("U8", "F4"), None, loads=False, repairs=False),
    "bytes": Format("bytes without scales (GGUF?)", ("U8",), None, loads=False, repairs=False),
    "int": Format("integers", (), None, loads=False, repairs=False),
    "other": Format("of a dtype no tool here reads", (), None, loads=False, repairs=False),
}


def kind_of(members: Group) -> str:
    """Key of FORMATS, from the tensors alone: what a weight is where nothing is declared."""
    name = weight_suffix(members)
    info = members[name]
    if any(".quant_state" in suffix or suffix.endswith("weight.absmax") for suffix in members):
        state = next((suffix for suffix in members if "bitsandbytes__" in suffix), "")
        kind = "bitsandbytes_" + state.rpartition("__")[2]
        return kind if kind in FORMATS else "bitsandbytes"
    if info.dtype in FLOATS:
        return "float"
    if info.dtype in FP8_FORMATS:
        return _kind_of_fp8(members, info)
    if info.dtype == "F4":
        return _kind_of_fp4(members)
    if info.dtype == "U8" and len(info.shape) > 1:
        scales = members.keys() & _NVFP4_SCALES
        if scales == {"weight_scale"} and members["weight_scale"].dtype in ("U8", "F8_E8M0"):
            return "mxfp4"  # powers of two, and no second scale
        return "nvfp4" if scales else "bytes"
    if info.dtype == "I8" and "SCB" in members:
        return "bitsandbytes_int8"
    if info.dtype == "I8":
        return "int8" if "weight_scale" in members else "int"
    return "int" if info.dtype[:1] in "IUB" else "other"


def title_of(members: Group) -> str:
    """A weight's format in words, from the tensors alone: plain floats, and what no tool reads, by their dtype."""
    kind = kind_of(members)
    return members[weight_suffix(members)].dtype if kind in ("float", "other") else FORMATS[kind].title


def _kind_of_fp4(members: Group) -> str:
    """Of a weight whose dtype is F4: MXFP4 has powers of two for scales, NVFP4 E4M3 numbers."""
    scale = members.get("weight_scale")
    if scale is None:
        return "fp4"
    return "nvfp4_f4" if scale.dtype == "F8_E4M3" else "mxfp4"


def _kind_of_fp8(members: Group, info: TensorInfo) -> str:
    scale = members.get(scale_suffix(members) or "")
    if scale is None:
        return "fp8_cast"
    if scale.dtype in ("U8", "F8_E8M0"):
        return "mxfp8"
    if scale.numel == 1:
        return "fp8"
    rows = info.shape[0] if info.shape else 1
    if scale.shape in ((rows,), (rows, *[1] * (len(info.shape) - 1))):
        return "fp8_rows"
    return "fp8_blocks"


def weight_suffix(members: Group) -> str | None:
    """The key suffix of the layer's numbers."""
    return next((suffix for suffix in reversed(WEIGHTS) if suffix in members), None)


def scale_suffix(members: Group) -> str | None:
    """The key suffix of what multiplies FP8 or INT8 codes."""
    return next((suffix for suffix in FP8_SCALES if suffix in members), None)
