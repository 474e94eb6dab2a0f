# SPDX-License-Identifier: Apache-2.0
"""Time what Gemma 3 12B's block does for one token, each launch against those that it stands for.

"apart" is what the block does without it: ComfyUI's norms with their 1 + w, its additions, comfy-kitchen's rotation,
index_copy, two products with a softmax between, one launch a weight. Correctness comes first, against the plain torch
of kernels/one_token.py: the part of elements that differ, and the relative error. The calls follow each other in a
CUDA graph, as in the token loop; "x floor" counts the bytes that have to be read. ``SLOTS`` slots of the cache have a
token; with a window the last ``WINDOW`` of them count, and "apart" reads them all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import common

HIDDEN, INNER, GROUPS, WIDTH, MLP, EPS = 3840, 16, 8, 256, 15360, 1e-6
SLOTS, WINDOW = 1400, 1024
Case = tuple[Callable, Callable, Callable, list[tuple], float]  # fused, apart, plain torch, argument sets, bytes read


def _tensor(*shape: int) -> Any:
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _weight(rows: int, cols: int) -> Any:
    from nvfp4_video.kernels import reference

    return reference.quantize(_tensor(rows, cols) / cols**0.5)


def _norm(x: Any, weight: Any) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, weight.shape, weight + 1.0, EPS)


def product_cases(sets: int) -> dict[str, Case]:
    """Weights in one launch."""
    import torch
    from nvfp4_video.kernels import dispatch, one_token
    from nvfp4_video.kernels.triton import gemv

    def one_by_one(x, *weights):
        return [dispatch.gemv(x, weight) for weight in weights]

    def gelu_times(x, *weights):
        gate, up = one_by_one(x, *weights)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def case(shapes: tuple[int, ...], gated: bool) -> Case:
        given = [(_tensor(1, HIDDEN), *(_weight(rows, HIDDEN) for rows in shapes)) for _ in range(sets)]
        return (
            lambda x, *weights: gemv.gemv_group(x, weights, gated),
            gelu_times if gated else one_by_one,
            lambda x, *weights: one_token.gemv_group(x, weights, gated),
            given, sum(weight.nbytes for weight in given[0][1:]),
        )  # fmt: skip

    heads = INNER * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH
    return {"q, k and v": case(heads, False), "gate and up, GELU of one times the other": case((MLP, MLP), True)}


def norm_cases(sets: int) -> dict[str, Case]:
    """The residual stream."""
    from nvfp4_video.kernels import one_token
    from nvfp4_video.kernels.triton.one_token import add_norm as fused

    def apart(x, add, weight, eps):
        if add is not None:
            x.add_(_norm(*add))
        return None if weight is None else _norm(x, weight)

    def case(add: bool, norm: bool) -> Case:
        def arguments() -> tuple:
            added = (_tensor(1, HIDDEN), _tensor(HIDDEN)) if add else None
            return _tensor(1, HIDDEN), added, _tensor(HIDDEN) if norm else None, EPS

        given = [arguments() for _ in range(sets)]
        return fused, apart, one_token.add_norm, given, 2 * HIDDEN * (2 + 2 * add)

    found = {"norm": case(False, True), "norm, addition, norm of the sum": case(True, True)}
    return found | {"norm, addition": case(True, False)}


def head_cases(sets: int) -> dict[str, Case]:
    """Heads and cache."""
    import comfy_kitchen
    import torch
    from nvfp4_video.kernels import one_token
    from nvfp4_video.kernels.triton import attend
    from nvfp4_video.kernels.triton.one_token import place_token

    angle = torch.randn(WIDTH // 2, device="cuda")
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(-1, 2, 2)
    bias = torch.full((-(-SLOTS // 8) * 8 + 40,), float("-inf"), device="cuda")
    bias[:SLOTS] = 0
    position, scale = torch.tensor([SLOTS - 1], device="cuda"), WIDTH**-0.5

    def placed_apart(qkv, weights, rotation, position, cache, eps):
        q, k, v = qkv.view(1, 1, -1, WIDTH).split((INNER, GROUPS, GROUPS), 2)
        q, k = _norm(q.transpose(1, 2), weights[0]), _norm(k.transpose(1, 2), weights[1])
        q, k = comfy_kitchen.apply_rope_split_half(q, k, rotation.view(1, 1, 1, -1, 2, 2))
        for kept, new in zip(cache, (k.transpose(1, 2), v), strict=True):
            kept.index_copy_(0, position, new[0])
        return q

    def attended_apart(query, key, value, position):
        scores = torch.bmm(query.view(GROUPS, -1, WIDTH), key.permute(1, 2, 0), out_dtype=torch.float32)
        weights = torch.add(bias, scores, alpha=scale).softmax(-1).to(query.dtype)
        return torch.bmm(weights, value.transpose(0, 1))

    def cache() -> tuple:
        return _tensor(len(bias), GROUPS, WIDTH), _tensor(len(bias), GROUPS, WIDTH)

    weights, lines = (_tensor(WIDTH), _tensor(WIDTH)), (INNER + 2 * GROUPS) * WIDTH
    placed = [(_tensor(lines), weights, rotation, position, cache(), EPS) for _ in range(sets)]
    attended = [(_tensor(INNER, WIDTH), *cache(), position) for _ in range(sets)]
    name = "norm and rotation of q and k, k and v into the cache"
    found = {name: (place_token, placed_apart, one_token.place_token, placed, 2 * lines)}
    for window in (None, WINDOW):
        run = attend.prepare(INNER, (len(bias), GROUPS, WIDTH), scale, window, bias.device)
        plain = functools.partial(one_token.attend, scale=scale, window=window)
        moved = 4 * (window or SLOTS) * GROUPS * WIDTH
        found[f"attention to {window or SLOTS:,} slots"] = run, attended_apart, plain, attended, moved
    return found


def cases(sets: int) -> dict[str, Case]:
    """Name -> what is compared."""
    return norm_cases(sets) | head_cases(sets) | product_cases(sets)


def _copy(value: Any) -> Any:
    import torch

    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list:
    import torch

    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def check() -> list[dict[str, Any]]:
    """Each launch against plain torch on the same inputs, outputs and what is written in place."""
    import torch
    from nvfp4_video.kernels import one_token

    found, kept = [], one_token.pick_backend
    for name, (fused, _, plain, sets, _) in cases(1).items():
        results = []
        for run in (fused, plain):
            given = _copy(sets[0])
            torch.cuda.synchronize()  # a kernel that overlaps the one before it reads what that must not have written
            one_token.pick_backend = kept if run is fused else lambda device: ("torch", "")
            results.append(_tensors((run(*given), given)))
        row: dict[str, Any] = {"launch": name, "differ": 0.0, "error": 0.0}
        for mine, right in zip(*results, strict=True):
            row["differ"] = max(row["differ"], float((mine != right).float().mean()))
            error = float((mine.double() - right.double()).norm() / right.double().norm())
            row["error"] = max(row["error"], error if error == error else float("inf"))
        found.append(row)
    one_token.pick_backend = kept
    return found


def measure(bandwidth: float, reps: int) -> list[dict[str, Any]]:
    """Microseconds of each launch and of those that it stands for, by turns; medians of ``reps`` runs."""
    found = []
    for name, (fused, apart, _, sets, moved) in cases(8).items():
        times = [(common.time_gpu(fused, sets, rounds=9), common.time_gpu(apart, sets, rounds=9)) for _ in range(reps)]
        mine, other = (sorted(column)[reps // 2] * 1e6 for column in zip(*times, strict=True))
        row = {"launch": name, "us": mine, "apart us": other, "ratio": mine / other}
        found.append(row | {"x floor": mine / 1e6 * bandwidth / moved})
    return found


def main() -> int:
    """Returns 1 if a kernel is not what plain torch makes of the same tensors, but for rounding."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--reps", type=int, default=3, help="repetitions; default 3")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    checks = check()
    common.print_table(checks, {"differ": ".1e", "error": ".1e"})
    rows = measure(bandwidth, options.reps)
    common.print_table(rows, {"us": ".1f", "apart us": ".1f", "ratio": ".2f", "x floor": ".2f"})
    content = {"facts": found, "copy_bandwidth": bandwidth, "checks": checks, "rows": rows}
    common.save("one_token", options.out, content)
    return common.exit_status([one for one in checks if not one["error"] < 5e-3])


if __name__ == "__main__":
    sys.exit(main())
