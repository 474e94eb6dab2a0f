# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for the compute capabilities named on the command line; needs no GPU, prints a JSON map.

A process of its own: under TRITON_INTERPRET=1, as the tests run, Triton compiles nothing.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

package = types.ModuleType("nvfp4_video")
package.__path__ = [str(Path(__file__).resolve().parents[2])]
sys.modules["nvfp4_video"] = package

from nvfp4_video.kernels.triton import (  # noqa: E402
    attend,
    depth_to_space,
    dequantize,
    dequantize_sum,
    gate_heads,
    gemv,
    gptq,
    moments,
    norm_rope,
    norm_rows,
    norm_silu,
    one_token,
    quantize,
    quantize_rows,
    scale_sums,
    to_fp8,
    to_fp8_sum,
    to_pixels,
    unpack_factors,
)
from triton import compile as triton_compile  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

POINTERS = {"packed_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "column_ptr": "*i32"}
# The dtype of the weight matters to a load only, hence each with one of the searches, whose code is long.
SEARCHES = {"amax *bf16": (False, False), "search *fp16": (True, False), "weighted *fp32": (True, True)}
Variant = tuple[str, object, dict[str, str], dict[str, object]]  # name, kernel, types of its tensors, constants


def compiled_bytes(kernel, capability: int, pointers: dict[str, str], constants: dict[str, object]) -> int:
    """Size of the machine code of one kernel for one capability."""
    names = kernel.arg_names
    types_of = {name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types_of, constexprs=values)
    return len(triton_compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def ptx(variant: Variant, capability: int, whole: Iterable[str], **options: int) -> str:
    """A variant as it is launched: its tensors, and its numbers ``whole``, are multiples of 16."""
    _, kernel, pointers, constants = variant
    names = kernel.arg_names
    types_of = {name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    even = [name for name in names if name.endswith("_ptr")] + list(whole)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=types_of, constexprs=values, attrs=attributes)
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def exchanges(capability: int) -> int:
    """How often the product of one row hands something from thread to thread before its sums."""
    *variant, constants = next(gemv_variants(capability))
    variant = (*variant, constants | {"TOKENS": 8, "BIAS": False})
    text = ptx(variant, capability, ("rows", "cols", "words_per_row", "scale_cols"), num_warps=1, num_stages=1)
    before = text[: text.rindex("mma.sync")]
    return before.count("shfl.sync") + before.count("st.shared")


def byte_loads(capability: int) -> int:
    """How often a thread loads a single byte where factors are unpacked from 8 bits."""
    text = ptx(next(factor_variants(capability)), capability, ())
    return len(re.findall(r"ld\.global\S*\.[bus]8\b", text))


def dequantize_variants(capability: int) -> Iterator[Variant]:
    for out in ("*bf16" if capability >= 80 else "*i16", "*fp16", "*fp32"):
        for full in (False, True):
            constants = {"ROWS": 2, "WORDS": 128, "STEPS": 2, "FULL": full, "STORE": ".cs"}
            yield f"{out} {full}", dequantize._dequantize_kernel, POINTERS | {"out_ptr": out}, constants


def quantize_variants(capability: int) -> Iterator[Variant]:
    for name, (search, weighted) in SEARCHES.items():
        constants = {"BLOCKS": 64, "SEARCH": search, "WEIGHTED": weighted}
        yield name, quantize._quantize_kernel, POINTERS | {"weight_ptr": name.split()[1]}, constants


def sum_variants(capability: int) -> Iterator[Variant]:
    """A decoded weight plus a low-rank change."""
    for dtype in ("*bf16", "*fp16") if capability >= 80 else ("*fp16",):
        pointers = POINTERS | dict.fromkeys(("up_ptr", "down_ptr", "out_ptr"), dtype)
        for full in (False, True):
            constants = {"ROWS": 64, "WORDS": 16, "RANK": 64, "FULL": full, "PRODUCTS": True, "STORE": ""}
            yield f"{dtype} {full}", dequantize_sum._dequantize_sum_kernel, pointers, constants


def gemv_variants(capability: int) -> Iterator[Variant]:
    """The kernel for few rows, from the first tensor cores on that take BF16: masks or none, K in one slice or four.

    And for several weights.
    """
    if capability < 80:
        return
    tile = {"UNDO": 256.0, "TOKENS": 16, "ROWS": 16, "PACKED": True, "BIAS": True, "WEIGHTS": 1, "GATED": False}
    tile |= {"OVERLAP": False}
    sums = {"sum_ptr": "*fp32", "counter_ptr": "*i32"}
    for number in (1, 2):
        sums |= {f"{name}{number}_ptr": POINTERS[f"{name}_ptr"] for name in ("packed", "scale", "global")}
    for dtype in ("*bf16", "*fp16"):
        pointers = POINTERS | sums | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), dtype)
        for full, split in ((True, 4), (True, 1), (False, 1)):
            yield f"{dtype} {full} {split}", gemv._gemv_kernel, pointers, tile | {"FULL": full, "SPLIT": split}
        for weights, gated in ((3, False), (2, True)):
            group = tile | {"WEIGHTS": weights, "GATED": gated, "BIAS": False, "FULL": True, "SPLIT": 2}
            group |= {"OVERLAP": capability >= 90}
            yield f"{dtype} {weights}", gemv._gemv_kernel, pointers, group


