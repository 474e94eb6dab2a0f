# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the pack as a package, hardware facts, timing, tables, result files.

torch is imported inside the functions: in_process.start_host has to choose the CUDA allocator first, as ComfyUI does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACK = "nvfp4_video"
COPY_BYTES = 4 << 30


def import_pack() -> None:
    """Make the repository importable as ``nvfp4_video`` whatever its folder is called; its entry point does not run."""
    if PACK not in sys.modules:
        spec = ModuleSpec(PACK, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[PACK] = importlib.util.module_from_spec(spec)


def make_parser(description: str | None, shapes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Parser with the options every benchmark has: --out, and with default ``shapes`` --shapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/<name>.json")
    if shapes:
        text = "OUTxIN, separated by commas; default %(default)s"
        parser.add_argument("--shapes", default=",".join(shapes), help=text)
    return parser


def need_cuda() -> None:
    """Leave with a message, and no error, where there is nothing to measure."""
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark measures GPU kernels and has nothing to do here.")
        raise SystemExit(0)


def begin_on_gpu() -> tuple[dict[str, Any], float]:
    """-> (``facts``, bytes a second of a copy), both printed; leaves where there is no CUDA device."""
    need_cuda()
    found = facts()
    print_facts(found)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s (bytes read + written)", flush=True)
    return found, bandwidth


def shapes_of(text: str) -> list[tuple[int, ...]]:
    """"2048x4096,..." -> [(2048, 4096), ...]."""
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",") if shape]


def facts() -> dict[str, Any]:
    """Hardware and versions that a number depends on."""
    import_pack()
    from nvfp4_video.measure import machine

    return machine.facts()


def time_gpu(call: Callable[..., Any], sets: Sequence[tuple], rounds: int = 25) -> float:
    """Median seconds of GPU time of one ``call(*arguments)``, over ``rounds`` rounds through all argument sets.

    The calls of a round are captured in a CUDA graph and replayed, so that the CPU's launch cost stays out of the
    figure; the outputs of one pass through the sets are distinct, so that no call writes where the one before it did.
    """
    import torch

    passes = max(1, -(-24 // len(sets)))
    for _ in range(2):
        kept = [call(*arguments) for arguments in sets]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            kept = [call(*arguments) for arguments in sets]  # noqa: F841  (see above)
    seconds = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(sets) / passes)
    return statistics.median(seconds)


def time_launch(call: Callable[[], Any], calls: int = 200, rounds: int = 15) -> float:
    """Median seconds the CPU needs to queue one ``call()``: the GPU is idle before a round and not waited for in it."""
    import torch

    seconds = []
    for _ in range(rounds + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds[2:])


def rotation(bytes_per_set: int, most: int = 64) -> int:
    """How many argument sets of that size exceed four times the L2 cache: at least 3, at most ``most``."""
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(3, min(most, -(-4 * cache // bytes_per_set)))


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy of random data, read and written bytes both counted."""
    import torch

    size = min(COPY_BYTES, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * size / statistics.median(seconds[2:])


def print_facts(found: dict[str, Any]) -> None:
    """One line of what the numbers below it were measured on."""
    named = ("gpu", "driver", "cuda", "cpu", "torch", "triton", "comfy-kitchen", "comfy-aimdo", "comfyui")
    print(", ".join(f"{name} {found[name]}" for name in named if found.get(name)), flush=True)


def print_table(rows: Iterable[dict[str, Any]], formats: dict[str, str] | None = None) -> None:
    """Print dictionaries of like keys as an aligned table; a missing value is a dash."""
    rows, formats = list(rows), formats or {}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(name), formats.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return format(value, form or ".4f")
    return str(value)


def save(name: str, out: Path | None, content: dict[str, Any]) -> None:
    """Write the result file and say where."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)


def exit_status(wrong: Sequence[Any]) -> int:
    """What of a script's checks is not right -> 1, after telling it, or 0."""
    if wrong:
        print(f"WRONG: {wrong}")
    return int(bool(wrong))
