# SPDX-License-Identifier: Apache-2.0
"""The prompt server: routes are recorded, nothing listens."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["PromptServer"]


class _Route(NamedTuple):
    method: str
    path: str
    handler: Any


class _Routes:
    """Every route, in ``items``; iterating goes over them."""

    def __init__(self):
        self.items = []

    def __iter__(self):
        return iter(self.items)

    def get(self, path, **kwargs):
        return self._route("GET", path)

    def post(self, path, **kwargs):
        return self._route("POST", path)

    def _route(self, method, path):
        def register(handler):
            self.items.append(_Route(method, path, handler))
            return handler

        return register


class _Queue:
    """As much of ``execution.PromptQueue`` as the routes read."""

    def __init__(self):
        self.history = {}

    def get_history(self, prompt_id=None, max_items=None, offset=-1, map_function=None):
        return self.history


class PromptServer:
    """``sent`` collects (text, node id) and (event, data); ``on_prompt_handlers`` what was added."""

    def __init__(self, loop):
        self.loop = loop
        self.routes = _Routes()
        self.on_prompt_handlers = []
        self.prompt_queue = _Queue()
        self.sent = []
        self.client_id = None

    def add_on_prompt_handler(self, handler):
        self.on_prompt_handlers.append(handler)

    def trigger_on_prompt(self, json_data):
        for handler in self.on_prompt_handlers:
            json_data = handler(json_data)
        return json_data

    def send_progress_text(self, text, node_id, sid=None):
        self.sent.append((text, node_id))

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))


PromptServer.instance = PromptServer(None)
