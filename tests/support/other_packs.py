# SPDX-License-Identifier: Apache-2.0
"""Functions as of another pack or the host, by the file that their code says it is from; a host's nested latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

HOST, PACK = "/srv/ComfyUI/comfy/sample.py", "/srv/ComfyUI/custom_nodes/ComfyUI_Old/modules/rng.py"
PACK_S_NAME = "ComfyUI_Old/modules/rng.py"


def of(path: str, function: Callable) -> Callable:
    """The function as one of that file."""
    code = function.__code__.replace(co_filename=path)
    return type(function)(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


class Nested:
    """As much of the host's NestedTensor as trials need; its size is the first part's, as the host's is."""

    is_nested = True

    def __init__(self, tensors: Iterable[Any]):
        self.tensors = list(tensors)

    def unbind(self) -> list[Any]:
        return self.tensors

    def size(self) -> Any:
        return self.tensors[0].size()
