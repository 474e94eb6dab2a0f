# SPDX-License-Identifier: Apache-2.0
"""Which launches of a vulnerable ComfyUI crash in the prefetch of joint audio and video, and what avoids it?

usage: python benchmarks/launch_crash.py [--out FILE]

COMFYUI_PATH: a checkout of commit 783782d5 (no release has the fault); comfy-aimdo 0.3.0, which it was made for, first
on PYTHONPATH; one NVIDIA GPU. Eight LTX-2.3 blocks of random weights in NVFP4, read from a file and resident, are
sampled in a process of its own for each case, with the joint latent ("av") or with a video latent only ("v").
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import in_process as comfyui

MARK = "case: "
SIZE, FRAMES, STEPS, LIMIT_S = "768x512", 33, 6, 100
# name -> launch flags, loader, with the guard's cure, kinds of latent
CASES = {
    "default": ((), "stock", False, ("av", "v")),
    "cure": ((), "stock", True, ("av",)),
    "--disable-async-offload": (("--disable-async-offload",), "stock", False, ("av",)),
    "--disable-dynamic-vram": (("--disable-dynamic-vram",), "stock", False, ("av",)),
    "our loader": ((), "ours", False, ("av", "v")),
    "our loader, cure": ((), "ours", True, ("av",)),
}
FACTS = ("prefetch_crash", "ltxav_needs_audio", "async_offload_streams", "dynamic_vram", "aimdo_version")


def write_model(path: Path) -> None:
    import step

    common.import_pack()
    from nvfp4_video.samples.released import recorded_model

    keys, config = recorded_model(8)
    step.write_nvfp4(path, keys, config, "cuda")


def sample(patcher: Any, config: dict, joint: bool) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, and the sums of the latents."""
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers
    import torch

    generator = torch.Generator().manual_seed(1)
    shapes = comfyui.latent_shapes(SIZE, FRAMES)
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    empty = [torch.zeros(shape) for shape in shapes]
    nested = comfy.nested_tensor.NestedTensor
    noise, empty = (nested(noise), nested(empty)) if joint else (noise[0], empty[0])
    width = config["cross_attention_dim"] + config["audio_cross_attention_dim"]
    condition = [[torch.randn(1, 64, width, generator=generator), {"frame_rate": comfyui.FRAME_RATE}]]
    times: list[float] = []

    def on_step(*_: Any) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(comfyui.SIGMAS[: STEPS + 1])
    result = comfy.sample.sample_custom(
        patcher, noise, 1.0, sampler, sigmas, condition, condition, empty, callback=on_step, disable_pbar=True, seed=1
    )
    comfyui.end_of_node()
    parts = list(result.unbind()) if joint else [result]
    return [b - a for a, b in zip(times, times[1:], strict=False)], [part.double().sum().item() for part in parts]


def run_case(name: str, kind: str, path: Path) -> dict[str, Any]:
    """Runs in the child."""
    flags, loader, cured, _ = CASES[name]
    found: dict[str, Any] = {"comfyui": comfyui.start_host(os.environ["COMFYUI_PATH"], flags)}
    common.import_pack()
    import comfy.sd
    import torch
    from nvfp4_video.checkpoint.file.header import read_header
    from nvfp4_video.checkpoint.identify.signatures import transformer_config
    from nvfp4_video.host.doctor import probe
    from nvfp4_video.host.guard import cure
    from nvfp4_video.host.load import model as load

    facts = probe.probe()
    found["probe"] = {name: facts[name].value for name in FACTS}
    try:
        with torch.inference_mode():  # as the host's executor runs every node
            patcher = comfy.sd.load_diffusion_model(str(path)) if loader == "stock" else load.load_model(str(path))[0]
            found["dynamic"] = bool(patcher.is_dynamic())
            if cured:
                patcher = cure.cure(patcher)
                found["proof"] = cure.prove(patcher)
            seconds, found["sums"] = sample(patcher, transformer_config(read_header(path)), kind == "av")
    except Exception as error:
        return found | {"result": f"{type(error).__name__}: {error}"}
    return found | {"result": "runs", "step_s": statistics.median(seconds)}


def in_child(name: str, kind: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", name, kind, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {"result": f"no end in {LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1][len(MARK) :]) if lines else {"result": f"ended with {done.stderr[-300:]}"}


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        name, kind, path = sys.argv[2:]
        sys.argv = sys.argv[:1]
        print(MARK + json.dumps(run_case(name, kind, Path(path))))
        return
    if sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]))
        return
    args = common.make_parser(__doc__).parse_args()
    common.need_cuda()
    found, rows = common.facts(), []
    with tempfile.TemporaryDirectory(prefix="nvfp4-crash-") as folder:
        path = Path(folder) / "ltx23-8-blocks.safetensors"
        subprocess.run([sys.executable, __file__, "--write", str(path)], check=True)  # noqa: S603
        for name, (_, _, _, kinds) in CASES.items():
            for kind in kinds:
                rows.append({"launch": name, "latent": kind} | in_child(name, kind, path))
    common.print_table([{key: row.get(key) for key in ("launch", "latent", "result", "step_s")} for row in rows])
    common.save("launch_crash", args.out, {"facts": found, "size": SIZE, "frames": FRAMES, "rows": rows})


if __name__ == "__main__":
    main()
