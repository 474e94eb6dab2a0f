# SPDX-License-Identifier: Apache-2.0
"""What GPTQ is worth on trained weights and real activations: six Linears of all-MiniLM-L6-v2, judged by outputs.

Calibrated and judged on different paragraphs. The whole model is measured by benchmarks/calibration.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from nvfp4_video.kernels import dispatch, gptq, reference
from nvfp4_video.measure.moments import Collector
from nvfp4_video.tests.support import minilm

if minilm.folder() is None:
    pytest.skip(f"all-MiniLM-L6-v2 is not installed: {minilm.INSTALL}", allow_module_level=True)

FULL = 1536
TOKENS = 3000, 800
PART = "encoder.layer.3."
LAYERS = {name: module for name, module in minilm.modules().items() if name.startswith(PART)}


@cache
def collectors() -> tuple[Collector, Collector]:
    """Of the texts to calibrate with, and of those to judge by: full matrices."""
    layers, found = minilm.modules(), []
    for texts in minilm.texts(*TOKENS):
        found.append(Collector({name: layers[name] for name in LAYERS}, FULL))
        with found[-1], torch.inference_mode():
            for text in texts:
                minilm.embed(minilm.weights(), text, layers)
    return tuple(found)


def blocks(gram: torch.Tensor, width: int) -> torch.Tensor:
    """(1, K, K) -> its blocks on the diagonal, (K / width, width, width)."""
    width = min(width, gram.shape[1])
    return torch.stack([gram[0, at : at + width, at : at + width] for at in range(0, gram.shape[1], width)])


@cache
def packed(width: int) -> dict[str, torch.Tensor]:
    """Layer -> its weight, packed and decoded; 0: by the plain search."""
    calibrated, found = collectors()[0], {}
    for name, layer in LAYERS.items():
        scale = reference.default_global_scale(layer.weight.abs().amax(), "mse")
        if width:
            moments = calibrated.moments[calibrated.inputs[name]]
            told = gptq.feedback(blocks(moments.gram + moments.held_out, width), 0.02)
            record = gptq.quantize(layer.weight, told, scale)
        else:
            record = dispatch.quantize(layer.weight, scale, "mse")
        found[name] = reference.dequantize(record, torch.float32)
    return found


def output_errors(width: int) -> list[float]:
    """Relative squared error of each layer's outputs on the texts it was not calibrated with."""
    judged, found = collectors()[1], []
    for name, weight in packed(width).items():
        moments = judged.moments[judged.inputs[name]]
        gram = moments.gram + moments.held_out
        original = LAYERS[name].weight
        found.append(float(gptq.output_error(weight - original, gram) / gptq.output_error(original, gram)))
    return found


def distance(width: int) -> float:
    """Mean cosine distance of the embeddings of other texts, with these layers packed, from the original's."""
    state = minilm.weights() | {f"{name}.weight": weight for name, weight in packed(width).items()}
    texts = minilm.texts(*TOKENS)[1]
    with torch.inference_mode():
        pairs = [(minilm.embed(minilm.weights(), text), minilm.embed(state, text)) for text in texts]
    return sum(1 - float(one @ other) for one, other in pairs) / len(pairs)


def test_query_key_and_value_share_one_input():
    calibrated = collectors()[0]
    assert len(LAYERS) == len(calibrated.inputs) == 6 and len(calibrated.moments) == 4
    leader = f"{PART}attention.self.query"
    assert calibrated.inputs[f"{PART}attention.self.value"] == leader


@pytest.mark.parametrize(("width", "share"), ((128, 0.70), (FULL, 0.55)))
def test_gptq_takes_a_good_part_of_the_output_error_on_texts_it_has_not_seen(width, share):
    plain, calibrated = output_errors(0), output_errors(width)
    assert sum(calibrated) < share * sum(plain)
    assert all(one < other for one, other in zip(calibrated, plain, strict=True))


def test_embeddings_of_other_texts_come_closer_to_the_original_s():
    assert distance(FULL) < 0.6 * distance(0)


def test_the_weights_themselves_are_further_off_than_with_the_search():
    plain, calibrated = (
        sum(float((weight - LAYERS[name].weight).square().sum()) for name, weight in packed(width).items())
        for width in (0, FULL)
    )
    assert 1.1 * plain < calibrated < 3 * plain
