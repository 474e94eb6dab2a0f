# SPDX-License-Identifier: Apache-2.0
"""One real ComfyUI for all tests of this folder; they are marked ``host``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_video.tests.real.harness import ComfyUI

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def host() -> Iterator[ComfyUI]:
    """A ComfyUI on the CPU with the pack and the stand-in nodes, if there are any, shared by the session."""
    with ComfyUI(custom_nodes=[path for path in [HERE / "standin_nodes"] if path.is_dir()]) as running:
        yield running
