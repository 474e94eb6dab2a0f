# SPDX-License-Identifier: Apache-2.0
"""A LoRA on NVFP4 weights in a real ComfyUI: this pack's branch beside the packed weight against stock ComfyUI, which
adds it to the decoded weight and packs the sum again.

LTX-2.3 with random weights, cut to --layers blocks; the LoRA, random too and of --rank, is on every quantised Linear
and changes a weight by a fifth of its size. One process holds all models; ComfyUI is set up as in step.py.

1. Errors. Outputs of the quantised Linears of one block, against FP32 products with the unquantised or the decoded
   weight plus the LoRA. Final latents of 8 steps, against the host's own BF16 loader of the unquantised or the decoded
   weights with the LoRA merged: as part of what is expected, and as part of what the LoRA changes.
2. Times of a step without and with the LoRA: ours in `bf16` and, where it runs, `fp8` compute, and the stock NVFP4
   loader, side by side. Each repetition runs the rows in another order; a row's first step, which brings the weights to
   the GPU and applies the LoRA, is not counted but given as `first s`.
3. Adapters on the GPU, in bytes, and seconds to load the model with the LoRA, and again with another strength.

`--tiny --cpu --sizes 64x64 --frames 9` tries the script on a machine without a GPU.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import in_process
from step import relative_error, say, write_nvfp4

ROWS = {"ours": "ours, bf16", "fp8": "ours, fp8", "stock": "stock NVFP4"}
REFERENCES = ("unquantised", "decoded")
WITH = " + LoRA"
TOKENS = (1, 300, 6144)  # the fused kernel, the side branch, the merged weight
CHANGE = 0.2
STARTED = time.perf_counter()


def make_lora(layers: list[str], keys: Mapping[str, list[int]], rank: int, device: str) -> dict[str, Any]:
    """{tensor name as in LTX LoRAs: BF16 tensor in host memory} for all these layers, seeded by their names."""
    import torch

    tensors = {}
    for layer in layers:
        rows, cols = keys[f"{layer}.weight"]
        generator = torch.Generator(device).manual_seed(zlib.crc32(layer.encode()) ^ 1)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        down, up = draw(rank, cols) / cols**0.5, draw(rows, rank) * (0.5 * CHANGE / rank**0.5)
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down.bfloat16().cpu()
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = up.bfloat16().cpu()
    return tensors


def decoded(key: str, shape: list[int], device: str) -> Any:
    """A quantised layer's weight after one trip through NVFP4, in BF16."""
    from nvfp4_video.kernels import reference
    from nvfp4_video.samples.released import random_weight

    record = reference.quantize(random_weight(key, shape, device))
    return reference.dequantize(record)


def load_reference(name: str, keys: Mapping[str, list[int]], config: Mapping, layers: list[str], device: str) -> Any:
    """The host's own patcher of the unquantised or the decoded BF16 weights."""
    import comfy.sd
    from nvfp4_video.samples.released import random_weight

    packed = {f"{layer}.weight" for layer in layers} if name == "decoded" else set()
    make = {True: decoded, False: random_weight}
    state = {key: make[key in packed](key, shape, device).cpu() for key, shape in keys.items()}
    metadata = {"config": json.dumps({"transformer": config})}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)


def load_row(name: str, path: Path, options: Namespace) -> Any:
    """One row's patcher without the LoRA."""
    import comfy.sd

    if name == "stock":
        return comfy.sd.load_diffusion_model(str(path))
    from nvfp4_video.host.load import model as load

    patcher, report = load.load_model(str(path), "fp8" if name == "fp8" else "bf16", backend=options.backend)
    say(str(report))
    return patcher


