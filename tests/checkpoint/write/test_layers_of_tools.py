# SPDX-License-Identifier: Apache-2.0
"""Layers of every kind through inspect, repair, quantize and verify: read, copied, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.dialects import detect
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.checkpoint.write.repair import repair
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.host.load.test_load_layers import LAYER, TALL, replaced, stored
from safetensors.torch import load_file, save_file

KEPT = r"\.2\.ff\.net\.0\.proj$"
TITLES = {
    **dict.fromkeys(("one", "old", "e5m2"), "scaled FP8"),
    **dict.fromkeys(("rows", "rows_flat"), "FP8 scaled by rows"),
    "blocks": "FP8 scaled in blocks",
}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return synthetic.small_ltx23()


def config(model) -> dict[str, str]:
    return {"config": json.dumps({"transformer": model[1]})}


def fp8_file(folder: Path, kind: str, model) -> tuple[Path, dict[str, torch.Tensor]]:
    """A BF16 file two of whose layers are FP8 of this kind, and the weights those mean."""
    tensors, meant = dict(model[0]), {}
    for layer in (TALL, TALL.replace(".2.", ".3.")):
        new, meant[layer] = stored(kind, model[0][f"{layer}.weight"])
        replaced(tensors, layer, new)
    if kind in ("old", "e5m2"):
        tensors["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "source.safetensors", config(model))
    return folder / "source.safetensors", meant


def edited(folder: Path, kind: str, model, change) -> Path:
    """A file of a kind of synthetic.py, altered."""
    path = folder / f"{kind}.safetensors"
    synthetic.write(path, kind, *model)
    tensors, metadata = load_file(path), read_header(path).metadata
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def decoded(path: Path, layer: str) -> torch.Tensor:
    """An FP8 or BF16 layer as ComfyUI reads it: by its marker or header entry, with a scale that broadcasts."""
    tensors, plan = load_file(path), detect(read_header(path))
    weight = tensors[f"{layer}.weight"].float()
    if plan.layers[layer].marker is None:
        return weight
    return weight * tensors[f"{layer}.weight_scale"].float()


@pytest.mark.parametrize("kind", TITLES)
def test_a_file_with_fp8_is_called_what_it_is_quantised_from_its_values_and_verified(kind: str, model, tmp_path: Path):
    source, meant = fp8_file(tmp_path, kind, model)
    assert TITLES[kind] in inspect_checkpoint(source).formats
    target = tmp_path / "target.safetensors"
    settings = QuantizeSettings(search=AMAX, options=Options(keep=(KEPT,)))
    quantize_checkpoint(source, target, settings)
    assert (decoded(target, TALL) - meant[TALL]).norm() < 0.01 * meant[TALL].norm()
    found = verify(target, source)
    assert found.ok and found.mean_error < 0.12
    assert TALL.replace(".2.", ".3.") in {check.layer for check in found.layers}


@pytest.mark.parametrize("kind", ["one", "old", "e5m2", "rows", "rows_flat"])
def test_repair_declares_fp8_by_its_dtype_with_a_scale_that_broadcasts(kind: str, model, tmp_path: Path):
    source, meant = fp8_file(tmp_path, kind, model)
    if kind == "old":  # ComfyUI converts such a file itself
        assert repair(source, tmp_path / "t.safetensors").method == "nothing"
        return
    found = repair(source, tmp_path / "t.safetensors")
    assert [finding.code for finding in found.cured] == ["unmarked", *(["rows"] if kind == "rows_flat" else [])]
    plan = detect(read_header(tmp_path / "t.safetensors"))
    assert plan.formats[TALL]["format"] == ("float8_e5m2" if kind == "e5m2" else "float8_e4m3fn")
    assert "scaled_fp8" not in plan.header.tensors
    assert torch.equal(decoded(tmp_path / "t.safetensors", TALL), meant[TALL])


def test_repair_refuses_what_comfyui_has_no_format_for(model, tmp_path: Path):
    source, _ = fp8_file(tmp_path, "blocks", model)
    with pytest.raises(CheckpointError, match="FP8 scaled in blocks.*quantize it"):
        repair(source, tmp_path / "t.safetensors")
    assert "without the scales" in str(inspect_checkpoint(source))


def test_repair_refuses_scales_that_are_nan_in_a_file_of_any_dialect_before_it_writes(model, tmp_path: Path):
    for kind in ("metadata_less", "modelopt"):

        def spoil(tensors):
            tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F

        source, target = edited(tmp_path, kind, model, spoil), tmp_path / "t.safetensors"
        with pytest.raises(CheckpointError, match=f"layer {LAYER}: its block scales hold NaN"):
            repair(source, target)
        assert not target.exists()


def test_damaged_markers_of_some_fp8_layers_are_found_repaired_and_never_copied(model, tmp_path: Path):
    layer = "transformer_blocks.2.audio_attn1.to_q"

    def spoil(tensors):
        tensors[f"{layer}.comfy_quant"] = tensors[f"{layer}.comfy_quant"] * 0

    source = edited(tmp_path, "mixed", model, spoil)
    assert f"that of {layer} holds nothing but NUL" in str(repair(source, tmp_path / "t.safetensors"))
    assert "JSONDecodeError" in str(inspect_checkpoint(source))
    plan = detect(read_header(tmp_path / "t.safetensors"))
    assert not plan.faults() and plan.formats[layer] == {"format": "float8_e4m3fn"}


def test_an_empty_marker_of_a_plain_weight_is_dropped(model, tmp_path: Path):
    key = "transformer_blocks.0.attn1.to_q.comfy_quant"
    source = edited(tmp_path, "comfy_markers", model, lambda t: t.update({key: torch.zeros(0, dtype=torch.uint8)}))
    repair(source, tmp_path / "t.safetensors")
    assert key not in read_header(tmp_path / "t.safetensors").tensors


def test_repair_says_what_was_stated_and_measured(model, tmp_path: Path):
    synthetic.write(tmp_path / "s.safetensors", "modelopt", *model)
    found = repair(tmp_path / "s.safetensors", tmp_path / "t.safetensors", dialect="modelopt")
    assert "dialect: modelopt, stated by the user" in str(found)


def test_verify_adds_a_low_rank_part_and_repair_refuses_it(model, tmp_path: Path):
    parts = {}

    def change(tensors):
        for layer in synthetic.quantised_layers(*model):
            rows, cols = model[0][f"{layer}.weight"].shape
            parts[layer] = torch.randn(2, cols) * 0.01, torch.randn(rows, 2)
            for suffix, part in zip(("svdquant_lora_a", "svdquant_lora_b"), parts[layer], strict=True):
                tensors[f"{layer}.{suffix}"] = part

    ours = edited(tmp_path, "modelopt", model, change)
    source = dict(model[0])
    for layer, (down, up) in parts.items():
        source[f"{layer}.weight"] = (source[f"{layer}.weight"].float() + up @ down).bfloat16()
    save_file(source, tmp_path / "source.safetensors", config(model))
    assert verify(ours, tmp_path / "source.safetensors").mean_error < 0.11
    with pytest.raises(CheckpointError, match="low-rank part"):
        repair(ours, tmp_path / "t.safetensors")


@pytest.mark.parametrize("suffix", ["weight_zero_point", "svd_up", "lora_A.weight"])
def test_every_tool_names_what_it_cannot_read_beside_a_weight(suffix: str, model, tmp_path: Path):
    path = edited(tmp_path, "comfy_markers", model, lambda t: t.update({f"{LAYER}.{suffix}": torch.zeros(2)}))
    plain = tmp_path / "plain.safetensors"
    save_file(dict(model[0]) | {f"{LAYER}.{suffix}": torch.zeros(2)}, plain, config(model))
    target = tmp_path / "t.safetensors"
    for tool in (
        lambda: inspect_checkpoint(path),
        lambda: repair(path, target),
        lambda: verify(path, plain),
        lambda: quantize_checkpoint(plain, target),
    ):
        with pytest.raises(CheckpointError, match=rf"layer {LAYER}: `{suffix}` beside its weight"):
            tool()
