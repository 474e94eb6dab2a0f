"""Compiles the Triton kernels for the compute capabilities named on the command line; needs no GPU, prints a JSON map.

A process of its own: under TRITON_INTERPRET=1, as the tests run, Triton compiles nothing.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

package = types.ModuleType("nvfp4_video")
package.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["nvfp4_video"] = package

from nvfp4_video.kernels import triton_nvfp4  # noqa: E402
from triton import compile as triton_compile  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

POINTERS = {"packed_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32"}


def compiled_bytes(kernel, capability: int, pointers: dict[str, str], constants: dict[str, object]) -> int:
    """Size of the machine code of one kernel for one capability."""
    names = kernel.arg_names
    types_of = {name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types_of, constexprs=values)
    return len(triton_compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def main() -> None:
    sizes = {}
    for capability in map(int, sys.argv[1:]):
        for full in (True, False):
            constants = {"ROWS": 2, "WORDS": 128, "STEPS": 2, "FULL": full, "STORE": ".cs"}
            for out in ("*bf16" if capability >= 80 else "*i16", "*fp16", "*fp32"):
                pointers = POINTERS | {"out_ptr": out}
                size = compiled_bytes(triton_nvfp4._dequantize_kernel, capability, pointers, constants)
                sizes[f"{capability} dequantize {out} {full}"] = size
        for dtype in ("*bf16", "*fp16", "*fp32"):
            pointers = POINTERS | {"weight_ptr": dtype}
            size = compiled_bytes(triton_nvfp4._quantize_kernel, capability, pointers, {"BLOCKS": 64})
            sizes[f"{capability} quantize {dtype}"] = size
    sys.stdout.write(json.dumps(sizes))


main()
