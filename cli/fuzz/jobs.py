# SPDX-License-Identifier: Apache-2.0
"""The writers and readers whose runs are disturbed: each in a process of its own, which may be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.file.header import CheckpointError
from ...checkpoint.identify.report import inspect_checkpoint
from ...checkpoint.verify.verify import verify
from ...checkpoint.write.quantize import quantize_checkpoint
from ...checkpoint.write.repair import repair, restore_header
from ...checkpoint.write.split import split
from ...samples import synthetic
from ..console import write_file
from .files import KEPT, PLAIN, small

DONE, REFUSED = 0, 3
FITS = "base_model.model.transformer."  # a prefix that goes, so that the new header fits in the old one's place
_LIMIT = 60.0

Call = Callable[[Path, Path, bool, Callable[[int, int], None]], Any]  # source, target, overwrite, on_step


@dataclass(frozen=True)
class Job:
    """One way to run: what it makes of the kind of source ``source``. ``in_place``: the source is the target."""

    source: str
    run: Call
    in_place: bool = False


def _quantize(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    quantize_checkpoint(source, target, PLAIN, overwrite=overwrite, on_step=step)


def _split(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    split(source, {"diffusion_model": target}, overwrite=overwrite, on_bytes=step)


def _repair(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    repair(source, target, overwrite=overwrite, on_bytes=step)


def _in_place(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    repair(source, in_place=True, overwrite=overwrite, on_bytes=step)


def _undo(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    restore_header(source)


def _picture(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    write_file(target, source.read_bytes())


def _inspect(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    target.write_text(json.dumps(inspect_checkpoint(source).as_dict()))


def _verify(source: Path, target: Path, overwrite: bool, step: Callable[[int, int], None]) -> None:
    target.write_text(str(verify(source, source.with_name("other.safetensors"), on_step=step)))


WRITERS: Mapping[str, Job] = {
    "quantize": Job("bf16", _quantize),
    "split": Job("full", _split),
    "repair": Job("modelopt", _repair),
    "repair in place": Job("fits", _in_place, in_place=True),
    "repair in place, converting": Job("modelopt", _in_place, in_place=True),
    "undo": Job("repaired", _undo, in_place=True),
    "picture": Job("bf16", _picture),
}
READERS: Mapping[str, Job] = {"inspect": Job("full", _inspect), "verify": Job("modelopt", _verify)}


@dataclass(frozen=True)
class Sources:
    """``files``: kind of source and which of two models -> what lies in its folder, by how its name ends.

    ``made``: job and model -> what an undisturbed run makes of it; ``seconds``: job -> how long that takes here.
    """

    files: Mapping[tuple[str, int], Mapping[str, bytes]]
    made: dict[tuple[str, int], bytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def put(self, kind: str, model: int, folder: Path, name: str = "m") -> Path:
        """Write a source to ``folder`` -> its path; what lies beside it is named after it, too."""
        for ending, data in self.files[kind, model].items():
            (folder / f"{name}{ending}").write_bytes(data)
        return folder / f"{name}.safetensors"

    def set_up(self, job: Job, model: int, folder: Path) -> tuple[Path, Path]:
        """Put what a job needs into a folder -> its source, its target."""
        self.put("bf16", 0, folder, "other")
        return self.put(job.source, model, folder, f"m{model}"), folder / "t.safetensors"


def prepare(folder: Path) -> Sources:
    """Two models of the same names in each kind of source, and what each job makes of them."""
    files = {}
    for model in (0, 1):
        state, config = synthetic.small_ltx23(model)
        state = {name: small(tensor) for name, tensor in state.items() if name.startswith(KEPT)}
        packed = synthetic.quantize_layers(state, config)
        (place := folder / str(model)).mkdir()
        kinds = {
            "bf16": ("bf16", {}), "full": ("comfy_markers", {"full": True}), "modelopt": ("modelopt", {}),
            "fits": ("metadata_less", {"prefix": FITS}),
        }  # fmt: skip
        for name, (kind, options) in kinds.items():
            synthetic.write(place / f"{name}.safetensors", kind, state, config, packed, **options)
            files[name, model] = {".safetensors": (place / f"{name}.safetensors").read_bytes()}
        backup = repair(place / "fits.safetensors", in_place=True).backup
        repaired = {"": place / "fits.safetensors", backup.suffix: backup}
        files["repaired", model] = {f".safetensors{end}": path.read_bytes() for end, path in repaired.items()}
    sources = Sources(files)
    for name, job in (WRITERS | READERS).items():
        for model in (0, 1):
            (place := folder / f"{name}-{model}").mkdir()
            start = time.monotonic()
            code, said = Child(job, *sources.set_up(job, model, place)).wait()
            if code != DONE:
                raise RuntimeError(f"undisturbed, {name} ends with {code}: {said}")
            sources.seconds[name] = time.monotonic() - start
            made = f"m{model}" if job.in_place else "t"
            sources.made[name, model] = (place / f"{made}.safetensors").read_bytes()
    return sources


class Child:
    """A job in a process of its own: ends with DONE, with REFUSED and the error's text, or otherwise."""

    def __init__(self, job: Job, source: Path, target: Path, overwrite: bool = False, pause: float = 0.0) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            code = 1
            try:
                torch.set_num_threads(1)
                job.run(source, target, overwrite, lambda done, total: time.sleep(pause) if pause else None)
                code = DONE
            except CheckpointError as error:
                os.write(write, str(error).encode(errors="backslashreplace")[:4000])
                code = REFUSED
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode(errors="backslashreplace")[:4000])
            os._exit(code)
        os.close(write)
        self.pipe = read

    def kill(self) -> None:
        """End it at once, as the system does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str]:
        """-> its exit code, or minus the number of the signal that ended it; what it said. TimeoutError if it hangs."""
        until, pause = time.monotonic() + _LIMIT, 0.0005
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                self.kill()
                os.waitpid(self.pid, 0)
                os.close(self.pipe)
                raise TimeoutError(f"a job did not end within {_LIMIT:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        with os.fdopen(self.pipe, "rb") as pipe:
            said = pipe.read().decode()
        return os.waitstatus_to_exitcode(status), said
