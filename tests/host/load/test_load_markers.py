# SPDX-License-Identifier: Apache-2.0
"""Layers whose markers or weights contradict the rest of the file or the model: refused by load_model, on the stub."""

from __future__ import annotations

import torch
from nvfp4_video.host.load.model import load_model
from nvfp4_video.tests.host.load.test_load_model import (  # the fixtures come with their names
    LAYER,
    assert_computes_the_decoded_weights,
    assert_refused,
    edit,  # noqa: F401
    files,  # noqa: F401
    model,  # noqa: F401
    one_thread,  # noqa: F401
    put,
)


def test_linears_without_a_weight_or_with_another_s_are_refused(edit):  # noqa: F811
    path = edit("comfy_markers", put(f"{LAYER}.bias", torch.zeros(64, dtype=torch.bfloat16)))
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: .*expected .*\(64, 128\).*")


def test_markers_that_contradict_their_tensors_are_refused(edit, model):  # noqa: F811
    for content in (b'{"format": "nf4"}', b'{"format": "float8_e4m3fn"}'):
        path = edit("comfy_markers", put(f"{LAYER}.comfy_quant", torch.tensor(list(content), dtype=torch.uint8)))
        assert_refused(path, rf"edited\.safetensors, layer {LAYER}: its `comfy_quant` marker (names|says).*")
        assert_computes_the_decoded_weights(load_model(path, dialect="comfy")[0], model)
