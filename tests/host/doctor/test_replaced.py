# SPDX-License-Identifier: Apache-2.0
"""A sampling function that another pack put there is tried with a joint latent: what cannot take one is named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import server
import torch
from nvfp4_video.host.doctor import probe, replaced, trials
from nvfp4_video.host.doctor.facts import Fact
from nvfp4_video.tests.support.modules import offer, withhold
from nvfp4_video.tests.support.other_packs import HOST, PACK, PACK_S_NAME, Nested, of

CHANNELS, GUIDER = "comfy.sample.fix_empty_latent_channels", "comfy.samplers.CFGGuider.sample"
EULER = "comfy.k_diffusion.sampling.sample_euler"


def pack_latents(latents):
    return torch.cat([part.reshape(part.shape[0], 1, -1) for part in latents], -1), [part.shape for part in latents]


def unpack_latents(packed, shapes):
    parts = packed.split([torch.Size(shape[1:]).numel() for shape in shapes], -1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class Guider:
    def __init__(self, patcher):
        self.patcher = patcher


@pytest.fixture
def host(monkeypatch, tmp_path):
    """-> a function that puts functions into a host, by name, and asks; whose own are of HOST and sampling.py."""
    own = tmp_path / "sampling.py"
    own.write_text("def sample_euler(model, x, sigmas):\n    return x\n", encoding="utf-8")
    monkeypatch.setattr(replaced, "_judged", {})
    offer(monkeypatch, "comfy.nested_tensor", NestedTensor=Nested)
    offer(monkeypatch, "comfy.latent_formats", LatentFormat=SimpleNamespace)
    offer(monkeypatch, "comfy.model_sampling", ModelSamplingFlux=type("Flux", (), {}), CONST=type("Const", (), {}))
    utils = SimpleNamespace(pack_latents=pack_latents, unpack_latents=unpack_latents)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    offer(monkeypatch, "comfy.samplers", __file__=HOST, CFGGuider=Guider)
    offer(monkeypatch, "comfy.sample", __file__=HOST)
    offer(monkeypatch, "comfy.k_diffusion.sampling", __file__=str(own))

    def ask(**functions: object) -> Fact:
        for name, function in functions.items():
            place, attribute = {
                "channels": ("comfy.sample", "fix_empty_latent_channels"),
                "euler": ("comfy.k_diffusion.sampling", "sample_euler"),
                "guider": ("comfy.samplers", "CFGGuider"),
            }[name]
            made = type("CFGGuider", (Guider,), {"sample": function}) if name == "guider" else function
            monkeypatch.setattr(sys.modules[place], attribute, made, raising=False)
        return probe.probe()["joint_sampling_crash"]

    return ask


# Each function as of another pack, for each of the places.


def channels_of_a_tensor(model, latent):
    return latent if latent.shape[1] == model.get_model_object("latent_format").latent_channels else latent * 1


def channels_of_both(model, latent):
    return latent if latent.is_nested else channels_of_a_tensor(model, latent)


def channels_of_the_picture(model, latent):
    return latent.unbind()[0] if latent.is_nested else latent


def guides_what_is_nested(self, noise, latent_image, sampler, sigmas, disable_pbar=False, **options):
    return self.outer_sample(noise, latent_image, sampler, sigmas)


def guides_what_it_packs(self, noise, latent_image, sampler, sigmas, disable_pbar=False, **options):
    if not latent_image.is_nested:
        return self.outer_sample(noise, latent_image, sampler, sigmas)
    packed, shapes = pack_latents(latent_image.unbind())
    return Nested(unpack_latents(self.outer_sample(packed, packed, sampler, sigmas), shapes))


def samples_five_dimensions(model, x, sigmas, extra_args=None, callback=None, disable=None):
    batch, channels, frames, height, width = x.shape
    return model(x, sigmas[0] * x.new_ones(batch), **extra_args)


def samples_anything(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[0] * x.new_ones(x.shape[0]), **extra_args)


def needs_what_a_trial_lacks(*arguments, **options):
    raise RuntimeError("no model of the right kind")


@pytest.mark.parametrize(
    ("place", "name", "function", "wrong"),
    [
        ("channels", CHANNELS, channels_of_a_tensor, "stops on a joint latent (AttributeError)"),
        ("channels", CHANNELS, channels_of_the_picture, "loses a part of a joint latent"),
        ("guider", GUIDER, guides_what_is_nested, "stops on a joint latent (TypeError)"),
        ("euler", EULER, samples_five_dimensions, "stops on a joint latent (ValueError)"),
    ],
)
def test_a_function_that_cannot_take_a_joint_latent_is_found_with_the_module_it_is_from(
    host, place, name, function, wrong
):
    fact = host(**{place: of(PACK, function)})
    assert fact.value == ((name, PACK_S_NAME),)
    assert fact.text == f"yes: {name} is {PACK_S_NAME}'s, which {wrong}"


@pytest.mark.parametrize(
    ("place", "function"),
    [("channels", channels_of_both), ("guider", guides_what_it_packs), ("euler", samples_anything)],
)
def test_a_function_that_takes_a_joint_latent_is_not_named(host, place, function):
    fact = host(**{place: of(PACK, function)})
    assert (fact.value, fact.text) == ((), "no")


@pytest.mark.parametrize("place", ["channels", "guider", "euler"])
def test_a_function_that_stops_on_a_plain_latent_too_is_not_judged(host, place):
    fact = host(**{place: of(PACK, needs_what_a_trial_lacks)})
    assert (fact.value, fact.text) == ((), "no")


@pytest.mark.parametrize("made", [None, 3, "latent", [], {}, SimpleNamespace(shape=7), object()])
def test_what_is_no_latent_at_all_is_not_judged(host, made):
    def wild(*arguments, **options):
        return made

    fact = host(channels=of(PACK, wild), guider=of(PACK, wild), euler=of(PACK, wild))
    assert (fact.value, fact.text) == ((), "no")


@pytest.mark.parametrize("made", [None, 3, [], SimpleNamespace(is_nested=True), Nested([3, 4]), object()])
def test_what_gives_no_latent_for_a_joint_one_loses_it(host, made):
    def wild(model, latent):
        return made if latent.is_nested else latent

    fact = host(channels=of(PACK, wild), euler=of(PACK, samples_five_dimensions))
    assert [name for name, _ in fact.value] == [CHANNELS, EULER]
    assert "loses a part of a joint latent" in fact.text


class Anything:
    """Has every attribute, as a mock has, and can be called."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *arguments, **options):
        return Anything()


