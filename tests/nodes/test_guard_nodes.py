# SPDX-License-Identifier: Apache-2.0
"""The guard's nodes, and the cure: what the model is told with it and without it, through the host's own chain."""

from __future__ import annotations

import asyncio
import types

import pytest
import torch
from comfy import patcher_extension
from comfy.model_patcher import ModelPatcher
from nvfp4_video.host.guard import cure
from nvfp4_video.kernels.errors import PackError
from nvfp4_video.nodes.guard import NVFP4HostReport, NVFP4LaunchGuard
from nvfp4_video.tests.support.guard_prompts import HEALTHY, VULNERABLE, clip
from server import PromptServer

KIND = patcher_extension.WrappersMP.DIFFUSION_MODEL


@pytest.fixture
def model() -> ModelPatcher:
    return ModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu"))


@pytest.fixture
def run(stub_comfy, monkeypatch: pytest.MonkeyPatch, model):
    """run(policy, facts, prompt) -> the node's output."""

    def execute(policy: str, host: dict, prompt: object = None):
        monkeypatch.setattr(cure, "probe", lambda: host)
        monkeypatch.setattr(NVFP4LaunchGuard, "hidden", types.SimpleNamespace(unique_id="7", prompt=prompt))
        return NVFP4LaunchGuard.execute(model, policy)

    return execute


def told(patcher: ModelPatcher, *args: object, **kwargs: object) -> list:
    """What the diffusion model is called with, through the patcher's wrappers."""
    calls: list = []
    wrappers = patcher.get_all_wrappers(KIND)
    executor = patcher_extension.WrapperExecutor.new_class_executor(
        lambda *a, **k: calls.append((a, k)) or "out", None, wrappers
    )
    assert executor.execute(*args, **kwargs) == "out"
    return calls


def test_the_cure_turns_the_flag_off_wherever_the_options_are_given_and_touches_nothing_else(model):
    cured = cure.cure(model)
    other = {"prefetch_dynamic_vbars_of_another": True}
    ((args, kwargs),) = told(cured, 1, {"prefetch_dynamic_vbars": True, "sigmas": 2}, other, x=3)
    assert args == (1, {"prefetch_dynamic_vbars": False, "sigmas": 2}, {"prefetch_dynamic_vbars_of_another": True})
    assert kwargs == {"x": 3}
    ((args, kwargs),) = told(cured, 1, transformer_options={"prefetch_dynamic_vbars": True})
    assert kwargs == {"transformer_options": {"prefetch_dynamic_vbars": False}}
    ((args, kwargs),) = told(cured, 1, transformer_options={})
    assert kwargs == {"transformer_options": {}}


def test_the_cure_is_on_a_clone_and_put_on_once(model):
    cured = cure.cure(cure.cure(model))
    assert cured is not model and cured.is_clone(model)
    assert cured.get_all_wrappers(KIND) == [cure.without_prefetch]
    assert model.get_all_wrappers(KIND) == []
    ((_, kwargs),) = told(model, transformer_options={"prefetch_dynamic_vbars": True})
    assert kwargs == {"transformer_options": {"prefetch_dynamic_vbars": True}}


def test_the_proof_holds_for_a_cured_model_and_fails_for_one_that_is_not(model):
    assert cure.prove(cure.cure(model)).startswith("prefetch flag True -> False")
    with pytest.raises(cure.CureError, match=r"reached the model as \[True\].*expected \[False\]"):
        cure.prove(model)


def test_the_proof_fails_if_the_host_s_chain_loses_the_wrapper(model, monkeypatch):
    cured = cure.cure(model)
    monkeypatch.setattr(patcher_extension, "get_all_wrappers", lambda kind, options: [])
    with pytest.raises(cure.CureError, match="with 0 of this pack's wrappers"):
        cure.prove(cured)


def test_the_proof_fails_if_the_wrapper_does_nothing(model, monkeypatch):
    monkeypatch.setattr(cure, "without_prefetch", lambda executor, *a, **k: executor(*a, **k))
    with pytest.raises(cure.CureError, match=r"reached the model as \[True\], with 1"):
        cure.prove(cure.cure(model))


