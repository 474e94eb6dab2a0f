"""What the guard has a real ComfyUI compute, as one line of JSON; run by test_schedules_host.py.

usage: <the host's python> schedules_in_process.py, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

import asyncio
import importlib
import json

import in_process

in_process.comfy("samplers")
nodes = importlib.import_module("nodes")
graph = in_process.pack("host.guard.prompt_graph")
schedules = in_process.pack("host.guard.values.schedules")
ltx = in_process.pack("measure.ltx")
