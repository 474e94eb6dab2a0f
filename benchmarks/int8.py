# SPDX-License-Identifier: Apache-2.0
"""Time one NVFP4 Linear in INT8 (W4A8) beside dense BF16, the BF16 and FP8 modes and comfy-kitchen's int8_linear.

"int8" is what a layer costs: weight to INT8, activations quantised row by row, ``torch._int_mm``, scales and bias; the
columns behind it are those parts. "kitchen" is comfy-kitchen's own Linear of the same converted weight, conversion
included, its activations quantised by itself. Correctness comes first: the conversions bit for bit against
kernels/int8_reference.py, then the error of a Linear by mode for activations without and with outlier channels.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import common
from fp8 import launch_cost, operands

SHAPES = ("16384x4096", "4096x16384", "4096x4096", "2048x2048")
TOKENS = (256, 1024, 6144, 14080)
OUTLIERS = (0, 1, 8, 41)  # channels, of 4096
TIMES = 50.0


def modes() -> list[str]:
    """Those in 8 bits that run here."""
    import torch
    from nvfp4_video.kernels import fp8

    return ["int8", "fp8"] if not fp8.obstacle(torch.device("cuda:0")) else ["int8"]


def check(shape: tuple[int, int], tokens: int = 33) -> dict[str, Any]:
    """Elements of the conversions and sums that differ from the reference; relative error of the whole Linear."""
    import torch
    from nvfp4_video.kernels import dispatch, int8_reference
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows_int8
    from nvfp4_video.kernels.triton.scale_sums import scale_sums
    from nvfp4_video.kernels.triton.to_fp8 import to_int8

    x, w, _, bias = operands(shape, tokens)[0]
    (weight, weight_scale), (quantized, scale) = to_int8(w), quantize_rows_int8(x)
    sums = torch._int_mm(quantized, weight.t())
    exact = (quantized.double() @ weight.double().t()).int()
    arguments = exact, scale, weight_scale, None, shape[0], x.dtype
    pairs = [
        *zip((weight, weight_scale), int8_reference.to_int8(w), strict=True),
        *zip((quantized, scale), int8_reference.quantize_rows_int8(x), strict=True),
        (sums, exact),
        (scale_sums(*arguments), int8_reference.scale_sums(*arguments)),
    ]
    differ = [int((found != right).sum()) for found, right in pairs]
    right = int8_reference.linear_int8(x.double(), w, bias.double())
    error = float((dispatch.linear_int8(x, w, bias).double() - right).norm() / right.norm())
    return {"out x in": f"{shape[0]} x {shape[1]}", "differ": sum(differ), "error": error}


def errors(shape: tuple[int, int] = (4096, 4096), tokens: int = 1024) -> list[dict[str, Any]]:
    """Outlier channels -> error of a Linear's output against the decoded weight, by mode."""
    import torch
    from nvfp4_video.kernels import dispatch, reference

    weight = reference.quantize(torch.randn(shape, device="cuda") / shape[1] ** 0.5, search="mse")
    decoded, rows = reference.dequantize(weight, torch.float32).double(), []
    calls = {"bf16": dispatch.linear} | {mode: getattr(dispatch, f"linear_{mode}") for mode in modes()}
    for count in OUTLIERS:
        x = torch.randn(tokens, shape[1], device="cuda")
        x[:, torch.randperm(shape[1], device="cuda")[:count]] *= TIMES
        x = x.bfloat16()
        exact = x.double() @ decoded.t()
        rows.append({f"channels x {TIMES:.0f}": count})
        for mode, linear in calls.items():
            rows[-1][mode] = float((linear(x, weight).double() - exact).norm() / exact.norm())
    return rows


