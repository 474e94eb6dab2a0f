# SPDX-License-Identifier: Apache-2.0
"""Files written by the quantiser in a real ComfyUI process on the CPU, as one line of JSON; run by the test beside it.

usage: <the host's python> quantized_in_process.py <empty folder>, in the folder of a ComfyUI checkout

The small LTX model, in BF16 and twice in FP8, is quantised as a whole and without the rest; each file is loaded by the
host's UNETLoader and checkpoint loader and by ours, and sampled. Gates and outer Linears are FP8 layers that stay.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "facts: "
KINDS = ("bf16", "fp8_markers", "fp8_old")


def pack(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


def write_source(path: Path, kind: str, state: dict, config: dict) -> None:
    """A full checkpoint whose Linears outside and inside the blocks are FP8 but in ``bf16``."""
    torch, synthetic = importlib.import_module("torch"), pack("samples.synthetic")
    sources = pack("tests.support.quantize_sources")
    tensors = {}
    for name, tensor in state.items():
        layer, full = name.removesuffix(".weight"), synthetic.DIT_PREFIX + name
        if kind == "bf16" or layer == name or tensor.ndim != 2 or not layer.startswith("transformer_blocks."):
            tensors[full] = tensor
            continue
        value, scale = sources.to_fp8(tensor)
        layer = synthetic.DIT_PREFIX + layer
        tensors[full] = value
        if kind == "fp8_old":
            tensors |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            tensors |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": marker}
    if kind == "fp8_old":
        tensors[synthetic.DIT_PREFIX + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    sources.save(path, tensors | synthetic.other_components(), {"config": json.dumps({"transformer": config})})


def facts_of(scene, host, kind: str) -> dict:
    """Latents of every loader on every file, against the host's on the decoded weights."""
    torch = importlib.import_module("torch")
    quantize, plan = pack("checkpoint.write.quantize"), pack("checkpoint.write.plan")
    files_of, load = pack("tests.support.files"), pack("host.load.model")
    source = scene.folder / f"{kind}.safetensors"
    write_source(source, kind, scene.state, scene.config)
    files = {}
    for name, only in (("whole", False), ("model", True)):
        files[name] = str(scene.folder / f"{kind}_{name}.safetensors")
        record = quantize.quantize_checkpoint(source, files[name], plan.QuantizeSettings(only_model=only))
    decoded = decode(files_of.load(Path(files["model"])))
    reference_file = scene.folder / f"{kind}_decoded.safetensors"
    files_of.save(reference_file, decoded, {"config": json.dumps({"transformer": scene.config})})
    sd = host("sd")
    reference = scene.sample(sd.load_diffusion_model(str(reference_file)))
    loaders = {
        "unet_model": lambda: sd.load_diffusion_model(files["model"]),
        "unet_whole": lambda: sd.load_diffusion_model(files["whole"]),
        "checkpoint_whole": lambda: sd.load_checkpoint_guess_config(
            files["whole"], output_vae=False, output_clip=False
        )[0],
        "ours_model": lambda: load.load_model(files["model"])[0],
        "ours_whole": lambda: load.load_model(files["whole"])[0],
    }
    found = {"layers": record["layers"], "finite": bool(reference.isfinite().all()), "loaders": {}}
    latents = {}
    for name, loader in loaders.items():
        patcher = loader()
        modules = dict(patcher.model.diffusion_model.named_modules())
        formats = [getattr(module, "quant_format", None) for module in modules.values()]
        latents[name] = scene.sample(patcher)
        found["loaders"][name] = {
            "nvfp4": formats.count("nvfp4"),
            "fp8": formats.count("float8_e4m3fn"),
            "equal_decoded": torch.equal(latents[name], reference),
            "difference": float((latents[name] - reference).norm() / reference.norm()),
            "equal_first": torch.equal(latents[name], latents["unet_model"]),
        }
        host("model_management").unload_all_models()
    return found


def decode(tensors: dict) -> dict:
    """NVFP4 and FP8 layers of a file -> BF16."""
    torch, reference = importlib.import_module("torch"), pack("kernels.reference")
    record = pack("kernels.format").PackedWeight
    state = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        scale = tensors.get(f"{layer}.weight_scale")
        if suffix in ("weight_scale", "weight_scale_2", "comfy_quant", "input_scale"):
            continue
        if suffix == "weight" and tensor.dtype == torch.uint8:
            rows = tensors[f"{layer}.bias"].numel() if f"{layer}.bias" in tensors else tensor.shape[0]
            shape = (rows, 2 * tensor.shape[1])
            tensor = reference.dequantize(record(tensor, scale, tensors[f"{layer}.weight_scale_2"], shape))
        elif suffix == "weight" and tensor.dtype == torch.float8_e4m3fn:
            tensor = (tensor.float() * scale.float()).to(torch.bfloat16)
        state[name] = tensor
    return state


def main(folder: Path) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = importlib.import_module("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    harness, synthetic = pack("tests.real.harness"), pack("samples.synthetic")
    facts["ltx"] = harness.small_model(Path.cwd())
    if facts["ltx"] is not None:
        scene = in_process.Scene.__new__(in_process.Scene)
        scene.folder = folder
        scene.state, scene.config = getattr(synthetic, f"small_{facts['ltx']}")()
        for kind in KINDS:
            try:
                facts[kind] = facts_of(scene, in_process.comfy, kind)
            except Exception:
                facts[kind] = {"error": traceback.format_exc()}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
