# SPDX-License-Identifier: Apache-2.0
"""Known faults are told by trying the functions that have them; what other packs replaced, by whose code runs."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import pytest
import server
import torch
from nvfp4_video.host.doctor import probe, trials
from nvfp4_video.tests.support.modules import offer, withhold
from nvfp4_video.tests.support.other_packs import HOST, PACK, Nested, of

# The block prefetch, as its three ages have it: the stream is waited for, waited for if there is one, or elsewhere.


def waits(queue, device, module):
    stream, _ = queue.pop(0)
    stream.wait_stream(device)


def waits_if_there_is_a_stream(queue, device, module, dtype=None, core=None):
    stream, _ = queue.pop(0)
    if stream is not None:
        stream.wait_stream(device)


def takes_something_else(queue):
    return queue


def has_another_fault(queue, device, module):
    return queue.popleft()


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (waits, True, "wait_stream"),
        (waits_if_there_is_a_stream, False, "no"),
        (takes_something_else, None, "unknown: TypeError"),
        (has_another_fault, None, "unknown: AttributeError"),
    ],
)
def test_only_a_prefetch_that_waits_for_no_stream_is_called_vulnerable(monkeypatch, function, value, words):
    offer(monkeypatch, "comfy.model_prefetch", prefetch_queue_pop=function)
    fact = probe.probe()["prefetch_crash"]
    assert fact.value is value
    assert words in fact.text


def test_a_host_without_the_prefetch_is_not_vulnerable_and_one_that_cannot_import_it_is_unknown(monkeypatch):
    withhold(monkeypatch, "comfy.model_prefetch")
    assert probe.probe()["prefetch_crash"].value is False
    monkeypatch.delitem(sys.modules, "comfy.model_prefetch")
    withhold(monkeypatch, "comfy_aimdo")

    class NeedsAimdo:
        def find_spec(self, name, path=None, target=None):
            if name == "comfy.model_prefetch":
                importlib_error = ModuleNotFoundError("No module named 'comfy_aimdo'", name="comfy_aimdo")
                raise importlib_error

    monkeypatch.setattr(sys, "meta_path", [NeedsAimdo(), *sys.meta_path])
    fact = probe.probe()["prefetch_crash"]
    assert (fact.value, fact.text) == (None, "unknown: there is no module comfy_aimdo")


def ambiguous(freqs, pad, split, heads, dtype):
    return freqs.reshape(*freqs.shape[:2], heads, -1)


def unambiguous(freqs, pad, split, heads, dtype):
    return freqs.reshape(*freqs.shape[:2], heads, freqs.shape[2] // heads)


@pytest.mark.parametrize(("function", "value"), [(ambiguous, True), (unambiguous, False), (None, False)])
def test_ltx2_needs_audio_where_the_rotary_embedding_cannot_be_empty(monkeypatch, function, value):
    offer(monkeypatch, "comfy.ldm.lightricks.av_model")
    offer(monkeypatch, "comfy.ldm.lightricks.model", **({"freqs_cis_matrix": function} if function else {}))
    assert probe.probe()["ltxav_needs_audio"].value is value


def test_a_host_without_ltx2_does_not_crash_in_it(monkeypatch):
    withhold(monkeypatch, "comfy.ldm.lightricks.av_model")
    assert probe.probe()["ltxav_needs_audio"].value is False


# Noise for joint audio and video, as the host makes it, and as packs written before LTX-2 do.


def makes_both(latent, seed, noise_inds=None):
    generator = torch.manual_seed(seed)
    parts = latent.unbind() if latent.is_nested else [latent]
    noises = [torch.randn(part.size(), generator=generator) for part in parts]
    return Nested(noises) if latent.is_nested else noises[0]


def makes_the_picture_s(latent, seed, noise_inds=None):
    return torch.randn(latent.size(), generator=torch.manual_seed(seed))


def stops(latent, seed, noise_inds=None):
    return torch.randn(latent.shape, generator=torch.manual_seed(seed))


def calls_another(latent, seed, noise_inds=None):
    return stops(latent, seed) * 0.5


def takes_nothing(latent):
    return latent


@pytest.fixture
def sampling(monkeypatch):
    """-> a function that puts a ``prepare_noise`` into a host, the file of whose own functions is HOST."""
    monkeypatch.setattr(trials, "_tried", [])
    offer(monkeypatch, "comfy.nested_tensor", NestedTensor=Nested)
    offer(monkeypatch, "comfy.samplers", __file__=HOST)

    def put(function):
        offer(monkeypatch, "comfy.sample", __file__=HOST, prepare_noise=function)
        return probe.probe()["joint_noise_crash"]

    return put


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (makes_both, False, "no, ComfyUI_Old/modules/rng.py takes both"),
        (makes_the_picture_s, True, "yes: ComfyUI_Old/modules/rng.py makes noise for the picture alone"),
        (stops, True, "yes: ComfyUI_Old/modules/rng.py stops on them (AttributeError)"),
        (calls_another, True, "yes: ComfyUI_Old/modules/rng.py stops on them (AttributeError)"),
        (takes_nothing, None, "unknown: TypeError"),
    ],
)
def test_replaced_noise_is_tried_and_called_by_its_pack(sampling, function, value, words):
    fact = sampling(of(PACK, function))
    assert fact.value is value
    assert fact.text.startswith(words)
    assert "/srv" not in fact.text


class Patch:
    """How packs replace a function by an object."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def method(self, *arguments):
        return self.function(*arguments)