def with_lora(patcher: Any, lora: Mapping[str, Any], strength: float = 1.0) -> Any:
    """What LoraLoaderModelOnly returns."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0.0)[0]


def change_strength(patcher: Any, lora: Mapping[str, Any]) -> dict[str, float]:
    """Seconds until a loaded model has the LoRA, has it at another strength, and has none."""
    import comfy.model_management
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    models = {"LoRA s": with_lora(patcher, lora), "another strength s": with_lora(patcher, lora, 0.5)}
    models["none s"] = patcher
    comfy.model_management.load_models_gpu([patcher])
    found = {}
    for name, model in models.items():
        synchronize()
        start = time.perf_counter()
        comfy.model_management.load_models_gpu([model])
        synchronize()
        found[name] = time.perf_counter() - start
    in_process.end_of_node()
    return found


def layer_errors(
    patchers: Mapping[str, Any], layers: list[str], keys: Mapping[str, list[int]], lora: Mapping[str, Any], device: str
) -> list[dict[str, Any]]:
    """Mean relative errors of one block's quantised Linears by row, number of tokens and reference."""
    import comfy.model_management
    import torch
    from nvfp4_video.samples.released import random_weight

    block = layers[len(layers) // 2].split(".")[1]
    chosen = [layer for layer in layers if layer.split(".")[1] == block]
    rows = []
    for name, patcher in patchers.items():
        comfy.model_management.load_models_gpu([patcher])
        dtype = patcher.model.get_dtype_inference()
        found: dict[tuple[int, str], list[float]] = {}
        for layer in chosen:
            key, module = f"{layer}.weight", patcher.model.diffusion_model.get_submodule(layer)
            up, down = (lora[f"diffusion_model.{layer}.lora_{part}.weight"].to(device).float() for part in "BA")
            bias = random_weight(f"{layer}.bias", keys[f"{layer}.bias"], device).float()
            weights = [make(key, keys[key], device).float() + up @ down for make in (random_weight, decoded)]
            generator = torch.Generator(device).manual_seed(1)
            for tokens in TOKENS:
                x = torch.randn(tokens, keys[key][1], generator=generator, device=device).to(dtype)
                out = module(x)
                for reference, weight in zip(REFERENCES, weights, strict=True):
                    wanted = torch.nn.functional.linear(x.float(), weight, bias)
                    found.setdefault((tokens, reference), []).append(relative_error(out, wanted))
        in_process.end_of_node()
        for tokens in TOKENS:
            means = {f"against {one}": statistics.mean(found[tokens, one]) for one in REFERENCES}
            rows.append({"row": ROWS[name] + WITH, "tokens": tokens, **means, "layers": len(chosen)})
        say(f"{ROWS[name]}: errors of {len(chosen)} Linears of block {block}")
    return rows


def latents_of(patcher: Any, config: Mapping, options: Namespace) -> Any:
    """Final latents of video and audio of 8 steps at the first size, flat in one FP32 tensor."""
    import torch

    streams = in_process.sample(patcher, options.sizes[0], config, options.frames, seed=1)[1]
    return torch.cat([stream.float().flatten().cpu() for stream in streams])


def latent_errors(patchers: Mapping[str, Any], expected: Mapping[str, tuple], config, options) -> list[dict[str, Any]]:
    """Final latents with the LoRA against the references: (without the LoRA, with it) by name."""
    rows = []
    for name, patcher in patchers.items():
        found, row = latents_of(patcher, config, options), {"row": ROWS[name] + WITH}
        for reference, (without, merged) in expected.items():
            row[f"against {reference}"] = relative_error(found, merged)
            row[f"{reference}, of the change"] = float((found - merged).norm() / (merged - without).norm())
        rows.append(row | {"finite": bool(found.isfinite().all())})
    return rows


def measure_size(size: str, patchers: Mapping[str, Any], config: Mapping, options: Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of all rows at one size, interleaved, with ratios."""
    names, steps, first = list(patchers), {name: [] for name in patchers}, {name: [] for name in patchers}
    for name in names:
        in_process.sample(patchers[name], size, config, options.frames, seed=0, steps=2)
    for rep in range(options.reps):
        if rep and time.perf_counter() - STARTED > options.limit:
            say(f"{options.limit:.0f} s are over: no further repetition")
            break
        for name in names[rep % len(names) :] + names[: rep % len(names)]:
            start = time.perf_counter()
            taken, _ = in_process.sample(patchers[name], size, config, options.frames, seed=1 + rep)
            first[name].append(time.perf_counter() - start - sum(taken))
            steps[name].append(statistics.median(taken))
        say(f"{size}: repetition {rep + 1}")
    medians = {name: statistics.median(taken) for name, taken in steps.items()}
    rows = []
    for name, taken in steps.items():
        row: dict[str, Any] = {"size": size, "row": name, "step s": medians[name]}
        row |= {"lowest": min(taken), "highest": max(taken), "first s": statistics.median(first[name])}
        row["repetitions"] = len(taken)
        if name.endswith(WITH):
            row["x without"] = medians[name] / medians[name.removesuffix(WITH)]
        if (stock := medians.get(ROWS["stock"] + WITH)) is not None:
            row["x stock + LoRA"] = medians[name] / stock
        rows.append(row)
    return rows


def adapter_bytes(patcher: Any) -> dict[str, Any]:
    """Branches of a loaded model of ours and their bytes on the GPU."""
    owns = [module.__dict__ for module in patcher.model.modules()]
    branches = [own["nvfp4_lora"] for own in owns if "nvfp4_lora" in own]
    refused = sum(bool(own.get("nvfp4_lora_refused")) for own in owns)
    found = {"branches": len(branches), "gb": sum(branch.nbytes for branch in branches) / 1e9, "refused": refused}
    return found | {"in 8 bits": sum(branch.packed for branch in branches)}


def run(options: Namespace, found: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Everything between writing the file and the tables; the result so far is saved after each stage."""
    import comfy.model_management
    import torch
    from nvfp4_video.host.compute.modes import obstacle
    from nvfp4_video.samples.released import recorded_model

    device = "cpu" if options.cpu else "cuda"
    keys, config = recorded_model(options.layers, options.tiny)
    path = scratch / "ltx23-nvfp4.safetensors"
    layers = write_nvfp4(path, keys, config, device)
    lora = make_lora(layers, keys, options.rank, device)
    say(f"wrote {path.stat().st_size / 1e9:.2f} GB, {config['num_layers']} blocks, {len(layers)} NVFP4 Linears")
    result: dict[str, Any] = {"facts": found, "blocks": config["num_layers"], "quantised": len(layers)}
    result |= {"rank": options.rank, "frames": options.frames, "change": CHANGE, "sizes": {}}
    if options.budget is not None:
        from nvfp4_video.host.compute import lora as branches

        branches.ADAPTER_BYTES = options.budget * 1e9
    expected = {}
    for name in REFERENCES if options.errors else ():
        patcher = load_reference(name, keys, config, layers, device)
        expected[name] = latents_of(patcher, config, options), latents_of(with_lora(patcher, lora), config, options)
        del patcher
        comfy.model_management.unload_all_models()
        say(f"latents of the {name} model, without and with the LoRA")
    target = torch.device(device)
    names = [name for name in options.rows if name != "fp8" or not obstacle("fp8", target)]
    plain = {name: load_row(name, path, options) for name in names}
    patched = {name: with_lora(patcher, lora) for name, patcher in plain.items()}
    dynamic = {name: bool(getattr(patcher, "is_dynamic", bool)()) for name, patcher in plain.items()}
    result |= {"DynamicVRAM": dynamic, "latents": [], "linears": [], "adapters": {}}
    if options.errors:
        result["latents"] = latent_errors(patched, expected, config, options)
        result["linears"] = layer_errors(patched, layers, keys, lora, device)
    for name in names:
        comfy.model_management.load_models_gpu([patched[name]])
        result["adapters"][name] = {} if name == "stock" else adapter_bytes(patched[name])
        result["adapters"][name] |= change_strength(plain[name], lora)
    in_process.save("lora", options, result)
    rows = {ROWS[name] + end: patchers[name] for name in names for end, patchers in (("", plain), (WITH, patched))}
    for size in options.sizes:
        result["sizes"][size] = measure_size(size, rows, config, options)
        in_process.save("lora", options, result)
    return result


def parse() -> Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, "ours,fp8,stock")
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks; default %(default)s")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA; default %(default)s")
    parser.add_argument("--budget", type=float, help="GB of adapters beyond which they are kept in 8 bits; default 2")
    parser.add_argument("--no-errors", dest="errors", action="store_false", help="leave out the first part")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 8 GB free; default %(default)s")
    parser.add_argument("--limit", type=float, default=150, help="start no repetition after so many seconds")
    return in_process.parse_options(parser, ROWS)


def main() -> int:
    """Returns 1 if latents of ours are not finite, or farther from the decoded model with the LoRA than stock's."""
    options = parse()
    found = in_process.begin(options)
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = run(options, found, Path(scratch))
    common.print_table(result["linears"])
    common.print_table(result["latents"])
    common.print_table([row for rows in result["sizes"].values() for row in rows], {"x without": ".3f"})
    common.print_table([{"row": ROWS[name], **found} for name, found in result["adapters"].items()])
    errors = {row["row"]: row["decoded, of the change"] for row in result["latents"]}
    ours, stock = errors.get(ROWS["ours"] + WITH), errors.get(ROWS["stock"] + WITH)
    return int(not all(row["finite"] for row in result["latents"]) or None not in (ours, stock) and ours > stock)


if __name__ == "__main__":
    sys.exit(main())
