# SPDX-License-Identifier: Apache-2.0
"""One Chromium for each file of browser tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nvfp4_video.tests.web.doctor_page import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as running:
        yield running
