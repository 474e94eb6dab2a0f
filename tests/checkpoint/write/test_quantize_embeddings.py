# SPDX-License-Identifier: Apache-2.0
"""What the scale search is worth on trained weights: the 36 Linears of all-MiniLM-L6-v2, and its sentence embeddings.

The model is a test-only package (tests/support/minilm.py); without it these tests are skipped.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from nvfp4_video.tests.support.minilm import INSTALL, LINEAR, SENTENCES, embed, folder, linears, weights

if folder() is None:
    pytest.skip(f"all-MiniLM-L6-v2 is not installed: {INSTALL}", allow_module_level=True)


@cache
def decoded(search: str) -> dict[str, torch.Tensor]:
    """The state with its Linears packed and decoded again."""
    state = dict(weights())
    for name in filter(LINEAR.fullmatch, state):
        record = dispatch.quantize(state[name], search=search)
        state[name] = reference.dequantize(record, torch.float32)
    return state


def test_the_model_written_out_here_is_the_published_one():
    config = json.loads((folder() / "config.json").read_text("utf-8"))
    assert (config["num_hidden_layers"], config["num_attention_heads"], len(linears())) == (6, 12, 36)
    guitar, instrument, market = (embed(weights(), sentence) for sentence in SENTENCES[:3])
    assert guitar @ instrument > 0.4 > 0.1 > guitar @ market


def test_amax_scales_on_trained_weights_are_comfy_kitchen_s():
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    for name in linears()[:6]:
        record = dispatch.quantize(weights()[name])
        packed, scale = kitchen.quantize_nvfp4(weights()[name], record.global_scale, pad_16x=True)
        assert torch.equal(record.packed, packed)
        assert torch.equal(record.block_scale.view(torch.uint8), scale.view(torch.uint8))


def test_on_trained_linears_the_search_leaves_a_fifth_less_squared_error():
    errors = dict.fromkeys(reference.SEARCHES, 0.0)
    for search in errors:
        for name in linears():
            errors[search] += float((decoded(search)[name] - weights()[name]).square().sum())
    assert errors["mse"] < 0.8 * errors["amax"]


def test_no_trained_linear_gets_worse():
    for name in linears():
        error = {s: (decoded(s)[name] - weights()[name]).square().sum() for s in reference.SEARCHES}
        assert error["mse"] < 0.85 * error["amax"], name


def test_block_scales_of_trained_linears_neither_saturate_nor_underflow():
    for name in linears():
        record = dispatch.quantize(weights()[name], search="mse")
        rows, cols = record.shape
        scale = reference.unswizzle(record.block_scale, rows, cols // 16).float()
        zero = weights()[name].view(rows, -1, 16).abs().amax(-1) == 0
        assert torch.equal(scale == 0, zero), name
        assert scale.max() <= 448 and scale[~zero].min() >= 2**-6, name


def test_sentence_embeddings_are_closer_to_the_unquantised_ones_than_with_amax_scales():
    distance = {}
    for search in reference.SEARCHES:
        pairs = [(embed(weights(), sentence), embed(decoded(search), sentence)) for sentence in SENTENCES]
        distance[search] = sum(1 - float(one @ other) for one, other in pairs) / len(pairs)
    assert 0 < distance["mse"] <= distance["amax"] < 0.1, distance
