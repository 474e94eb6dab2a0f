# SPDX-License-Identifier: Apache-2.0
"""The branch of the host's token loop that its compiler takes on a GPU, taken on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass
class Seen:
    """``compiler``: whether the host has one; which scopes it was asked for, and the buffers of the token loop."""

    compiler: bool
    scopes: list[str] = field(default_factory=list)
    buffers: list[tuple] = field(default_factory=list)


@contextmanager
def forced(text_decode: Any, model: Any) -> Iterator[Seen]:
    """Meanwhile ``model`` decodes as where its blocks can be captured: with our caches, and the compiler's buffers."""
    prefetch = importlib.import_module("comfy.model_prefetch")
    seen = Seen(hasattr(prefetch, "malloc_graph_enabled"))
    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any, **options: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, **options))

        replace(text_decode, "_obstacle", lambda device: "")
        for layer in model.layers:
            replace(layer, "_v_block", object(), create=True)  # the host gives a block an allocation on the GPU only
        if seen.compiler:
            make = model.init_decode_buffers
            replace(prefetch, "malloc_graph_enabled", lambda device: True)
            replace(prefetch, "malloc_graph_begin", lambda device: seen.scopes.append("begin"))
            replace(prefetch, "malloc_graph_end", lambda: seen.scopes.append("end"))
            replace(model, "init_decode_buffers", lambda *sizes: seen.buffers.append(make(*sizes)) or seen.buffers[-1])
        yield seen
