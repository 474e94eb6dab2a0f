# SPDX-License-Identifier: Apache-2.0
"""One Chromium, one stubbed host and one page for each file of browser tests; each test is a first visit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nvfp4_video.tests.web.doctor_page import DoctorPage, chromium
from nvfp4_video.tests.web.frontend_server import FrontendServer, static_folder


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def stage(browser) -> Iterator[tuple[FrontendServer, list[DoctorPage]]]:
    """The host, and the page that the last test left; no page before the first test, or if that one could not leave."""
    static = static_folder()
    if static is None:
        pytest.skip("comfyui-frontend-package is not installed")
    with FrontendServer(static, {}) as server:
        left: list[DoctorPage] = []
        yield server, left
        for page in left:
            page.close()


@pytest.fixture
def enter(browser, stage, tmp_path: Path) -> Iterator[Callable]:
    """enter(object_info, settings, routes, scripts) -> (page, server), once a test; the console must be clean then.

    ``scripts`` run before the page's own, so that this page is not used again.
    """
    server, left = stage
    opened: list[DoctorPage] = []
    own = False

    def start(object_info: dict, settings: dict | None, routes: dict, scripts: tuple[str, ...] = ()):
        nonlocal own
        server.begin(object_info, settings)
        server.routes.update(routes)
        own = bool(scripts)
        if own or not left:
            opened.append(DoctorPage(browser, server.url, tmp_path, scripts=scripts))
        else:
            opened.append(left.pop())
            opened[0].come_back(tmp_path)
        return opened[0], server

    yield start
    for page in opened:
        if own:
            page.close()
        else:
            page.leave()
            left.append(page)
        assert page.problems == []
    assert server.unknown == []
