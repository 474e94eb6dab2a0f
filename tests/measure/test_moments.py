# SPDX-License-Identifier: Apache-2.0
"""What the collector of calibration statistics sums, which inputs it counts once, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.measure.moments import Collector, Moments, block_width, moment_bytes
from torch.nn import Linear, Module


class Attention(Module):
    """Two Linears of one input, one of another, and one that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.unused = (Linear(20, 20) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.q(x) * self.k(x))

    @property
    def layers(self) -> dict[str, Module]:
        return dict(self.named_children())


def total(found: Moments) -> torch.Tensor:
    return found.gram + found.held_out


def test_the_sums_are_the_gram_matrices_of_the_inputs_in_blocks_and_every_token_is_on_one_side():
    torch.manual_seed(0)
    model, inputs = Attention(), [torch.randn(2, 7, 20) for _ in range(5)]
    with Collector(model.layers, 16) as found:
        for x in inputs:
            model(x)
    rows = torch.nn.functional.pad(torch.cat(inputs).reshape(-1, 20), (0, 12))
    moments = found.moments["q"]
    for place in range(2):
        block = rows[:, 16 * place : 16 * place + 16]
        torch.testing.assert_close(total(moments)[place], block.t() @ block, rtol=1e-5, atol=1e-4)
    assert (moments.tokens + moments.held_tokens, moments.held_tokens) == (70, 17)
    torch.testing.assert_close(moments.mean_square, rows.square().mean(0)[:20])
    held = torch.cat([x.reshape(14, 20)[14 * (n % 4) // 4 : 14 * (n % 4 + 1) // 4] for n, x in enumerate(inputs)])
    torch.testing.assert_close(moments.held_out[0], held[:, :16].t() @ held[:, :16], rtol=1e-5, atol=1e-4)


def test_layers_that_share_an_input_have_one_sum_and_unreached_ones_none():
    model = Attention()
    with Collector(model.layers, 32) as found:
        model(torch.ones(4, 20))
    assert found.inputs == {"q": "q", "k": "q", "out": "out"}
    assert found.moments.keys() == {"q", "out"} and found.moments["q"].gram.shape == (1, 32, 32)


def test_an_input_that_was_written_to_in_between_is_another_one():
    q, k, x = Linear(16, 16), Linear(16, 16), torch.ones(3, 16)
    with torch.no_grad(), Collector({"q": q, "k": k}, 16) as found:
        q(x)
        k(x.mul_(2))
    assert found.inputs == {"q": "q", "k": "k"}
    assert [float(total(found.moments[n])[0, 0, 0]) for n in "qk"] == [3, 12]


def test_a_layer_that_leaves_its_leader_has_sums_of_its_own_from_then_on():
    q, k, x = Linear(16, 16), Linear(16, 16), torch.ones(4, 16)
    with torch.inference_mode(), Collector({"q": q, "k": k}, 16) as found:
        for second in (x, 2 * x, x):
            q(x)
            k(second)
    assert found.inputs == {"q": "q", "k": "k"}
    assert found.moments["q"].tokens + found.moments["q"].held_tokens == 12
    assert found.moments["k"].tokens + found.moments["k"].held_tokens == 8


def test_calls_of_one_token_are_held_out_one_in_four():
    layer = Linear(16, 16)
    with Collector({"a": layer}, 16) as found:
        for _ in range(8):
            layer(torch.ones(1, 1, 16))
    assert (found.moments["a"].tokens, found.moments["a"].held_tokens) == (6, 2)


def test_outputs_are_not_changed_hooks_go_and_a_second_time_goes_on():
    torch.manual_seed(1)
    model, x = Attention(), torch.randn(4, 20)
    wanted = model(x)
    collector = Collector(model.layers, 16)
    for count in (1, 2):
        with collector:
            assert torch.equal(model(x), wanted)
        model(x)
        assert collector.moments["q"].tokens + collector.moments["q"].held_tokens == 4 * count
    assert not model.q._forward_pre_hooks


def test_half_precision_inputs_are_summed_in_fp32_under_autocast_too():
    layer, x = Linear(16, 16).bfloat16(), torch.full((300, 16), 1.0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Collector({"a": layer}, 16) as found:
        layer(x)
    assert torch.equal(total(found.moments["a"]), torch.full((1, 16, 16), 300.0))


def test_the_width_is_the_widest_whose_sums_fit_the_budget():
    columns = [4096, 16384, 2048]
    for width in (16, 128, 16384):
        needed = sum(moment_bytes(count, width) for count in columns)
        assert block_width(columns, needed) == width
        assert block_width(columns, needed + 1) == width
    assert moment_bytes(4096, 128) == 2 * 32 * 128 * 128 * 4
    assert block_width([100], 2**30) == 112
    with pytest.raises(ValueError, match="blocks of 16 columns need 2,883,584"):
        block_width(columns, 1000)
