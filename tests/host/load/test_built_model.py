# SPDX-License-Identifier: Apache-2.0
"""After the host has built a model, its parameters are held against what the file had: nothing is left to chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host.load.state_dict import as_named, check_model


def built() -> torch.nn.Module:
    """Two components of a model, as the host builds them: one with a Linear, a norm and a table, one with a Linear."""
    a = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 8), "norm": torch.nn.LayerNorm(4, bias=False)})
    model = torch.nn.ModuleDict({"a": a, "b": torch.nn.ModuleDict({"k": torch.nn.Linear(4, 8)})})
    model.register_parameter("table", torch.nn.Parameter(torch.zeros(2, 4)))
    return model


@pytest.mark.parametrize("lost", ["a.q.bias", "a.q.weight", "a.norm.weight", "table", "b.k.bias"])
def test_a_model_that_is_built_with_what_the_file_lacks_is_refused(lost: str):
    model = built()
    given = model.state_dict()
    check_model(model, torch.nn.Linear, given, "some.safetensors")
    del given[lost]
    layer, _, suffix = lost.rpartition(".")
    where = f"some.safetensors, layer {layer}" if layer else "some.safetensors"
    with pytest.raises(CheckpointError, match=f"{where}: it has no `{suffix}`; expected floating point of shape"):
        check_model(model, torch.nn.Linear, given, "some.safetensors")


def test_a_layer_that_the_file_lacks_is_refused_where_it_has_others_of_the_component(caplog):
    model = built()
    model["b"]["k"].weight = None
    given = {key: value for key, value in model.state_dict().items() if not key.startswith("b.")}
    check_model(model, torch.nn.Linear, given, "some.safetensors")
    assert "some.safetensors has nothing of b, which this ComfyUI builds" in caplog.text
    model["a"]["q"].weight = None
    given = {key: value for key, value in given.items() if not key.startswith("a.q.")}
    with pytest.raises(CheckpointError, match="layer a.q: it has no `weight`"):
        check_model(model, torch.nn.Linear, given, "some.safetensors")


def test_integers_are_no_parameters_of_a_model():
    model = built()
    given = model.state_dict() | {"table": torch.zeros(2, 4, dtype=torch.int16)}
    with pytest.raises(CheckpointError, match="some.safetensors: its `table` is torch.int16"):
        check_model(model, torch.nn.Linear, given, "some.safetensors")


def test_names_that_the_host_changes_are_compared_as_it_changes_them():
    model = torch.nn.Module()
    rename = lambda state: {f"new.{name}": tensor for name, tensor in state.items()}  # noqa: E731
    model.model_config = SimpleNamespace(process_unet_state_dict=rename)
    (found,) = as_named(model, {"a.weight": torch.zeros(2, 3)}).items()
    assert (found[0], found[1].shape, found[1].device.type) == ("new.a.weight", (2, 3), "meta")
