# SPDX-License-Identifier: Apache-2.0
"""Time one NVFP4 Linear with a LoRA of --rank: merged while the weight is decoded or converted, or as a branch.

Correctness comes first: 8-bit factors bit for bit against kernels/reference.py, the sums against FP64. Then
microseconds of GPU time of what a weight costs, without and with the change, and milliseconds of a whole Linear:

* "bf16", "fp8": without a LoRA; "+ merged": what a layer does, its 8-bit factors decoded included
* "+ branch": the same product and x A^T B^T in BF16 beside it; "+ fp8 branch": x A^T on the FP8 tensor cores

--tiles adds tiles of the two sums.
"""

from __future__ import annotations

import sys
from typing import Any

import common

SHAPES = ("16384x4096", "4096x16384", "4096x4096", "2048x4096", "2048x2048")
TOKENS = (1024, 6144, 14080)
TILES = ((64, 16, 4, 2), (64, 16, 4, 3), (128, 16, 8, 3), (128, 16, 4, 3), (128, 16, 4, 2), (64, 32, 4, 2))


def operands(shape: tuple[int, int], rank: int, tokens: int) -> list[dict[str, Any]]:
    """As many sets of a packed weight, 8-bit factors and inputs as outgrow the cache."""
    import torch
    from nvfp4_video.kernels import reference

    found = []
    for _ in range(common.rotation(shape[0] * shape[1] // 2 + 2 * tokens * shape[1], most=6)):
        weight = reference.quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5)
        up = reference.pack_factor(torch.randn(shape[0], rank, device="cuda") * (0.2 / rank**0.5))
        down = reference.pack_factor(torch.randn(rank, shape[1], device="cuda") / shape[1] ** 0.5)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
        one = {"weight": weight, "up": up, "down": down, "peak": down[1].amax(1) * 128}
        found.append(one | {"x": x, "bias": bias})
    return found


def factors(one: dict[str, Any]) -> tuple[Any, Any]:
    """``down`` and ``up`` of a set in BF16."""
    from nvfp4_video.kernels import dispatch

    return dispatch.unpack_factors(*one["down"], *one["up"])


def check(shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Elements that differ from the reference, few of the sums, added in another order; errors against FP64."""
    import torch
    from nvfp4_video.kernels import dispatch, reference
    from nvfp4_video.kernels.triton.to_fp8_sum import to_fp8_sum

    one = operands(shape, rank, 64)[0]
    weight = one["weight"]
    down, up = factors(one)
    right = reference.unpack_factors(*one["down"], *one["up"])
    differ = int((down != right[0]).sum() + (up != right[1]).sum())
    exact = reference.dequantize(weight, torch.float32).double() + up.double() @ down.double()
    merged = dispatch.dequantize_sum(weight, up, down).double()
    rounded, scale = to_fp8_sum(weight, up, down, one["peak"])
    other, other_scale = reference.to_fp8_sum(weight, up, down, one["peak"])
    decoded = (rounded.double() * scale.unsqueeze(1).double())[: shape[0], : shape[1]]
    return {
        "out x in": f"{shape[0]} x {shape[1]}",
        "rank": rank,
        "factors differ": differ,
        "scales differ": int((scale != other_scale).sum()),
        "bytes differ": float((rounded.view(torch.uint8) != other.view(torch.uint8)).float().mean()),
        "bf16 sum": float((merged - exact).norm() / exact.norm()),
        "fp8 sum": float((decoded - exact).norm() / exact.norm()),
    }


def weights(shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Microseconds of what is done to a weight and to the factors before the product."""
    from nvfp4_video.kernels import dispatch
    from nvfp4_video.kernels.triton.dequantize_sum import dequantize_sum
    from nvfp4_video.kernels.triton.to_fp8 import to_fp8
    from nvfp4_video.kernels.triton.to_fp8_sum import to_fp8_sum

    sets = [(one, *factors(one)) for one in operands(shape, rank, 16)]
    calls = {
        "dequantize": lambda one, down, up: dispatch.dequantize(one["weight"]),
        "in one kernel": lambda one, down, up: dequantize_sum(one["weight"], up, down),
        "and addmm_": lambda one, down, up: dispatch.dequantize(one["weight"]).addmm_(up, down),
        "to_fp8": lambda one, down, up: to_fp8(one["weight"]),
        "to_fp8_sum": lambda one, down, up: to_fp8_sum(one["weight"], up, down, one["peak"]),
        "unpack_factors": lambda one, down, up: factors(one),
    }
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "rank": rank}
    return row | {name: common.time_gpu(call, sets, rounds=9) * 1e6 for name, call in calls.items()}


def linears(shape: tuple[int, int], rank: int, tokens: int) -> dict[str, Any]:
    """Milliseconds of one whole Linear."""
    import torch
    from nvfp4_video.kernels import dispatch, fp8
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows

    summed = dispatch.prepare("linear_fp8_sum", shape, torch.bfloat16, torch.device("cuda", 0))
    sets = []
    for one in operands(shape, rank, tokens):
        down, up = factors(one)
        low, low_scale = quantize_rows(down)
        sets.append((one, down, up, low, low_scale.squeeze(1)))

    def merged(one, *_):
        down, up = factors(one)
        return torch.nn.functional.linear(one["x"], dispatch.dequantize_sum(one["weight"], up, down), one["bias"])

    def merged_fp8(one, *_):
        down, up = factors(one)
        return summed(one["x"], *one["weight"].parts, up, down, one["peak"], one["bias"])

    def fp8_branch(one, down, up, low, low_scale):
        out = dispatch.linear_fp8(one["x"], one["weight"], one["bias"])
        low = fp8.scaled_mm(*quantize_rows(one["x"]), low, low_scale, None)  # a layer would quantise x only once
        return out.addmm_(low, up.t())

    calls = {
        "bf16": lambda one, *_: dispatch.linear(one["x"], one["weight"], one["bias"]),
        "bf16 + merged": merged,
        "fp8": lambda one, *_: dispatch.linear_fp8(one["x"], one["weight"], one["bias"]),
        "fp8 + merged": merged_fp8,
        "fp8 + branch": lambda one, down, up, *_: dispatch.linear_fp8(one["x"], one["weight"], one["bias"]).addmm_(
            one["x"] @ down.t(), up.t()
        ),
        "fp8 + fp8 branch": fp8_branch,
    }
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "tokens": tokens}
    row |= {name: common.time_gpu(call, sets, rounds=7) * 1e3 for name, call in calls.items()}
    row |= {"bf16 x": row["bf16 + merged"] / row["bf16"], "fp8 x": row["fp8 + merged"] / row["fp8"]}
    return row


