# SPDX-License-Identifier: Apache-2.0
"""Verifying a quantised file against its source: numbers, wrong dialects, damage, exit codes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.verify.verify import summary, verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.cli import main
from nvfp4_video.kernels import reference
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import PREFIX, linears, save, tiny, to_fp8

FAST = QuantizeSettings(search=AMAX)
LAYER = "transformer_blocks.1.ff.net.0.proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """source.safetensors, and quantised from it: whole.safetensors and model.safetensors."""
    path = tmp_path_factory.mktemp("verify")
    source = save(path / "source.safetensors", tiny())
    quantize_checkpoint(source, path / "whole.safetensors", FAST)
    quantize_checkpoint(source, path / "model.safetensors", QuantizeSettings(search=AMAX, only_model=True))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small LTX-2.3 in BF16 and in several dialects."""
    path = tmp_path_factory.mktemp("small")
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    for kind in ("bf16", "modelopt", "modelopt_swizzled", "compressed_tensors", "lightx2v", "mixed"):
        synthetic.write(path / f"{kind}.safetensors", kind, state, config, packed)
    return path


def changed(folder, tmp_path, change) -> object:
    """The quantised file after ``change(tensors)`` -> its path."""
    tensors = load(folder / "whole.safetensors")
    change(tensors)
    return save(tmp_path / "changed.safetensors", tensors, metadata(folder / "whole.safetensors"))


def check_of(found, layer):
    return next(check for check in found.layers if check.layer == layer)


def test_errors_are_those_of_the_layers_and_everything_else_is_found_identical(folder):
    found = verify(folder / "whole.safetensors", folder / "source.safetensors")
    tensors = tiny()
    assert found.ok and found.dialect == "comfy"
    assert {PREFIX + check.layer for check in found.layers} == set(linears(tensors))
    for check in found.layers:
        original = tensors[f"{PREFIX}{check.layer}.weight"].float()
        packed = reference.quantize(original)
        decoded = reference.dequantize(packed, torch.float32)
        error = float((decoded - original).norm() / original.norm())
        assert math.isclose(check.error, error, rel_tol=1e-4)
        assert math.isclose(check.allowed, 1.25 * error, rel_tol=1e-4)
        assert math.isclose(check.sqnr, -20 * math.log10(error), abs_tol=0.01)
        assert (check.saturated, check.lost, check.non_finite) == (0, 0, 0)
    assert found.identical == len(tensors) - len(found.layers)
    assert 0.08 < found.mean_error < 0.11


def test_a_file_of_the_diffusion_model_alone_is_compared_with_the_full_checkpoint(folder):
    found = verify(folder / "model.safetensors", folder / "source.safetensors")
    assert found.ok and len(found.layers) == len(linears(tiny()))


def test_two_names_of_one_file_are_refused_instead_of_agreeing(folder, tmp_path):
    file, twin = folder / "whole.safetensors", tmp_path / "twin.safetensors"
    twin.hardlink_to(file)
    for source in (file, twin):
        with pytest.raises(CheckpointError, match="it is both the file and its source; expected two files"):
            verify(file, source)


@pytest.mark.parametrize("kind", ["modelopt", "metadata_less"])
def test_a_source_that_is_nvfp4_itself_is_refused_where_a_plain_one_is_asked_for(small, tmp_path, kind):
    source = tmp_path / "source.safetensors"
    synthetic.write(source, kind, *synthetic.small_ltx23())
    with pytest.raises(CheckpointError, match="source is quantized itself .*; expected a source in BF16, FP16"):
        verify(small / "lightx2v.safetensors", source, plain_source=True)


def test_an_fp8_source_counts_with_its_scale(tmp_path):
    tensors = tiny()
    stored = dict(tensors)
    for layer in linears(tensors):
        stored[f"{layer}.weight"], stored[f"{layer}.weight_scale"] = to_fp8(tensors[f"{layer}.weight"])
    source = save(tmp_path / "fp8.safetensors", stored)
    quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert verify(tmp_path / "t.safetensors", source).ok
    against_bf16 = verify(tmp_path / "t.safetensors", save(tmp_path / "bf16.safetensors", tensors))
    assert against_bf16.ok and against_bf16.mean_error < 0.12


