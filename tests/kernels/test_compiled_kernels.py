# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every architecture the pack names, without a GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
COUNTS = {"75": 21, "80": 18, "89": 19, "90": 19, "100": 19, "120": 58}
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def test_the_kernels_compile_from_turing_to_blackwell(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "75", "80", "89", "90", "100", "120"]
    run = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    sizes = found["sizes"]
    # BF16 tensor cores from 8.0 on, E4M3 conversions from 8.9 on; all variants of the first and the last, one between.
    assert Counter(name.split()[0] for name in sizes) == COUNTS
    assert all(size > 1000 for size in sizes.values())
    # What a thread loads of a weight is what its tensor core takes: which thread has what is up to Triton's version.
    assert found["exchanges"] == 0
    assert found["byte loads"] == 0
