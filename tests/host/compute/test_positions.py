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
from nvfp4_video.host.compute import fusions, graph_key, positions

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


def latent_to_pixel_coords(coords, factor):
    return coords * factor


def generate_freqs():
    """By this name and those below the host's functions behind its tables are found; here they do nothing."""


get_fractional_positions = freqs_cis_matrix = generate_freqs


class SymmetricPatchifier:
    """Tokens of video in the order and with the strides of the host's, and their coordinates."""

    patch_size = (1, 1, 1)

    def __init__(self):
        self.shift = 0

    def get_latent_coords(self, frames, height, width, batch):
        return torch.arange(frames * height * width).float().repeat(batch, 1) + self.shift

    def patchify(self, latents):
        batch, _, *sizes = latents.shape
        tokens = latents.permute(0, 2, 3, 4, 1).reshape(batch, -1, latents.shape[1])
        return tokens, self.get_latent_coords(*sizes, batch)


class AudioPatchifier:
    def __init__(self):
        self.hop = 2

    def _get_audio_latent_time_in_sec(self, start, end):
        return torch.arange(start, end).float() * self.hop

    def patchify(self, latents):
        tokens = latents.permute(0, 2, 1, 3).reshape(latents.shape[0], latents.shape[2], -1)
        return tokens, self._get_audio_latent_time_in_sec(0, latents.shape[2])


class LTXVModel(torch.nn.Module):
    """Video's part of the host's way from latents to tokens."""

    def _process_input(self, x, keyframe_idxs, denoise_mask, **kwargs):
        tokens, coords = self.patchifier.patchify(x)
        coords = latent_to_pixel_coords(coords, self.vae_scale_factors)
        coords = coords if keyframe_idxs is None else keyframe_idxs
        return self.patchify_proj(tokens), coords, {"orig_shape": list(x.shape)}

    def apply_keyframes_abs_pos_embedding(self, x, pixel_coords, **_):
        return x

    def _precompute_freqs_cis(self, coords, dtype):
        return (coords / self.positional_embedding_max_pos[0]).to(dtype)

    def _prepare_positional_embeddings(self, coords, frame_rate, x_dtype):
        coords.mul_(1 / frame_rate)


class LTXAVModel(LTXVModel):
    """Tables as the host makes them: it writes to the coordinates it is given. ``taken``: inputs the host took."""

    def __init__(self):
        super().__init__()
        self.time_proj = Timesteps()
        self.positional_embedding_max_pos, self.made, self.taken = [20, 2048, 2048], 0, 0
        self.patchifier, self.a_patchifier = SymmetricPatchifier(), AudioPatchifier()
        self.vae_scale_factors, self.causal_temporal_positioning = 3, True
        self.patchify_proj, self.audio_patchify_proj = torch.nn.Linear(4, 3), torch.nn.Linear(6, 3)

    def separate_audio_and_video_latents(self, x, audio_length):
        return x

    def _process_input(self, x, keyframe_idxs, denoise_mask, **kwargs):
        self.taken += 1
        varies = False
        for frame in range(denoise_mask.shape[2] if denoise_mask is not None else 0):
            one = denoise_mask[0, 0, frame]
            varies = varies or bool(one.numel() > 0 and one.min() != one.max())
        video, coords, more = super()._process_input(x[0], keyframe_idxs, denoise_mask, **kwargs)
        audio, times = self.a_patchifier.patchify(x[1])
        if (reference := kwargs.get("ref_audio")) is not None:
            times = torch.cat([reference, times])
        return [video, self.audio_patchify_proj(audio)], [coords, times], more | {"has_spatial_mask": varies}

    def _prepare_positional_embeddings(self, pixel_coords, frame_rate, x_dtype):
        self.made += 1
        super()._prepare_positional_embeddings(pixel_coords[0], frame_rate, x_dtype)
        return [(self._precompute_freqs_cis(one, x_dtype), True) for one in pixel_coords]


@pytest.fixture
def patcher(monkeypatch: pytest.MonkeyPatch) -> ModelPatcher:
    module = types.ModuleType("comfy.ldm.lightricks.av_model")
    module.LTXAVModel = LTXAVModel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(positions, "_known_embedding", lambda: Timesteps)
    monkeypatch.setattr(positions, "_CODE", fusions.fingerprint(*positions._code(LTXAVModel)[1]))
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


