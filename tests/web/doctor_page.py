# SPDX-License-Identifier: Apache-2.0
"""A browser page with the ComfyUI front end and this pack's panel in it, for the tests of this folder."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EVENT = "nvfp4.findings"
PANEL = ".nvfp4-doctor"
READY = "() => window.app?.extensionManager?.getSidebarTabs?.().some((tab) => tab.id === 'nvfp4-doctor')"
# A real host's first workflow is there; before, it would take the place of one that a test loads.
OPENED = "() => app.extensionManager.workflow.activeWorkflow?.changeTracker"
# How errors begin that the front end logs without us: 1.49.6 asks for the graph while it opens its first workflow, and
# gives up on a slow answer about features.
KNOWN_ERRORS = ("ComfyApp graph accessed before initialization", "Failed to fetch remote config: AbortError")
# The front end asks where a template's missing models are published how large they are; the host's rules forbid it.
MODEL_SIZES = "/assets/missingModelMetadata"
# What a real host answers with 404 on a first visit, which Chromium logs.
KNOWN_MISSING = (
    "/favicon.ico", "/user.css", "/userdata?dir=workflows", "/userdata?dir=subgraphs", "/userdata/comfy.templates.json",
)  # fmt: skip
ELSEWHERE = re.compile(r"^https?://(?!127\.0\.0\.1)")
# Not by Playwright's ``route``, which switches off Chromium's cache, and with it that of compiled scripts.
NOWHERE_ELSE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
VIEW = {"width": 1500, "height": 950}
TIMEOUT_MS = 60_000


@contextmanager
def chromium() -> Iterator:
    """The system's Chromium under Playwright; skips the test where either is missing. Nothing is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("there is no chromium on the PATH; Debian and Ubuntu have it as the package chromium")
    with sync_api.sync_playwright() as playwright:
        # Containers run as root and give no user namespaces, which Chromium's sandbox needs.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", NOWHERE_ELSE])
        yield browser
        browser.close()


class DoctorPage:
    """One visit to the front end at ``url``; ``.page`` is Playwright's page.

    ``.problems`` collects what the console called an error, what was thrown and not caught, and what our own files
    warned about. With ``host=True`` the websocket is the server's, else a silent one; ``send`` speaks into either.
    Other machines cannot be reached.
    """

    def __init__(self, browser, url: str, shots: Path, host: bool = False, scripts: tuple[str, ...] = ()):
        self.url, self.shots, self.host, self.problems, self._sockets = url, shots, host, [], []
        self.context = browser.new_context(viewport=VIEW, permissions=["clipboard-read", "clipboard-write"])
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page = page = self.context.new_page()
        for script in scripts:
            page.add_init_script(script)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"not caught: {error}"))
        page.route_web_socket("**/ws*", self._on_host_socket if host else self._on_socket)
        self._open()

    def _open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_function(READY)
        if self.host:
            self.page.wait_for_function(OPENED)

    def leave(self) -> None:
        """End the visit: nothing of the front end runs any more, and what it stored in the browser is gone."""
        self.page.goto(f"{self.url}/user.css")
        self.page.evaluate("() => sessionStorage.clear()")
        session = self.context.new_cdp_session(self.page)
        session.send("Storage.clearDataForOrigin", {"origin": self.url, "storageTypes": "all"})
        session.detach()

    def come_back(self, shots: Path) -> None:
        """Another first visit, after ``leave``. What Chromium compiled of the front end stays: half of the work."""
        self.shots, self.problems, self._sockets = shots, [], []
        self._open()

    def _on_socket(self, socket) -> None:
        self._sockets.append(socket)
        self.send("status", {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "tests"})

    def _on_host_socket(self, socket) -> None:
        socket.connect_to_server()
        self._sockets.append(socket)

    def _on_console(self, message) -> None:
        where = message.location.get("url", "")
        ours = not (MODEL_SIZES in where or ELSEWHERE.match(where))
        if message.type == "error" and not message.text.startswith(KNOWN_ERRORS) and ours:
            if not ("404" in message.text and any(known in where for known in KNOWN_MISSING)):
                self.problems.append(f"{message.text} ({where})")
        elif message.type == "warning" and "nvfp4" in where:
            self.problems.append(f"warning: {message.text} ({where})")

    def close(self) -> None:
        self.context.close()

    def send(self, event: str, data: dict) -> None:
        """Let the server's websocket say something."""
        self._sockets[-1].send(json.dumps({"type": event, "data": data}))

    def send_progress(self, node: str, text: str) -> None:
        """What ``PromptServer.send_progress_text`` sends to a client that announces no newer form."""
        self._sockets[-1].send(struct.pack(">II", 3, len(node)) + node.encode() + text.encode())

    def find(self, findings: list[dict]) -> None:
        """What the guard sends when a prompt is queued."""
        self.send(EVENT, {"findings": findings})

    def load(self, workflow: dict) -> None:
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function("(count) => app.rootGraph.nodes.length === count", arg=len(workflow["nodes"]))

    def open_panel(self) -> None:
        """Open the tab with its button, and wait until the host has answered."""
        self.tab().click()
        self.wait_checked()

    def wait_checked(self) -> None:
        self.page.locator(f"{PANEL}[aria-busy=false]").wait_for()

    def tab(self):
        """The sidebar's button, its badge included."""
        return self.page.get_by_role("button", name="NVFP4 Doctor")

    @property
    def panel(self):
        return self.page.locator(PANEL)

    def status(self) -> str:
        return self.panel.get_by_role("status").inner_text()

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name)

    def toasts(self):
        alerts = self.page.locator("[role=alert]", has_text="NVFP4 Doctor")
        return alerts.filter(has=self.page.get_by_role("button"))

    def selected(self) -> list[str]:
        return self.page.evaluate("() => [...app.canvas.selectedItems].map((item) => String(item.id))")

    def distance_from_centre(self, node: str) -> float:
        """How far a node's centre is from the canvas's centre, in pixels of the screen."""
        return self.page.evaluate(
            """(id) => {
              const { canvas } = app;
              const [x, y, width, height] = canvas.graph.getNodeById(id).boundingRect;
              const { width: w, height: h } = canvas.canvas.getBoundingClientRect();
              const { offset, scale } = canvas.ds;
              const [left, top] = [x + width / 2 + offset[0], y + height / 2 + offset[1]];
              return Math.hypot(left * scale - w / 2, top * scale - h / 2);
            }""",
            node,
        )

    def settle(self) -> None:
        """Let animations and the front end's own viewport changes end."""
        self.page.wait_for_timeout(600)

    def shot(self, name: str) -> Path:
        path = self.shots / f"{name}.png"
        self.page.screenshot(path=path)
        return path
