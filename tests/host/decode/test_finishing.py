# SPDX-License-Identifier: Apache-2.0
"""Which frames go through the host's ``process_output``, and which the decoder has finished."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def ours(stub_comfy):
    """The module, on the stubbed host."""
    from nvfp4_video.host.decode import decoder

    return decoder


def doubled(image: torch.Tensor) -> torch.Tensor:
    return image.mul_(2)


def vae_with(ours, decoding, process) -> SimpleNamespace:
    decoder = torch.nn.Identity()
    decoder.__dict__["_nvfp4_decoding"] = decoding
    return SimpleNamespace(first_stage_model=SimpleNamespace(decoder=decoder), process_output=process)


def test_frames_that_the_decoder_finished_are_left_alone_once(ours):
    decoding = ours.Decoding()
    vae = vae_with(ours, decoding, ours.Finished(decoding, doubled))
    frames, others = torch.ones(1, 3, 2, 2, 2), torch.ones(1, 3, 2, 2, 2)
    with ours.finishing(vae):
        assert decoding.finishing
        decoding.finished = frames
        assert vae.process_output(others).unique() == 2, "other memory"
        assert vae.process_output(frames[:, :, :1]).unique() == 2, "a part of it"
        frames.fill_(1)
        assert vae.process_output(frames).unique() == 1
        assert vae.process_output(frames).unique() == 2, "a second time"
    assert not decoding.finishing and decoding.finished is None


def test_after_an_error_nothing_counts_as_finished(ours):
    decoding = ours.Decoding()
    vae = vae_with(ours, decoding, ours.Finished(decoding, doubled))
    with pytest.raises(MemoryError), ours.finishing(vae):
        decoding.finished = torch.ones(2)
        raise MemoryError
    assert not decoding.finishing and decoding.finished is None


@pytest.mark.parametrize("case", ["somebody's", "another decoder's"])
def test_no_frames_are_finished_for_a_process_output_that_would_not_know_of_it(ours, case):
    decoding = ours.Decoding()
    process = doubled if case == "somebody's" else ours.Finished(ours.Decoding(), doubled)
    with ours.finishing(vae_with(ours, decoding, process)):
        assert not decoding.finishing


def test_a_vae_without_a_fast_decoder_is_no_concern(ours):
    for model in (None, SimpleNamespace(), SimpleNamespace(decoder=torch.nn.Identity())):
        with ours.finishing(SimpleNamespace(first_stage_model=model)):
            pass
