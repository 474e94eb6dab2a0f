# SPDX-License-Identifier: Apache-2.0
"""Verify with a calibration file: outputs decide, wrong readings still show, and the card tells of both."""

from __future__ import annotations

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.verify.found import summary
from nvfp4_video.checkpoint.verify.quality import quality_card
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write import calibration
from nvfp4_video.checkpoint.write.plan import AMAX, GPTQ, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.draw.verify import verification_picture
from nvfp4_video.kernels import gptq, reference
from nvfp4_video.kernels.format import PackedWeight
from nvfp4_video.measure.moments import Moments
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import METADATA, PREFIX, save, tiny

Q, FF = (f"transformer_blocks.1.{name}" for name in ("attn1.to_q", "ff.net.0.proj"))


def inputs(tokens: int) -> torch.Tensor:
    """(tokens, 64) of which a few directions have nearly all the energy."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    return 3 * mixed + 0.3 * torch.randn(tokens, 64, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source, its calibration file with two layers, and the file by GPTQ."""
    path = tmp_path_factory.mktemp("outputs")
    source = save(path / "source.safetensors", tiny())
    moments = Moments.zeros(64, 64)
    for call, part in enumerate(inputs(1600).chunk(4)):
        moments.add(part, call)
    given = {"model": calibration.model_identity(open_checkpoint(source)), "recipe": "LTX-2.3", "prompts": 1}
    calibration.write_calibration(path / "c.safetensors", {Q: moments}, {Q: Q, FF: Q}, **given)
    quantize_checkpoint(
        source, path / "gptq.safetensors", QuantizeSettings(search=GPTQ, calibration=path / "c.safetensors")
    )
    return path


def checked(folder, name: str = "gptq", **options):
    given = {"calibration": folder / "c.safetensors"} | options
    return verify(folder / f"{name}.safetensors", folder / "source.safetensors", **given)


def judged(found) -> dict:
    return {check.layer: check for check in found.layers if check.output is not None}


def altered(folder, name: str, change) -> None:
    """A copy of the GPTQ file whose layer FF was changed, and which does not say that GPTQ made it."""
    tensors = load(folder / "gptq.safetensors")
    change(tensors)
    said = {key: text for key, text in metadata(folder / "gptq.safetensors").items() if key in METADATA}
    save(folder / f"{name}.safetensors", tensors, said)


