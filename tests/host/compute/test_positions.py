# SPDX-License-Identifier: Apache-2.0
"""What is kept between steps: tables of rotations, until something they follow from is another, and frequencies."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from nvfp4_video.host.compute import graph_key, positions

CPU = torch.device("cpu")


class Timesteps(torch.nn.Module):
    """A timestep's embedding in the operations of the host's."""

    def __init__(self, num_channels=16, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1):
        super().__init__()
        self.num_channels, self.flip_sin_to_cos = num_channels, flip_sin_to_cos
        self.downscale_freq_shift, self.scale = downscale_freq_shift, scale

    def forward(self, timesteps):
        half = self.num_channels // 2
        exponent = -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32, device=timesteps.device)
        emb = timesteps[:, None].float() * torch.exp(exponent / (half - self.downscale_freq_shift))[None, :]
        emb = self.scale * emb
        emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)
        return torch.cat([emb[:, half:], emb[:, :half]], dim=-1) if self.flip_sin_to_cos else emb


class LTXAVModel(torch.nn.Module):
    """Tables as the host makes them: it writes to the coordinates it is given."""

    def __init__(self):
        super().__init__()
        self.time_proj = Timesteps()
        self.positional_embedding_max_pos, self.made = [20, 2048, 2048], 0

    def _precompute_freqs_cis(self, coords, dtype):
        return (coords / self.positional_embedding_max_pos[0]).to(dtype)

    def _prepare_positional_embeddings(self, pixel_coords, frame_rate, x_dtype):
        self.made += 1
        pixel_coords[0].mul_(1 / frame_rate)
        return [(self._precompute_freqs_cis(one, x_dtype), True) for one in pixel_coords]


@pytest.fixture
def patcher(monkeypatch: pytest.MonkeyPatch) -> ModelPatcher:
    module = types.ModuleType("comfy.ldm.lightricks.av_model")
    module.LTXAVModel = LTXAVModel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(positions, "_known_embedding", lambda: Timesteps)
    inner = torch.nn.Module()
    inner.diffusion_model = LTXAVModel()
    found = ModelPatcher(inner, CPU, CPU)
    positions.use_positions(found)
    return found


def coords(first: float = 1.0, tokens: int = 4) -> list[torch.Tensor]:
    return [torch.arange(tokens).float() + first, torch.arange(2).float()]


def ask(patcher, given=None, frame_rate=25.0, dtype=torch.bfloat16):
    with torch.no_grad():
        return patcher.model.diffusion_model._prepare_positional_embeddings(given or coords(), frame_rate, dtype)


def test_tables_of_the_same_coordinates_are_made_once_and_are_the_host_s(patcher):
    model = patcher.model.diffusion_model
    assert type(model.time_proj).__name__ == "KeepsFrequencies"
    assert type(model).__name__ == "LTXAVModel" and isinstance(model, LTXAVModel)
    assert type(model) is not LTXAVModel and graph_key.is_host_s(model, "LTXAVModel")
    first, again = ask(patcher), ask(patcher)
    assert again is first and model.made == 1
    right = LTXAVModel()._prepare_positional_embeddings(coords(), 25.0, torch.bfloat16)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, right, strict=True))


def test_anything_they_follow_from_makes_them_anew(patcher, monkeypatch):
    model = patcher.model.diffusion_model

    def longer():
        model.positional_embedding_max_pos = [40, 2048, 2048]

    def patched():
        host_s = LTXAVModel._precompute_freqs_cis
        monkeypatch.setattr(LTXAVModel, "_precompute_freqs_cis", lambda *given: host_s(*given) + 1)

    changes = [
        lambda: {"given": coords(2.0)}, lambda: {"given": coords(tokens=5)}, lambda: {"frame_rate": 24.0},
        lambda: {"dtype": torch.float32}, longer, patched,
    ]  # fmt: skip
    for number, change in enumerate(changes):
        ask(patcher)
        named = change() or {}
        before, found = model.made, ask(patcher, **named)
        assert model.made == before + 1, number
        given = named.get("given", coords())
        again = coords(2.0) if "given" in named and len(given[0]) == 4 else coords(tokens=len(given[0]))
        fresh = LTXAVModel()
        fresh.positional_embedding_max_pos = model.positional_embedding_max_pos
        right = fresh._prepare_positional_embeddings(again, named.get("frame_rate", 25.0), found[0][0].dtype)
        assert torch.equal(found[0][0], right[0][0]), number


def test_nothing_is_kept_after_a_sampling_or_with_gradients(patcher):
    model = patcher.model.diffusion_model
    ask(patcher)
    (drop,) = patcher.callbacks[CallbacksMP.ON_CLEANUP][positions.KEY]
    drop(patcher)
    assert positions._KEPT not in model.__dict__
    with torch.enable_grad():
        for _ in range(2):
            model._prepare_positional_embeddings(coords(), 25.0, torch.bfloat16)
    assert model.made == 3 and positions._KEPT not in model.__dict__


@pytest.mark.parametrize("options", [(), (16, False), (32, True, 1), (32, False, 0, 3.0)], ids=str)
def test_an_embedding_with_its_frequencies_kept_has_the_host_s_bits(options, monkeypatch):
    right, kept = Timesteps(*options), positions.embedding_class(Timesteps)(*options)
    with torch.no_grad():
        for _ in range(2):
            for times in (torch.rand(5) * 1000, torch.tensor([421.875]).double()):
                assert torch.equal(kept(times), right(times))
        monkeypatch.setattr(Timesteps, "forward", lambda self, times: "somebody's")
        assert kept(times) == "somebody's"


def test_a_model_of_another_class_is_left_alone(patcher):
    other = type("Other", (LTXAVModel,), {})
    patcher.model.diffusion_model = model = other()
    positions.use_positions(patcher)
    assert type(model) is other
