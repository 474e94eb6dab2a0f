# SPDX-License-Identifier: Apache-2.0
"""Work that may not keep its caller waiting: done on a thread of its own, waited for up to a limit.

The host's prompt handlers run on its event loop, where a slow disk or a pipe in a file's place would stop the whole
server. A thread that is late goes on in the background, since nothing can end it; only a few such may be under way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

MOST_LATE = 4
_started: list[threading.Thread] = []


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of ``work``, or what it raises; TimeoutError after ``seconds``, or while MOST_LATE others are late."""
    _started[:] = [thread for thread in _started if thread.is_alive()]
    if len(_started) >= MOST_LATE:
        raise TimeoutError(f"{len(_started)} earlier checks are still under way")
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:  # raised where the result is waited for
            answer.put((None, error))

    thread = threading.Thread(target=run, name="nvfp4-guard", daemon=True)  # the host's exit does not wait for it
    _started.append(thread)
    thread.start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"it took longer than {seconds:g} s") from None
    if error is not None:
        raise error
    return result