def test_the_proof_asks_the_host_whether_it_would_prefetch(model, monkeypatch):
    asked = []
    prefetch = types.ModuleType("comfy.model_prefetch")
    prefetch.make_prefetch_queue = lambda queue, device, options: asked.append(dict(options)) or ["queue"]
    monkeypatch.setitem(__import__("sys").modules, "comfy.model_prefetch", prefetch)
    with pytest.raises(cure.CureError, match="although the flag is off"):
        cure.prove(cure.cure(model))
    assert asked[0]["prefetch_dynamic_vbars"] is False


def test_the_proof_runs_no_other_pack_s_wrapper(model):
    def others(*_: object, **__: object) -> None:
        raise AssertionError("called with a model that is none")

    model.add_wrapper_with_key(KIND, "another", others)
    cured = cure.cure(model)
    assert cure.prove(cured).startswith("prefetch flag True -> False")
    assert len(cured.get_all_wrappers(KIND)) == 2


def test_warn_passes_the_model_on_and_shows_the_findings(run, model):
    out = run("warn", VULNERABLE, clip())
    assert out.args[0] is model
    assert "in the middle of joint audio and video sampling" in out.args[1]
    assert out.ui["text"] == (out.args[1],)


def test_on_a_healthy_host_no_policy_changes_the_model_or_finds_anything(run, model):
    for policy in ("warn", "cure", "block"):
        out = run(policy, HEALTHY, clip())
        assert out.args[0] is model
        assert out.args[1].splitlines()[0] == "nothing found"
    assert "not needed" in run("cure", HEALTHY, clip()).args[1]


def test_cure_wraps_the_model_on_a_vulnerable_host_and_on_an_unknown_one(run, model):
    for host in (VULNERABLE, {}):
        out = run("cure", host, clip())
        assert out.args[0].get_all_wrappers(KIND) == [cure.without_prefetch]
        assert "cure: prefetch flag True -> False" in out.args[1]
    assert model.get_all_wrappers(KIND) == []


def test_block_stops_a_run_that_no_handler_saw_and_only_for_errors(run, model):
    with pytest.raises(PackError, match="wait_stream"):
        run("block", VULNERABLE, clip())
    out = run("block", HEALTHY, clip(video={"length": 120}))
    assert out.args[0] is model and "120 frames" in out.args[1]


@pytest.mark.parametrize("prompt", [None, {}, {"1": None}, []])
def test_a_prompt_that_the_host_does_not_give_is_no_obstacle(prompt: object, run, model):
    assert run("warn", HEALTHY, prompt).args[0] is model


def test_a_policy_is_one_of_three_a_link_or_a_refusal():
    assert [NVFP4LaunchGuard.validate_inputs(policy) for policy in ("warn", "cure", "block", None)] == [True] * 4
    assert NVFP4LaunchGuard.validate_inputs("refused: because") == "because"
    assert NVFP4LaunchGuard.validate_inputs("off") == "'off'; expected one of warn, cure, block"
    assert "expected one of" in NVFP4LaunchGuard.validate_inputs(3)


def test_the_guard_s_inputs_and_outputs(stub_comfy):
    shown = NVFP4LaunchGuard.INPUT_TYPES()["required"]
    assert list(shown) == ["model", "policy"]
    assert (shown["policy"][1]["options"], shown["policy"][1]["default"]) == (["warn", "cure", "block"], "warn")
    schema = NVFP4LaunchGuard.GET_SCHEMA()
    assert [output.io_type for output in schema.outputs] == ["MODEL", "STRING"]
    assert schema.is_output_node  # the refusal of a prompt needs it, see host/guard/routes.py


def test_the_host_report_is_a_text_and_runs_anew_every_time(stub_comfy, monkeypatch):
    monkeypatch.setattr(NVFP4HostReport, "hidden", types.SimpleNamespace(unique_id="3", prompt={}))
    out = NVFP4HostReport.execute()
    assert "Known crashes" in out.args[0] and "Recommended launch" in out.args[0]
    assert out.ui["text"] == (out.args[0],)
    assert NVFP4HostReport.fingerprint_inputs() != NVFP4HostReport.fingerprint_inputs()


def test_loading_the_pack_starts_the_guard(pack, stub_comfy):
    asyncio.run(pack.comfy_entrypoint())
    server = PromptServer.instance
    assert [route.path for route in server.routes] == ["/nvfp4/report", "/nvfp4/check", "/nvfp4/reports"]
    assert len(server.on_prompt_handlers) == 1
