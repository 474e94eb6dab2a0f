# SPDX-License-Identifier: Apache-2.0
"""What ComfyUI itself makes of LoRA files that are folded in here, and of files of mixed formats, as one line of JSON.

Run by test_fold_lora_host.py.

usage: <the host's python> fold_lora_in_process.py <empty folder>, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

MARK = "facts: "
STRENGTHS = (0.7, -0.4)
SOURCE = "bf16"


def load(name: str):
    return importlib.import_module(name)


def write_loras(scene) -> list[str]:
    """Two LoRAs in ComfyUI's spellings, all kinds that are folded in, of layers that are packed and of others."""
    torch, save_file = load("torch"), load("safetensors.torch").save_file
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    one, two = {}, {}
    matrices = {name: t.shape for name, t in scene.state.items() if t.ndim == 2 and name.endswith(".weight")}
    shapes = {name.removesuffix(".weight"): shape for name, shape in matrices.items()}
    for number, (layer, (rows, cols)) in enumerate(shapes.items()):
        flat = f"lora_unet_{layer.replace('.', '_')}"
        name = f"diffusion_model.{layer}"
        kind = number % 4
        if kind == 0:
            one |= {f"{name}.lora_B.weight": random(rows, 3), f"{name}.lora_A.weight": random(3, cols)}
            two |= {f"{layer}.lora_up.weight": random(rows, 2), f"{layer}.lora_down.weight": random(2, cols)}
            two[f"{layer}.alpha"] = torch.tensor(1.5)
        elif kind == 1:
            one |= {f"{flat}.hada_w{n}_a": random(rows, 2) for n in (1, 2)}
            one |= {f"{flat}.hada_w{n}_b": random(2, cols) for n in (1, 2)}
            one[f"{flat}.alpha"] = torch.tensor(0.5)
        elif kind == 2:
            two |= {f"{name}.lokr_w1": random(rows // 4, cols // 8), f"{name}.lokr_w2_a": random(4, 2)}
            two |= {f"{name}.lokr_w2_b": random(2, 8), f"{name}.alpha": torch.tensor(4.0)}
        else:
            one[f"{name}.diff"] = 0.1 * random(rows, cols)
        if kind % 2 and f"{layer}.bias" in scene.state:
            two[f"{name}.diff_b"] = random(rows)
    paths = [str(scene.folder / f"lora{number}.safetensors") for number in range(2)]
    for path, keys in zip(paths, (one, two), strict=True):
        save_file({key: t.contiguous() for key, t in keys.items()}, path)
    return paths


def on(patcher, paths: list[str]):
    for path, strength in zip(paths, STRENGTHS, strict=True):
        lora = load("comfy.utils").load_torch_file(path)
        patcher = load("comfy.sd").load_lora_for_models(patcher, None, lora, strength, 0.0)[0]
    return patcher


def error(found, wanted) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def sums(scene, paths: list[str]) -> dict:
    """How far source and LoRAs are from what ComfyUI makes of them, both in FP32, and how much they change."""
    torch, lora = load("torch"), load("nvfp4_video.checkpoint.write.lora")
    header = load("nvfp4_video.checkpoint.file.shards").open_checkpoint(scene.path(SOURCE)).header
    names = load("nvfp4_video.checkpoint.identify.components").find_components(header)["diffusion_model"].names
    full = {f"diffusion_model.{own}": name for name, own in names.items()}
    given = lora.read_loras(list(zip(paths, STRENGTHS, strict=True)), header, names)
    patches = on(scene.stock(SOURCE), paths).patches
    weights = load("safetensors.torch").load_file(scene.path(SOURCE))
    errors, changes = [], []
    with lora.Deltas(given) as deltas:
        for key, patch in patches.items():
            stored = weights[full[key]].float()
            wanted = load("comfy.lora").calculate_weight(patch, stored.clone(), key)
            added = deltas.of(full[key], torch.device("cpu")).rows(0, stored.shape[0]).view(stored.shape)
            errors.append(error(stored + added, wanted))
            changes.append(error(stored, wanted))
        same = {full[key] for key in patches} == deltas.tensors
    return {"tensors": len(errors), "same": same, "worst": max(errors), "least change": min(changes)}


def end_to_end(scene, paths: list[str]) -> dict:
    """Quantised with the LoRAs, verified, loaded by stock and by ours; latents against source and LoRAs in ComfyUI."""
    plan, verify = load("nvfp4_video.checkpoint.write.plan"), load("nvfp4_video.checkpoint.verify.verify")
    given = tuple(zip(paths, STRENGTHS, strict=True))
    source, made = scene.path(SOURCE), scene.path("folded")
    quantize = load("nvfp4_video.checkpoint.write.quantize").quantize_checkpoint
    quantize(source, made, plan.QuantizeSettings(loras=given))
    found = verify.verify(made, source, loras=given)
    layers = {check.layer: check.error for check in found.layers}
    stock, ours = (scene.sample(loader("folded")) for loader in (scene.stock, scene.ours))
    plain = scene.sample(scene.stock(SOURCE))
    wanted = scene.sample(on(scene.stock(SOURCE), paths))
    return {
        "ok": found.ok, "report": load("nvfp4_video.checkpoint.verify.found").summary(found),
        "worst": max(layers.values()), "layers": len(layers), "equal": load("torch").equal(stock, ours),
        "folded": error(ours - plain, wanted - plain), "finite": bool(ours.isfinite().all()),
    }  # fmt: skip


def mixed(scene, paths: list[str]) -> dict:
    """Calibrated while stock's model samples, a file by GPTQ with a byte budget; stock's latents of it and ours."""
    plan, verify = load("nvfp4_video.checkpoint.write.plan"), load("nvfp4_video.checkpoint.verify.verify")
    source, made, known = scene.path(SOURCE), scene.path("mixed"), str(scene.folder / "calibration.safetensors")
    patcher = scene.stock(SOURCE).clone()
    plain = scene.sample(scene.stock(SOURCE))
    load("nvfp4_video.host.compute.calibrate").collect(patcher, source, known, 10**8, overwrite=False)
    same = load("torch").equal(scene.sample(patcher), plain)
    for _ in range(3):  # a clip is a few tokens
        scene.sample(patcher, steps=8)
    settings = plan.QuantizeSettings(search=plan.GPTQ, calibration=known, budget="balanced")
    record = load("nvfp4_video.checkpoint.write.quantize").quantize_checkpoint(source, made, settings)
    found = verify.verify(made, source, calibration=known)
    stock, ours = (scene.sample(loader("mixed")) for loader in (scene.stock, scene.ours))
    return {
        "same": same, "ok": found.ok, "report": load("nvfp4_video.checkpoint.verify.found").summary(found),
        "fp8": record["fp8"], "whole": record["budget"]["whole"], "layers": record["layers"], "gptq": record["gptq"],
        "nbytes": record["nbytes"], "smallest": record["budget"]["curve"][0]["nbytes"],
        "stock": error(stock, plain), "ours": error(ours, plain), "apart": error(ours, stock),
    }  # fmt: skip


def main(folder: Path) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = load("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    scene = in_process.Scene(folder)
    facts["ltx"] = scene.ltx
    if scene.ltx is not None:
        # Not the decoded weights: on the grid of NVFP4, rounding would undo small changes.
        load("nvfp4_video.samples.synthetic").write(
            scene.path(SOURCE), SOURCE, scene.state, scene.config, scene.packed
        )
        facts |= in_process.run_topics((sums, end_to_end, mixed), (), scene, write_loras(scene))
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
