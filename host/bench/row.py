# SPDX-License-Identifier: Apache-2.0
"""One row of ``bench``: a model file loaded, sampled and decoded in this process, as a job of the parent says.

The parent (cli/bench_child.py) starts one process for each repetition of a row, so that the first clip is a cold one
and the peaks of memory are this row's alone. What is found goes to stdout as lines that begin with ``MARK``; whatever
else ComfyUI writes is its log. The process ends when its stdin does: a parent that dies leaves no child behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...kernels.errors import PackError
from . import session
from .meter import PeakMemory, peak_host_memory

MARK = "bench-row: "
STOCK, OURS, MAKE = "stock", "ours", "make"
_SAY_SECONDS = 0.2


def main(path: Path) -> bool:
    """Do the job in the JSON file ``path`` and tell the parent -> whether it could be done."""
    job = json.loads(path.read_text(encoding="utf-8"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        (_make if job["loader"] == MAKE else _row)(job)
    except Exception as error:
        traceback.print_exc()
        _tell("error", text=_describe(error))
        return False
    _tell("done", host_peak_gb=peak_host_memory())
    return True


def _end_with_parent() -> None:
    os.read(0, 1)  # returns at the end of the file; sys.stdin would hold its lock while the interpreter ends
    os._exit(3)


def _tell(event: str, **content: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps({'event': event} | content)}\n")
    sys.stdout.flush()


def _describe(error: Exception) -> str:
    """One line for the table."""
    text = " ".join(str(error).split())[:500]
    if "OutOfMemory" in type(error).__name__:
        return f"out of GPU memory: {text}"
    if isinstance(error, MemoryError):
        return f"out of host memory: {text}"
    return text if isinstance(error, PackError) and text else f"{type(error).__name__}: {text}"


def _make(job: Mapping[str, Any]) -> None:
    """Write the files of ``--synthetic``; no ComfyUI."""
    import torch

    from ...samples import released

    device = "cuda" if torch.cuda.is_available() and "--cpu" not in job["flags"] else "cpu"
    last = 0.0

    def say(name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SAY_SECONDS:
            last = time.monotonic()
            _tell("stage", text=f"{name}, {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    files = released.write_all(Path(job["save"]), job["formats"], job["layers"], job["small"], device, say)
    _tell("files", files={name: str(path) for name, path in files.items()})


def _row(job: Mapping[str, Any]) -> None:
    _tell("stage", text="starting ComfyUI")
    started = time.perf_counter()
    version = session.start(job["comfyui"], job["flags"], job["dynamic"])
    import comfy.model_management
    import torch

    from ...measure.machine import facts
    from ..compute.modes import MODES, obstacle

    device = comfy.model_management.get_torch_device()
    refused = {mode: found for mode in MODES if (found := obstacle(mode, device))}
    boot = time.perf_counter() - started
    _tell("host", comfyui=version, facts=facts(), refused=refused, boot_s=boot)
    if job["compute"] in refused:
        return
    with torch.inference_mode():  # as the host runs its nodes
        _tell("stage", text="loading the model")
        start = time.perf_counter()
        patcher, report = _load(job)
        loaded = {"load_s": time.perf_counter() - start, "report": report}
        loaded["dynamic_vram"] = bool(getattr(patcher, "is_dynamic", bool)())
        _tell("stage", text="loading the VAEs")
        start = time.perf_counter()
        vaes = {kind: _vae(job[f"{kind}_vae"], kind) for kind in ("video", "audio") if job[f"{kind}_vae"]}
        _tell("loaded", **loaded, vae_load_s=time.perf_counter() - start)
        text = _conditioning(job["conditioning"])
        for number in range(1 + job["warm"]):
            found, latents, pixels, sound = _clip(job, patcher, vaes, text, number)
            found["latents_sha256"] = _digest(latents)
            if number == 0 and job["save"]:
                found["notes"] = _save(Path(job["save"]), latents, pixels, sound)
            _tell("clip", cold=number == 0, **found)


def _load(job: Mapping[str, Any]) -> tuple[Any, str | None]:
    """-> (the host's patcher, what our loader reports)."""
    if job["loader"] == STOCK:
        import comfy.sd

        return comfy.sd.load_diffusion_model(job["path"]), None
    from ..load.model import load_model

    patcher, report = load_model(job["path"], job["compute"])
    return patcher, str(report)


def _vae(path: str, kind: str) -> Any:
    from ..load.vae import load_vae

    return load_vae(path, kind)[0]


def _conditioning(path: str | None) -> Any:
    """A safetensors file with one tensor (1, tokens, width) -> that tensor; None without a file."""
    if path is None:
        return None
    from ...checkpoint.file.container import TensorReader

    with TensorReader(path) as reader:
        return reader.get(next(iter(reader.header.tensors))).float().clone()


def _clip(job: Mapping[str, Any], patcher: Any, vaes: Mapping[str, Any], text: Any, number: int) -> tuple:
    """One clip, timed -> (times and peaks, latents, frames or None, (waveform, rate) or None).

    Memory is polled in the cold clip only, whose steps are in no table.
    """
    import torch

    cold, name = number == 0, f"warm clip {number}" if number else "cold clip"

    def on_step(done: int) -> None:
        _tell("stage", text=f"{name}, step {done} of {job['steps']}")

    clip = (job["size"], job["config"], job["frames"], job["seed"], job["steps"], job["sigmas"])
    with PeakMemory(poll=cold) as sampling:
        (steps, latents), sampling_s = _timed(lambda: session.sample(patcher, *clip, text, on_step))
    found = {"sampling_s": sampling_s, "steps_s": steps, "decode_s": None, "sound_s": None}
    peaks, pixels, sound = [sampling], None, None
    if vaes:
        _tell("stage", text=f"{name}, decoding")
        with PeakMemory(poll=cold) as decoding:
            if "video" in vaes:
                pixels, found["decode_s"] = _timed(lambda: vaes["video"].decode(latents[0]))
            if "audio" in vaes:
                # With cuDNN's default algorithms two decodes of one latent differ by a percent.
                torch.backends.cudnn.deterministic = True
                sound, found["sound_s"] = _timed(lambda: session.decode_sound(vaes["audio"], latents[1]))
                torch.backends.cudnn.deterministic = False
        session.end_of_node()
        peaks.append(decoding)
    for kind in ("gpu", "torch", "host"):
        values = [getattr(peak, kind) for peak in peaks]
        found |= {f"peak_{kind}_gb": max(values), f"sampling_{kind}_gb": values[0]}
    return found, latents, pixels, sound


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    import torch

    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _digest(latents: list) -> str:
    """SHA-256 of the latents' numbers: equal digests, equal bits."""
    found = hashlib.sha256()
    for latent in latents:
        found.update(latent.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _save(folder: Path, latents: list, pixels: Any, sound: Any) -> list[str]:
    """Write video.npy, audio.npy, frames.npy and sound.npz for the parent to compare -> what could not be written."""
    import numpy as np

    from ...measure.media import MediaError, to_frames, to_sound

    folder.mkdir(parents=True, exist_ok=True)
    for name, latent in zip(("video", "audio"), latents, strict=True):
        np.save(folder / f"{name}.npy", latent.float().cpu().numpy())
    notes = []
    try:
        if pixels is not None:
            np.save(folder / "frames.npy", to_frames(pixels.reshape(-1, *pixels.shape[-3:])))
        if sound is not None:
            wave, rate = to_sound({"waveform": sound[0], "sample_rate": sound[1]})
            np.savez(folder / "sound.npz", wave=wave, rate=rate)
    except MediaError as error:
        notes.append(str(error))
    return notes