@pytest.mark.parametrize("place", ["the class", "the model", "around the model's"])
def test_a_function_of_somebody_s_is_asked_in_every_step(place, patcher, monkeypatch):
    model, step = patcher.model.diffusion_model, iter(range(9))
    taken = take(model)
    host_s = LTXAVModel._precompute_freqs_cis
    if place == "the class":
        monkeypatch.setattr(LTXAVModel, "_precompute_freqs_cis", lambda *given: host_s(*given) + next(step))
    elif place == "the model":
        model._precompute_freqs_cis = lambda *given: host_s(model, *given) + next(step)
    else:
        ours = model._prepare_positional_embeddings

        def around(*given):
            tables = ours(*given)
            tables[0][0].add_(next(step))
            return tables

        model._prepare_positional_embeddings = around
    found = [take(model)[3][0][0] for _ in range(3)]
    by = 1 if place == "around the model's" else 2  # tables a step
    for number, one in enumerate(found):
        assert torch.equal(one, taken[3][0][0] + by * number), "another one in each step"


def test_nothing_is_kept_after_a_sampling_or_with_gradients(patcher):
    model = patcher.model.diffusion_model
    ask(patcher)
    (drop,) = patcher.callbacks[CallbacksMP.ON_CLEANUP][positions.KEY]
    drop(patcher)
    assert positions._TABLES not in model.__dict__
    with torch.enable_grad():
        for _ in range(2):
            model._prepare_positional_embeddings(coords(), 25.0, torch.bfloat16)
    assert model.made == 3 and positions._TABLES not in model.__dict__


def latents(frames=2, width=2, sound=5, batch=1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return [torch.randn(shape, generator=generator) for shape in ((batch, 4, frames, 2, width), (batch, 2, sound, 3))]


def take(model, x=None, keyframes=None, mask=None, **more):
    """Latents -> tokens, coordinates, what else is handed on, the tables."""
    with torch.inference_mode():
        tokens, coords, found = model._process_input(x or latents(), keyframes, mask, **more)
        asked = [one.clone() for one in coords]
        return tokens, asked, found, model._prepare_positional_embeddings(coords, 25.0, torch.bfloat16)


def right(model, *given, **more):
    """The same of a model of the host's with this one's weights and numbers."""
    fresh = LTXAVModel()
    fresh.load_state_dict(model.state_dict())
    for name in ("patchifier", "a_patchifier", "vae_scale_factors"):
        setattr(fresh, name, getattr(model, name))
    return take(fresh, *given, **more)


def same(found, expected) -> bool:
    flat = ([*one[0], *one[1], *(table[0] for table in one[3])] for one in (found, expected))
    alike = all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*flat, strict=True))
    return alike and found[2] == expected[2]


def test_coordinates_of_a_shape_are_made_once_and_their_tables_are_not_compared(patcher, monkeypatch):
    model = patcher.model.diffusion_model
    first = take(model)
    assert same(first, right(model)) and model.taken == model.made == 1
    monkeypatch.setattr(torch, "equal", None)
    again = take(model)
    monkeypatch.undo()
    assert same(again, first) and again[3] is first[3] and model.taken == model.made == 1
    for x in (latents(3), latents(2, 4), latents(sound=7), latents(batch=2), latents()):
        before = model.taken
        assert same(take(model, x), right(model, x)) and model.taken == before + 1
        assert same(take(model, x), right(model, x)) and model.taken == before + 1


def test_what_the_coordinates_may_follow_from_besides_leaves_them_to_the_host(patcher, monkeypatch):
    model = patcher.model.diffusion_model
    keyframes, sound = torch.tensor([[7.0, 8, 9, 1, 2, 3, 4, 5]]), torch.tensor([-2.0])
    keyframes, sound = [{"keyframes": keyframes + by} for by in (0, 1)], [{"ref_audio": sound - by} for by in (0, 1)]
    for more in (*keyframes, *sound):
        for _ in range(2):
            before = model.taken
            assert same(take(model, **more), right(model, **more)) and model.taken == before + 1, more
        assert same(take(model), right(model))
    taken = model.taken
    with torch.enable_grad():
        model._process_input(latents(), None, None)
    take(model, tuple(latents()))
    assert model.taken == taken + 2
    take(model)
    monkeypatch.setattr(LTXVModel, "_process_input", lambda *given, **more: "somebody's")
    with pytest.raises(ValueError):
        take(model)


