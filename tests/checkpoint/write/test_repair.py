# SPDX-License-Identifier: Apache-2.0
"""Repaired files hold ComfyUI's own layout, marks and names; every value, and all other metadata, as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify import dialects
from nvfp4_video.checkpoint.write.repair import BACKUP_ENDING, repair, restore_header
from nvfp4_video.kernels.format import PackedWeight
from nvfp4_video.kernels.reference import dequantize
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.files import load, save

PREFIX = synthetic.DIT_PREFIX
SOUND = ("bf16", "bf16_decoded", "comfy_markers", "comfy_header", "mixed")
FOREIGN = ("modelopt", "modelopt_layerwise", "modelopt_swizzled", "compressed_tensors", "lightx2v", "lightx2v_absmax")


@pytest.fixture(scope="module")
def model():
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    return state, config, packed, synthetic.decoded_state(state, packed)


def write(path: Path, kind: str, model, **options) -> Path:
    synthetic.write(path, kind, *model[:3], **options)
    return path


def decoded(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Names below ``prefix`` -> BF16 values, read as ComfyUI does: marks from the header, its own layout."""
    plan = dialects.detect(read_header(path), "comfy")
    declared = json.loads(plan.header.metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    tensors = load(path)
    for layer in plan.nvfp4:
        marker = tensors.pop(f"{layer}.comfy_quant", None)
        content = json.loads(bytes(marker.tolist())) if marker is not None else declared[layer]
        assert content == {"format": "nvfp4"}
        packed, scale, factor = (tensors.pop(f"{layer}.{key}") for key in ("weight", "weight_scale", "weight_scale_2"))
        if f"{layer}.input_scale" in tensors:
            assert tensors.pop(f"{layer}.input_scale").item() == synthetic.INPUT_SCALE
        tensors[f"{layer}.weight"] = dequantize(PackedWeight(packed, scale, factor, plan.nvfp4[layer]))
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def same_values(found: dict, wanted: dict) -> bool:
    """Equal up to the padding that ComfyUI's layout has."""
    if found.keys() != wanted.keys():
        return False
    for name, value in wanted.items():
        window = found[name][tuple(slice(size) for size in value.shape)] if value.ndim else found[name]
        if window.dtype != value.dtype or not torch.equal(window, value):
            return False
    return True


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["metadata_less", "comfy_header_unprefixed", *FOREIGN])
def test_a_repaired_file_decodes_to_the_same_weights_in_comfyui_s_own_layout(tmp_path, model, kind, full):
    source = write(tmp_path / "source.safetensors", kind, model, full=full)
    report = repair(source, tmp_path / "repaired.safetensors")
    assert report.method == "copy"
    assert report.remaining == ()
    assert report.converted == (len(model[2]) if kind in FOREIGN else 0)
    prefix = PREFIX if full or kind == "comfy_header_unprefixed" else ""
    assert same_values(decoded(report.path, prefix), model[3])
    config = json.loads(read_header(report.path).metadata["config"])
    assert config == json.loads(read_header(source).metadata["config"])
    assert "quantization_config" not in read_header(report.path).metadata
    assert repair(report.path, tmp_path / "again.safetensors").method == "nothing"
    assert not (tmp_path / "again.safetensors").exists()


def test_what_only_lacks_a_mark_is_copied_byte_for_byte(tmp_path, model):
    source = write(tmp_path / "source.safetensors", "metadata_less", model, full=True)
    report = repair(source, tmp_path / "repaired.safetensors")
    before, after = load(source), load(report.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if before[n].ndim)


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_file_is_left_alone(tmp_path, model, kind):
    source = write(tmp_path / "source.safetensors", kind, model)
    before = source.read_bytes()
    report = repair(source, in_place=True)
    assert report.method == "nothing"
    assert "nothing to repair" in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
    assert source.read_bytes() == before


