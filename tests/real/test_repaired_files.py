# SPDX-License-Identifier: Apache-2.0
"""Stock ComfyUI loads what `repair` writes: its UNETLoader samples the latents of the decoded weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.write.repair import repair
from nvfp4_video.samples import synthetic
from nvfp4_video.tests.real import graphs
from nvfp4_video.tests.real.harness import ComfyUI, HostError, run_in_host
from nvfp4_video.tests.real.models import small_model_of

KINDS = ("metadata_less", "modelopt", "modelopt_swizzled", "compressed_tensors", "lightx2v")
# Loads a full checkpoint with ComfyUI's own function and says which layers it took for NVFP4, and the checksum of one.
CHECKPOINT_LOADER = """
import json, sys
sys.path.insert(0, ".")
sys.argv = [sys.argv[0], "--cpu", *sys.argv[1:]]
path = sys.argv.pop()
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, comfy.quant_ops
model = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
packed = {name for name, p in model.model.diffusion_model.named_parameters()
          if isinstance(p, comfy.quant_ops.QuantizedTensor)}
print("RESULT" + json.dumps(sorted(packed)))
"""


@pytest.fixture(scope="module")
def model(host: ComfyUI):
    """State, config and packed layers of the model this host can build, and its decoded weights in a file."""
    state, config, packed = small_model_of(host)
    folder = host.base / "models" / "diffusion_models"
    synthetic.write(folder / "repair_reference.safetensors", "bf16_decoded", state, config, packed)
    return state, config, packed


def sample(host: ComfyUI, name: str, config: dict) -> list[dict]:
    stats = graphs.stats_of(host.queue(graphs.sampling(graphs.stock_loader(name), config))["outputs"])
    assert all(stream["finite"] for stream in stats)
    return stats


@pytest.fixture(scope="module")
def reference(host: ComfyUI, model) -> list[dict]:
    return sample(host, "repair_reference.safetensors", model[1])


@pytest.mark.parametrize("kind", KINDS)
def test_stock_unetloader_samples_a_repaired_file_like_its_decoded_weights(host, model, reference, tmp_path, kind):
    source = tmp_path / "source.safetensors"
    synthetic.write(source, kind, *model)
    repair(source, f"repaired_{kind}.safetensors", base=host.base / "models" / "diffusion_models")
    assert sample(host, f"repaired_{kind}.safetensors", model[1]) == reference


def test_stock_unetloader_samples_a_file_repaired_in_place(host, model, reference):
    path = host.base / "models" / "diffusion_models" / "in_place.safetensors"
    synthetic.write(path, "metadata_less", *model, prefix="base_model.model.transformer.")
    with pytest.raises(HostError):
        sample(host, path.name, model[1])
    # Another name, because the host keeps what it read of the old one.
    path = path.rename(path.with_name("in_place_repaired.safetensors"))
    assert repair(path, in_place=True).method == "header"
    assert sample(host, path.name, model[1]) == reference


@pytest.mark.parametrize("kind", ["comfy_header_unprefixed", "compressed_tensors"])
def test_stock_checkpoint_loaders_find_every_packed_layer_of_a_repaired_full_checkpoint(model, tmp_path, kind):
    source = tmp_path / "full.safetensors"
    synthetic.write(source, kind, *model, full=True)
    target = repair(source, tmp_path / "repaired.safetensors").path
    script = tmp_path / "load.py"
    script.write_text(CHECKPOINT_LOADER)
    packed = {}
    for path in (source, target):
        run = run_in_host(script, str(path))
        answer = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        packed[Path(path).name] = json.loads(answer[0].removeprefix("RESULT")) if answer else run.stderr[-2000:]
    assert packed["repaired.safetensors"] == sorted(f"{layer}.weight" for layer in model[2])
    assert packed["full.safetensors"] != packed["repaired.safetensors"]
