# SPDX-License-Identifier: Apache-2.0
"""The calibration file, and what `quantize` makes of it: GPTQ where it helps, the plain search elsewhere, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write import calibration
from nvfp4_video.checkpoint.write.card import calibration_text
from nvfp4_video.checkpoint.write.estimate import estimate
from nvfp4_video.checkpoint.write.plan import GPTQ, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.kernels import gptq, reference
from nvfp4_video.kernels.format import PackedWeight
from nvfp4_video.measure.moments import Moments
from nvfp4_video.tests.support.files import metadata
from nvfp4_video.tests.support.quantize_sources import PREFIX, linears, save
from safetensors.torch import load_file, save_file

Q = "transformer_blocks.1.attn1.to_q"
FF = "transformer_blocks.1.ff.net.0.proj"


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    return 2 * mixed + torch.randn(tokens, columns, generator=generator)


def gathered(tokens: int = 800, columns: int = 64, width: int = 32) -> Moments:
    found = Moments.zeros(columns, width)
    inputs = correlated(tokens, columns)
    for call, part in enumerate(inputs.chunk(4)):
        found.add(part, call)
    return found


def write(path: Path, source: Path, moments=None, inputs=None, **changes) -> Path:
    given = {"model": calibration.model_identity(open_checkpoint(source)), "recipe": "LTX-2.3", "prompts": 2} | changes
    moments = {Q: gathered()} if moments is None else moments
    calibration.write_calibration(path, moments, inputs or {Q: Q, FF: Q}, **given)
    return path


def edited(path: Path, target: Path, tensors=None, **entry) -> Path:
    """A copy of a calibration file with other tensors or facts."""
    said = json.loads(metadata(path)[calibration.ENTRY]) | entry
    save_file(load_file(path) | (tensors or {}), target, {calibration.ENTRY: json.dumps(said)})
    return target


def settings(path: Path) -> QuantizeSettings:
    return QuantizeSettings(search=GPTQ, calibration=path)


@pytest.fixture
def file(tmp_path, source) -> Path:
    return write(tmp_path / "c.safetensors", source)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def unpacked(path: Path, layer: str, shape: tuple[int, int]) -> torch.Tensor:
    found = load_file(path)
    parts = (found[f"{PREFIX}{layer}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2"))
    return reference.dequantize(PackedWeight(*parts, shape), torch.float32)


def test_what_is_written_is_read_back(file, tmp_path, source):
    found, wanted = calibration.read_calibration(file), gathered()
    assert found.layers == {Q: Q, FF: Q} and (found.recipe, found.prompts, found.tokens) == ("LTX-2.3", 2, 800)
    assert found.model == calibration.model_identity(open_checkpoint(source))
    read = found.moments(FF, torch.device("cpu"))
    assert torch.equal(read.gram, wanted.gram) and torch.equal(read.held_out, wanted.held_out)
    assert torch.equal(found.mean_square(Q), wanted.mean_square)


def test_layers_that_gain_take_gptq_the_others_keep_the_search_and_the_report_counts_them(
    file, tmp_path, source, tensors
):
    target = tmp_path / "t.safetensors"
    record = quantize_checkpoint(source, target, settings(file))
    plain = quantize_checkpoint(source, tmp_path / "p.safetensors")
    counts = record["gptq"]
    assert (counts["taken"], counts["worse"], counts["unfit"]) == (2, 0, 0)
    assert counts["unseen"] == record["layers"] - 2 == len(linears(tensors)) - 2
    assert 0 < counts["error"] < 0.8
    assert record["nbytes"] - plain["nbytes"] < 200  # the header alone says more
    held = gathered().held_out
    for layer, shape in ((Q, (64, 64)), (FF, (256, 64))):
        weight = tensors[f"{PREFIX}{layer}.weight"].float()
        files = target, tmp_path / "p.safetensors"
        errors = [gptq.output_error(unpacked(path, layer, shape) - weight, held) for path in files]
        assert errors[0] < 0.8 * errors[1]
    one, other = load_file(target), load_file(tmp_path / "p.safetensors")
    changed = {name.rpartition(".")[0] for name in one if not same_bytes(one[name], other[name])}
    assert changed == {PREFIX + Q, PREFIX + FF}


def test_the_same_request_gives_the_same_bytes(file, tmp_path, source):
    hashes = {quantize_checkpoint(source, tmp_path / f"{n}.safetensors", settings(file))["sha256"] for n in range(2)}
    assert len(hashes) == 1


def test_verify_accepts_the_file_and_the_card_tells_of_it(file, tmp_path, source):
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", settings(file))
    assert verify(tmp_path / "t.safetensors", source).ok
    card = (tmp_path / "t.md").read_text("utf-8")
    assert "GPTQ: rounding errors" in card and "2 layers took GPTQ" in card
    assert "2 of 20 layers; 2 layers took GPTQ, 18 kept the plain search for lack of tokens" in calibration_text(record)


def test_a_layer_whose_held_out_outputs_do_not_gain_keeps_the_plain_search(tmp_path, source):
    moments = gathered()
    inputs = correlated(400, 64, seed=9)  # correlated in another way than what was counted
    blocks = inputs.unflatten(1, (2, 32)).transpose(0, 1)
    moments.held_out = blocks.transpose(1, 2) @ blocks
    moments.gram = moments.gram + 1e6 * torch.ones(32, 32)  # all columns as one
    file = write(tmp_path / "c.safetensors", source, {Q: moments})
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", settings(file))
    assert record["gptq"] == {"taken": 0, "worse": 2, "unseen": 18, "unfit": 0, "error": None}
    quantize_checkpoint(source, tmp_path / "p.safetensors")
    one, other = load_file(tmp_path / "t.safetensors"), load_file(tmp_path / "p.safetensors")
    assert all(same_bytes(one[name], other[name]) for name in one)


def test_sums_that_are_not_positive_definite_leave_the_plain_search(tmp_path, source):
    file = write(tmp_path / "c.safetensors", source, {Q: gathered(), "other": gathered()}, {Q: Q, FF: "other"})
    gram = gathered().gram
    gram[:, 0, 1] = gram[:, 1, 0] = 20 * gram.diagonal(dim1=1, dim2=2).mean()
    bad = edited(file, tmp_path / "d.safetensors", {"other.gram": gram})
    assert quantize_checkpoint(source, tmp_path / "t.safetensors", settings(bad))["gptq"]["unfit"] == 1


def test_dead_channels_are_no_obstacle(tmp_path, source):
    inputs, moments = correlated(800, 64), Moments.zeros(64, 32)
    inputs[:, [3, 20]] = 0
    inputs[:, 32:] = 0
    for call, part in enumerate(inputs.chunk(4)):
        moments.add(part, call)
    file = write(tmp_path / "c.safetensors", source, {Q: moments})
    assert quantize_checkpoint(source, tmp_path / "t.safetensors", settings(file))["gptq"]["taken"] == 2


def test_with_the_quality_best_the_mean_squares_weight_the_search(file, tmp_path, source, tensors):
    quantize_checkpoint(source, tmp_path / "t.safetensors", QuantizeSettings(calibration=file))
    weight = tensors[f"{PREFIX}{Q}.weight"].float()
    wanted = reference.quantize(weight, search="mse", column_weight=gathered().mean_square)
    assert torch.equal(load_file(tmp_path / "t.safetensors")[f"{PREFIX}{Q}.weight"], wanted.packed)


def test_the_estimate_takes_blocks_that_do_not_divide_its_sample(tmp_path, source):
    file = write(tmp_path / "c.safetensors", source, {Q: gathered(width=48)})
    assert estimate(source, tmp_path / "t.safetensors", settings(file))["rates"]["quantize"] > 0


def test_the_estimate_says_how_many_layers_have_statistics_and_is_the_size_to_the_byte(file, tmp_path, source):
    found = estimate(source, tmp_path / "t.safetensors", settings(file))
    assert found["calibrated"] == 2 and "2 of 20 layers; each takes GPTQ where" in calibration_text(found)
    assert found["nbytes"] == quantize_checkpoint(source, tmp_path / "t.safetensors", settings(file))["nbytes"]


def test_a_model_split_from_its_checkpoint_is_the_same_and_a_fine_tune_another(tmp_path, source, tensors):
    own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    part = save(tmp_path / "part.safetensors", own)
    weight = f"{PREFIX}{Q}.weight"
    tuned = save(tmp_path / "tuned.safetensors", tensors | {weight: tensors[weight] * 1.1})
    whole, alone, other = (calibration.model_identity(open_checkpoint(path)) for path in (source, part, tuned))
    assert whole == alone != other


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"model": "0" * 64}, "another model than source.safetensors"),
        ({"format": 2, "tool": "NVFP4 Video 9"}, "format is 2, written by 'NVFP4 Video 9'; expected format 1; update"),
        ({"complete": False}, "its collection was interrupted"),
        ({"tokens": {Q: [60, 20]}}, "no layer saw more than 80 tokens; expected at least 128"),
        ({"tokens": {Q: [800, 0]}}, "no layer saw more than 800 tokens; expected .* held out"),
        ({"tokens": {}}, "cannot be read"),
        ({"tokens": [1]}, "cannot be read"),
        ({"layers": {Q: "x"}}, "cannot be read"),
        ({"layers": {}}, "no layer saw more than 0 tokens"),
        ({"layers": {"transformer_blocks.1.attn2.to_k": Q}}, r"has shape \(64,\); expected \(32,\)"),
        ({"layers": {"nowhere": Q}}, "statistics of none of the layers"),
    ),
)
def test_a_file_that_cannot_be_relied_on_is_refused_before_anything_is_written(change, words, file, tmp_path, source):
    bad = edited(file, tmp_path / "bad.safetensors", **change)
    with pytest.raises(CheckpointError, match=words):
        quantize_checkpoint(source, tmp_path / "t.safetensors", settings(bad))
    assert not list(tmp_path.glob("t.*"))


def test_nan_is_refused_by_the_writer_and_by_the_reader_with_the_layer_s_name(file, tmp_path, source):
    moments = gathered()
    moments.gram[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=f"{Q}: its inputs were not finite"):
        write(tmp_path / "n.safetensors", source, {Q: moments})
    squares, gram = load_file(file)[f"{Q}.mean_square"], load_file(file)[f"{Q}.gram"]
    squares[5] = torch.inf
    gram[0, 1, 2] = torch.nan
    for number, (name, value, words) in enumerate(
        (("mean_square", squares, "other numbers than mean squares"), ("gram", gram, "NaN or infinity in it"))
    ):
        bad = edited(file, tmp_path / f"bad{number}.safetensors", {f"{Q}.{name}": value})
        with pytest.raises(CheckpointError, match=words):
            quantize_checkpoint(source, tmp_path / f"t{number}.safetensors", settings(bad))


def test_calibrated_quality_needs_a_file_with_gram_matrices(tmp_path, source):
    squares = save(tmp_path / "s.safetensors", {Q: torch.ones(64)}, {})
    for path, words in ((None, "needs a calibration file"), (squares, "has no Gram matrices")):
        with pytest.raises(CheckpointError, match=words):
            quantize_checkpoint(source, tmp_path / "t.safetensors", settings(path))


def test_the_command_takes_the_quality_and_tells_how_the_layers_fared(file, tmp_path, source, capsys):
    target = tmp_path / "t.safetensors"
    given = ["quantize", str(source), str(target), "--quality", "calibrated", "--calibration", str(file)]
    assert main([*given, "--estimate"]) == 0
    assert "c.safetensors has 2 of 20 layers; each takes GPTQ" in " ".join(capsys.readouterr().out.split())
    assert main(given) == 0
    assert "2 layers took GPTQ" in capsys.readouterr().out
    assert main(given[:5]) == 2
    assert "calibrated quality needs a calibration file" in capsys.readouterr().err
