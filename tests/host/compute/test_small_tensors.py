# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model count as small, and when what the host brought anew goes to their former place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.host.compute import small_tensors

CPU = torch.device("cpu")


def model() -> torch.nn.Module:
    norm, linear, large = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.Linear(1024, 1024, bias=False)
    norm.register_buffer("table", torch.arange(3))
    linear.__dict__["_v"] = object()  # DynamicVRAM's own
    return torch.nn.ModuleList([norm, linear, large]).requires_grad_(False)


def patcher(dynamic: bool = True, device: str = "cpu") -> SimpleNamespace:
    backup = {"0.weight": SimpleNamespace(weight=torch.empty(4, device=device))}
    return SimpleNamespace(is_dynamic=lambda: dynamic, backup=backup)


def bring_anew(norm: torch.nn.Module) -> None:
    norm.weight = torch.nn.Parameter(torch.full((4,), 7.0), requires_grad=False)
    norm.table = torch.arange(3) + 5


def test_small_are_tensors_below_a_mebibyte_that_have_no_address_of_their_own():
    found = small_tensors.places_of(model(), CPU)
    assert [(place.name, place.tensor.numel()) for place in found] == [("weight", 4), ("bias", 4), ("table", 3)]
    assert small_tensors.places_of(model(), torch.device("meta")) == []


def test_new_tensors_go_where_the_old_ones_lay_with_their_numbers():
    blocks = model()
    norm, places = blocks[0], small_tensors.places_of(blocks, CPU)
    addresses = [place.tensor.data_ptr() for place in places]
    bring_anew(norm)
    assert small_tensors.put_back(patcher(), places)
    assert [tensor.data_ptr() for tensor in (norm.weight, norm.bias, norm.table)] == addresses
    assert norm.weight.tolist() == [7.0] * 4 and norm.table.tolist() == [5, 6, 7]
    assert isinstance(norm.weight, torch.nn.Parameter) and norm.bias is places[1].tensor


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("a model without DynamicVRAM, whose originals may be these", {"dynamic": False}),
        ("originals that are not in RAM", {"device": "meta"}),
        ("a tensor of another shape", {}),
        ("no tensor", {}),
        ("a tensor that gradients may need", {}),
    ],
)
def test_nothing_is_written_to_where_that_might_destroy_something(case, given):
    blocks = model()
    norm, places = blocks[0], small_tensors.places_of(blocks, CPU)
    bring_anew(norm)
    if case == "a tensor of another shape":
        norm.table = torch.arange(4)
    elif case == "no tensor":
        norm.bias = None
    elif case == "a tensor that gradients may need":
        with torch.inference_mode():
            places = [place._replace(tensor=torch.nn.Parameter(place.tensor * 1, False)) for place in places[:1]]
    assert not small_tensors.put_back(patcher(**given), places)
    assert places[0].tensor.tolist() == [1.0] * 4 and norm.weight.tolist() == [7.0] * 4


def test_a_model_of_which_nothing_moved_is_left_alone():
    blocks = model()
    assert small_tensors.put_back(patcher(dynamic=False), small_tensors.places_of(blocks, CPU))