def measure(shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """One shape and token count -> milliseconds and ratios to dense BF16."""
    import torch
    from nvfp4_video.kernels import dispatch
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows_int8
    from nvfp4_video.kernels.triton.scale_sums import scale_sums
    from nvfp4_video.kernels.triton.to_fp8 import to_int8

    sets = operands(shape, tokens)
    calls = {
        "dense": lambda x, w, dense, bias: torch.nn.functional.linear(x, dense, bias),
        "bf16": lambda x, w, dense, bias: dispatch.linear(x, w, bias),
        **{mode: functools.partial(_linear, getattr(dispatch, f"linear_{mode}")) for mode in modes()},
        "weight": lambda x, w, dense, bias: to_int8(w),
        "rows": lambda x, w, dense, bias: quantize_rows_int8(x),
    }
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "tokens": tokens}
    row |= {name: common.time_gpu(call, sets, rounds=7) * 1e3 for name, call in calls.items()}
    rounded = [(quantize_rows_int8(x), to_int8(w), bias) for x, w, _, bias in sets[:3]]
    products = [(x[0], w[0]) for x, w, _ in rounded]
    row["_int_mm"] = common.time_gpu(lambda x, w: torch._int_mm(x, w.t()), products, rounds=7) * 1e3
    sums = [(torch._int_mm(x[0], w[0].t()), x[1], w[1], bias, shape[0], torch.bfloat16) for x, w, bias in rounded]
    row["sums"] = common.time_gpu(scale_sums, sums, rounds=7) * 1e3
    row |= {f"{mode} / dense": row[mode] / row["dense"] for mode in ("bf16", *modes())}
    return row


def _linear(linear: Any, x: Any, weight: Any, dense: Any, bias: Any) -> Any:
    return linear(x, weight, bias)


def kitchen(shape: tuple[int, int], tokens: int) -> float | None:
    """Milliseconds of the weight's conversion and comfy-kitchen's Linear; None without it."""
    try:
        from comfy_kitchen import int8_linear
    except ImportError:
        return None
    from nvfp4_video.kernels.triton.to_fp8 import to_int8

    sets = operands(shape, tokens)
    return common.time_gpu(lambda x, w, dense, bias: int8_linear(x, *to_int8(w), bias), sets, rounds=7) * 1e3


def main() -> int:
    """Returns 1 if a conversion differs from the reference or a product is off by more than BF16's rounding."""
    parser = common.make_parser(__doc__, SHAPES)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default %(default)s")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    import torch
    from nvfp4_video.kernels import int8

    if reason := int8.obstacle(torch.device("cuda:0")):
        print(f"INT8 cannot run here: {reason}")
        return 0
    shapes = common.shapes_of(options.shapes)
    checks = [check(shape) for shape in [*shapes, (32, 4096), (144, 1040), (33, 100)]]
    common.print_table(checks, {"error": ".2e"})
    losses = errors()
    print("error of a Linear, 4096 x 4096, against the decoded weight")
    common.print_table(losses)
    launches = launch_cost((2048, 2048), modes())
    print("CPU time to queue one Linear, 2048 x 2048: " + ", ".join(f"{k} {v:.1f} us" for k, v in launches.items()))
    rows = [measure(shape, tokens) for shape in shapes for tokens in map(int, options.tokens.split(","))]
    print("milliseconds of GPU time")
    common.print_table(rows, {key: ".3f" for row in rows for key in row if "/" in key})
    content = {"facts": found, "copy_bandwidth": bandwidth, "checks": checks, "errors": losses, "rows": rows}
    common.save("int8", options.out, content | {"launch_us": launches})
    for row in rows:  # last: what another package cannot do must not take the rest with it
        shape = tuple(map(int, row["out x in"].split(" x ")))
        row["kitchen"] = kitchen(shape, row["tokens"])
    common.print_table([{key: row[key] for key in ("out x in", "tokens", "dense", "int8", "kitchen")} for row in rows])
    common.save("int8", options.out, content | {"launch_us": launches})
    return common.exit_status([one for one in checks if one["differ"] or not one["error"] < 3e-3])


if __name__ == "__main__":
    sys.exit(main())
