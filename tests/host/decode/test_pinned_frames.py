# SPDX-License-Identifier: Apache-2.0
"""Frames on their way to host memory."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def frame_copy(stub_comfy):
    """The class, on the stubbed host."""
    from nvfp4_video.host.decode.frames import FrameCopy

    return FrameCopy


@pytest.mark.parametrize("device", DEVICES)
def test_every_chunk_reaches_its_place(frame_copy, device):
    clip, buffer = torch.rand(3, 11, 4, 6), torch.full((3, 11, 4, 6), torch.nan)
    copy = frame_copy(torch.device(device))
    for first, end in ((0, 1), (1, 5), (5, 11)):
        copy.put(clip[:, first:end].to(device).contiguous(), buffer[:, first:end])
    copy.finish()
    assert torch.equal(buffer, clip)


@pytest.mark.cuda
def test_a_buffer_on_the_gpu_is_written_at_once(frame_copy):
    pixels, buffer = torch.rand(3, 2, 4, 6, device="cuda"), torch.zeros(3, 2, 4, 6, device="cuda")
    frame_copy(torch.device("cuda", 0)).put(pixels, buffer)
    assert torch.equal(pixels, buffer)


@pytest.mark.cuda
def test_without_pinned_memory_frames_are_copied_all_the_same(frame_copy, monkeypatch):
    clip, buffer, empty = torch.rand(3, 4, 4, 6), torch.zeros(3, 4, 4, 6), torch.empty
    copy = frame_copy(torch.device("cuda", 0))
    copy.put(clip[:, :2].cuda().contiguous(), buffer[:, :2])

    def refused(*size, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("out of pinned memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refused)
    copy.put(clip[:, 2:].cuda().contiguous(), buffer[:, 2:])
    copy.finish()
    assert torch.equal(buffer, clip)