def test_other_numbers_and_functions_of_the_host_s_modules_make_them_anew(patcher, monkeypatch):
    model = patcher.model.diffusion_model
    host_s = SymmetricPatchifier.get_latent_coords

    def method():
        model.a_patchifier.patchify = lambda x: (2 * x.permute(0, 2, 1, 3).flatten(2), torch.ones(x.shape[2]))

    changes = [
        lambda: setattr(model, "vae_scale_factors", 5), lambda: setattr(model.patchifier, "shift", 2),
        lambda: setattr(model.a_patchifier, "hop", 4), method, lambda: vars(model.a_patchifier).pop("patchify"),
        lambda: monkeypatch.setattr(SymmetricPatchifier, "get_latent_coords", lambda *given: host_s(*given) + 1),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        take(model)
        change()
        assert same(take(model), right(model)), number
        assert same(take(model), right(model)), number


def test_coordinates_that_somebody_wrote_to_are_not_taken_for_the_host_s(patcher, monkeypatch):
    model = patcher.model.diffusion_model
    take(model)
    with torch.inference_mode():
        _, coords, _ = model._process_input(latents(), None, None)
        coords[0].add_(4)
        tables = model._prepare_positional_embeddings(coords, 25.0, torch.bfloat16)
        expected = LTXAVModel()._prepare_positional_embeddings([one.clone() for one in coords], 25.0, torch.bfloat16)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(tables, expected, strict=True))
    assert same(take(model), right(model)) and same(take(model), right(model))
    with torch.inference_mode():
        model._process_input(latents(), None, None)[1][0].add_(0)
    found = take(model)
    monkeypatch.setattr(torch, "equal", None)
    assert take(model)[3] is found[3], "what was compared once is known from then on"


def test_a_mask_is_looked_at_as_the_host_does(patcher):
    model, masks = patcher.model.diffusion_model, [torch.ones(1, 1, 2, 2, 2) for _ in range(4)]
    masks[1][:, :, 0] = 0.0
    masks[2][0, 0, 1, 1, 1] = 0.5
    masks[3][0, 0, 1] = math.nan
    take(model)
    found = [take(model, mask=mask) for mask in masks]
    assert model.taken == 1 and [one[2]["has_spatial_mask"] for one in found] == [False, False, True, True]
    assert all(same(one, right(model, mask=mask)) for one, mask in zip(found, masks, strict=True))
    take(model, mask=torch.ones(1, 1, 2, 0, 2))
    assert model.taken == 2


def test_the_projections_and_their_hooks_are_given_in_every_step_what_the_host_gives_them(patcher):
    model, calls = patcher.model.diffusion_model, []
    for layer in (model.patchify_proj, model.audio_patchify_proj):
        layer.register_forward_hook(lambda _, given, out: calls.append((given[0].stride(), given[0].tolist())))
    for _ in range(3):
        take(model)
    assert model.taken == 1 and calls[:2] == calls[2:4] == calls[4:]


def test_the_cpu_waits_for_the_beginning_of_the_call_before(patcher, monkeypatch):
    model, done = patcher.model.diffusion_model, []

    class Event:
        def __init__(self):
            self.number = len(done)

        def record(self, stream):
            done.append(f"{self.number} recorded on {stream}")

        def synchronize(self):
            done.append(f"{self.number} waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{device}'s")
    for _ in range(3):
        positions._keep_pace(model, torch.device("cuda:1"))
    assert done == [
        "0 recorded on cuda:1's", "1 recorded on cuda:1's", "0 waited for", "3 recorded on cuda:1's", "1 waited for"
    ]  # fmt: skip
    positions._drop(patcher)
    positions._keep_pace(model, torch.device("cuda:1"))
    assert len(done) == 6, "nothing is waited for in the first call of a sampling"
    positions._keep_pace(model, CPU)
    assert len(done) == 6


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
