# SPDX-License-Identifier: Apache-2.0
"""Time the dequantisation of one NVFP4 weight to BF16 against the copy bandwidth measured in the same run.

floor = bytes read (packed weight + block scales) and written (BF16 weight) / copy bandwidth; copy = a device-to-device
copy of as many bytes, which pays the same launch. Before anything is timed, the elements whose bits differ from those
of kernels/reference.py are counted for every contender; kitchen's eager code rounds the scales and is known to differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import common

SHAPES = ("4096x4096", "16384x4096", "4096x16384", "2048x2048", "2048x8192", "32x4096")


def contenders(backend: str) -> dict[str, Callable]:
    """Name -> function of (PackedWeight) -> BF16 weight; kitchen's backends only where they can run."""
    from nvfp4_video.kernels import dispatch

    found = {"ours": lambda w: dispatch.dequantize(w, backend=backend)}
    try:
        import comfy_kitchen
    except ImportError:
        print("comfy-kitchen is not installed: its columns stay empty.")
        return found
    for name in ("cuda", "eager"):
        state = comfy_kitchen.list_backends().get(name, {})
        if state.get("available"):
            found[f"kitchen {name}"] = _kitchen(comfy_kitchen, name)
        else:
            print(f"comfy-kitchen's backend {name} cannot run here: {state.get('unavailable_reason')}")
    return found


def _kitchen(comfy_kitchen: Any, name: str) -> Callable:
    # Not use_backend(): that falls back to another backend in silence.
    dequantize = comfy_kitchen.registry.get_implementation("dequantize_nvfp4", backend=name)
    return lambda w: dequantize(w.packed, w.global_scale, w.block_scale)


def mismatches(call: Callable, weights: list, expected: list) -> int:
    """Elements of all weights whose BF16 bits differ; the memory a result lands in is filled with NaN first."""
    import torch

    differing = 0
    for weight, right in zip(weights, expected, strict=True):
        poison = torch.full_like(right, torch.nan)
        del poison
        result = call(weight)[: right.shape[0], : right.shape[1]]
        differing += int((result.view(torch.int16) != right.view(torch.int16)).sum())
    return differing


def measure(shape: tuple[int, int], calls: dict[str, Callable], bandwidth: float) -> dict[str, Any]:
    """One shape -> a table row: milliseconds, ratio to the floor, per cent of the copy bandwidth, mismatches."""
    import torch
    from nvfp4_video.kernels import reference

    rows, cols = shape
    moved = rows * cols * 2 + rows * cols // 2 + rows * cols // 16
    sets = common.rotation(moved)
    weights = [reference.quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(sets)]
    expected = [reference.dequantize(w) for w in weights]
    checked = {f"{name} differs": mismatches(call, weights, expected) for name, call in calls.items()}
    del expected
    floor = moved / bandwidth
    row: dict[str, Any] = {"out x in": f"{rows} x {cols}", "sets": sets, "floor ms": floor * 1e3}
    halves = [torch.randint(0, 255, (moved // 2,), device="cuda", dtype=torch.uint8) for _ in range(sets)]
    row["copy ms"] = common.time_gpu(torch.clone, [(half,) for half in halves]) * 1e3
    del halves
    for name, call in calls.items():
        seconds = common.time_gpu(call, [(weight,) for weight in weights])
        row |= {f"{name} ms": seconds * 1e3, f"{name} x floor": seconds / floor}
        row[f"{name} % copy"] = 100 * floor / seconds
    return row | checked


def main() -> int:
    """Returns 1 if our kernel disagrees with the reference anywhere."""
    parser = common.make_parser(__doc__, SHAPES)
    parser.add_argument("--backend", default="triton", choices=("triton", "torch", "auto"), help="default %(default)s")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    calls = contenders(options.backend)
    rows = []
    for shape in common.shapes_of(options.shapes):
        rows.append(measure(shape, calls, bandwidth))
        print(f"{rows[-1]['out x in']} done", flush=True)
    ratios = {name: ".2f" for name in rows[0] if "x floor" in name}
    common.print_table(rows, ratios | {name: ".1f" for name in rows[0] if "%" in name})
    content = {"facts": found, "copy_bandwidth": bandwidth, "backend": options.backend, "rows": rows}
    common.save("dequant", options.out, content)
    wrong = sum(row["ours differs"] for row in rows)
    if wrong:
        print(f"WRONG: {wrong} elements differ from kernels/reference.py")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
