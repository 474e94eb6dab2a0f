# SPDX-License-Identifier: Apache-2.0
"""What tests/stub_comfy computes is what the real ComfyUI computes from the same inputs, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.tests.real import stub_values
from nvfp4_video.tests.real.harness import facts_in_host


@pytest.fixture(scope="module")
def host_values() -> dict:
    """Name of a case -> the real host's value."""
    return facts_in_host(Path(stub_values.__file__), mark=stub_values.MARK)


@pytest.mark.parametrize("name", stub_values.cases())
def test_the_stub_computes_what_the_host_computes(host_values: dict, name: str):
    stub = json.loads(json.dumps(stub_values.plain(stub_values.cases()[name]())))
    assert stub == host_values[name]
