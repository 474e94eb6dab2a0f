# SPDX-License-Identifier: Apache-2.0
"""The real front end over a stubbed host: what ``comfyui-frontend-package`` asks for, and our two routes.

    with FrontendServer(static_folder(), node_definitions(workflow)) as server:
        page.goto(server.url)

Standard library only. The websocket is not served here: tests route it in the browser (``open_socket``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PACK = Path(__file__).resolve().parents[2]
EXTENSION = "/extensions/nvfp4-video/"
EXTRA_LOCALE_FILES = ("nodeDefs", "commands", "settings")
# The node types of the graphs that front ends open on a first visit, with the widgets that they look for.
FIRST_VISIT = {
    "CheckpointLoaderSimple": {}, "CLIPLoader": {}, "CLIPTextEncode": {"text": ["STRING", {}]}, "EmptyLatentImage": {},
    "EmptySD3LatentImage": {}, "KSampler": {}, "ModelSamplingAuraFlow": {}, "UNETLoader": {}, "VAEDecode": {},
    "VAELoader": {}, "SaveImage": {"filename_prefix": ["STRING", {}]},
}  # fmt: skip
# What the front end should not do on its first visit, or would do differently from run to run.
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.0.0", "Comfy.Locale": "en",
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}  # fmt: skip
SYSTEM = {
    "os": "linux", "python_version": "3", "embedded_python": False, "comfyui_version": "0.33.0", "pytorch_version": "2",
    "argv": [], "ram_total": 1, "ram_free": 1,
}  # fmt: skip


def static_folder() -> Path | None:
    """The built front end: the folder COMFYUI_FRONTEND names, else that of ``comfyui-frontend-package``, else None."""
    if os.environ.get("COMFYUI_FRONTEND"):
        return Path(os.environ["COMFYUI_FRONTEND"])
    spec = importlib.util.find_spec("comfyui_frontend_package")
    return Path(spec.origin).parent / "static" if spec and spec.origin else None


def translations() -> dict[str, dict]:
    """The body of GET /i18n: every locale's main.json, and the other files of the folder under their names."""
    merged = {}
    for folder in sorted(path for path in (PACK / "locales").iterdir() if path.is_dir()):
        found = {file.stem: json.loads(file.read_text("utf-8")) for file in folder.glob("*.json")}
        extra = {name: found[name] for name in EXTRA_LOCALE_FILES if name in found}
        merged[folder.name] = found.get("main", {}) | extra
    return merged


def node_definitions(workflow: dict) -> dict[str, dict]:
    """A workflow -> /object_info that knows its node types: inputs, widgets and outputs as the workflow stores them."""
    definitions = {name: _definition(name, inputs, []) for name, inputs in FIRST_VISIT.items()}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node.get("widgets_values") or [])
        inputs = {}
        for entry in node["inputs"]:
            stored = next(values) if "widget" in entry else None
            if entry["name"] in ("seed", "noise_seed"):
                next(values)
            options = {"control_after_generate": True} if entry["name"] in ("seed", "noise_seed") else {}
            kind = [stored] if "widget" in entry and "COMBO" in entry["type"] else entry["type"].split(",")[0]
            inputs[entry["name"]] = [kind, options]
        definitions[node["type"]] = _definition(node["type"], inputs, node.get("outputs", []))
    return definitions


def _definition(name: str, inputs: dict, outputs: list[dict]) -> dict:
    return {
        "input": {"required": inputs}, "input_order": {"required": list(inputs)}, "name": name, "display_name": name,
        "output": [output["type"] for output in outputs], "output_name": [output["name"] for output in outputs],
        "output_is_list": [False] * len(outputs), "output_node": not outputs,
        "description": "", "python_module": "nodes", "category": "test",
    }  # fmt: skip


class FrontendServer:
    """Serves the front end on a free local port until the ``with`` block ends.

    ``routes``: path below /api -> what to answer, or a function of the request's body (None for GET) that returns it;
    an answer of None is a 404. ``settings`` is the user's saved settings. ``.unknown`` collects the paths nobody
    serves, ``.calls`` the (path, body) of the calls to /nvfp4/.
    """

    def __init__(self, static: Path, object_info: dict, settings: dict | None = None):
        self.begin(object_info, settings)
        handler = type("Handler", (_Handler,), {"owner": self, "static": str(static)})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def begin(self, object_info: dict, settings: dict | None = None) -> None:
        """Answer as if nobody had been here."""
        self.settings = SETTINGS | (settings or {})
        self.calls: list[tuple[str, Any]] = []
        self.unknown: list[str] = []
        scripts = [EXTENSION + file.relative_to(PACK / "web").as_posix() for file in (PACK / "web").rglob("*.js")]
        self.routes: dict[str, Any] = {
            "/features": {}, "/users": {"storage": "server", "migrated": True},
            "/system_stats": {"system": SYSTEM, "devices": []}, "/i18n": translations(),
            "/extensions": scripts, "/object_info": object_info, "/global_subgraphs": {}, "/node_replacements": {},
            "/workflow_templates": {}, "/experiment/models": [], "/userdata": [], "/userdata/comfy.templates.json": [],
            "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
            "/queue": {"queue_running": [], "queue_pending": []}, "/history": {}, "/embeddings": [],
            "/settings": lambda body: self.settings,
        }  # fmt: skip

    def __enter__(self) -> FrontendServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: Any) -> Any:
        """The JSON that a path below /api answers; None for a 404."""
        if path.startswith("/nvfp4/"):
            self.calls.append((path, body))
        elif path.startswith("/settings/"):
            self.settings[unquote(path.removeprefix("/settings/"))] = body
            return {}
        if path not in self.routes and not path.startswith("/nvfp4/"):
            self.unknown.append(path)
        route = self.routes.get(path)
        return route(body) if isinstance(route, Callable) else route


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FrontendServer
    static: str

    def __init__(self, *args: Any):
        super().__init__(*args, directory=self.static)

    def log_message(self, *_: Any) -> None:
        """The test's output has no place for an access log."""

    def translate_path(self, path: str) -> str:
        clean = unquote(urlsplit(path).path)
        if clean.startswith(EXTENSION) and ".." not in clean:
            return str(PACK / "web" / clean.removeprefix(EXTENSION))
        return super().translate_path(path)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.endswith("/user.css"):
            self._send(b"", "text/css")
        elif path.startswith("/api/"):
            self._answer(path.removeprefix("/api"), None)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(urlsplit(self.path).path.removeprefix("/api"), json.loads(body) if body else None)

    def _answer(self, path: str, body: Any) -> None:
        answer = self.owner.answer(path, body)
        self._send(json.dumps(answer).encode(), "application/json", 404 if answer is None else 200)

    def _send(self, body: bytes, content_type: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
