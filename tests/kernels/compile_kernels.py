"""Compiles the Triton kernels for the compute capabilities named on the command line; needs no GPU, prints a JSON map.

A process of its own: under TRITON_INTERPRET=1, as the tests run, Triton compiles nothing.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

package = types.ModuleType("nvfp4_video")
package.__path__ = [str(Path(__file__).resolve().parents[2])]
sys.modules["nvfp4_video"] = package

from nvfp4_video.kernels.triton import dequantize, dequantize_sum, gemv, quantize, to_fp8  # noqa: E402
from triton import compile as triton_compile  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

POINTERS = {"packed_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "column_ptr": "*i32"}
SEARCHES = {"amax": (False, False), "search": (True, False), "weighted": (True, True)}


def compiled_bytes(kernel, capability: int, pointers: dict[str, str], constants: dict[str, object]) -> int:
    """Size of the machine code of one kernel for one capability."""
    names = kernel.arg_names
    types_of = {name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types_of, constexprs=values)
    return len(triton_compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def gemv_sizes(capability: int) -> dict[str, int]:
    """The kernels for few rows: BF16 and FP16, with and without masks, K in one slice or four."""
    sizes = {}
    tile = {"UNDO": 256.0, "TOKENS": 16, "ROWS": 16, "UNROLL": 1, "PACKED": True, "BIAS": True}
    sums = {"sum_ptr": "*fp32", "counter_ptr": "*i32"}
    for dtype in ("*bf16", "*fp16"):
        pointers = POINTERS | sums | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), dtype)
        for full, split in ((True, 1), (False, 1), (True, 4)):
            constants = tile | {"FULL": full, "SPLIT": split}
            size = compiled_bytes(gemv._gemv_kernel, capability, pointers, constants)
            sizes[f"{capability} gemv {dtype} {full} {split}"] = size
    return sizes


def fp8_sizes(capability: int) -> dict[str, int]:
    """The conversions of weights and activations to E4M3."""
    sizes = {}
    for full in (True, False):
        pointers = POINTERS | {"out_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32"}
        constants = {"ROWS": 2, "BLOCKS": 128, "SCALES": 256, "FULL": full}
        size = compiled_bytes(to_fp8._to_fp8_kernel, capability, pointers, constants)
        sizes[f"{capability} to_fp8 {full}"] = size
        pointers = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        constants = {"COLS": 4096, "SINGLE": full, "ACTIVATION": "gelu_tanh" if full else ""}
        size = compiled_bytes(to_fp8._quantize_rows_kernel, capability, pointers, constants)
        sizes[f"{capability} quantize_rows {full}"] = size
    return sizes


def lora_sizes(capability: int) -> dict[str, int]:
    """A decoded weight plus a low-rank change."""
    sizes = {}
    for dtype in ("*bf16", "*fp16") if capability >= 80 else ("*fp16",):
        pointers = POINTERS | dict.fromkeys(("up_ptr", "down_ptr", "out_ptr"), dtype)
        for full in (True, False):
            constants = {"ROWS": 64, "WORDS": 16, "RANK": 64, "FULL": full, "PRODUCTS": True, "STORE": ""}
            size = compiled_bytes(dequantize_sum._dequantize_sum_kernel, capability, pointers, constants)
            sizes[f"{capability} sum {dtype} {full}"] = size
    return sizes


def main() -> None:
    sizes = {}
    for capability in map(int, sys.argv[1:]):
        for full in (True, False):
            constants = {"ROWS": 2, "WORDS": 128, "STEPS": 2, "FULL": full, "STORE": ".cs"}
            for out in ("*bf16" if capability >= 80 else "*i16", "*fp16", "*fp32"):
                pointers = POINTERS | {"out_ptr": out}
                size = compiled_bytes(dequantize._dequantize_kernel, capability, pointers, constants)
                sizes[f"{capability} dequantize {out} {full}"] = size
        for dtype in ("*bf16", "*fp16", "*fp32"):
            pointers = POINTERS | {"weight_ptr": dtype}
            for name, (search, weighted) in SEARCHES.items():
                constants = {"BLOCKS": 64, "SEARCH": search, "WEIGHTED": weighted}
                size = compiled_bytes(quantize._quantize_kernel, capability, pointers, constants)
                sizes[f"{capability} quantize {dtype} {name}"] = size
        sizes |= lora_sizes(capability)
        if capability >= 80:
            sizes |= gemv_sizes(capability)
        if capability >= 89:
            sizes |= fp8_sizes(capability)
    sys.stdout.write(json.dumps(sizes))


main()
