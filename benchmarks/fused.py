# SPDX-License-Identifier: Apache-2.0
"""Time the passes between the products of an LTX-2.3 block, each fused one against those that it stands for.

"apart" is what ComfyUI 0.38 does with comfy-kitchen's kernels and this pack's row quantisation: expanded modulations,
``rms_adaln``, ``addcmul``, gates, norms, rotation. Correctness comes first, against the plain torch of
kernels/fused.py: the part of elements that differ, and the relative error. "x floor" counts the bytes that have to be
moved. --tiles tries rows a program and columns a warp.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import common

COLS, HEADS, FRAMES, COUNT = 4096, 32, 16, 9
TOKENS = (6144, 14080)
TILES = ((1, 512), (4, 256), (4, 512), (4, 1024), (8, 256), (8, 512))
Case = tuple[Callable, Callable, list[tuple], float]  # fused, apart, argument sets, bytes a token


def _tensor(*shape: int):
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _expanded(ada, at: int):
    """A modulation as the host makes it: added on frames, then copied to every token."""
    table, steps = ada.table[at], ada.steps.view(-1, COUNT, COLS)[:, at]
    return (table + steps).unsqueeze(1).expand(-1, ada.group, -1).reshape(1, -1, COLS)


def cases(tokens: int, sets: int) -> dict[str, Case]:
    """Name -> what is compared, for a stream of ``tokens``."""
    import comfy_kitchen as ck
    import torch
    from nvfp4_video.kernels import fused
    from nvfp4_video.kernels.fused import Ada, Add, Want
    from nvfp4_video.kernels.triton.quantize_rows import quantize_rows

    def ada(frames: int) -> Ada:
        return Ada(_tensor(COUNT, COLS) / 8, _tensor(frames, COUNT * COLS) / 8, tokens // frames)

    def rows(x):
        return quantize_rows(x.view(-1, COLS))

    def norm_apart(x, one):
        return rows(ck.rms_adaln(x, _expanded(one, 1), _expanded(one, 0)))

    def add_apart(x, y, one):
        return x.addcmul_(y, _expanded(one, 2))

    def both_apart(x, y, one):
        add_apart(x, y, one)
        return norm_apart(x, one)

    def gates_apart(x, logits):
        gates = 2.0 * torch.sigmoid(logits)
        return rows((x.view(1, tokens, HEADS, -1) * gates.unsqueeze(-1)).view(1, tokens, COLS))

    def rope_apart(q, k, w, rotation):
        q, k = (torch.nn.functional.rms_norm(x, (COLS,), w, 1e-5).view(1, tokens, HEADS, -1) for x in (q, k))
        return ck.apply_rope_split_half(q, k, rotation)

    def rotation():
        angle = torch.randn(1, tokens, HEADS, COLS // HEADS // 2, device="cuda")
        matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1)
        return matrix.bfloat16().view(*angle.shape, 2, 2)

    def x(n: int = 1):
        return [_tensor(1, tokens, COLS) for _ in range(n)]

    want = lambda one, quantize=True: Want(one, 1, 0, quantize)  # noqa: E731
    found: dict[str, Case] = {}
    for frames in (1, FRAMES):
        one, name = ada(frames), "a frame" if frames > 1 else "a clip"
        found[f"norm, modulation by {name}, rows"] = (
            lambda x, one: fused.norm_rows(x, None, [want(one)]), norm_apart, [(*x(), one) for _ in range(sets)],
            3 * COLS,
        )  # fmt: skip
        found[f"gated addition by {name}, norm, modulation, rows"] = (
            lambda x, y, one: fused.norm_rows(x, Add(y, one, 2), [want(one)]), both_apart,
            [(*x(2), one) for _ in range(sets)], 7 * COLS,
        )  # fmt: skip
    found["norm and modulation alone"] = (
        lambda x, one: fused.norm_rows(x, None, [want(one, False)]),
        lambda x, one: ck.rms_adaln(x, _expanded(one, 1), _expanded(one, 0)), [(*x(), one) for _ in range(sets)],
        4 * COLS,
    )  # fmt: skip
    found["gated addition, norm, two modulations, rows"] = (
        lambda x, y, one: fused.norm_rows(x, Add(y, one, 2), [want(one), Want(one, 4, 3, True)]),
        lambda x, y, one: (both_apart(x, y, one), norm_apart(x, one)), [(*x(2), one) for _ in range(sets)], 8 * COLS,
    )  # fmt: skip
    found["gated addition"] = (
        lambda x, y, one: fused.norm_rows(x, Add(y, one, 2), [], norm=False), add_apart,
        [(*x(2), one) for _ in range(sets)], 6 * COLS,
    )  # fmt: skip
    found["gates of heads, rows"] = (
        lambda x, logits: fused.gate_heads(x, logits, True), gates_apart,
        [(*x(), _tensor(1, tokens, HEADS)) for _ in range(sets)], 3 * COLS,
    )  # fmt: skip
    found["norm and rotation of q and k"] = (
        lambda q, k, w, rotation: fused.norm_rope([(q, w), (k, w)], rotation, 1e-5), rope_apart,
        [(*x(2), _tensor(COLS), rotation()) for _ in range(sets)], 12 * COLS,
    )  # fmt: skip
    found["norm of q"] = (
        lambda q, w: fused.norm_rope([(q, w)], None, 1e-5),
        lambda q, w: torch.nn.functional.rms_norm(q, (COLS,), w, 1e-5), [(*x(), _tensor(COLS)) for _ in range(sets)],
        4 * COLS,
    )  # fmt: skip
    found["norm, modulation, rows and their tensor"] = (
        lambda x, one: fused.norm_rows(x, None, [Want(one, 1, 0, True, True)]), norm_apart,
        [(*x(), ada(1)) for _ in range(sets)], 5 * COLS,
    )  # fmt: skip
    return found


def check() -> list[dict[str, Any]]:
    """Each kernel against plain torch on the same inputs, over poisoned memory."""
    import torch
    from nvfp4_video.kernels import fused

    found = []
    for name, (run, _, sets, _) in cases(FRAMES * 24, 1).items():
        results = []
        for backend in ("triton", "torch"):
            arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in sets[0]]
            poison = torch.full((64 << 20,), 255, device="cuda", dtype=torch.uint8)
            del poison
            kept, fused.pick_backend = fused.pick_backend, lambda device, backend=backend: (backend, "")
            out = run(*arguments)
            fused.pick_backend = kept
            results.append([arguments[0], *(one.plain() if hasattr(one, "plain") else one for one in _listed(out))])
        row: dict[str, Any] = {"pass": name, "differ": 0.0, "error": 0.0}
        for mine, right in zip(*results, strict=True):
            row["differ"] = max(row["differ"], float((mine != right).float().mean()))
            error = float((mine.double() - right.double()).norm() / right.double().norm())
            row["error"] = max(row["error"], error if error == error else float("inf"))
        found.append(row)
    return found


def _listed(out: Any) -> list:
    return list(out) if isinstance(out, list | tuple) else [out]


def measure(tokens: int, bandwidth: float, reps: int) -> list[dict[str, Any]]:
    """Milliseconds of each pass, fused and apart by turns; the median of ``reps`` runs and their extremes."""
    found = []
    for name, (run, apart, sets, moved) in cases(tokens, 3).items():
        times = [(common.time_gpu(run, sets, rounds=7), common.time_gpu(apart, sets, rounds=7)) for _ in range(reps)]
        ratios = sorted(mine / other for mine, other in times)
        mine, other = (sorted(column)[reps // 2] * 1e3 for column in zip(*times, strict=True))
        row = {"pass": name, "tokens": tokens, "fused ms": mine, "apart ms": other, "ratio": ratios[reps // 2]}
        row |= {"lowest": ratios[0], "highest": ratios[-1], "x floor": mine / 1e3 * bandwidth / (moved * tokens)}
        found.append(row)
    return found


def set_tile(rows: int, cols: int) -> None:
    """Rows a program and columns a warp of all kernels from now on."""
    from nvfp4_video.kernels.triton import gate_heads, norm_rope, norm_rows

    norm_rows._TILE = norm_rows._TILE_OF_TWO = norm_rows._TILE_OF_NONE = rows, cols
    gate_heads._WARP_COLS, norm_rope._WARP_PAIRS = cols, cols // 2
    for module in (norm_rows, gate_heads, norm_rope):
        module._launcher.cache_clear()


def tiles(tokens: int) -> list[dict[str, Any]]:
    """Microseconds by rows a program and columns a warp."""
    found = []
    for rows, cols in TILES:
        set_tile(rows, cols)
        row: dict[str, Any] = {"rows": rows, "columns a warp": cols}
        for number, (run, _, sets, _) in enumerate(cases(tokens, 3).values()):
            row[str(number)] = common.time_gpu(run, sets, rounds=5) * 1e6
        found.append(row)
    return found


def main() -> int:
    """Returns 1 if a kernel is not what plain torch makes of the same tensors, but for rounding."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--reps", type=int, default=3, help="repetitions; default 3")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default %(default)s")
    parser.add_argument("--tiles", action="store_true", help="also time tiles, at the first number of tokens")
    options = parser.parse_args()
    found, bandwidth = common.begin_on_gpu()
    checks = check()
    common.print_table(checks, {"differ": ".1e", "error": ".1e"})
    tokens = list(map(int, options.tokens.split(",")))
    rows = [row for each in tokens for row in measure(each, bandwidth, options.reps)]
    common.print_table(rows, {name: ".3f" for name in ("ratio", "lowest", "highest", "x floor")})
    tile_rows = tiles(tokens[0]) if options.tiles else []
    if tile_rows:
        common.print_table(tile_rows, {str(number): ".1f" for number in range(9)})
    content = {"facts": found, "copy_bandwidth": bandwidth, "checks": checks, "rows": rows, "tiles": tile_rows}
    common.save("fused", options.out, content)
    return common.exit_status([one for one in checks if not one["error"] < 5e-3])


if __name__ == "__main__":
    sys.exit(main())
