# SPDX-License-Identifier: Apache-2.0
"""The processes of ``bench``: one job each (host/bench/row.py), its messages read, its end made sure of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..host.bench.row import MARK

PACK = Path(__file__).resolve().parent.parent
_PATIENCE_SECONDS = 10
_LAST_LINES = 3
# The tests put another program in the place of the pack's own command.
COMMAND = (sys.executable, str(PACK), "bench", "--row-job")


def run_job(
    job: Mapping[str, Any], folder: Path, log: Path, on_stage: Callable[[str], None]
) -> tuple[dict[str, Any], str | None]:
    """Run one job in a process of its own -> (what it told, why it failed or None).

    ``log`` takes everything else it wrote. What it told: the content of its messages in one dictionary, those of
    "clip" in a list ``clips``. The process is gone when this returns or raises.
    """
    log.parent.mkdir(exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    told: dict[str, Any] = {"clips": []}
    error, last = None, []
    with log.open("a", encoding="utf-8", errors="replace") as written, _process([*COMMAND, str(path)]) as process:
        for line in process.stdout:
            if not line.startswith(MARK):
                written.write(line)
                last = [*last, line.strip()][-_LAST_LINES:] if line.strip() else last
                continue
            message = json.loads(line.removeprefix(MARK))
            event = message.pop("event")
            if event == "stage":
                on_stage(message["text"])
            elif event == "error":
                error = message["text"]
            elif event == "clip":
                told["clips"].append(message)
            else:
                told |= message
        code = process.wait()
    return told, error or (_died(code, last) if code else None)


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen]:
    """A child whose output is text by lines; it is ended, if it still runs, when the body is left."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(  # noqa: S603  (this pack's own command)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdin.close()
        process.stdout.close()


def _died(code: int, last: list[str]) -> str:
    """Exit code of a process that told no error, the last lines of its output -> the reason, as far as it is known."""
    if code == -9:
        return "its process was killed: most likely the system ran out of memory"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    return f"its process {how}" + (f"; it last wrote: {' | '.join(last)}" if last else "")
