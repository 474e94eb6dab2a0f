# SPDX-License-Identifier: Apache-2.0
"""After the host has built a model, its parameters are held against what the file had: nothing is left to chance."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host.load.built import as_named, build_again, check_model


def built() -> torch.nn.Module:
    """Two components of a model, as the host builds them: one with a Linear, a norm and a table, one with a Linear."""
    a = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 8), "norm": torch.nn.LayerNorm(4, bias=False)})
    model = torch.nn.ModuleDict({"a": a, "b": torch.nn.ModuleDict({"k": torch.nn.Linear(4, 8)})})
    model.register_parameter("table", torch.nn.Parameter(torch.zeros(2, 4)))
    return model


def check(model: torch.nn.Module, given: dict, before: torch.nn.Module | None = None) -> str:
    """The check of a model that has nothing by itself, or has what ``before`` has."""
    if before is None:
        before = copy.deepcopy(model)
        for parameter in before.parameters():
            parameter.data.fill_(float("nan"))
    return check_model(model, torch.nn.Linear, given, "some.safetensors", lambda: before)


@pytest.mark.parametrize("lost", ["a.q.bias", "a.q.weight", "a.norm.weight", "table", "b.k.bias"])
def test_a_model_that_is_built_with_what_the_file_lacks_is_refused(lost: str):
    model = built()
    given = model.state_dict()
    check(model, given)
    del given[lost]
    layer, _, suffix = lost.rpartition(".")
    where = f"some.safetensors, layer {layer}" if layer else "some.safetensors"
    with pytest.raises(CheckpointError, match=f"{where}: it has no `{suffix}`; expected floating point of shape"):
        check(model, given)


def test_a_layer_that_the_file_lacks_is_refused_where_it_has_others_of_the_component(caplog):
    model = built()
    model["b"]["k"].weight = None
    given = {key: value for key, value in model.state_dict().items() if not key.startswith("b.")}
    check(model, given)
    assert "some.safetensors has nothing of b, which this ComfyUI builds" in caplog.text
    with pytest.raises(CheckpointError, match="some.safetensors, layer b.k: the model needs it"):
        model["b"]["k"](torch.zeros(1, 4))
    model["a"]["q"].weight = None
    given = {key: value for key, value in given.items() if not key.startswith("a.q.")}
    with pytest.raises(CheckpointError, match="layer a.q: it has no `weight`"):
        check(model, given)


@pytest.mark.parametrize("part", [torch.nn.LayerNorm(4), torch.nn.Conv1d(4, 4, 1), torch.nn.Embedding(4, 4)])
def test_a_component_the_file_lacks_may_be_built_but_not_used(part: torch.nn.Module, caplog):
    model = built()
    given = model.state_dict()
    model["norm_final"] = copy.deepcopy(part)
    lacks = check(model, given)
    assert lacks == "nothing of norm_final, which this ComfyUI builds: it is an error to use it"
    assert lacks in caplog.text
    assert model["norm_final"].weight.isnan().all()
    with pytest.raises(CheckpointError, match="some.safetensors, layer norm_final: the model needs it"):
        model["norm_final"](torch.zeros(1, 4, 4))
    model["a"]["norm"](torch.zeros(1, 4))


def test_a_list_of_parameters_is_used_without_a_call_and_so_refused():
    model = built()
    given = model.state_dict()
    model["tables"] = torch.nn.ParameterList([torch.zeros(2, 4)])
    with pytest.raises(CheckpointError, match="layer tables: it has no `0`"):
        check(model, given)


@pytest.mark.parametrize("lost", ["a.norm.weight", "table"])
def test_a_parameter_that_the_model_sets_by_itself_may_be_lacking(lost: str):
    model = built()
    given = {key: value for key, value in model.state_dict().items() if key != lost}
    lacks = check(model, given, built())
    assert lacks == f"no {lost}, to which this ComfyUI gives a value by itself"
    assert check(model, model.state_dict()) == ""


class _Parts(torch.nn.Module):
    """What a model of the host may have: parameters set, drawn and left unwritten."""

    def __init__(self, width: int, device: torch.device, operations: object):
        super().__init__()
        self.unwritten = torch.nn.Parameter(torch.empty(width, device=device))
        self.drawn = torch.nn.Parameter(torch.randn(width, device=device))
        self.set = torch.nn.Parameter(torch.zeros(width, device=device))


def test_a_model_built_again_has_nan_where_the_host_writes_nothing_and_leaves_torch_s_switches():
    base = SimpleNamespace(model_config=SimpleNamespace(unet_config={"width": 4}, custom_operations=None))
    base.diffusion_model = _Parts(4, torch.device("cpu"), None)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    again = build_again(base)
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before
    assert again.unwritten.isnan().all() and not again.set.any()
    for kept in ("unwritten", "drawn"):
        given = {key: value for key, value in base.diffusion_model.state_dict().items() if key != kept}
        with pytest.raises(CheckpointError, match=f"it has no `{kept}`"):
            check(base.diffusion_model, given, again)


def test_integers_are_no_parameters_of_a_model():
    model = built()
    given = model.state_dict() | {"table": torch.zeros(2, 4, dtype=torch.int16)}
    with pytest.raises(CheckpointError, match="some.safetensors: its `table` is torch.int16"):
        check(model, given)


def test_names_that_the_host_changes_are_compared_as_it_changes_them():
    model = torch.nn.Module()
    rename = lambda state: {f"new.{name}": tensor for name, tensor in state.items()}  # noqa: E731
    model.model_config = SimpleNamespace(process_unet_state_dict=rename)
    (found,) = as_named(model, {"a.weight": torch.zeros(2, 3)}).items()
    assert (found[0], found[1].shape, found[1].device.type) == ("new.a.weight", (2, 3), "meta")


def test_a_block_that_the_model_would_leave_out_is_refused_and_other_weights_are_told(caplog):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    given = model.state_dict() | {"blocks.1.more.weight": torch.zeros(2), "extra.0.weight": torch.zeros(2)}
    assert check(model, given) == "2 weights that this ComfyUI has no place for, such as blocks.1.more.weight"
    assert "some.safetensors has 2 weights that" in caplog.text
    with pytest.raises(CheckpointError, match="some.safetensors: it has `blocks.2.weight`, which .* leave out"):
        check(model, given | {"blocks.2.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match="it has `blocks.1.more.weight`, which the model .* update ComfyUI"):
        check_model(model, torch.nn.Linear, given, "some.safetensors", lambda: model, whole=True)
    del given["blocks.1.more.weight"]
    assert check_model(model, torch.nn.Linear, given, "some.safetensors", lambda: model, whole=True)


def test_a_quantised_weight_of_a_module_that_drops_scales_is_refused():
    model = built()
    given = model.state_dict() | {"a.norm.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    given["a.norm.weight"] = given["a.norm.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="layer a.norm: its `weight` is quantized, .* in a LayerNorm"):
        check(model, given)
