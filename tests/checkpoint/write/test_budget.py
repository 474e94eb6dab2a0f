# SPDX-License-Identifier: Apache-2.0
"""A byte budget: what it buys, that it is not exceeded, that nothing else of its size is better, and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write import budget, calibration
from nvfp4_video.checkpoint.write.estimate import estimate
from nvfp4_video.checkpoint.write.plan import GPTQ, SENSITIVE, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.measure.moments import Moments
from nvfp4_video.tests.support.quantize_sources import PREFIX, linears, save, tiny
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
BLOCK = "transformer_blocks.2"
LOUD = f"{BLOCK}.attn1.to_q"  # its inputs lie along rows of the weight that rounding hits hardest


def moments(columns: int, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    found = Moments.zeros(columns, 16)
    for call in range(4):
        found.add(torch.randn(200, columns, generator=generator) * torch.rand(columns, generator=generator), call)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("budget")
    tensors = tiny()
    weight = tensors[f"{PREFIX}{LOUD}.weight"].float()
    weight[:, ::16] *= 30  # each block has one large column; the others round badly, and are what its inputs see
    tensors[f"{PREFIX}{LOUD}.weight"] = weight.bfloat16()
    source = save(path / "source.safetensors", tensors)
    layers = [name.removeprefix(PREFIX) for name in linears(tensors)]
    known = {
        layer: moments(tensors[f"{PREFIX}{layer}.weight"].shape[1], seed)
        for seed, layer in enumerate(layers) if not layer.startswith("transformer_blocks.3")
    }  # fmt: skip
    for part in (known[LOUD].gram, known[LOUD].held_out):
        part[:, 0], part[:, :, 0] = 0, 0
    given = {"model": calibration.model_identity(open_checkpoint(source)), "recipe": "LTX-2.3", "prompts": 1}
    calibration.write_calibration(path / "c.safetensors", known, {name: name for name in known}, **given)
    return path


def settings(folder, asked: str, **changes) -> QuantizeSettings:
    return QuantizeSettings(**({"calibration": folder / "c.safetensors", "budget": asked} | changes))


def made(folder, asked: str, **changes) -> dict:
    target = folder / "made.safetensors"
    return quantize_checkpoint(
        folder / "source.safetensors", target, settings(folder, asked, **changes), overwrite=True
    )


def formats(path) -> dict[str, str]:
    tensors = load_file(path)
    return {
        name.removesuffix(".weight").removeprefix(PREFIX): {torch.uint8: "NVFP4", torch.float8_e4m3fn: "FP8"}.get(
            tensor.dtype, "source"
        )
        for name, tensor in tensors.items()
        if name.startswith(f"{PREFIX}transformer_blocks") and name.endswith(".weight") and tensor.ndim == 2
    }


def size(folder, more: float) -> str:
    smallest = estimate(folder / "source.safetensors", folder / "x.safetensors", settings(folder, ""))["nbytes"]
    return f"{(smallest + more) / 1e6:.6f}MB"


def test_the_first_bytes_go_to_the_layer_whose_outputs_are_worst(folder):
    record = made(folder, size(folder, 1600))
    found = formats(folder / "made.safetensors")
    assert {layer for layer, kind in found.items() if kind == "FP8"} == {LOUD}
    assert record["fp8"] == 1 and record["budget"]["fp8"] == 1
    assert record["budget"]["error"] < record["budget"]["curve"][0]["error"]


def test_a_budget_is_not_exceeded_and_more_of_it_never_gives_more_error(folder):
    errors = []
    for more in (0, 3000, 20_000, 60_000):
        asked = size(folder, more)
        record = made(folder, asked)
        assert record["nbytes"] <= float(asked.removesuffix("MB")) * 1e6
        errors.append(record["budget"]["error"])
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]


def test_the_file_is_in_order_and_says_why_layers_were_kept(folder):
    record = made(folder, size(folder, 60_000))
    kinds = formats(folder / "made.safetensors")
    assert record["kept"][SENSITIVE] == record["budget"]["whole"] > 0
    assert sum(kind == "FP8" for kind in kinds.values()) == record["fp8"]
    found = verify(folder / "made.safetensors", folder / "source.safetensors", calibration=folder / "c.safetensors")
    assert found.ok and sum(check.format == "FP8" for check in found.layers) == record["fp8"]
    card = (folder / "made.md").read_text("utf-8")
    assert f"{record['fp8']} in FP8, for ComfyUI" in card and "| budget |" in card
    tensors = load_file(folder / "made.safetensors")
    layer = next(layer for layer, kind in kinds.items() if kind == "FP8")
    weight = load_file(folder / "source.safetensors")[f"{PREFIX}{layer}.weight"].float()
    decoded = tensors[f"{PREFIX}{layer}.weight"].float() * tensors[f"{PREFIX}{layer}.weight_scale"]
    assert ((decoded - weight).norm() / weight.norm()).item() < 0.04
    assert bytes(tensors[f"{PREFIX}{layer}.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'


def test_layers_that_the_calibration_did_not_reach_stay_in_nvfp4(folder):
    made(folder, size(folder, 60_000))
    assert {kind for layer, kind in formats(folder / "made.safetensors").items()
            if layer.startswith("transformer_blocks.3") and "gate" not in layer} == {"NVFP4"}  # fmt: skip


def test_what_is_kept_is_free_for_gptq_and_for_a_lora(folder):
    lora = folder / "lora.safetensors"
    keys = {f"diffusion_model.{LOUD}.lora_A.weight": torch.randn(2, 64) / 8}
    save_file(keys | {f"diffusion_model.{LOUD}.lora_B.weight": torch.randn(64, 2) / 8}, lora)
    record = made(folder, size(folder, 3000), search=GPTQ, loras=((lora, 1.0),))
    assert record["gptq"]["taken"] + record["gptq"]["worse"] > 0
    given = {"loras": [(lora, 1.0)], "calibration": folder / "c.safetensors"}
    assert verify(folder / "made.safetensors", folder / "source.safetensors", **given).ok


def test_of_an_fp8_source_layers_stay_in_fp8(folder, tmp_path):
    tensors = load_file(folder / "source.safetensors")
    for name in linears(tensors):
        weight = tensors[f"{name}.weight"].float()
        scale = weight.abs().amax() / 448
        tensors |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    source = save(tmp_path / "fp8.safetensors", tensors)
    known = calibration.read_calibration(folder / "c.safetensors")
    sums = {layer: known.moments(layer, CPU) for layer in known.layers}
    for layer, found in sums.items():
        found.tokens, found.held_tokens = 600, 200
        assert layer in known.layers
    given = {"model": calibration.model_identity(open_checkpoint(source)), "recipe": "LTX-2.3", "prompts": 1}
    calibration.write_calibration(tmp_path / "c.safetensors", sums, {name: name for name in sums}, **given)
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", settings(tmp_path, "balanced"))
    assert record["fp8"] == 0 and record["budget"]["whole"] > 0
    assert LOUD in {layer for layer, kind in formats(tmp_path / "t.safetensors").items() if kind == "FP8"}
    assert verify(tmp_path / "t.safetensors", source).ok


def test_the_estimate_has_the_curve_from_the_smallest_to_the_largest_and_writes_nothing(folder, capsys):
    source, target = str(folder / "source.safetensors"), str(folder / "e.safetensors")
    given = ["quantize", source, target, "--calibration", str(folder / "c.safetensors"), "--budget"]
    assert main([*given, "balanced", "--estimate"]) == 0
    text = capsys.readouterr().out
    assert "error of outputs" in text and "as in the source" in text
    found = estimate(source, target, settings(folder, "balanced"))
    curve = found["budget"]["curve"]
    assert [point["nbytes"] for point in curve] == sorted(point["nbytes"] for point in curve)
    assert [point["error"] for point in curve] == sorted((point["error"] for point in curve), reverse=True)
    assert curve[0]["fp8"] == curve[0]["whole"] == 0 and curve[-1]["error"] == 0
    assert found["nbytes"] <= 1.1 * curve[0]["nbytes"]
    assert found["nbytes"] == made(folder, "balanced")["nbytes"]
    assert not (folder / "e.safetensors").exists()
    assert main([*given, "tiny"]) == 2
    assert "expected smallest, balanced, 24gb-card, or a size" in capsys.readouterr().err


def test_the_smallest_is_the_file_without_a_budget(folder):
    one, other = made(folder, "smallest"), made(folder, "")
    assert one["nbytes"] == other["nbytes"] and one["fp8"] == 0


@pytest.mark.parametrize("asked", ("10MB", "24gb-card"))
def test_a_budget_for_all_of_it_leaves_nothing_to_quantise_but_what_was_not_reached(asked, folder):
    record = made(folder, asked)
    assert record["budget"]["error"] == 0 and record["layers"] == 5


def test_a_file_that_a_budget_leaves_without_nvfp4_layers_is_verified_like_others(folder, tmp_path):
    source, target = save(tmp_path / "s.safetensors", tiny()), tmp_path / "t.safetensors"
    names = [name.removeprefix(PREFIX) for name in linears(tiny())]
    sums = {name: moments(tiny()[f"{PREFIX}{name}.weight"].shape[1], 1) for name in names}
    model = calibration.model_identity(open_checkpoint(source))
    file = tmp_path / "c.safetensors"
    calibration.write_calibration(file, sums, {name: name for name in names}, model=model, recipe="", prompts=1)
    with pytest.raises(CheckpointError, match="a budget of 1GB has room for all 20 layers as they are; use the source"):
        quantize_checkpoint(source, target, QuantizeSettings(calibration=file, budget="1GB"))
    assert not target.exists()
    record = quantize_checkpoint(source, target, QuantizeSettings(calibration=file, budget="0.2MB"))
    assert record["layers"] == 0 < record["fp8"]
    found = verify(target, source)
    assert found.ok and {check.format for check in found.layers} == {"FP8"} and len(found.layers) == record["fp8"]
    assert not verify(target, save(tmp_path / "other.safetensors", tiny(seed=9))).ok


def test_refusals_name_what_is_possible(folder):
    for asked, words in (("0.01MB", "the smallest file would have"), ("much", "budget 'much'; expected")):
        with pytest.raises(CheckpointError, match=words):
            made(folder, asked)
    with pytest.raises(CheckpointError, match="a budget needs a calibration file"):
        made(folder, "balanced", calibration=None)


def test_the_steps_of_a_layer_follow_its_hull_and_the_greedy_choice_is_the_best_for_what_it_spends():
    points = {
        "a": [(10, 8.0, ""), (20, 4.0, "FP8"), (40, 0.0, "source")],
        "b": [(10, 5.0, ""), (20, 4.9, "FP8"), (40, 0.0, "source")],  # FP8 is not on the hull
        "c": [(10, 1.0, ""), (20, 0.1, "FP8"), (40, 0.0, "source")],
    }
    steps = [step for layer, found in points.items() for step in budget._steps(layer, found)]
    assert [step.to for step in steps if step.layer == "b"] == ["source"]
    order = tuple(sorted(steps, key=lambda step: -step.worth))
    trade = budget.Trade(30, 14.0, 3, order)
    for count in range(len(order) + 1):
        spent = sum(step.nbytes for step in order[:count])
        found = trade.after(trade.taken(30 + spent))
        assert found["nbytes"] == 30 + spent
        least = min(
            sum(point[1] for point in choice)
            for choice in itertools.product(*points.values())
            if sum(point[0] for point in choice) <= 30 + spent
        )
        assert found["error"] * 3 == pytest.approx(least)
