# SPDX-License-Identifier: Apache-2.0
"""Does every reader of what others send take time in proportion to its size, also where the shape is made to be slow?

usage: python benchmarks/scaling.py [--most N] [--repeats N] [--out FILE]

Prompts and headers come from samples/shapes.py, in sizes that double. A figure is the least CPU time of the repeats, so
that other work on the machine counts little. ``growth``: time per item at the largest size by that at a quarter of it,
1 where a reader is linear and 4 where it is quadratic; small sizes have a share that is the same for all. The guard
runs without a host, over tests/stub_comfy, and asks for files that are not there.

``large``: headers as long as they may be, full of one thing each, in a process of their own: CPU seconds until
read_header has read or refused it, until inspect has, and the most memory, that of Python and torch included.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

LEAST = 1000
LARGE_BYTES = 99_000_000


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def header_readers(path: Path) -> dict[str, Callable[[], Any]]:
    """Reader -> a call of it on this file."""
    from nvfp4_video.checkpoint.file.header import read_header
    from nvfp4_video.checkpoint.identify.components import find_components
    from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
    from nvfp4_video.checkpoint.identify.vae_signatures import find_vaes
    from nvfp4_video.draw.inspect import inspection_picture

    header, found = read_header(path), inspect_checkpoint(path)
    return {
        "read_header": lambda: read_header(path),
        "find_vaes": lambda: find_vaes(header),
        "find_components": lambda: find_components(header),
        "inspect": lambda: inspect_checkpoint(path),
        "picture": lambda: inspection_picture(found),
    }


def large(make: Callable[[int], str], folder: Path) -> dict[str, Any]:
    """One full header: seconds and bytes of reading it."""
    from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
    from nvfp4_video.checkpoint.identify.report import inspect_checkpoint

    path = folder / "large.safetensors"

    def write() -> None:
        text = make(LARGE_BYTES).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)

    def read(reader: Callable[[Path], Any]) -> None:
        try:
            reader(path)
        except CheckpointError:
            os._exit(1)

    in_own_process(write)
    row: dict[str, Any] = {"MB": round(path.stat().st_size / 1e6, 1)}
    for reader in (read_header, inspect_checkpoint):
        code, usage = in_own_process(lambda reader=reader: read(reader))
        row[reader.__name__] = {
            "seconds": round(usage.ru_utime + usage.ru_stime, 2), "peak_mib": usage.ru_maxrss // 1024,
            "refused": bool(code),
        }  # fmt: skip
    return row


def in_own_process(call: Callable[[], Any]) -> tuple[int, Any]:
    """-> exit code, usage of CPU and memory."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise RuntimeError(f"a measurement ended with {code}")
    return code, usage


def measure(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    from nvfp4_video.host.doctor.facts import Fact
    from nvfp4_video.host.guard import check as guard
    from nvfp4_video.samples import shapes

    values = {"prefetch_crash": True, "dynamic_vram": True, "async_offload_streams": 2, "capability": (9, 0)}
    host = {name: Fact(name, "", name, value, "", "made") for name, value in values.items()}
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    for size in sizes:
        for name, make in shapes.PROMPTS.items():
            prompt = make(size)
            took = least_seconds(lambda prompt=prompt: guard.check(prompt, host), repeats)
            seconds.setdefault(("guard", name), {})[size] = took
        with tempfile.TemporaryDirectory() as folder:
            for name, make in shapes.HEADERS.items():
                path = Path(folder, f"{name}.safetensors")
                shapes.write_names(path, make(size))
                for reader, call in header_readers(path).items():
                    seconds.setdefault((reader, name), {})[size] = least_seconds(call, repeats)
    rows = []
    for (reader, shape), took in seconds.items():
        us = {size: value / size * 1e6 for size, value in took.items()}
        growth = us[sizes[-1]] / us[sizes[-3]]
        row = {f"{n:,}": value for n, value in us.items()} | {"growth": growth}
        rows.append({"reader": reader, "shape": shape} | {name: round(value, 3) for name, value in row.items()})
    return rows


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--most", type=int, default=32_000, help="largest size")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    common.import_pack()
    sys.path.insert(0, str(common.ROOT / "tests" / "stub_comfy"))
    sizes = [LEAST]
    while sizes[-1] * 2 <= arguments.most:
        sizes.append(sizes[-1] * 2)
    from nvfp4_video.samples import shapes

    with tempfile.TemporaryDirectory() as folder:
        full = [{"full of": name} | large(make, Path(folder)) for name, make in shapes.LARGE.items()]
    for row in full:
        print(row)
    rows = measure(sizes, arguments.repeats)
    facts = common.facts() | {"cpu_cores": os.cpu_count()}
    common.print_facts(facts)
    print("microseconds per item")
    common.print_table(rows, {f"{size:,}": ".1f" for size in sizes} | {"growth": ".2f"})
    unit = "microseconds per item"
    common.save("scaling", arguments.out, {"facts": facts, "unit": unit, "rows": rows, "large": full})


if __name__ == "__main__":
    main()
