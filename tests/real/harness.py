# SPDX-License-Identifier: Apache-2.0
"""Boots a real, headless ComfyUI with this pack in it, and talks to it over HTTP.

Used by the tests marked ``host`` and by the command line's ``demo``; standard library only, because the host has an
interpreter of its own. ``COMFYUI_PATH`` names the checkout; ``COMFYUI_PYTHON`` that interpreter, by default the one in
the checkout's own ``.venv`` or ``venv``, else ``python3``; ``COMFYUI_FRONTEND`` the folder of another front end than
the installed one.

    with ComfyUI() as host:
        outputs = host.queue({"1": {"class_type": "PreviewAny", "inputs": {"source": "text"}}})["outputs"]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
PACK_FOLDER = "nvfp4-video"
# Folders a link would share but a copy must not carry along.
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__")


class HostError(RuntimeError):
    """ComfyUI did not start, refused a prompt, or failed while running it; the message quotes its own words."""


def comfyui_path() -> Path:
    """The checkout that ``COMFYUI_PATH`` names. Raises HostError if it names none."""
    value = os.environ.get("COMFYUI_PATH", "")
    path = Path(value).expanduser().resolve()
    if not value or not (path / "main.py").is_file():
        raise HostError(f"COMFYUI_PATH is {value!r}; expected the folder of a ComfyUI checkout, the one with main.py")
    return path


def comfyui_python(path: Path) -> str:
    """The interpreter that runs the checkout at ``path``."""
    if os.environ.get("COMFYUI_PYTHON"):
        return os.environ["COMFYUI_PYTHON"]
    for venv in (".venv", "venv"):
        for python in (path / venv / "bin" / "python", path / venv / "Scripts" / "python.exe"):
            if python.is_file():
                return str(python)
    return "python3"


def small_model(comfyui: Path) -> str | None:
    """The scaled-down model of synthetic.py this ComfyUI can build, "ltx23" or "ltx20", by what its source knows.

    None if it builds the embeddings connectors in their released size only; versions tell less than the source.
    """
    model = comfyui / "comfy" / "ldm" / "lightricks" / "av_model.py"
    source = model.read_text(encoding="utf-8") if model.is_file() else ""
    if "apply_gated_attention" in source:
        return "ltx23"
    return None if "video_embeddings_connector" in source or not source else "ltx20"


def host_environment() -> dict[str, str]:
    """This process's environment without what the tests set for themselves."""
    return {name: value for name, value in os.environ.items() if name not in {"TRITON_INTERPRET", "PYTHONPATH"}}