def one_token_variants(capability: int) -> Iterator[Variant]:
    """What Gemma's block does between its products for one token."""
    if capability < 80:
        return
    for add, norm in ((False, True), (True, True), (True, False)):
        pointers = dict.fromkeys(("x", "y", "y_weight", "weight", "x_out", "out"), "*bf16")
        pointers = {f"{name}_ptr": kind for name, kind in pointers.items()} | {"eps": "fp32"}
        constants = {"COLS": 4096, "ADD": add, "NORM": norm, "FULL": False, "BITS": False, "OVERLAP": capability >= 90}
        yield f"add_norm {add} {norm}", one_token._add_norm_kernel, pointers, constants
    kernel = one_token._place_token_kernel
    pointers = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), "*bf16")
    pointers |= {"rotation_ptr": "*fp32", "position_ptr": "*i64", "eps": "fp32"}
    constants = {"HALF": 128, "PAIRS": 128, "FULL": True, "BITS": False, "OVERLAP": capability >= 90}
    yield "place_token", kernel, pointers, constants


def attend_variants(capability: int) -> Iterator[Variant]:
    kernel = attend._attend_kernel
    pointers = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), "*bf16")
    pointers |= {"share_ptr": "*fp32", "end_ptr": "*fp32", "counter_ptr": "*i32", "position_ptr": "*i64"}
    pointers |= {"scale": "fp32"}
    constants = {"WIDTH": 256, "COLS": 256, "SLOTS": 16, "WARPS": 4, "HALVINGS": 2}
    constants |= {"PARTS": 32, "FEW": 32, "BITS": False, "OVERLAP": capability >= 90}
    for two, steps in ((True, 1), (False, 2)) if capability >= 80 else ():
        yield f"two {two} steps {steps}", kernel, pointers, constants | {"TWO": two, "STEPS": steps}


def to_fp8_variants(capability: int) -> Iterator[Variant]:
    for out, full in itertools.product(("*fp8e4nv", "*i8") if capability >= 89 else ("*i8",), (False, True)):
        pointers = POINTERS | {"out_ptr": out, "row_scale_ptr": "*fp32"}
        constants = {"ROWS": 2, "BLOCKS": 128, "SCALES": 256, "FULL": full, "INT8": out == "*i8"}
        yield f"{out} {full}", to_fp8._to_fp8_kernel, pointers, constants