@pytest.mark.parametrize("kind", ["modelopt", "compressed_tensors", "lightx2v", "mixed"])
def test_files_of_other_writers_are_verified_in_their_own_dialect(small, kind):
    found = verify(small / f"{kind}.safetensors", small / "bf16.safetensors")
    assert found.ok, summary(found)
    assert {check.format for check in found.layers} == ({"NVFP4", "FP8"} if kind == "mixed" else {"NVFP4"})


def test_a_file_and_the_same_in_another_dialect_are_compared_by_their_numbers(small, tmp_path):
    found = verify(small / "modelopt.safetensors", small / "lightx2v.safetensors")
    assert found.ok and len(found.layers) == 68 and found.mean_error < 1e-6, summary(found)
    tensors = load(small / "modelopt.safetensors")
    name = next(name for name in tensors if name.endswith(".weight_scale_2"))
    tensors[name] = tensors[name] * 1.001
    file = save(tmp_path / "off.safetensors", tensors, metadata(small / "modelopt.safetensors"))
    assert [check.error > 1e-4 for check in verify(file, small / "lightx2v.safetensors").layers].count(True) == 1


def test_exchanged_nibbles_have_their_mark_of_1_41_and_the_right_dialect_is_named(small, tmp_path):
    tensors = load(small / "modelopt_swizzled.safetensors")
    layers = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    marked = tensors | {f"{layer}.comfy_quant": marker for layer in layers}
    wrong = save(tmp_path / "wrong.safetensors", marked, metadata(small / "bf16.safetensors"))
    found = verify(wrong, small / "bf16.safetensors")
    assert not found.ok and found.dialect == "comfy"
    assert 1.39 < found.mean_error < 1.43
    assert "it is in the dialect modelopt_swizzled, not comfy" in found.layers[0].verdict
    assert verify(wrong, small / "bf16.safetensors", dialect="modelopt_swizzled").ok


