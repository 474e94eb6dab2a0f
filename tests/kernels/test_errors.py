# SPDX-License-Identifier: Apache-2.0
"""Errors of others in a line of ours."""

from __future__ import annotations

import pytest
from nvfp4_video.kernels.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...\n"), "CUDA error: out of memory"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("\nsecond"), "ValueError"),
        (KeyError("name"), "'name'"),
        (RuntimeError("x" * 1000), "x" * 120),
    ],
)
def test_an_error_is_told_in_its_first_line_or_by_its_class(error: Exception, line: str):
    assert first_line(error) == line