def tiles(shape: tuple[int, int], rank: int) -> list[dict[str, Any]]:
    """Both sums by tile, the fastest in FP8 first."""
    from nvfp4_video.kernels.triton import dequantize_sum, to_fp8_sum

    sets = [(one, *factors(one)) for one in operands(shape, rank, 16)]
    kept, rows = dict(dequantize_sum.TILES), []
    calls = {
        "dequantize_sum us": lambda one, down, up: dequantize_sum.dequantize_sum(one["weight"], up, down),
        "to_fp8_sum us": lambda one, down, up: to_fp8_sum.to_fp8_sum(one["weight"], up, down, one["peak"]),
    }
    for tile in TILES:
        dequantize_sum.TILES.update(dict.fromkeys(kept, tile))
        dequantize_sum.prepare.cache_clear(), to_fp8_sum.prepare.cache_clear()
        row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "rank": rank, "tile": "x".join(map(str, tile))}
        rows.append(row | {name: common.time_gpu(call, sets, rounds=7) * 1e6 for name, call in calls.items()})
    dequantize_sum.TILES.update(kept)
    dequantize_sum.prepare.cache_clear(), to_fp8_sum.prepare.cache_clear()
    return sorted(rows, key=lambda row: row["to_fp8_sum us"])


def main() -> int:
    """Returns 1 if an unpacked factor differs from the reference or a sum is off by more than its rounding."""
    parser = common.make_parser(__doc__, SHAPES)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default %(default)s")
    parser.add_argument("--ranks", default="64,384", help="default %(default)s; whole Linears at the last one")
    parser.add_argument("--tiles", action="store_true", help="also time tiles")
    options = parser.parse_args()
    found, _ = common.begin_on_gpu()
    shapes, ranks = common.shapes_of(options.shapes), [int(rank) for rank in options.ranks.split(",")]
    checks = [check(shape, ranks[-1]) for shape in shapes] + [check((144, 1040), 33)]
    common.print_table(checks, dict.fromkeys(("bf16 sum", "fp8 sum", "bytes differ"), ".2e"))
    tile_rows = [row for rank in ranks for row in tiles(shapes[0], rank)] if options.tiles else []
    if tile_rows:
        common.print_table(tile_rows, {"dequantize_sum us": ".1f", "to_fp8_sum us": ".1f"})
    weight_rows = [weights(shape, rank) for rank in ranks for shape in shapes]
    print("microseconds of GPU time")
    common.print_table(weight_rows, {name: ".1f" for name in weight_rows[0]})
    tokens = [int(count) for count in options.tokens.split(",")]
    rows = [linears(shape, ranks[-1], count) for shape in shapes for count in tokens]
    print("milliseconds of GPU time")
    common.print_table(rows, {"bf16 x": ".3f", "fp8 x": ".3f"})
    content = {"facts": found, "checks": checks, "tiles": tile_rows}
    common.save("low_rank", options.out, content | {"weights": weight_rows, "rows": rows})
    wrong = [one for one in checks if one["factors differ"] or one["bytes differ"] > 1e-4 or one["bf16 sum"] > 3e-3]
    return common.exit_status(wrong)


if __name__ == "__main__":
    sys.exit(main())
