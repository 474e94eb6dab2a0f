# SPDX-License-Identifier: Apache-2.0
"""What the quantiser refuses, by name and before it leaves anything behind: files, weights, targets, disks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.split import split
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.support.files import load
from nvfp4_video.tests.support.quantize_sources import PREFIX, linears, save, tiny

FAST = QuantizeSettings(search=AMAX)
LAYER = PREFIX + "transformer_blocks.1.attn1.to_q"


def test_layers_with_nan_or_infinity_are_all_named_and_kept_only_on_request(tmp_path, tensors):
    bad = dict(tensors)
    for name, value in ((f"{LAYER}.weight", "nan"), (PREFIX + "transformer_blocks.3.ff.net.0.proj.weight", "-inf")):
        bad[name] = bad[name].clone()
        bad[name][5, 7] = float(value)
    source, target = save(tmp_path / "s.safetensors", bad), tmp_path / "t.safetensors"
    with pytest.raises(CheckpointError, match=r"in 2 layers: .*1\.attn1\.to_q, .*3\.ff\.net\.0\.proj.*keep_non_finite"):
        quantize_checkpoint(source, target, FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    record = quantize_checkpoint(source, target, QuantizeSettings(search=AMAX, keep_non_finite=True))
    found = load(target)
    assert torch.equal(found[f"{LAYER}.weight"].view(torch.uint8), bad[f"{LAYER}.weight"].view(torch.uint8))
    assert record["layers"] == 18 and record["kept"]["NaN or infinity in it, kept on request"] == 2


def write_refused(kind: str, path: Path) -> Path:
    state, config = synthetic.small_ltx23()
    if kind == "lora":
        synthetic.write_lora(path, state, config)
    elif kind == "vae":
        synthetic.write_vae(path)
    elif kind == "config":
        save(path, tiny(), {"license": "x"})
    elif kind == "gguf":
        path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    elif kind == "pickle":
        path.write_bytes(b"PK\x03\x04\x00\x00\x08\x08" + bytes(64))
    elif kind == "text":
        save(path, {"model.layers.0.q.weight": torch.ones(16, 16)}, {})
    elif kind == "small":
        save(path, {"blocks.0.cross_attn.k.weight": torch.ones(16, 8), "head.head.weight": torch.ones(4, 4)}, {})
    else:
        synthetic.write(path, kind, state, config)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("comfy_markers", "four bits already.*take the BF16 or FP8"),
        ("compressed_tensors", "four bits already"),
        ("modelopt", "four bits already"),
        ("lora", "LoRA"),
        ("vae", "VAE"),
        ("text", "text encoder"),
        ("gguf", "GGUF"),
        ("pickle", "pickle"),
        ("config", "no `config`.*config_from"),
        ("small", "nothing in it would be quantized"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_what_it_is(tmp_path, kind, words):
    source = write_refused(kind, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match=words):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_calibration_or_a_donor_of_the_config_is_never_the_target(source, tensors, tmp_path):
    also = tmp_path / "also.safetensors"
    save(also, {name.removeprefix(PREFIX): torch.ones(tensors[f"{name}.weight"].shape[1]) for name in linears(tensors)})
    before = also.read_bytes()
    for given in ({"calibration": also}, {"config_from": also}):
        with pytest.raises(CheckpointError, match="the target is a file that is read"):
            quantize_checkpoint(source, also, QuantizeSettings(**given), overwrite=True)
    with pytest.raises(CheckpointError, match="the target is a file that is read"):
        split(source, {"video_vae": also}, config_from=also, overwrite=True)
    assert also.read_bytes() == before


def test_the_source_is_never_the_target_and_an_existing_file_stays_unless_allowed(source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(CheckpointError, match="the source itself"):
        quantize_checkpoint(source, source, FAST, overwrite=True)
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="the target exists"):
        quantize_checkpoint(source, target, FAST)
    assert (source.read_bytes(), target.read_bytes()) == (before, b"mine")
    with pytest.raises(CheckpointError, match="outside the output folder"):
        quantize_checkpoint(source, "../t.safetensors", FAST, base=tmp_path / "out")
    quantize_checkpoint(source, target, FAST, overwrite=True)
    assert target.stat().st_size > 1000
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(CheckpointError, match="ModelOpt's layout"):
        quantize_checkpoint(source, tmp_path / "u.safetensors", FAST)


@pytest.mark.parametrize("how", ["touched", "replaced", "grown", "removed"])
def test_a_source_that_changes_while_it_is_read_is_noticed(source, tensors, tmp_path, how):
    calls = []

    def meddle(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 10:
            if how == "touched":
                os.utime(source, ns=(1, 1))
            elif how == "replaced":
                stat = source.stat()
                os.replace(shutil.copy(source, tmp_path / "copy"), source)
                os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            elif how == "grown":
                with source.open("ab") as file:
                    file.write(b" ")
            else:
                source.unlink()

    with pytest.raises(CheckpointError, match=r"source\.safetensors: the source changed"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST, on_step=meddle)
    assert not (tmp_path / "t.safetensors").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="are free on its disk"):
        quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
