# SPDX-License-Identifier: Apache-2.0
"""How much memory does taking a checkpoint apart need, and how fast is it beside a plain copy of the same bytes?

usage: python benchmarks/split.py [--gigabytes N] [--repeats N] [--folder DIR] [--out FILE]

The checkpoint has LTX-2.3's VAEs in their true shapes (726 and 182 million parameters in BF16) and a diffusion model of
NVFP4 layers that fills it up to the size asked for; all bytes are random. Every run is a process of its own, which says
by how much its memory peaked above what it had before the split. Both sides end with fsync, in turn, after one round
that is not counted; the file is in the page cache if memory allows. On Linux the whole is repeated in memory, because a
disk's speed varies from run to run more than the two sides differ. largest_tensor counts a restored weight as stored
and as BF16, since it is there twice; the speed of restoring is that of converting on the CPU, not of copying.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

MIB = 2**20
ROW_BYTES = 4096 * 4096 // 2
RESTORED = "video_vae from FP8"
MEMORY = Path("/dev/shm")  # noqa: S108  (a private folder is made in it)


def sizes() -> dict[str, list[int]]:
    from nvfp4_video.samples.recorded import recorded

    keys = recorded("ltx_vae_keys")
    return {f"vae.{name}": shape for name, shape in keys["video_vae"].items()} | keys["audio_vae"]


def write_source(path: Path, gigabytes: float, fp8: bool) -> None:
    """A full checkpoint; with ``fp8`` only its video VAE, large kernels as scaled FP8."""
    import numpy as np
    from nvfp4_video.checkpoint.file.container import PlannedTensor, write_checkpoint
    from nvfp4_video.samples.recorded import recorded

    noise = memoryview(np.random.default_rng(0).integers(0, 256, 512 * MIB, np.uint8))
    one = memoryview(np.ones(1, np.float32).tobytes())
    planned, total = [], 0

    def add(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal total
        total += nbytes
        planned.append(PlannedTensor(name, dtype, shape, lambda: one if dtype == "F32" else noise[:nbytes]))

    for name, shape in sizes().items():
        count = math.prod(shape)
        if not fp8:
            add(name, "BF16", tuple(shape), 2 * count)
        elif name.startswith("vae."):
            kernel = len(shape) == 5 and count > MIB
            add(name, "F8_E4M3" if kernel else "BF16", tuple(shape), count if kernel else 2 * count)
            if kernel:
                add(f"{name}_scale", "F32", (), 4)
    block = 0
    while not fp8 and total < gigabytes * 1e9:
        layer = f"model.diffusion_model.transformer_blocks.{block}.attn1.to_q"
        add(f"{layer}.weight", "U8", (4096, 2048), ROW_BYTES)
        add(f"{layer}.weight_scale", "F8_E4M3", (4096, 256), 2 * ROW_BYTES // 16)
        add(f"{layer}.weight_scale_2", "F32", (), 4)
        block += 1
    planned.sort(key=lambda tensor: tensor.dtype != "F32")
    write_checkpoint(path, planned, {"config": json.dumps(recorded("ltx23_config"))})


def split_once(source: Path, folder: Path, parts: list[str]) -> dict[str, float]:
    """Runs in the child: seconds of the split, and MiB by which its memory peaked above where it began."""
    common.import_pack()
    import torch
    from nvfp4_video.checkpoint.write.split import split

    torch.set_num_threads(os.cpu_count() or 1)
    torch.zeros(1).to(torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = status("VmRSS")
    start = time.perf_counter()
    written = split(source, {part: f"{part}.safetensors" for part in parts}, base=folder)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": status("VmHWM") - before, "bytes": sum(part.nbytes for part in written)}


def status(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith(f"{field}:")).split()[1]) / 1024


def in_child(source: Path, folder: Path, parts: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(source), str(folder), *parts]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return json.loads(answer.stdout.splitlines()[-1])


def copy_once(source: Path, target: Path) -> float:
    """Seconds of the system's own copy of a file, on disk."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(source: Path, folder: Path, parts: list[str], repeats: int) -> dict[str, Any]:
    """Splits and copies in turn -> medians, and the ratio of the speeds."""
    from nvfp4_video.checkpoint.file.header import read_header

    splits, copies = [], []
    out = folder / "out"
    copy = folder / "copy.safetensors"
    in_child(source, out, parts)
    files = sorted(out.iterdir())
    for _ in range(repeats + 1):
        splits.append(in_child(source, out, parts))
        copies.append(sum(copy_once(file, copy) for file in files))
        copy.unlink()
    splits, copies = splits[1:], copies[1:]
    header = read_header(source)
    prefixes = {"video_vae": "vae.", "audio_vae": ("audio_vae.", "vocoder."), "diffusion_model": "model."}
    starts = tuple(_flat(prefixes[p] for p in parts))
    # A restored weight is there twice, as stored and as BF16.
    tensors = [info for name, info in header.tensors.items() if name.startswith(starts)]
    largest = max(3 * i.nbytes if i.dtype == "F8_E4M3" and len(i.shape) == 5 else i.nbytes for i in tensors) / MIB
    seconds, copied = statistics.median(run["seconds"] for run in splits), statistics.median(copies)
    return {
        "components": ", ".join(parts),
        "gigabytes": splits[0]["bytes"] / 1e9,
        "split_s": seconds,
        "copy_s": copied,
        "speed_of_copy": copied / seconds,
        "lowest": min(c / s["seconds"] for c, s in zip(copies, splits, strict=True)),
        "largest_tensor_mib": largest,
        "peak_mib": max(run["peak_mib"] for run in splits),
        "beyond_largest_mib": max(run["peak_mib"] for run in splits) - largest,
    }


def _flat(prefixes: Any) -> list[str]:
    return [one for prefix in prefixes for one in ([prefix] if isinstance(prefix, str) else prefix)]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(split_once(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
        return
    parser = common.make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default the system's folder for temporary files")
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        print("No /proc/self/clear_refs: this benchmark reads its memory from Linux and has nothing to do here.")
        return
    common.import_pack()
    found = common.facts() | {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}
    common.print_facts(found)
    rows = []
    places = {"disk": args.folder}
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 3 * args.gigabytes * 1e9:
        places["memory"] = MEMORY
    for place, parent in places.items():
        with tempfile.TemporaryDirectory(prefix="nvfp4-split-", dir=parent) as name:
            folder = Path(name)
            source = folder / "full.safetensors"
            write_source(source, args.gigabytes, fp8=False)
            found_here = [measure(source, folder, ["video_vae", "audio_vae", "diffusion_model"], args.repeats)]
            found_here.append(measure(source, folder, ["video_vae"], args.repeats))
            write_source(source, args.gigabytes, fp8=True)
            found_here.append(measure(source, folder, ["video_vae"], args.repeats) | {"components": RESTORED})
            rows += [{"place": place} | row for row in found_here]
    common.print_table(rows, dict.fromkeys(rows[0], ".2f"))
    common.save("split", args.out, {"facts": found, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