def test_outputs_are_measured_where_the_calibration_has_them_and_are_those_of_the_held_out_tokens(folder):
    found = checked(folder)
    assert found.ok, summary(found)
    assert judged(found).keys() == {Q, FF}
    tensors, weight = load(folder / "gptq.safetensors"), tiny()[f"{PREFIX}{FF}.weight"].float()
    parts = (tensors[f"{PREFIX}{FF}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    off = reference.dequantize(PackedWeight(*parts, (256, 64)), torch.float32) - weight
    held = calibration.read_calibration(folder / "c.safetensors").moments(FF, torch.device("cpu")).held_out
    wanted = (gptq.output_error(off, held) / gptq.output_error(weight, held)).sqrt().item()
    assert judged(found)[FF].output == pytest.approx(wanted, rel=1e-4)
    assert judged(found)[FF].output < 0.5 * judged(found)[FF].output_plain
    text = summary(found)
    assert "outputs, by c.safetensors: mean squared error" in text and "of 2 layers, 2 better" in text


def test_a_weight_error_that_outputs_do_not_see_is_no_fault_with_the_file_and_one_without(folder):
    def spend(tensors):
        weight = tiny()[f"{PREFIX}{FF}.weight"].float()
        gram = calibration.read_calibration(folder / "c.safetensors").moments(FF, torch.device("cpu")).gram
        quiet = torch.linalg.eigh(gram[0]).eigenvectors[:, :40]  # directions in which the inputs are small
        noise = 0.012 * torch.randn(256, 40, generator=torch.Generator().manual_seed(5)) @ quiet.t()
        made = reference.quantize(weight + noise, search="mse")
        tensors |= {f"{PREFIX}{FF}.weight": made.packed, f"{PREFIX}{FF}.weight_scale": made.block_scale}
        tensors[f"{PREFIX}{FF}.weight_scale_2"] = made.global_scale

    altered(folder, "spent", spend)
    found = checked(folder, "spent")
    assert found.ok, summary(found)
    wrong = [check for check in checked(folder, "spent", calibration=None).layers if check.verdict]
    assert [check.layer for check in wrong] == [FF] and 0.12 < wrong[0].error < 0.28


def test_outputs_that_are_worse_than_block_maxima_allow_are_a_fault_though_the_weights_are_fine(folder):
    def lean(tensors):
        weight = tiny()[f"{PREFIX}{FF}.weight"].float()
        gram = calibration.read_calibration(folder / "c.safetensors").moments(FF, torch.device("cpu")).gram
        loud = torch.linalg.eigh(gram[0]).eigenvectors[:, -4:]
        made = reference.quantize(weight - 0.15 * (weight @ loud) @ loud.t(), search="mse")
        tensors |= {f"{PREFIX}{FF}.weight": made.packed, f"{PREFIX}{FF}.weight_scale": made.block_scale}
        tensors[f"{PREFIX}{FF}.weight_scale_2"] = made.global_scale

    altered(folder, "leaning", lean)
    assert not any(check.verdict for check in checked(folder, "leaning", calibration=None).layers)
    wrong = [check for check in checked(folder, "leaning").layers if check.verdict]
    assert [check.layer for check in wrong] == [FF] and "its outputs are off by" in wrong[0].verdict


def test_exchanged_nibbles_still_show(folder):
    def exchange(tensors):
        packed = tensors[f"{PREFIX}{FF}.weight"]
        tensors[f"{PREFIX}{FF}.weight"] = (packed >> 4) | (packed << 4)

    altered(folder, "exchanged", exchange)
    found = checked(folder, "exchanged")
    assert [check.layer for check in found.layers if check.verdict] == [FF]
    assert "it is in the dialect modelopt_swizzled, not comfy" in judged(found)[FF].verdict


def test_a_calibration_of_another_model_is_refused(folder):
    other = save(folder / "other.safetensors", tiny(seed=1))
    with pytest.raises(CheckpointError, match="collected with another model than other.safetensors"):
        verify(folder / "gptq.safetensors", other, calibration=folder / "c.safetensors")


def test_the_card_has_errors_before_and_after_by_layer_type_and_block_and_the_worst_layers(folder, capsys):
    card, picture = folder / "q.md", folder / "q.png"
    given = ["verify", str(folder / "gptq.safetensors"), str(folder / "source.safetensors")]
    given += ["--calibration", str(folder / "c.safetensors"), "--card", str(card), "--picture", str(picture)]
    assert main(given) == 0
    assert f"Quality card: {card}" in capsys.readouterr().out
    text = card.read_text("utf-8")
    assert text == quality_card(checked(folder), "q.png") and "![Errors by block and layer type](q.png)" in text
    checks = judged(checked(folder))
    before, after = (sum(getattr(c, n) ** 2 for c in checks.values()) / 2 for n in ("output_plain", "output"))
    assert "| 1 | 5 | " in text and f"| {before**0.5:.4f} | {after**0.5:.4f} |" in text
    (kind,) = (line for line in text.splitlines() if line.startswith("| ff.net.0.proj |"))
    assert kind.endswith(f"| {checks[FF].output_plain:.4f} | {checks[FF].output:.4f} |")
    assert main([*given[:3], "--card", str(folder / "q.txt")]) == 2


def test_the_picture_has_a_second_map_with_a_calibration_file_only(folder):
    plain, both = (verification_picture(checked(folder, calibration=c)) for c in (None, folder / "c.safetensors"))
    assert both.shape[0] > plain.shape[0] + 100 and both.shape[1:] == plain.shape[1:]


def test_a_file_by_block_maxima_passes_by_its_outputs_too(folder):
    quantize_checkpoint(folder / "source.safetensors", folder / "amax.safetensors", QuantizeSettings(search=AMAX))
    found = checked(folder, "amax")
    assert found.ok and all(c.output == pytest.approx(c.output_plain, rel=1e-5) for c in judged(found).values())
