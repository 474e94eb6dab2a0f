# SPDX-License-Identifier: Apache-2.0
"""What leaves a node or a route when something fails: the pack's own errors as they are, all else as an internal error.

An own error is a PackError or one of the file system; it names file, layer and remedy. Anything else is a fault of the
pack: the log gets its traceback under a reference, and the user a sentence with that reference. What the host itself
acts on passes untouched: interruptions, and memory that ran out. Messages hold names from files, and the host writes
them to its terminal, so they are made visible (measure/escape.py).
"""

from __future__ import annotations

import functools
import logging
import secrets
import traceback
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..kernels.errors import SHORT, PackError
from ..measure.escape import visible

logger = logging.getLogger(__name__)

_EXPECTED = (PackError, OSError)
_BORDERS = ("execute", "fingerprint_inputs")
_MOST_REFERENCES = 100
_references: dict[tuple[str, str, str], str] = {}  # what failed, and how -> reference in the log


class InternalError(RuntimeError):
    """A fault of the pack, with the reference under which the log has it."""

    __module__ = SHORT


def guarded(node: type) -> type:
    """A node's class -> the same; what its functions raise is fit for the user and the host."""
    for name in _BORDERS:
        function = node.__dict__.get(name)
        if function is not None:
            setattr(node, name, classmethod(_guarded(function.__func__, node.__name__)))
    return node


def answered(route: Callable[..., Any]) -> Callable[..., Any]:
    """A route of the server -> the same; what it does not foresee is answered with status 500 and a sentence."""

    @functools.wraps(route)
    async def answer(request: Any) -> Any:
        from aiohttp import web

        try:
            return await route(request)
        except (web.HTTPException, ConnectionError):  # the host's, and a client that went away
            raise
        except Exception as error:
            return web.json_response({"error": internal_error(error, route.__name__)}, status=500)

    return answer


def internal_error(error: Exception, doing: str) -> str:
    """Log a fault -> the sentence for the user."""
    return (
        f"internal error in {doing} ({type(error).__name__}), a fault of NVFP4 Video: please report it with the lines "
        f"of ComfyUI's log that have the reference {log_fault(error, doing)}"
    )


def log_fault(error: Exception, doing: str) -> str:
    """Log a fault with its traceback, the same one only once -> the reference under which the log has it."""
    key = doing, type(error).__name__, str(traceback.extract_tb(error.__traceback__)[-1:])
    if key not in _references:
        if len(_references) >= _MOST_REFERENCES:
            _references.clear()
        _references[key] = secrets.token_hex(4)
        text = visible("".join(traceback.format_exception(error)))
        logger.error("NVFP4 Video: %s failed, reference %s\n%s", doing, _references[key], text)
    return _references[key]


def _guarded(function: Callable[..., Any], doing: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(cls, *args, **kwargs)
        except _hosts():
            raise
        except _EXPECTED as error:
            _make_visible(error)
            raise
        except Exception as error:
            raise InternalError(internal_error(error, doing)) from None

    return run


def _hosts() -> tuple[type[BaseException], ...]:
    """Exceptions that the host acts on; an interruption was an Exception once."""
    lost = getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)  # since torch 2.8; memory, among others
    return comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError, lost, MemoryError


def _make_visible(error: Exception) -> None:
    """Leave nothing in an error's message that a terminal would obey, nor in those of the errors behind it."""
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        if visible(text) != text:
            link.args = (visible(text),)
        link = link.__cause__ or link.__context__
