# SPDX-License-Identifier: Apache-2.0
"""ComfyUI in this process: what is set up as its main.py does."""

from __future__ import annotations

import types

import pytest
import torch
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


@pytest.mark.parametrize(("timed", "waits", "seconds"), [(True, 3, 2), (False, 0, 0)])
def test_only_a_sampling_whose_steps_are_timed_waits_for_the_gpu_after_each(monkeypatch, timed, waits, seconds):
    waited, steps = [], []

    def sample_custom(*given, callback, **named):
        for step in range(3):
            callback(step, None, None, 3)
        return types.SimpleNamespace(unbind=lambda: ("video", "sound"))

    nested = offer(monkeypatch, "comfy.nested_tensor", NestedTensor=lambda tensors: tensors)
    samplers = offer(monkeypatch, "comfy.samplers", sampler_object=lambda name: name)
    sampling = offer(monkeypatch, "comfy.sample", sample_custom=sample_custom)
    offer(monkeypatch, "comfy", nested_tensor=nested, samplers=samplers, sample=sampling)
    monkeypatch.setattr(session, "end_of_node", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(None))
    text = torch.zeros(1, 4, 8)
    taken, latents = session.sample(None, "64x64", {}, 9, 1, 3, text=text, on_step=steps.append, timed=timed)
    assert (len(waited), len(taken), steps, latents) == (waits, seconds, [1, 2, 3], ["video", "sound"])
