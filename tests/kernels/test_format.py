# SPDX-License-Identifier: Apache-2.0
"""The layout of a packed weight: where scales lie, how nibbles are ordered, what is padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import fresh_generator, scale_offset
from nvfp4_video.kernels.format import block_scale_shape, packed_shape, round_up, swap_nibbles, swizzle, unswizzle

generator = pytest.fixture(fresh_generator)


def test_the_tiled_offset_of_a_scale_is_the_one_worked_out_by_hand():
    scales = torch.arange(256 * 8, dtype=torch.int16).remainder(251).to(torch.uint8).view(256, 8)
    tiled = swizzle(scales).flatten()
    by_hand = {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 0): 496, (32, 0): 4, (64, 0): 8, (127, 3): 511, (0, 4): 512}
    by_hand |= {(33, 5): 533, (127, 7): 1023, (128, 0): 1024, (255, 7): 2047}
    for (row, block), offset in by_hand.items():
        assert scale_offset(row, block, 8) == offset
        assert tiled[offset] == scales[row, block], (row, block)


@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (129, 5), (30, 7), (256, 8), (300, 13)])
def test_tiling_puts_every_scale_where_the_formula_says_and_zeros_elsewhere(shape, generator):
    scales = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    expected = np.zeros((round_up(shape[0], 128), round_up(shape[1], 4)), np.uint8)
    row, block = np.indices(shape)
    expected.ravel()[scale_offset(row, block, shape[1])] = scales.numpy()
    tiled = swizzle(scales.view(torch.float8_e4m3fn))
    assert tiled.dtype == torch.float8_e4m3fn
    assert np.array_equal(tiled.view(torch.uint8).numpy(), expected)
    assert torch.equal(unswizzle(tiled, *shape).view(torch.uint8), scales)


def test_tiling_undoes_untiling(generator):
    tiled = torch.randint(256, (256, 12), generator=generator, dtype=torch.uint8)
    assert torch.equal(swizzle(unswizzle(tiled, 256, 12)), tiled)


def test_swapping_nibbles_exchanges_the_two_codes_of_each_byte():
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        swap_nibbles(packed), torch.tensor([16 * (byte % 16) + byte // 16 for byte in range(256)]).byte()
    )
    assert swap_nibbles(torch.tensor([0xBA], dtype=torch.uint8)).item() == 0xAB


def test_rows_and_columns_are_padded_to_16_and_scales_to_whole_tiles():
    assert (packed_shape((30, 100)), block_scale_shape((30, 100))) == ((32, 56), (128, 8))
    assert (packed_shape((1, 16)), block_scale_shape((1, 16))) == ((16, 8), (128, 4))
    assert (packed_shape((129, 1024)), block_scale_shape((129, 1024))) == ((144, 512), (256, 64))
