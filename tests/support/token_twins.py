# SPDX-License-Identifier: Apache-2.0
"""Gemma's block of one token on a CPU: the plain torch of kernels/one_token.py in the place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from nvfp4_video.kernels import one_token
from nvfp4_video.kernels.format import PackedWeight


def _group(shapes, dtype, device, backend, gated=False):
    return lambda x, *parts: one_token.gemv_group(
        x, [PackedWeight(*part, shape) for part, shape in zip(parts, shapes, strict=True)], gated
    )


@contextmanager
def in_plain_torch(token_block: Any) -> Iterator[list[torch.nn.Module]]:
    """Meanwhile nothing but a module's own state keeps a block from it; -> the blocks that ran so."""
    runs, run = [], token_block._run

    def counted(block, *arguments):
        runs.append(block)
        return run(block, *arguments)

    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        replace(token_block, "obstacle", lambda *_: "")
        replace(token_block, "_run", counted)
        replace(one_token, "prepare_group", _group)
        replace(one_token, "DTYPES", (torch.bfloat16, torch.float32))
        yield runs