def run_in_host(script: Path | str, *args: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a Python file with the host's interpreter inside the checkout; stdout and stderr come back as text."""
    path = comfyui_path()
    command = [comfyui_python(path), str(script), *args]
    return subprocess.run(command, cwd=path, env=host_environment(), capture_output=True, text=True, timeout=timeout)


def facts_in_host(script: Path | str, *args: str, mark: str, timeout: float = 300) -> Any:
    """``run_in_host``, and what the file prints last as JSON behind ``mark``."""
    result = run_in_host(script, *args, timeout=timeout)
    lines = [line for line in result.stdout.splitlines() if line.startswith(mark)]
    assert lines, f"the host's Python ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return json.loads(lines[-1].removeprefix(mark))


class ComfyUI:
    """A running ComfyUI in a temporary base folder, or in ``base``; a context manager.

    ``custom_nodes``: further node packs to put beside this one; ``pack=None`` leaves this one out. ``args`` and
    ``env``: further flags and environment variables; ``cpu=False`` lets the host use its GPU. ``.base`` is the base
    folder (``models/``, ``output/`` and so on below it), ``.url`` the address, ``.version`` what the host says it is.
    """

    def __init__(
        self,
        base: Path | str | None = None,
        pack: Path | None = PACK,
        custom_nodes: Iterable[Path] = (),
        args: Iterable[str] = (),
        env: dict[str, str] | None = None,
        cpu: bool = True,
        boot_timeout: float = 240,
    ):
        self.path = comfyui_path()
        self.python = comfyui_python(self.path)
        self.args = [*(["--cpu"] if cpu else []), *args]
        self.env = host_environment() | (env or {})
        self.boot_timeout = boot_timeout
        self._temporary = base is None
        self.base = Path(tempfile.mkdtemp(prefix="nvfp4-comfyui-") if base is None else base).resolve()
        self._log_path = self.base / "comfyui.log"
        self._process: subprocess.Popen | None = None
        nodes = self.base / "custom_nodes"
        models = [f"models/{kind}" for kind in ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")]
        for name in ("custom_nodes", "input", "output", *models):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if pack is not None:
            _place(pack, nodes / PACK_FOLDER)
        for folder in custom_nodes:
            _place(Path(folder), nodes / Path(folder).name)

    def __enter__(self) -> ComfyUI:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def command(self, port: int) -> list[str]:
        """The command line, without the flags that this checkout does not know."""
        known = (self.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", str(port)]
        for flag, *value in (
            ("--base-directory", str(self.base)),
            ("--disable-api-nodes",),
            ("--database-url", f"sqlite:///{self.base / 'comfyui.db'}"),
            *([("--front-end-root", os.environ["COMFYUI_FRONTEND"])] if os.environ.get("COMFYUI_FRONTEND") else []),
        ):
            if f'"{flag}"' in known:
                command += [flag, *value]
        return command + self.args

    def start(self) -> None:
        """Start the process and wait until it answers. Raises HostError with the end of its log if it does not."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(port), cwd=self.path, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + self.boot_timeout
        while True:
            try:
                self.version = self.get("/system_stats")["system"]["comfyui_version"]
                return
            except OSError:
                self._check_alive()
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer in {self.boot_timeout:.0f} s; its log ends:\n{self._tail()}")
            time.sleep(0.25)

    def stop(self) -> None:
        """End the process, if it runs, and wait for it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self) -> str:
        """Everything the host has written to stdout and stderr so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, route: str) -> dict:
        """GET a route, JSON in the answer."""
        with urllib.request.urlopen(self.url + route, timeout=30) as answer:
            return json.load(answer)

    def post(self, route: str, data: dict) -> dict:
        """POST JSON to a route. Raises HostError with the answer's text if the host refuses it."""
        request = urllib.request.Request(
            self.url + route, data=json.dumps(data).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise HostError(_refusal(error.read().decode(errors="replace"))) from None
        return json.loads(body) if body else {}

    def object_info(self, node: str) -> dict:
        """What /object_info says about one node; empty if the host does not know it."""
        return self.get(f"/object_info/{node}").get(node, {})

    def queue(self, prompt: dict, timeout: float = 600) -> dict:
        """Run a prompt graph to its end and return its history entry.

        Raises HostError with the node and its error message if the host refuses the graph or a node fails.
        """
        prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": "nvfp4-video-tests"})["prompt_id"]
        deadline = time.monotonic() + timeout
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            self._check_alive()
            if time.monotonic() > deadline:
                raise HostError(f"the prompt did not finish within {timeout:.0f} s; the log ends:\n{self._tail()}")
            time.sleep(0.1)
        entry = history[prompt_id]
        if entry["status"]["status_str"] != "success":
            raise HostError(_failure(entry["status"]["messages"]))
        return entry

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = "not started" if self._process is None else self._process.returncode
            raise HostError(f"ComfyUI is not running (exit status: {code}); its log ends:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log().splitlines()[-30:]) if self._log_path.exists() else "(no log)"


def _place(folder: Path, target: Path) -> None:
    """Link a node pack into the host, or copy it where links are not allowed."""
    if target.exists():
        return
    try:
        target.symlink_to(folder.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(folder, target, ignore=NOT_COPIED)


def _refusal(body: str) -> str:
    """The answer to a refused prompt -> one line per reason."""
    try:
        answer = json.loads(body)
        reasons = [f"{answer['error']['message']} {answer['error'].get('details', '')}".strip()]
    except (ValueError, TypeError, KeyError):
        return f"ComfyUI refused the request: {body[:2000]}"
    for node, found in (answer.get("node_errors") or {}).items():
        reasons += [f"node {node} ({found['class_type']}): {e['message']}: {e['details']}" for e in found["errors"]]
    return "ComfyUI refused the prompt: " + "\n".join(reasons)


def _failure(messages: list) -> str:
    """The status messages of a failed prompt -> the node, its error and its traceback."""
    for event, data in messages:
        if event == "execution_error":
            trace = "".join(data.get("traceback", []))
            return f"node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}\n{trace}"
    return f"the prompt ended without success: {messages}"