def test_row_major_scales_read_as_tiled_are_recognised(tmp_path):
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 64)
    layer = f"{PREFIX}transformer_blocks.1.attn1.to_q"
    source = save(tmp_path / "s.safetensors", tiny() | {f"{layer}.weight": weight})
    packed = reference.quantize(weight)
    linear = reference.unswizzle(packed.block_scale, 128, 4)  # of the very shape that tiled ones have
    parts = {"weight": packed.packed, "weight_scale": linear, "weight_scale_2": packed.global_scale}
    marker = {f"{layer}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    file = save(tmp_path / "t.safetensors", tiny() | {f"{layer}.{key}": t for key, t in parts.items()} | marker)
    (check,) = verify(file, source).layers
    assert 0.25 < check.error < 0.9
    assert check.verdict.startswith("its error is") and ("order" in check.verdict or "dialect" in check.verdict)


def test_a_file_that_leaves_its_dialect_open_is_read_in_the_one_that_fits(small, tmp_path):
    tensors = load(small / "modelopt_swizzled.safetensors")
    state = load(small / "bf16.safetensors")
    # Neither markers nor a known writer's header; without padded layers shapes tell nothing either.
    padded = [name.rpartition(".")[0] for name, t in tensors.items() if name.endswith(".weight") and t.shape[0] % 128]
    for layer in padded:
        for name in [n for n in tensors if n.rpartition(".")[0] == layer]:
            tensors[name] = state.get(name, tensors[name])
            if name not in state:
                del tensors[name]
    file = save(tmp_path / "open.safetensors", tensors, {})
    with pytest.raises(CheckpointError, match="neither markers nor the header"):
        from nvfp4_video.checkpoint.file.header import read_header
        from nvfp4_video.checkpoint.identify.dialects import detect

        detect(read_header(file))
    found = verify(file, save(tmp_path / "bf16.safetensors", state, {}))
    assert found.ok and found.dialect in ("modelopt_swizzled", "lightx2v")
    assert "fits the source" in found.evidence


@pytest.mark.filterwarnings("error")
def test_a_layer_that_decodes_to_infinity_is_a_finding_and_no_warning_of_numpy(folder, tmp_path):
    first = "transformer_blocks.0.attn1.to_q"  # which is read a second time, in plain numpy

    def spoil(tensors):
        tensors[f"{PREFIX}{first}.weight_scale_2"].fill_(3e38)

    found = verify(changed(folder, tmp_path, spoil), folder / "source.safetensors")
    assert check_of(found, first).non_finite and found.sampled == 3 and not found.ok


def test_damage_is_named_by_layer(folder, tmp_path):
    def spoil(tensors):
        tensors[f"{PREFIX}{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F  # NaN in E4M3
        name = f"{PREFIX}transformer_blocks.2.attn1.to_q.weight_scale_2"
        tensors[name] = tensors[name] * 1.3
        zero = f"{PREFIX}transformer_blocks.3.attn1.to_q.weight_scale"
        tensors[zero] = torch.zeros_like(tensors[zero].view(torch.uint8)).view(torch.float8_e4m3fn)
        tensors[f"{PREFIX}proj_out.weight"] += 1

    found = verify(changed(folder, tmp_path, spoil), folder / "source.safetensors")
    nan, scaled = check_of(found, LAYER), check_of(found, "transformer_blocks.2.attn1.to_q")
    lost = check_of(found, "transformer_blocks.3.attn1.to_q")
    assert nan.non_finite == 16 and "NaN" in nan.verdict
    assert 0.3 < scaled.error < 0.35 and scaled.verdict
    assert lost.lost == 1.0 and lost.error == 1.0
    assert found.changed == ("proj_out.weight",)
    assert sum(bool(check.verdict) for check in found.layers) == 3 and not found.ok
    assert {nan.layer, scaled.layer, lost.layer} == {check.layer for check in found.worst(3)}


def test_saturation_is_counted(folder, tmp_path):
    layer = f"{PREFIX}{LAYER}"
    weight = tiny()[f"{layer}.weight"]
    small_scale = reference.amax_global_scale(weight) / 2

    def clip(tensors):
        packed = reference.quantize(weight, small_scale)
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = packed.packed, packed.block_scale
        tensors[f"{layer}.weight_scale_2"] = small_scale

    check = check_of(verify(changed(folder, tmp_path, clip), folder / "source.safetensors"), LAYER)
    blocks = weight.float().unflatten(1, (-1, 16)).abs().amax(-1)
    assert check.saturated == float((blocks > 1.01 * 2688 * small_scale).float().mean()) > 0


def test_a_layer_without_its_original_and_an_unrelated_source_are_not_in_order(folder, tmp_path):
    source = load(folder / "source.safetensors")
    del source[f"{PREFIX}{LAYER}.weight"]
    found = verify(folder / "whole.safetensors", save(tmp_path / "s.safetensors", source))
    assert found.alone == (LAYER,) and not found.ok
    other = verify(folder / "whole.safetensors", save(tmp_path / "o.safetensors", tiny(seed=9)))
    assert all("another model" in check.verdict for check in other.layers)
    with pytest.raises(CheckpointError, match="no NVFP4 layer.*choose the quantized file"):
        verify(folder / "source.safetensors", folder / "whole.safetensors")


@pytest.mark.parametrize("rows", [3, 17])
def test_a_layer_with_fewer_rows_than_its_original_is_one_clear_error_whatever_dialect_is_tried(
    folder, tmp_path, rows
):
    def cut(tensors):
        first = min(key for key in tensors if f"{key}_scale_2" in tensors)
        tensors[first] = tensors[first][:rows].clone()

    with pytest.raises(CheckpointError, match=f"{rows} packed rows"):
        verify(changed(folder, tmp_path, cut), folder / "source.safetensors")


def test_the_command_exits_with_1_where_a_layer_is_worse_than_allowed(folder, tmp_path, capsys):
    source, png = str(folder / "source.safetensors"), tmp_path / "v.png"
    whole = str(folder / "whole.safetensors")
    assert main(["verify", whole, source, "--device", "cpu", "--picture", str(png)]) == 0
    assert "as good as its format allows" in capsys.readouterr().out and png.stat().st_size > 1000

    def spoil(tensors):
        tensors[f"{PREFIX}{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F

    assert main(["verify", str(changed(folder, tmp_path, spoil)), source, "--device", "cpu", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is False
    assert [layer["layer"] for layer in record["layers"] if layer["verdict"]] == [LAYER]
    assert main(["verify", source, whole, "--device", "cpu"]) == 2
    assert "no NVFP4 layer" in capsys.readouterr().err
