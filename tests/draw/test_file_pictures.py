# SPDX-License-Identifier: Apache-2.0
"""Pictures of files: what is in a checkpoint, and the errors of its layers."""

from __future__ import annotations

import numpy as np
import pytest
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.verify.verify import blocks_and_kinds, verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.draw.inspect import inspection_picture
from nvfp4_video.draw.verify import colour_of, verification_picture
from nvfp4_video.tests.support import full_size
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Inspection of LTX-2.3 in its released size."""
    path = tmp_path_factory.mktemp("published") / "ltx-2.3-22b.safetensors"
    return inspect_checkpoint(full_size.write(path, full_size.checkpoint("NVFP4")))


def test_a_file_without_tensors_has_a_picture_too(tmp_path):
    empty = save(tmp_path / "e.safetensors", {}, {})
    assert inspection_picture(inspect_checkpoint(empty)).shape[1] == 1600


def test_the_picture_gives_each_component_its_share_of_the_bar(published):
    picture = inspection_picture(published)
    assert picture.dtype == np.uint8
    row = picture[180, 48:-48]  # inside the bar, above the letters
    share = (np.abs(row.astype(int) - (52, 96, 160)).max(-1) < 8).mean()
    total = sum(part.nbytes for part in published.parts)
    wanted = next(part.nbytes for part in published.parts if part.name == "diffusion_model") / total
    assert share == pytest.approx(wanted, abs=0.01)


def test_the_picture_stacks_each_block_by_format(published):
    picture = inspection_picture(published).astype(int)
    green = np.abs(picture - (86, 158, 60)).max(-1) < 8
    blue = np.abs(picture - (52, 96, 160)).max(-1) < 8
    chart = slice(440, 812)
    tall_green, tall_blue = green[chart].sum(0).max(), blue[chart].sum(0).max()
    packed = published.blocks["2"]["NVFP4"][1] / sum(nbytes for _, nbytes in published.blocks["0"].values())
    assert tall_green / tall_blue == pytest.approx(packed, abs=0.03)


def test_the_picture_has_a_cell_for_every_layer_and_red_for_what_is_wrong(tmp_path):
    source = save(tmp_path / "source.safetensors", tiny())
    quantize_checkpoint(source, tmp_path / "whole.safetensors", QuantizeSettings(search=AMAX))

    spoiled = load(tmp_path / "whole.safetensors")
    spoiled[f"{PREFIX}transformer_blocks.1.ff.net.0.proj.weight_scale_2"] *= 2
    save(tmp_path / "spoiled.safetensors", spoiled, metadata(tmp_path / "whole.safetensors"))
    good, bad = (verify(tmp_path / f"{name}.safetensors", source) for name in ("whole", "spoiled"))
    blocks, kinds = blocks_and_kinds(good.layers)
    assert blocks == [0, 1, 2, 3] and "attn1.to_q" in kinds and set(kinds["ff.net.0.proj"]) == {0, 1, 2, 3}
    pictures = [verification_picture(found) for found in (good, bad)]
    assert all(picture.shape[1:] == (1600, 3) and picture.dtype == "uint8" for picture in pictures)
    red = [int(((p[..., 0] > 180) & (p[..., 1] < 60) & (p[..., 2] < 60)).sum()) for p in pictures]
    assert red[1] > red[0] + 500
    assert colour_of(0.0) == colour_of(0.05) != colour_of(0.1) != colour_of(9.0)
