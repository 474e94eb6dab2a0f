# SPDX-License-Identifier: Apache-2.0
"""Time one NVFP4 Linear in FP8 (W4A8), everything included, against a dense BF16 matmul in the same run.

"linear" is what a layer costs: weight to E4M3, activations quantised row by row, matmul with bias. The columns after it
are its three parts. Correctness comes first: the two conversions bit for bit against kernels/reference.py, the whole
against an FP32 product of the rounded operands. --tiles adds a table of tiles of the weight's conversion.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import common

SHAPES = ("16384x4096", "4096x16384", "4096x4096", "2048x2048", "2048x4096")
TOKENS = (64, 256, 1024, 6144, 14080)
TILES = ((2, 128, 8), (1, 256, 8), (4, 64, 8), (2, 128, 4), (1, 128, 4), (2, 64, 4), (1, 256, 4), (4, 128, 8))


def operands(shape: tuple[int, int], tokens: int) -> list[tuple]:
    """As many sets of (x, PackedWeight, dense BF16 weight, bias) as outgrow the cache."""
    import torch
    from nvfp4_video.kernels import reference

    found = []
    for _ in range(common.rotation(shape[0] * shape[1] // 2 + 2 * tokens * shape[1], most=6)):
        weight = reference.quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5)
        dense = reference.dequantize(weight)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        found.append((x, weight, dense, torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)))
    return found


def check(shape: tuple[int, int], tokens: int = 33) -> dict[str, Any]:
    """Conversions: elements that differ from the reference; the Linear: relative errors."""
    import torch
    from nvfp4_video.kernels import dispatch, fp8, reference
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows
    from nvfp4_video.kernels.triton.to_fp8 import to_fp8

    x, w, dense, bias = operands(shape, tokens)[0]
    for size in (shape, (1, shape[1]), (tokens, shape[1])):
        poison = torch.full(size, 255, device="cuda", dtype=torch.uint8)
        del poison
    weight, weight_scale = to_fp8(w)
    right, right_scale = reference.to_fp8(w)
    differing = int((weight.view(torch.uint8) != right.view(torch.uint8)).sum() + (weight_scale != right_scale).sum())
    quantized, scale = quantize_rows(x)
    right, right_scale = reference.quantize_rows(x)
    differing += int((quantized.view(torch.uint8) != right.view(torch.uint8)).sum() + (scale != right_scale).sum())
    exact = quantized.double() @ weight.double().t() * scale * weight_scale + bias.double()
    dense_result = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    found = {"out x in": f"{shape[0]} x {shape[1]}", "differ": differing}
    for fast in (False, True):
        result = fp8.scaled_mm(quantized, scale, weight, weight_scale, bias, fast).double()
        found["error fast" if fast else "error"] = float((result - exact).norm() / exact.norm())
    whole = dispatch.linear_fp8(x, w, bias).double()
    found["against BF16 weights"] = float((whole - dense_result).norm() / dense_result.norm())
    return found


def measure(shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """One shape and token count -> milliseconds and ratios to dense BF16."""
    import torch
    from nvfp4_video.kernels import dispatch, fp8
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows
    from nvfp4_video.kernels.triton.to_fp8 import to_fp8

    sets = operands(shape, tokens)
    quantized = [(*quantize_rows(x), *to_fp8(w), b) for x, w, _, b in sets]
    calls = {
        "dense": lambda x, w, dense, bias: torch.nn.functional.linear(x, dense, bias),
        "bf16 mode": lambda x, w, dense, bias: dispatch.linear(x, w, bias),
        "linear": lambda x, w, dense, bias: dispatch.linear_fp8(x, w, bias),
        "weight": lambda x, w, dense, bias: to_fp8(w),
        "activations": lambda x, w, dense, bias: quantize_rows(x),
    }
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "tokens": tokens}
    row |= {name: common.time_gpu(call, sets, rounds=9) * 1e3 for name, call in calls.items()}
    for fast in (False, True):
        call = functools.partial(fp8.scaled_mm, fast=fast)
        row["matmul fast" if fast else "matmul"] = common.time_gpu(call, quantized, rounds=9) * 1e3
    row |= {"linear / dense": row["linear"] / row["dense"], "linear / bf16 mode": row["linear"] / row["bf16 mode"]}
    return row


def tiles(shape: tuple[int, int], bandwidth: float) -> list[dict[str, Any]]:
    """The conversion of one weight by tile, the fastest first: ``x floor`` counts 1.5625 bytes an element."""
    from nvfp4_video.kernels.triton import to_fp8

    sets = [(w,) for _, w, _, _ in operands(shape, 16)]
    floor, kept, rows = shape[0] * shape[1] * 1.5625 / bandwidth, to_fp8.WEIGHT_TILE, []
    for tile_rows, blocks, warps in TILES:
        to_fp8.WEIGHT_TILE = {"ROWS": tile_rows, "BLOCKS": blocks, "num_warps": warps}
        to_fp8.prepare.cache_clear()
        seconds = common.time_gpu(to_fp8.to_fp8, sets, rounds=9)
        rows.append({"out x in": f"{shape[0]} x {shape[1]}", **to_fp8.WEIGHT_TILE, "us": seconds * 1e6})
        rows[-1]["x floor"] = seconds / floor
    to_fp8.WEIGHT_TILE = kept
    to_fp8.prepare.cache_clear()
    return sorted(rows, key=lambda row: row["us"])


def launch_cost(shape: tuple[int, int], modes: Sequence[str] = ("fp8",)) -> dict[str, float]:
    """Microseconds of CPU time to queue one Linear of 256 tokens by each way."""
    import torch
    from nvfp4_video.kernels import dispatch

    x, w, dense, bias = operands(shape, 256)[0]
    prepared = {mode: dispatch.prepare(f"linear_{mode}", shape, x.dtype, x.device) for mode in modes}
    dequantize, linear = dispatch.prepare("dequantize", shape, x.dtype, x.device), torch.nn.functional.linear
    calls = {"dense": lambda: linear(x, dense, bias), "bf16 mode": lambda: linear(x, dequantize(*w.parts), bias)}
    calls |= {mode: functools.partial(run, x, *w.parts, bias) for mode, run in prepared.items()}
    return {name: common.time_launch(call, calls=20) * 1e6 for name, call in calls.items()}


def main() -> int:
    """Returns 1 if a conversion differs from the reference or a product is off by more than BF16's rounding."""
    parser = common.make_parser(__doc__, SHAPES)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default %(default)s")
    parser.add_argument("--tiles", action="store_true", help="also time tiles of the weight's conversion")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    import torch
    from nvfp4_video.kernels import fp8

    if reason := fp8.obstacle(torch.device("cuda:0")):
        print(f"FP8 cannot run here: {reason}")
        return 0
    shapes = common.shapes_of(options.shapes)
    checks = [check(shape) for shape in [*shapes, (32, 4096), (144, 1040)]]
    common.print_table(checks, {name: ".2e" for name in checks[0] if "rror" in name or "against" in name})
    tile_rows = [row for shape in shapes[:2] * options.tiles for row in tiles(shape, bandwidth)]
    if tile_rows:
        best = [
            row
            for shape in dict.fromkeys(r["out x in"] for r in tile_rows)
            for row in [r for r in tile_rows if r["out x in"] == shape][:5]
        ]
        common.print_table(best, {"us": ".1f", "x floor": ".2f"})
    launches = launch_cost((2048, 2048))
    rows = [measure(shape, tokens) for shape in shapes for tokens in map(int, options.tokens.split(","))]
    print("CPU time to queue one Linear, 2048 x 2048: " + ", ".join(f"{k} {v:.1f} us" for k, v in launches.items()))
    print("milliseconds of GPU time")
    common.print_table(rows, {"linear / dense": ".3f", "linear / bf16 mode": ".3f"})
    content = {"facts": found, "copy_bandwidth": bandwidth, "checks": checks, "rows": rows, "tiles": tile_rows}
    common.save("fp8", options.out, content | {"launch_us": launches})
    return common.exit_status([one for one in checks if one["differ"] or not one["error"] < 3e-3])


if __name__ == "__main__":
    sys.exit(main())