def test_a_dry_run_says_what_would_be_cured_and_writes_nothing(tmp_path, model):
    source = write(tmp_path / "source.safetensors", "modelopt", model)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    for target in ("new.safetensors", "there.safetensors"):
        report = repair(source, target, base=tmp_path, dry_run=True)
        assert (report.method, report.path, report.converted) == ("planned", source, len(model[2]))
        first, *lines = str(report).splitlines()
        assert first == f"source.safetensors: can be repaired, {len(model[2])} layers to convert"
        assert any(line.startswith("  to cure: ") and "modelopt" in line for line in lines)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before
    done = repair(source, "new.safetensors", base=tmp_path)
    assert (done.cured, done.remaining) == (report.cured, report.remaining)


def test_a_cancel_is_possible_while_values_are_checked(tmp_path, model):
    source = write(tmp_path / "source.safetensors", "metadata_less", model)

    def cancel(done: int, total: int) -> None:
        assert 0 == done < total
        raise KeyboardInterrupt

    for dry_run in (True, False):
        with pytest.raises(KeyboardInterrupt):
            repair(source, tmp_path / "new.safetensors", dry_run=dry_run, on_bytes=cancel)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_lent_config_is_a_cure_that_the_report_names(tmp_path, model):
    state, config, packed, _ = model
    lender = write(tmp_path / "lender.safetensors", "comfy_markers", model)
    source = save(tmp_path / "source.safetensors", load(lender), {})
    assert "nothing that can be repaired" in str(repair(source, tmp_path / "new.safetensors"))
    done = repair(source, tmp_path / "new.safetensors", config_from=lender)
    assert [fault.code for fault in done.cured] == ["config"] and done.remaining == ()
    assert "cured: the header has no `config`, unlike lender.safetensors" in str(done)


def test_an_open_dialect_has_to_be_stated(tmp_path, model):
    state, config, packed, wanted = model
    source = tmp_path / "source.safetensors"
    synthetic.write(source, "metadata_less", state, config | {"_class_name": "Unknown"}, packed)
    with pytest.raises(CheckpointError, match="modelopt_swizzled.*state the dialect"):
        repair(source, tmp_path / "repaired.safetensors")
    report = repair(source, tmp_path / "repaired.safetensors", dialect="comfy")
    assert same_values(decoded(report.path), wanted)


def test_layers_marked_with_nul_bytes_are_marked_anew(tmp_path, model):
    tensors = load(write(tmp_path / "good.safetensors", "comfy_markers", model))
    spoilt = {n: torch.zeros_like(t) if n.endswith("comfy_quant") else t for n, t in tensors.items()}
    source = save(tmp_path / "nul.safetensors", spoilt, read_header(tmp_path / "good.safetensors").metadata)
    report = repair(source, tmp_path / "repaired.safetensors")
    assert [finding.code for finding in report.cured] == ["markers"]
    assert not any(name.endswith("comfy_quant") for name in load(report.path))
    assert same_values(decoded(report.path), model[3])


@pytest.mark.parametrize("wrong", ["diffusion_model.", "transformer.", "base_model.model.transformer."])
def test_a_wrong_prefix_becomes_the_one_comfyui_strips(tmp_path, model, wrong):
    alone = write(tmp_path / "alone.safetensors", "comfy_markers", model, prefix=wrong)
    report = repair(alone, tmp_path / "alone_repaired.safetensors")
    assert [finding.code for finding in report.cured] == ["prefix"]
    assert same_values(decoded(report.path), model[3])
    tensors = load(alone) | synthetic.other_components()
    full = save(tmp_path / "full.safetensors", tensors, read_header(alone).metadata)
    report = repair(full, tmp_path / "full_repaired.safetensors")
    assert same_values(decoded(report.path, PREFIX), model[3])
    assert synthetic.other_components().keys() < load(report.path).keys()


def test_in_place_only_the_header_changes_and_its_backup_undoes_it(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "metadata_less", model, prefix="base_model.model.transformer.")
    before = source.read_bytes()
    report = repair(source, in_place=True)
    after = source.read_bytes()
    assert report.method == "header"
    length = int.from_bytes(before[:8], "little") + 8
    assert len(after) == len(before)
    assert after[:8] == before[:8]
    assert after[length:] == before[length:]
    assert same_values(decoded(source), model[3])
    assert report.backup.read_bytes() == before[:length] + after[:length]
    restore_header(source)
    assert source.read_bytes() == before


