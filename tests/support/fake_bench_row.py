# SPDX-License-Identifier: Apache-2.0
"""In the place of a row's process of ``bench``: says what host/bench/row.py says, of numbers known beforehand.

usage: fake_bench_row.py JOB; the environment's BENCH_FAKE is JSON: row -> what goes wrong with it
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

MARK = "bench-row: "
REFUSED = {"fp8": "FP8 needs another GPU", "fp4": "FP4 needs another GPU"}
# Row -> factor of the reference's latents, seconds of a step, peak of GPU memory.
TRUTH = {"bf16": (1.0, 0.5, 42.0), "fp8": (1.01, 0.6, 25.0), "nvfp4": (1.1, 0.7, 18.0), "ours": (1.1, 0.45, 17.0)}


def tell(event: str, **content: object) -> None:
    sys.stdout.write(f"{MARK}{json.dumps({'event': event} | content)}\n")
    sys.stdout.flush()


def save(folder: Path, factor: float) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("video", "audio"):
        np.save(folder / f"{name}.npy", random.standard_normal((1, 8, 2, 4)).astype(np.float32) * np.float32(factor))
    frames = random.integers(60, 180, (2, 64, 64, 3)) * factor
    np.save(folder / "frames.npy", frames.clip(0, 255).astype(np.uint8))
    np.savez(folder / "sound.npz", wave=random.uniform(-0.5, 0.5, (2, 4800)).astype(np.float32) * factor, rate=48000)


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    row = "ours" if job["loader"] == "ours" else Path(job["path"]).stem.rpartition("-")[2]
    with open(os.environ["BENCH_CALLS"], "a", encoding="utf-8") as calls:
        calls.write(f"{row} {os.getpid()}\n")
    trouble = json.loads(os.environ.get("BENCH_FAKE", "{}")).get(row)
    sys.stdout.write("something of ComfyUI\n")
    tell("stage", text=f"at work in {os.getpid()}")
    if trouble == "hang":
        time.sleep(100)
    tell("host", comfyui="0.0.0", facts={"gpu": "a GPU", "torch": "2.0"}, refused=REFUSED, boot_s=1.0)
    if job["compute"] in REFUSED:
        return 0
    if trouble == "error":
        tell("error", text="out of GPU memory: tried to allocate 20 GiB")
        return 1
    if trouble == "kill":
        os.kill(os.getpid(), 9)
    factor, step, peak = TRUTH[row]
    tell("loaded", load_s=2.0, vae_load_s=0.5, dynamic_vram=True, report=None)
    for number in range(1 + job["warm"]):
        if number == 0 and job["save"]:
            save(Path(job["save"]), factor)
        memory = {f"{when}_{kind}_gb": peak for when in ("peak", "sampling") for kind in ("gpu", "torch", "host")}
        clip = {"sampling_s": 8 * step, "steps_s": [step] * 7, "decode_s": 1.0, "sound_s": 0.25} | memory
        tell("clip", cold=number == 0, latents_sha256=str(factor), **clip)
    tell("done", host_peak_gb=9.0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
