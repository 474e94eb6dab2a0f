# SPDX-License-Identifier: Apache-2.0
"""NVFP4Verify and NVFP4Repair queued in a running ComfyUI: verdicts in the history, files where loaders list them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real.harness import ComfyUI, HostError
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny

SHOW = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}


@pytest.fixture(scope="module")
def checkpoints(host: ComfyUI) -> Path:
    """The folder of checkpoints with a source, a good file made of it, and one with a tensor altered."""
    folder = host.base / "models" / "checkpoints"
    source = save(folder / "verify_source.safetensors", tiny())
    good = folder / "verify_good.safetensors"
    quantize_checkpoint(source, good, QuantizeSettings(search=AMAX))
    altered = load(good)
    altered[f"{PREFIX}scale_shift_table"] += 1
    save(folder / "verify_bad.safetensors", altered, metadata(good))
    return folder


def verifying(name: str, on_finding: str, source: str = "verify_source.safetensors") -> dict:
    inputs = {"file_name": name, "source": source, "on_finding": on_finding}
    return {"1": {"class_type": "NVFP4Verify", "inputs": inputs}, "2": SHOW}


def repairing(name: str, action: str) -> dict:
    inputs = {"file_name": name, "action": action, "name": "", "overwrite": False}
    return {"1": {"class_type": "NVFP4Repair", "inputs": inputs}, "2": SHOW}


def test_a_verdict_is_an_output_and_the_report_is_in_the_history(host, checkpoints):
    for name, ok, verdict in (("good", True, "as good as its format allows"), ("bad", False, "NOT in order")):
        outputs = host.queue(verifying(f"verify_{name}.safetensors", "report"))["outputs"]
        first = outputs["1"]["text"][0].splitlines()[0]
        assert first == f"verify_{name}.safetensors against verify_source.safetensors: {verdict}"
        assert json.loads(outputs["2"]["text"][0].lower()) is ok
    assert "scale_shift_table: it should be a copy and is not" in outputs["1"]["text"][0]


def test_a_finding_stops_the_job_with_what_is_wrong(host, checkpoints):
    with pytest.raises(HostError, match=r"node 1 \(NVFP4Verify\).*NOT in order(.|\n)*scale_shift_table: it should be"):
        host.queue(verifying("verify_bad.safetensors", "stop the job"))
    host.queue(verifying("verify_good.safetensors", "stop the job"))
    with pytest.raises(HostError, match="it is both the file and its source"):
        host.queue(verifying("verify_good.safetensors", "report", "verify_good.safetensors"))


@pytest.mark.parametrize(
    ("folder", "loader", "widget"),
    [("diffusion_models", "UNETLoader", "unet_name"), ("text_encoders", "CLIPLoader", "clip_name")],
)
def test_a_repaired_file_appears_in_the_list_of_the_loader_that_lists_the_old_one(host, folder, loader, widget):
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    source = host.base / "models" / folder / f"to_repair_{folder}.safetensors"
    synthetic.write(source, "modelopt_swizzled", state, config, packed)
    plain = host.base / "models" / folder / f"to_repair_{folder}_bf16.safetensors"
    synthetic.write(plain, "bf16", state, config)
    shown = host.queue(repairing(source.name, "only report"))["outputs"]["1"]["text"][0]
    assert shown.splitlines()[0] == f"{source.name}: can be repaired, {len(packed)} layers to convert"
    name = f"to_repair_{folder}_repaired.safetensors"
    assert name not in json.dumps(host.object_info(loader)["input"]["required"][widget])
    outputs = host.queue(repairing(source.name, "write a new file"))["outputs"]
    assert outputs["1"]["text"][0].splitlines()[0] == f"{name}: repaired, {len(packed)} layers converted"
    written = host.base / "output" / outputs["2"]["text"][0]
    assert verify(written, plain).ok
    assert name in json.dumps(host.object_info(loader)["input"]["required"][widget])
    assert all(torch.isfinite(tensor.float()).all() for tensor in load(written).values() if tensor.is_floating_point())