def test_in_place_a_header_that_does_not_fit_leads_to_a_copy(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "metadata_less", model)
    before = source.read_bytes()
    report = repair(source, in_place=True)
    assert report.method == "copy"
    assert same_values(decoded(source), model[3])
    assert report.backup is None  # it could not be undone
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert source.read_bytes() != before


def test_an_older_backup_is_not_overwritten_unasked(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "metadata_less", model, prefix="base_model.model.transformer.")
    before = source.read_bytes()
    (tmp_path / f"m.safetensors{BACKUP_ENDING}").write_text("older")
    with pytest.raises(CheckpointError, match="earlier repair"):
        repair(source, in_place=True)
    assert source.read_bytes() == before


def test_an_interrupted_repair_leaves_the_file_as_it_was(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "compressed_tensors", model)
    before = source.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(source, tmp_path / "out.safetensors", on_bytes=interrupt)
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_beside_modelopt_s_declaration_would_be_misread_and_is_refused(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "modelopt", model, sidecar=True)
    with pytest.raises(CheckpointError, match="another folder"):
        repair(source, tmp_path / "out.safetensors")
    (tmp_path / "out").mkdir()
    assert same_values(decoded(repair(source, tmp_path / "out" / "o.safetensors").path), model[3])


def test_a_missing_config_remains_unless_another_file_gives_it(tmp_path, model):
    tensors = load(write(tmp_path / "good.safetensors", "metadata_less", model))
    source = save(tmp_path / "bare.safetensors", tensors, {"license": "community"})
    report = repair(source, tmp_path / "a.safetensors", dialect="comfy")
    assert [finding.code for finding in report.remaining] == ["config"]
    report = repair(source, tmp_path / "b.safetensors", dialect="comfy", config_from=tmp_path / "good.safetensors")
    assert report.remaining == ()
    metadata = read_header(report.path).metadata
    assert metadata["config"] == read_header(tmp_path / "good.safetensors").metadata["config"]
    assert metadata["license"] == "community"


def test_older_fp8_layers_beside_nvfp4_get_the_names_a_declared_file_needs(tmp_path):
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    synthetic.write(tmp_path / "good.safetensors", "metadata_less", state, config, packed)
    tensors = load(tmp_path / "good.safetensors")
    layer = "transformer_blocks.0.attn1.to_q"
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    tensors |= {f"{layer}.scale_weight": torch.tensor(0.5), f"{layer}.scale_input": torch.tensor(2.0)}
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    source = save(tmp_path / "m.safetensors", tensors, read_header(tmp_path / "good.safetensors").metadata)
    after = load(repair(source, tmp_path / "out.safetensors").path)
    assert after[f"{layer}.weight_scale"].item() == 0.5
    assert after[f"{layer}.input_scale"].item() == 2.0
    assert not {"scaled_fp8", f"{layer}.scale_weight", f"{layer}.scale_input"} & after.keys()
    declared = json.loads(read_header(tmp_path / "out.safetensors").metadata["_quantization_metadata"])["layers"]
    assert declared[layer] == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert len(declared) == len(packed) + 1


def test_target_and_in_place_exclude_each_other(tmp_path, model):
    source = write(tmp_path / "m.safetensors", "metadata_less", model)
    for options in ({}, {"target": tmp_path / "o.safetensors", "in_place": True}):
        with pytest.raises(CheckpointError, match="either a target or in_place"):
            repair(source, **options)
    with pytest.raises(CheckpointError, match="outside the output folder"):
        repair(source, "../o.safetensors", base=tmp_path)


def test_a_file_with_nothing_to_cure_is_not_called_sound_with_a_damaged_scale(tmp_path, model):
    path = write(tmp_path / "m.safetensors", "comfy_markers", model)
    tensors, name = load(path), f"{next(iter(model[2]))}.weight_scale_2"
    save(path, tensors | {name: 1 / tensors[name]}, read_header(path).metadata)
    with pytest.raises(CheckpointError, match="its global scale is .*; perhaps it is stored as its reciprocal"):
        repair(path, tmp_path / "new.safetensors")
