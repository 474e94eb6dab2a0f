# SPDX-License-Identifier: Apache-2.0
"""scale_order.py: the order of aligned block scales is told where rows and columns differ, and never guessed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.dialects import detect
from nvfp4_video.checkpoint.identify.scale_order import ROW_MAJOR, TILED, measure
from nvfp4_video.kernels.format import swizzle
from nvfp4_video.tests.support.header_by_hand import ENTRY, MODELOPT, comfy_layer, header, marked

SHAPE = (512, 1024)
LAYERS = 6


def scales(spread: float, tiled: bool, seed: int) -> torch.Tensor:
    """Block scales of a random weight whose rows and columns differ in size by ``spread`` (sigma of the logarithm)."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(SHAPE[0], 1, generator=generator) * spread).exp()
    cols = (torch.randn(SHAPE[1], generator=generator) * spread).exp()
    weight = torch.randn(SHAPE, generator=generator) * rows * cols
    amax = weight.abs().unflatten(1, (-1, 16)).amax(-1)
    stored = (amax / amax.max() * 448).to(torch.float8_e4m3fn)
    return swizzle(stored) if tiled else stored


def file(spread: float, tiled: bool, metadata=None, mark: bool = False):
    """Header and reader of a file of layers whose scales have the same shape in either order."""
    layer = marked(comfy_layer(*SHAPE)) if mark else comfy_layer(*SHAPE)
    head = header(metadata, **{f"q{number}": layer for number in range(LAYERS)})
    stored = {f"q{number}.weight_scale": scales(spread, tiled, number) for number in range(LAYERS)}
    return head, stored.__getitem__


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("spread", [0.15, 0.3, 1.0])
def test_the_order_is_told_where_rows_and_columns_differ_as_in_trained_weights(spread: float, tiled: bool):
    head, read = file(spread, tiled)
    found = measure(head, detect(head, "comfy").groups, read)
    assert found.decided and found.found == (TILED if tiled else ROW_MAJOR) and found.agree == found.layers == LAYERS


@pytest.mark.parametrize("tiled", [False, True])
def test_random_numbers_decide_nothing(tiled: bool):
    head, read = file(0.0, tiled)
    found = measure(head, detect(head, "comfy").groups, read)
    assert not found.decided and "too little to decide" in str(found)


@pytest.mark.parametrize("about", [MODELOPT, MODELOPT | {ENTRY: '{"layers": {}}'}])
def test_a_modelopt_file_of_aligned_shapes_is_decided_by_its_scales_or_is_a_question(about):
    for tiled, dialect in ((False, "modelopt"), (True, "modelopt_swizzled")):
        head, read = file(0.3, tiled, about)
        plan = detect(head, read=read)
        assert plan.dialect == dialect and "measured" in plan.evidence and "6 of 6 layers" in plan.evidence
    head, read = file(0.0, False, about)
    with pytest.raises(CheckpointError, match="too little to decide.*set `dialect`"):
        detect(head, read=read)
    assert detect(head, "modelopt", read=read).dialect == "modelopt"


def test_a_stated_order_that_the_scales_clearly_contradict_is_refused_with_what_was_measured():
    head, read = file(0.3, True, mark=True)
    with pytest.raises(CheckpointError, match="block scales are tiled, not row-major as modelopt has them .*sigma"):
        detect(head, "modelopt", read=read)
    assert "measured" in detect(head, "modelopt_swizzled", read=read).evidence
    head, read = file(0.3, False, {ENTRY: json.dumps({"layers": {}})})
    with pytest.raises(CheckpointError, match="block scales are row-major, not tiled as comfy has them"):
        detect(head, "comfy", read=read)


def test_layers_of_one_tile_are_not_asked():
    head = header(q=comfy_layer())
    assert measure(head, detect(head, "comfy").groups, lambda name: pytest.fail(name)).layers == 0
    assert replace(measure(head, {}, pytest.fail)).decided is False
