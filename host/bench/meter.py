# SPDX-License-Identifier: Apache-2.0
"""Memory of this process and of the GPU, now and at its highest. torch is imported in the functions, see session.py."""

from __future__ import annotations

import threading
from pathlib import Path

POLL_SECONDS = 0.02


def memory() -> dict[str, float]:
    """GB of host memory by kind and of GPU memory in use, as the kernel and the driver count them."""
    import torch

    found = {name: size for name, size in _status().items() if name in ("RssAnon", "RssFile", "RssShmem")}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["gpu"] = (total - free) / 1e9
    return found


def peak_host_memory() -> float | None:
    """GB that this process held at its highest, pages of mapped files included; None where the system does not say."""
    return _status().get("VmHWM")


def _status() -> dict[str, float]:
    """Linux's account of this process in GB."""
    path, found = Path("/proc/self/status"), {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.startswith(("Rss", "VmHWM")):
            found[name] = int(value.split()[0]) * 1024 / 1e9
    return found


class PeakMemory:
    """The most memory used while the body runs, in GB: ``torch`` its allocator's on the GPU, ``gpu`` the driver's,
    ``host`` this process's own pages (no mapped files). The last two are polled, which costs the body some CPU time;
    without ``poll`` they are those of its start and end.
    """

    def __init__(self, poll: bool = True) -> None:
        self._polls = poll

    def __enter__(self) -> PeakMemory:
        import torch

        self.torch, self.gpu, self.host, self._stop = 0.0, 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._look()
        if self._polls:
            self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        now = memory()
        self.gpu = max(self.gpu, now.get("gpu", 0.0))
        self.host = max(self.host, now.get("RssAnon", 0.0) + now.get("RssShmem", 0.0))

    def __exit__(self, *_: object) -> None:
        import torch

        self._look()
        self._stop.set()
        if self._polls:
            self._thread.join()
        if torch.cuda.is_available():
            self.torch = torch.cuda.max_memory_allocated() / 1e9
