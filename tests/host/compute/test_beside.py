# SPDX-License-Identifier: Apache-2.0
"""Work on a second stream: when it may be there, and on a GPU that the two streams wait for each other."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.host import residency
from nvfp4_video.host.compute.beside import Beside, may_run_beside

CPU = torch.device("cpu")
LONG = 20_000_000  # cycles


def test_without_a_device_everything_runs_where_it_is_called():
    done = []
    with Beside(None) as beside:
        done.append(1)
        beside.mark()
        with beside.queued():
            done.append(2)
        beside.meet()
    assert done == [1, 2]


def test_only_layers_of_nobody_else_whose_weights_lie_on_the_gpu_run_beside(monkeypatch):
    assert not may_run_beside(CPU, torch.nn.Linear(2, 2))
    gpu, on_it = torch.device("cuda", 0), [True]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(residency, "addresses", lambda own, device, into: device == gpu and on_it[0])
    parts = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2)
    assert may_run_beside(gpu, *parts)
    on_it[0] = False
    assert not may_run_beside(gpu, *parts), "the host has to bring a weight"
    on_it[0] = True
    handle = parts[0][0].register_forward_hook(lambda *_: None)
    assert not may_run_beside(gpu, *parts), "somebody looks at a layer"
    handle.remove()
    assert may_run_beside(gpu, *parts)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not may_run_beside(gpu, *parts)


def _crossing(x: torch.Tensor, y: torch.Tensor, device: torch.device) -> None:
    """x beside y, each late and in need of the other."""
    with Beside(device) as beside:
        torch.cuda._sleep(LONG)
        y.add_(1)
        with beside.queued():
            torch.cuda._sleep(LONG)
            x.mul_(3)
        beside.meet()
        y.add_(x)
        beside.mark()
        torch.cuda._sleep(LONG)
        y.mul_(2)
        kept = y + 1  # not known beside: it was queued after the mark
        with beside.queued():
            x.add_(1)
    x.add_(y)
    del kept


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [False, True])
def test_on_a_gpu_the_streams_wait_for_each_other_where_they_must(captured):
    device = torch.device("cuda", torch.cuda.current_device())
    x, y = torch.zeros(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    _crossing(x, y, device)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _crossing(x, y, device)
    for _ in range(3):
        x.fill_(1), y.fill_(0)
        graph.replay() if captured else _crossing(x, y, device)
        # y: (0 + 1 + 3) * 2; x: 3 + 1 + y
        assert (y == 8).all() and (x == 12).all()
