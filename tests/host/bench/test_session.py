# SPDX-License-Identifier: Apache-2.0
"""ComfyUI in this process: what is set up as its main.py does."""

from __future__ import annotations

import pytest
from nvfp4_video.host.bench import session
from nvfp4_video.tests.support.modules import offer


@pytest.mark.parametrize("ready", [True, False])
def test_dynamic_vram_comes_with_the_level_of_messages_that_main_py_sets(monkeypatch, ready):
    said = []
    functions = {"init_devices": lambda devices: ready, "set_log_info": lambda: said.append("info")}
    offer(monkeypatch, "comfy_aimdo", control=offer(monkeypatch, "comfy_aimdo.control", **functions))
    memory = offer(monkeypatch, "comfy.memory_management", aimdo_enabled=False)
    patchers = offer(monkeypatch, "comfy.model_patcher", CoreModelPatcher="ordinary", ModelPatcherDynamic="dynamic")
    offer(monkeypatch, "comfy", memory_management=memory, model_patcher=patchers)
    session._enable_dynamic_vram()
    assert said == ["info"] * ready
    assert (memory.aimdo_enabled, patchers.CoreModelPatcher) == (ready, "dynamic" if ready else "ordinary")
