# SPDX-License-Identifier: Apache-2.0
"""host/compute/token_graphs.py on stand-ins: token loops before, with, and after the Comfy Compiler's first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nvfp4_video.host.compute import token_graphs as text_decode
from nvfp4_video.tests.support import token_loops

PROMPT = [5, 9, 60, 2, 33, 8]


@pytest.fixture(params=token_loops.FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture
def llama(monkeypatch, form: str):
    for cached in (text_decode._classes, text_decode.disagreement):
        cached.cache_clear()
    yield token_loops.install(monkeypatch, form)
    for cached in (text_decode._classes, text_decode.disagreement):
        cached.cache_clear()


@pytest.fixture
def clip(llama) -> SimpleNamespace:
    """A text encoder as a DynamicVRAM host loads it: each block has its own allocation."""
    generator = torch.Generator().manual_seed(0)
    model = llama.Llama2_(llama.Gemma3_12B_Config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    for layer in model.layers:
        layer._v_block = object()
    encoder = SimpleNamespace(gemma3_12b=SimpleNamespace(transformer=SimpleNamespace(model=model)))
    patcher = SimpleNamespace(load_device=torch.device("cpu"), is_dynamic=lambda: True)
    return SimpleNamespace(cond_stage_model=encoder, patcher=patcher)


def model_of(clip: SimpleNamespace):
    return clip.cond_stage_model.gemma3_12b.transformer.model


@pytest.mark.parametrize("form", ["lists", "matrix"], indirect=True)
@torch.no_grad()
def test_tokens_are_the_host_s_with_its_decode_buffers_and_without(llama, clip, monkeypatch):
    wanted = token_loops.generate(model_of(clip), PROMPT, 20)
    monkeypatch.setattr(text_decode, "_obstacle", lambda *device: "")
    report, own = text_decode.use_graphs(clip).split("; its passes are ComfyUI's own, ")
    assert report == "a CUDA graph a block, where the block stays on the GPU"
    assert own == "this ComfyUI's block is not one that this pack knows"
    cache = text_decode._classes()[0]
    assert all(isinstance(one, cache) for one in model_of(clip).init_kv_cache(1, 8, torch.device("cpu"), torch.float32))
    assert len(set(wanted)) > 3
    assert token_loops.generate(model_of(clip), PROMPT, 20) == wanted


@pytest.mark.parametrize("form", ["matrix"], indirect=True)
@torch.no_grad()
def test_the_rotations_of_a_prompt_are_the_host_s_two_matrices(llama, clip):
    positions = torch.arange(5)[None]
    wanted = [llama.rope_matrix(one) for one in model_of(clip).compute_freqs_cis(positions, None)]
    text_decode.use_graphs(clip)
    assert torch.equal(model_of(clip).compute_freqs_cis(positions, None), torch.stack(wanted))


@pytest.mark.parametrize("form", ["matrix"], indirect=True)
@torch.no_grad()
def test_a_token_s_rotations_are_looked_up_while_its_cache_is_there(llama, clip):
    text_decode.use_graphs(clip)
    model, cpu, computed = model_of(clip), torch.device("cpu"), []
    wanted = [model.compute_freqs_cis(torch.tensor([[place]]), cpu) for place in range(11)]
    angles = llama.Llama2_.compute_freqs_cis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.Llama2_, "compute_freqs_cis", lambda *given: computed.append(given) or angles(*given))
        caches = model.fixed_caches(11, cpu, torch.float32)
        assert len(computed) == 1
        assert all(torch.equal(model.compute_freqs_cis(torch.tensor([[n]]), cpu), wanted[n]) for n in range(11))
        model.compute_freqs_cis(torch.arange(3, 5)[None], cpu)
        assert len(computed) == 2
        del caches
        assert torch.equal(model.compute_freqs_cis(torch.tensor([[4]]), cpu), wanted[4])
        assert len(computed) == 3


@pytest.mark.parametrize("form", ["changed"], indirect=True)
@torch.no_grad()
def test_a_host_that_keeps_its_cache_otherwise_is_named_and_decodes_as_without_the_pack(llama, clip, monkeypatch):
    wanted = token_loops.generate(model_of(clip), PROMPT, 20)
    monkeypatch.setattr(text_decode, "_obstacle", lambda *device: "")
    report = text_decode.use_graphs(clip)
    assert report.startswith("block by block, this ComfyUI's token loop is not the one known here (TypeError")
    assert "page" in report
    assert type(model_of(clip)) is llama.Llama2_
    assert token_loops.generate(model_of(clip), PROMPT, 20) == wanted


@pytest.mark.parametrize("form", ["matrix"], indirect=True)
def test_a_host_whose_blocks_compute_something_else_is_noticed(llama, monkeypatch):
    scale = llama.apply_rope
    monkeypatch.setattr(llama, "apply_rope", lambda query, key, freqs_cis: scale(query * 1.01, key, freqs_cis))
    assert "output differs by" in text_decode.disagreement()


def test_what_stands_in_the_way_of_graphs_is_named(monkeypatch):
    args, compiler = SimpleNamespace(disable_cuda_graphs=False), SimpleNamespace()
    modules = {"comfy.cli_args": SimpleNamespace(args=args), "comfy.model_prefetch": compiler}
    monkeypatch.setattr(text_decode.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(text_decode.comfy.model_management, "NUM_STREAMS", 2)
    gpu = torch.device("cuda")
    assert text_decode._obstacle(gpu) == ""
    compiler.malloc_graph_enabled = lambda device: device == gpu
    assert text_decode._obstacle(gpu) == ""
    compiler.malloc_graph_enabled = lambda device: False
    assert text_decode._obstacle(gpu) == "ComfyUI's compiler is off"
    args.disable_cuda_graphs = True
    assert "--disable-comfy-compiler" in text_decode._obstacle(gpu)
    assert "on cpu" in text_decode._obstacle(torch.device("cpu"))