@pytest.mark.parametrize("function", [3, "sample", [], Anything(), Anything, len, SimpleNamespace()])
def test_what_is_no_function_of_python_does_not_hide_what_is_wrong_elsewhere(host, function):
    fact = host(channels=function, euler=of(PACK, samples_five_dimensions))
    assert fact.value == ((EULER, PACK_S_NAME),)
    assert probe.probe()["replaced_sampling"].known


def test_the_host_s_own_functions_are_not_tried(host):
    own = sys.modules["comfy.k_diffusion.sampling"].__file__
    fact = host(channels=of(HOST, channels_of_a_tensor), guider=of(HOST, guides_what_is_nested),
                euler=of(own, samples_five_dimensions))  # fmt: skip
    assert (fact.value, fact.text) == ((), "no")
    assert replaced._judged == {}


def test_a_sampler_that_a_pack_adds_replaces_nothing(host, monkeypatch):
    monkeypatch.setattr(
        sys.modules["comfy.k_diffusion.sampling"], "sample_own", of(PACK, samples_five_dimensions), raising=False
    )
    assert host().value == ()


def test_a_function_is_tried_once_and_another_one_in_its_place_anew(host):
    calls = []

    def counted(model, latent):
        calls.append(latent)
        return latent

    function = of(PACK, counted)
    host(channels=function)
    first = len(calls)
    host(channels=function)
    assert first == len(calls) == 2  # a plain latent, a joint one
    assert host(channels=of(PACK, channels_of_a_tensor)).value == ((CHANNELS, PACK_S_NAME),)


def test_a_trial_leaves_the_generators_as_they_were(host):
    def seeds(model, latent):
        torch.manual_seed(7)
        return latent

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    host(channels=of(PACK, seeds))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_tried_beside_a_running_prompt(host, monkeypatch):
    running = server.PromptServer(None)
    running.prompt_queue = SimpleNamespace(currently_running={0: "a prompt"})
    monkeypatch.setattr(server.PromptServer, "instance", running)
    fact = host(channels=of(PACK, channels_of_a_tensor))
    assert (fact.value, "while a prompt runs" in fact.text) == (None, True)
    running.prompt_queue.currently_running.clear()
    assert host().value == ((CHANNELS, PACK_S_NAME),)


def test_a_host_without_these_functions_has_none_that_is_replaced(host, monkeypatch):
    for name in ("comfy.sample", "comfy.samplers", "comfy.k_diffusion.sampling"):
        offer(monkeypatch, name, __file__=HOST)
    assert (host().value, host().text) == ((), "no")
    for name in ("comfy.sample", "comfy.samplers", "comfy.k_diffusion.sampling"):
        monkeypatch.delitem(sys.modules, name)
    assert (host().value, host().text) == ((), "no")


def test_a_host_without_joint_latents_has_none_to_lose(host, monkeypatch):
    withhold(monkeypatch, "comfy.nested_tensor")
    fact = host(channels=of(PACK, channels_of_a_tensor))
    assert (fact.value, fact.text) == ((), "no, this ComfyUI has no joint latents")


@pytest.mark.parametrize("name", ["comfy.latent_formats", "comfy.model_sampling", "comfy.utils"])
def test_a_host_that_lacks_what_a_trial_needs_is_not_judged_and_nothing_stops(host, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    fact = host(channels=of(PACK, channels_of_a_tensor), euler=of(PACK, samples_five_dimensions))
    assert (CHANNELS, PACK_S_NAME) not in fact.value or name != "comfy.latent_formats"
    assert fact.text.startswith(("yes: ", "no"))


def test_no_text_holds_a_path(host):
    fact = host(channels=of(PACK, channels_of_a_tensor), euler=of(str(Path(PACK).with_name("x.py")), samples_anything))
    assert "/srv" not in fact.text
    assert trials.origin(of(PACK, channels_of_a_tensor)) == PACK_S_NAME