def fp8_sum_variants(capability: int) -> Iterator[Variant]:
    """A weight with a low-rank change in FP8, and its row scales."""
    factors = dict.fromkeys(("up_ptr", "down_ptr"), "*bf16")
    pointers = POINTERS | factors | {"out_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "peak_ptr": "*fp32"}
    for full, rows in ((True, 128), (False, 64)) if capability >= 89 else ():
        constants = {"ROWS": rows, "WORDS": 16, "RANK": 64, "FULL": full, "PRODUCTS": True, "STORE": ""}
        yield str(full), to_fp8_sum._to_fp8_sum_kernel, pointers, constants
    if capability >= 89:
        constants = {"ROWS": 8, "GROUPS": 64, "RANK": 512, "ALIGNED": True}
        yield "scales", to_fp8_sum._row_scale_kernel, pointers, constants


def factor_variants(capability: int) -> Iterator[Variant]:
    """Low-rank factors from 8 bits or with their strengths."""
    dtype = "*bf16" if capability >= 80 else "*fp16"
    for source, blocks in (("*i8", 1), (dtype, 0)):
        pointers = {}
        for name in ("down", "up"):
            pointers |= {f"{name}_ptr": source, f"{name}_scale_ptr": "*fp32", f"{name}_out_ptr": dtype}
        constants = {"DOWN_COLS": 128 if blocks else 1024, "UP_COLS": 128, "ELEMENTS": 2048}
        constants |= {"BLOCKS": blocks, "ALIGNED": bool(blocks)}
        yield source, unpack_factors._unpack_factors_kernel, pointers, constants


def rows_variants(capability: int) -> Iterator[Variant]:
    outs = ("*fp8e4nv", "*i8") if capability >= 89 else ("*i8",)
    for out, activation in itertools.product(outs, ("gelu_tanh", "")):
        pointers = {"x_ptr": "*bf16" if capability >= 80 else "*fp32", "out_ptr": out, "scale_ptr": "*fp32"}
        constants = {"COLS": 4096, "SINGLE": bool(activation), "ACTIVATION": activation, "INT8": out == "*i8"}
        yield f"{out} {activation}", quantize_rows._quantize_rows_kernel, pointers, constants


def scale_sums_variants(capability: int) -> Iterator[Variant]:
    names = ("scale_ptr", "weight_scale_ptr")
    for dtype in ("*bf16" if capability >= 80 else "*fp16", "*fp32"):
        pointers = {"sums_ptr": "*i32", "bias_ptr": dtype, "out_ptr": dtype} | dict.fromkeys(names, "*fp32")
        constants = {"ROWS": 4, "COLS": 1024, "BIAS": dtype != "*fp32"}
        yield dtype, scale_sums._scale_sums_kernel, pointers, constants


def norm_rows_variants(capability: int) -> Iterator[Variant]:
    """All there is in one pass to two tensors of FP8 rows; plain, to one in BF16."""
    names = [name for name in norm_rows._norm_rows_kernel.arg_names if name.endswith("_ptr")]
    pointers = dict.fromkeys(names, "*bf16") | {"eps": "fp32"}
    rows = dict.fromkeys(("out_ptr", "out2_ptr"), "*fp8e4nv") | dict.fromkeys(("scale_ptr", "scale2_ptr"), "*fp32")
    for full in (True, False)[capability < 89 :] if capability >= 80 else ():  # with INT8 from 8.0 on, without rows
        flags = ("ADD", "GATED", "MODULATED", "QUANTIZE", "KEEP", "MODULATED2", "QUANTIZE2", "KEEP2")
        constants = dict.fromkeys(flags, full) | {"NORM": True, "OUTPUTS": 1 + full, "FULL": full, "BITS": False}
        constants |= {"COLS": 4096, "ROWS": 4}
        yield str(full), norm_rows._norm_rows_kernel, pointers | rows if full else pointers, constants


def gate_heads_variants(capability: int) -> Iterator[Variant]:
    rows, out = capability >= 89, "*fp8e4nv" if capability >= 89 else "*bf16"
    pointers = {"x_ptr": "*bf16", "logits_ptr": "*bf16", "out_ptr": out, "scale_ptr": "*fp32"}
    if capability >= 80:
        constants = {"HEADS": 32, "WIDTH": 128, "QUANTIZE": rows, "FULL": True, "BITS": False}
        yield "", gate_heads._gate_heads_kernel, pointers, constants


def norm_rope_variants(capability: int) -> Iterator[Variant]:
    names = [name for name in norm_rope._norm_rope_kernel.arg_names if name.endswith("_ptr")]
    pointers = dict.fromkeys(names, "*bf16") | {"rotation_ptr": "*i64", "eps": "fp32"}
    for both in (True, False) if capability >= 80 else ():
        constants = {"HALF": 64, "PAIRS": 2048, "BOTH": both, "TURN": both, "FULL": both, "BITS": False}
        yield str(both), norm_rope._norm_rope_kernel, pointers, constants


def video_pointers(kernel, dtype: str) -> dict[str, str]:
    """Every tensor of a kernel of the video VAE in one dtype."""
    return {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | {"eps": "fp32"}


def norm_silu_variants(capability: int) -> Iterator[Variant]:
    """After the second convolution of a block; before an upsampling; with a timestep."""
    kernel = norm_silu._norm_silu_kernel
    tile = {"CHANNELS": 512, "ROWS": 2, "COLS": 512, "BIAS": True}
    for flags in ("RNK", "R", "MN") if capability >= 80 else ():
        names = {"NORM": "N", "RESIDUAL": "R", "KEEP": "K", "MODULATED": "M"}
        constants = tile | {name: letter in flags for name, letter in names.items()}
        yield flags, kernel, video_pointers(kernel, "*bf16"), constants


def depth_to_space_variants(capability: int) -> Iterator[Variant]:
    kernel = depth_to_space._depth_to_space_kernel
    constants = {"CHANNELS": 64, "P1": 2, "P2": 2, "P3": 2, "PARTS": 8, "ROWS": 8, "COLS": 64, "BIAS": True}
    if capability >= 80:
        yield "*bf16", kernel, video_pointers(kernel, "*bf16"), constants


def to_pixels_variants(capability: int) -> Iterator[Variant]:
    kernel = to_pixels._to_pixels_kernel
    constants = {"CHANNELS": 3, "PATCH": 4, "TILE": 1024, "BIAS": True, "FINISH": True}
    if capability >= 80:
        yield "*fp32", kernel, video_pointers(kernel, "*bf16") | {"out_ptr": "*fp32"}, constants


def gptq_variants(capability: int) -> Iterator[Variant]:
    kernel = gptq._group_kernel
    pointers = dict.fromkeys([name for name in kernel.arg_names if name.endswith("_ptr")], "*fp32")
    pointers |= {"packed_ptr": "*u8", "scale_ptr": "*u8", "order_ptr": "*i64"}
    for again in (False, True):
        yield str(again), kernel, pointers, {"AGAIN": again, "ROWS": 64}


def moments_variants(capability: int) -> Iterator[Variant]:
    """Blocks of columns, and whole matrices."""
    for dtype, tile in (("*bf16", 64), ("*fp16", 128)) if capability >= 80 else ():
        pointers = {"x_ptr": dtype, "gram_ptr": "*fp32", "held_ptr": "*fp32", "turn_ptr": "*i32"}
        yield dtype, moments._moments_kernel, pointers, {"TILE": tile, "TOKENS": 64}


KERNELS = {
    "dequantize": dequantize_variants,
    "quantize": quantize_variants,
    "dequantize_sum": sum_variants,
    "gemv": gemv_variants,
    "gptq": gptq_variants,
    "moments": moments_variants,
    "one_token": one_token_variants,
    "attend": attend_variants,
    "to_fp8": to_fp8_variants,
    "quantize_rows": rows_variants,
    "scale_sums": scale_sums_variants,
    "to_fp8_sum": fp8_sum_variants,
    "unpack_factors": factor_variants,
    "norm_rows": norm_rows_variants,
    "gate_heads": gate_heads_variants,
    "norm_rope": norm_rope_variants,
    "norm_silu": norm_silu_variants,
    "depth_to_space": depth_to_space_variants,
    "to_pixels": to_pixels_variants,
}


def main() -> None:
    """All variants for the first and the last capability; for those between them one of each kernel."""
    sizes, capabilities = {}, list(map(int, sys.argv[1:]))
    for capability in capabilities:
        most = None if capability in (capabilities[0], capabilities[-1]) else 1
        for kernel_name, variants in KERNELS.items():
            for name, *variant in itertools.islice(variants(capability), most):
                kernel, pointers, constants = variant
                size = compiled_bytes(kernel, capability, pointers, constants)
                sizes[f"{capability} {kernel_name} {name}"] = size
    found = {"sizes": sizes, "exchanges": exchanges(capabilities[-1]), "byte loads": byte_loads(capabilities[-1])}
    sys.stdout.write(json.dumps(found))


main()