@pytest.mark.parametrize(
    "wrap", [functools.partial, Patch, lambda function: Patch(function).method, torch.no_grad()],
    ids=["partial", "object", "method", "torch's decorator"],
)  # fmt: skip
def test_noise_is_tried_in_whatever_it_is_wrapped(sampling, wrap):
    assert sampling(wrap(of(PACK, makes_the_picture_s))).value is True
    assert sampling(wrap(of(PACK, makes_both))).value is False


def test_the_host_s_own_noise_is_not_tried(sampling):
    for function in (of(HOST, stops), torch.no_grad()(of(HOST, stops))):
        fact = sampling(function)
        assert (fact.value, fact.text) == (False, "no, it is ComfyUI's own")


def test_a_trial_leaves_the_generators_as_they_were_and_is_made_once(sampling):
    calls = []

    def counted(latent, seed, noise_inds=None):
        calls.append(latent)
        torch.manual_seed(seed)
        return latent

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sampling(function := of(PACK, counted))
    assert torch.equal(torch.random.get_rng_state(), before)
    first = len(calls)
    sampling(function)
    assert first == len(calls) > 0


def test_nothing_is_tried_beside_a_running_prompt(sampling, monkeypatch):
    host = server.PromptServer(None)
    host.prompt_queue = SimpleNamespace(currently_running={0: "a prompt"})
    monkeypatch.setattr(server.PromptServer, "instance", host)
    fact = sampling(of(PACK, stops))
    assert (fact.value, "while a prompt runs" in fact.text) == (None, True)
    host.prompt_queue.currently_running.clear()
    assert probe.probe()["joint_noise_crash"].value is True


def test_other_replaced_functions_are_named_and_not_judged(sampling, monkeypatch):
    sampling(of(HOST, makes_both))
    assert probe.probe()["replaced_sampling"].text == "none"
    guider = type("CFGGuider", (), {"sample": of(PACK, stops), "inner_sample": of(HOST, stops)})
    offer(monkeypatch, "comfy.samplers", __file__=HOST, CFGGuider=guider)
    fact = probe.probe()["replaced_sampling"]
    assert fact.value == (("comfy.samplers.CFGGuider.sample", "ComfyUI_Old/modules/rng.py"),)
    assert fact.text == "comfy.samplers.CFGGuider.sample is ComfyUI_Old/modules/rng.py's"
