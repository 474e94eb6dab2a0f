# SPDX-License-Identifier: Apache-2.0
"""Time the fused dequantise-and-multiply kernel for 1 to 16 rows against its bytes and against dense BF16.

floor = bytes of packed weight, block scales, input and output / copy bandwidth of the same run. "dequantised" is a
dequantisation and a matmul, what a Linear does with more rows. Correctness comes first: against an FP64 product of the
decoded weight, and each call twice, for equal bits. --configs times every (ROWS, SPLIT); the fastest of each
shape is shown beside the rule's own choice.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import common

SHAPES = ("16384x4096", "4096x16384", "4096x4096", "2048x2048")
GEMMA = ("2048x3840", "4096x3840", "15360x3840", "3840x15360")
ROWS = (1, 4, 8, 9, 12, 16)
CONFIGS = ((16, 32), (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16))
ODD = ((129, 1040), (32, 4096), (30, 112), (256, 2064))


def operands(shape: tuple[int, int], rows: int, dense: bool = True) -> list[tuple]:
    """As many sets of (x, PackedWeight, dense BF16 weight or None, bias) as outgrow the cache."""
    import torch
    from nvfp4_video.kernels import reference

    found = []
    for _ in range(common.rotation(shape[0] * shape[1] * 9 // 16, most=16)):
        w = reference.quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5)
        whole = reference.dequantize(w) if dense else None
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        found.append((x, w, whole, torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)))
    return found


def all_configs(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Those whose programs divide K evenly; others would be timed on the masked path."""
    steps = shape[1] // 128
    return [c for c in itertools.product(*CONFIGS) if steps % c[1] == 0] if shape[1] % 128 == 0 else []


def check(shape: tuple[int, int], rows: int, config: tuple[int, int] | None = None) -> dict[str, Any]:
    """Relative error against FP64, in BF16 and FP16; ``unequal``: elements that a second call gives otherwise."""
    import torch
    from nvfp4_video.kernels import reference
    from nvfp4_video.kernels.format import PackedWeight
    from nvfp4_video.kernels.triton.gemv import prepare

    x, w, _, bias = operands(shape, rows, dense=False)[0]
    one = torch.ones((), device="cuda")
    unscaled = PackedWeight(w.packed, w.block_scale, one, shape)
    decoded = reference.dequantize(unscaled, torch.float32).double() * w.global_scale.double()
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "rows": rows, "config": config, "unequal": 0}
    for dtype in (torch.bfloat16, torch.float16):
        run = prepare(shape, dtype, x.device, config)
        arguments = (x.to(dtype), *w.parts, bias.to(dtype))
        right = arguments[0].double() @ decoded.t() + arguments[4].double()
        poison = torch.full((rows, shape[0]), torch.nan, device="cuda", dtype=dtype)
        del poison
        found, again = run(*arguments), run(*arguments)
        row["unequal"] += int((found.view(torch.int16) != again.view(torch.int16)).sum())
        row[f"error {str(dtype)[6:]}"] = float((found.double() - right).norm() / right.norm())
    return row


def measure(shape: tuple[int, int], rows: int, bandwidth: float, configs: bool) -> tuple[dict[str, Any], list]:
    """One shape and row count -> microseconds and ratios; and, if asked, every configuration's."""
    import torch
    from nvfp4_video.kernels import dispatch
    from nvfp4_video.kernels.triton.gemv import prepare

    sets = operands(shape, rows)
    device, dtype = sets[0][0].device, torch.bfloat16
    parts = [(x, *w.parts, bias) for x, w, _, bias in sets]
    floor = (shape[0] * shape[1] * 9 / 16 + 2 * rows * sum(shape)) / bandwidth
    calls = {
        "dense": (lambda x, w, dense, bias: torch.nn.functional.linear(x, dense, bias), sets),
        "dequantised": (lambda x, w, dense, bias: dispatch.linear(x, w, bias, "triton"), sets),
        "fused": (prepare(shape, dtype, device), parts),
    }
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "rows": rows, "floor us": floor * 1e6}
    row |= {name: common.time_gpu(call, given, rounds=9) * 1e6 for name, (call, given) in calls.items()}
    row |= {"fused / floor": row["fused"] / (floor * 1e6), "dense / fused": row["dense"] / row["fused"]}
    timed = []
    for config in all_configs(shape) if configs else []:
        run = prepare(shape, dtype, device, config)
        timed.append((common.time_gpu(run, parts, rounds=5) * 1e6, config))
    if timed:
        row["best"], row["best config"] = min(timed)
        row["best / floor"] = row["best"] / (floor * 1e6)
    return row, sorted(timed)


def launch_cost(shape: tuple[int, int] = (2048, 2048)) -> dict[str, float]:
    """Microseconds of CPU time to queue one Linear of one row by each way."""
    import torch
    from nvfp4_video.kernels import dispatch
    from nvfp4_video.kernels.triton.gemv import prepare

    x, w, dense, bias = operands(shape, 1)[0]
    dequantize = dispatch.prepare("dequantize", shape, x.dtype, x.device)
    linear = torch.nn.functional.linear
    found = {
        "dense": lambda: linear(x, dense, bias),
        "dequantised": lambda: linear(x, dequantize(*w.parts), bias),
        "of which dequantised": lambda: dequantize(*w.parts),
        "of which allocated": lambda: torch.empty(shape, dtype=x.dtype, device=x.device),
    }
    for split in (1, 4):
        run = prepare(shape, x.dtype, x.device, (16, split))
        found[f"fused, split {split}"] = lambda run=run: run(x, *w.parts, bias)
    return {name: common.time_launch(call, calls=20) * 1e6 for name, call in found.items()}


def main() -> int:
    """Returns 1 if a result is further from the exact one than its rounding explains, or not repeatable."""
    parser = common.make_parser(__doc__, SHAPES + GEMMA)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="default %(default)s")
    parser.add_argument("--configs", action="store_true", help="time every configuration with one row")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    shapes = common.shapes_of(options.shapes)
    counts = list(map(int, options.rows.split(",")))
    checks = [check(shape, rows) for shape in (*common.shapes_of(",".join(SHAPES)), *ODD) for rows in (1, 7, 16)]
    if options.configs:
        checks += [check((256, 4096), rows, config) for config in all_configs((256, 4096)) for rows in (3, 13)]
    wrong = [c for c in checks if c["unequal"] or not (c["error bfloat16"] < 3e-3 and c["error float16"] < 5e-4)]
    common.print_table(wrong or checks[::8], {name: ".1e" for name in checks[0] if "error" in name})
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed", flush=True)
    launches = launch_cost()
    rows, tables = [], {}
    for shape, count in itertools.product(shapes, counts):
        row, timed = measure(shape, count, bandwidth, options.configs and count == 1)
        rows.append(row)
        tables[f"{shape[0]}x{shape[1]} {count}"] = timed
    for name, timed in tables.items():
        if timed:
            print(name, "; ".join(f"{config} {us:.1f}" for us, config in timed[:6]))
    print("CPU time to queue one Linear, 2048 x 2048: " + ", ".join(f"{k} {v:.1f} us" for k, v in launches.items()))
    print("microseconds of GPU time")
    names = {name for row in rows for name in row if isinstance(row[name], float)}
    common.print_table(rows, {name: ".2f" if "/" in name else ".1f" for name in names})
    content = {"facts": found, "copy_bandwidth": bandwidth, "checks": checks, "rows": rows, "launch_us": launches}
    common.save("gemv", options.out, content | {"configs": tables})
    if wrong:
        print(f"WRONG: {len(wrong)} checks")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
