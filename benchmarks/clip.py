# SPDX-License-Identifier: Apache-2.0
"""How long is a whole clip in one process: 8 distilled steps of joint audio and video, frames and sound in host memory?

usage: python benchmarks/clip.py [--comfyui DIR] [--rows ROW,...] [--sizes WxH,...] [--reps N] [--layers N] [--limit S]

Rows: stock ComfyUI with LTX-2.3 in BF16, in scaled FP8 and in NVFP4, its own VAEs; ours with `bf16` and `decode` =
exact; ours with `bf16` and attention by trial, with `int8` and with `fp8`, these with `decode` = fast; the audio VAE of
all of ours through our loader. Names and shapes are the released ones, the numbers random. The BF16 and FP8 weights go
to ComfyUI's loader from memory, where all blocks share those of one (67 GB of numbers would take longer than all the
rest; on the GPU each block has its own); NVFP4 and the VAEs come from files, which the rows share. The text
conditioning is given, no model is loaded or unloaded in a clip: what is timed is what a second prompt of a session
takes, all models being on the GPU. Each row's first clip, of 3 steps, is not counted; then rows take turns, in another
order each time. Nothing waits for the GPU between two steps, as in a ComfyUI that shows no previews; step.py times
steps. "frames" ends when all pixels lie in host memory. `--tiny --cpu` tries the script on a machine without a GPU.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import common
import in_process
import step
from step import say

ROWS = {
    "bf16": "stock BF16",
    "stock-fp8": "stock FP8",
    "stock": "stock NVFP4",
    "ours": "ours bf16, decode exact",
    "ours-attention": "ours bf16, attention auto, decode fast",
    "int8": "ours int8, decode fast",
    "fp8": "ours fp8, decode fast",
}
STOCK = ("bf16", "stock-fp8", "stock")
PARTS = ("sampling", "frames", "sound")
FIRST_STEPS = 3  # of a clip that is not counted: weights move, kernels compile, graphs are captured
_BLOCK = re.compile(r"^transformer_blocks\.\d+\.")


def build(keys: Mapping[str, list[int]], layers: Collection[str], device: str, shared: dict) -> dict[str, Any]:
    """The model's tensors on the CPU, the weights of ``layers`` in scaled FP8 as the host's own files have them.

    ``shared``: what is made for one block and one row, for all others.
    """
    from nvfp4_video.samples.released import random_weight
    from nvfp4_video.samples.synthetic import fp8_tensors

    state: dict[str, Any] = {}
    for key, shape in keys.items():
        layer = key.removesuffix(".weight")
        packed = layer != key and layer in layers
        kind = (_BLOCK.sub("a block.", key), *shape, packed)
        if kind not in shared:
            tensor = random_weight(key, shape, device)
            parts = fp8_tensors(tensor) if packed else {"": tensor}
            shared[kind] = {suffix: part.cpu() for suffix, part in parts.items()}
        state |= {f"{layer}.{suffix}" if suffix else key: part for suffix, part in shared[kind].items()}
    return state


def write_files(folder: Path, keys: Mapping, config: Mapping, options: Namespace) -> dict[str, Any]:
    """-> {"nvfp4", "video", "audio": files, "layers": the quantised ones, "bf16", "stock-fp8": tensors on the CPU}."""
    import torch
    from nvfp4_video.samples import synthetic
    from nvfp4_video.samples.released import write_vae

    device = "cpu" if options.cpu else "cuda"
    made: dict[str, Any] = {part: folder / f"{part}.safetensors" for part in ("nvfp4", "video", "audio")}
    layers = {*synthetic.quantised_layers({k: torch.empty(s, device="meta") for k, s in keys.items()}, config)}
    made["layers"] = sorted(step.write_nvfp4(made["nvfp4"], keys, config, device))
    say(f"NVFP4: {made['nvfp4'].stat().st_size / 1e9:.2f} GB, {len(layers)} Linears of {config['num_layers']} blocks")
    for part in ("video", "audio"):
        write_vae(made[part], f"{part}_vae", options.tiny, device)
    shared: dict = {}
    for row, packed in (("bf16", ()), ("stock-fp8", layers)):
        if row in options.rows:
            made[row] = build(keys, packed, device, shared)
            say(f"{ROWS[row]}: {sum(tensor.nbytes for tensor in made[row].values()) / 1e9:.2f} GB")
    step.empty_cache()
    return made


def load_model(row: str, made: dict[str, Any], config: Mapping, options: Namespace) -> tuple[Any, str]:
    """-> the host's ModelPatcher of a row, what our loader reports."""
    import comfy.sd

    if row in made:
        metadata = {"config": json.dumps({"transformer": config})}
        state, off = made.pop(row), options.no_dynamic
        return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, disable_dynamic=off), ""
    if row == "stock":
        return comfy.sd.load_diffusion_model(str(made["nvfp4"]), disable_dynamic=options.no_dynamic), ""
    from nvfp4_video.host.compute.modes import EIGHT_BITS
    from nvfp4_video.host.load import model

    compute = row if row in EIGHT_BITS else "bf16"
    more = {"backend": options.backend, "disable_dynamic": options.no_dynamic}
    more |= {"attention": "auto"} if row == "ours-attention" else {}
    patcher, report = model.load_model(str(made["nvfp4"]), compute, **more)
    return patcher, str(report)


@functools.cache
def load_vae(path: Path, kind: str, decode: str) -> Any:
    """``decode``: "stock", as ComfyUI's nodes load a VAE, else that of our loader; rows share what is equal."""
    import comfy.sd
    import comfy.utils

    if decode != "stock":
        from nvfp4_video.host.load.vae import load_vae

        vae, report = load_vae(str(path), kind, decode=decode)
        say(f"{kind} VAE: {report.decode}")
        return vae
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    if kind == "audio":  # as LTXVAudioVAELoader does
        names = {"audio_vae.": "autoencoder.", "vocoder.": "vocoder."}
        state = comfy.utils.state_dict_prefix_replace(state, names, filter_keys=True)
    return comfy.sd.VAE(sd=state, metadata=metadata)


def render(
    models: tuple, size: str, config: Mapping, options: Namespace, seed: int = 0, steps: int = 8
) -> dict[str, Any]:
    """One clip -> seconds of its parts, latents, shapes."""
    import torch
    from nvfp4_video.checkpoint.identify.signatures import context_width
    from nvfp4_video.host.bench.session import decode_sound

    patcher, video, audio = models
    text = torch.randn(1, 256, context_width(config), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"weights_gb": patcher.loaded_size() / 1e9}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        in_process.end_of_node()
        _wait()
        found[part] = time.perf_counter() - start
        return result

    _wait()
    clip = (patcher, size, config, options.frames, seed, steps)
    _, latents = timed("sampling", lambda: in_process.sample(*clip, text=text, timed=False))
    pixels = timed("frames", lambda: video.decode(latents[0]))
    wave, rate = timed("sound", lambda: decode_sound(audio, latents[1]))
    if pixels.device.type != "cpu":
        raise AssertionError(f"the frames are on {pixels.device}, not in host memory")
    found |= {"clip": sum(found[part] for part in PARTS), "latents": latents}
    return found | {"shapes": f"frames {tuple(pixels.shape)}, sound {tuple(wave.shape)} at {rate} Hz"}


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(latents: Mapping[str, list]) -> list[str]:
    """Latents of one repetition: ours `bf16` against stock NVFP4 by bits, the others by relative error, in words."""
    import torch

    broken = [ROWS[row] for row, made in latents.items() if not all(bool(one.isfinite().all()) for one in made)]
    found = [f"NOT FINITE: {', '.join(broken)}"] if broken else []
    if {"stock", "ours"} <= latents.keys():
        equal = all(map(torch.equal, latents["stock"], latents["ours"]))
        found.append(f"latents of {ROWS['ours']} and {ROWS['stock']}: {'the same bits' if equal else 'DIFFERENT'}")
    base = next((row for row in ("ours", "ours-attention") if row in latents), "")
    for row in latents.keys() - {*STOCK, base} if base else ():
        video, audio = (step.relative_error(a, b) for a, b in zip(latents[row], latents[base], strict=True))
        found.append(f"latents of {ROWS[row]} against {ROWS[base]}: video {video:.2e}, audio {audio:.2e}")
    return found


def table(clips: Mapping[str, list[dict[str, Any]]], size: str) -> list[dict[str, Any]]:
    """Medians of the counted clips and their ratios to the stock rows."""
    rows = []
    whole = {row: statistics.median(clip["clip"] for clip in taken) for row, taken in clips.items() if taken}
    for row, seconds in whole.items():
        taken = clips[row]
        found: dict[str, Any] = {"size": size, "row": ROWS[row], "clip s": seconds, "n": len(taken)}
        found |= {"low": min(clip["clip"] for clip in taken), "high": max(clip["clip"] for clip in taken)}
        for part in PARTS:
            found[f"{part} s"] = statistics.median(clip[part] for clip in taken)
        found |= {f"of {ROWS[base]}": seconds / whole[base] for base in STOCK if base in whole}
        found["weights GB"] = min(clip["weights_gb"] for clip in taken)
        rows.append(found)
    return rows


def measure(
    models: Mapping[str, tuple], size: str, config: Mapping, options: Namespace, keep: Callable[[dict], None]
) -> None:
    """All rows at one size, taking turns; ``keep`` gets what is there after each round."""
    clips: dict[str, list[dict[str, Any]]] = {row: [] for row in models}
    found: dict[str, Any] = {"latents": []}
    names = list(models)
    for rep in range(options.reps):
        if rep and time.perf_counter() - step.STARTED > options.limit:
            say(f"{options.limit:.0f} s are over: no further repetition")
            break
        latents = {}
        for row in names[rep % len(names) :] + names[: rep % len(names)]:
            made = render(models[row], size, config, options, seed=1 + rep)
            latents[row], found["shapes"] = made.pop("latents"), made.pop("shapes")
            clips[row].append(made)
            say(f"{size}, clip {rep + 1}, {ROWS[row]}: {told(made)}")
        found["latents"] += compare(latents)
        say("; ".join(compare(latents)))
        found["rows"] = table(clips, size)
        keep(found)


def told(made: Mapping[str, Any]) -> str:
    """Times of a clip and its parts in words."""
    return f"{made['clip']:.3f} s: " + ", ".join(f"{part} {made[part]:.3f} s" for part in PARTS)


def run(options: Namespace, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything between the weights and the tables; what is there is saved after each size."""
    from nvfp4_video.host.bench.meter import memory
    from nvfp4_video.samples.released import recorded_model

    keys, config = recorded_model(options.layers, options.tiny)
    made = write_files(folder, keys, config, options)
    result: dict[str, Any] = {"facts": facts, "flags": options.flags, "blocks": config["num_layers"]}
    result |= {"frames": options.frames, "quantised": len(made["layers"]), "reports": {}, "sizes": {}}
    models: dict[str, tuple] = {}

    def keep(size: str, found: dict[str, Any]) -> None:
        result["sizes"][size] = found
        in_process.save("clip", options, result)

    for row in _possible(options.rows):
        patcher, report = load_model(row, made, config, options)
        decode = "stock" if row in STOCK else "exact" if row == "ours" else "fast"
        vaes = [load_vae(made["video"], "video", decode), load_vae(made["audio"], "audio", _sound(decode))]
        models[row], result["reports"][ROWS[row]] = (patcher, *vaes), report
        first = render(models[row], options.sizes[0], config, options, steps=FIRST_STEPS)
        if getattr(patcher, "is_dynamic", bool)() and hasattr(patcher, "partially_unload_ram"):
            _wait()
            patcher.partially_unload_ram(1e32)  # step.py says why
        used = ", ".join(f"{kind} {value:.1f}" for kind, value in memory().items())
        say(f"{ROWS[row]}: {patcher.loaded_size() / 1e9:.2f} GB of weights on the GPU; GB in use: {used}")
        say(f"  first clip, not counted, {FIRST_STEPS} steps: {told(first)}")
    for number, size in enumerate(options.sizes):
        for row in models if number else ():
            render(models[row], size, config, options, steps=FIRST_STEPS)
        measure(models, size, config, options, functools.partial(keep, size))
    return result


def _sound(decode: str) -> str:
    """How the audio VAE is loaded beside a video VAE with ``decode``; it has no fast decoder."""
    return "stock" if decode == "stock" else "exact"


def _possible(rows: Collection[str]) -> list[str]:
    """The rows that can run on this device; says which cannot, and why."""
    import comfy.model_management
    from nvfp4_video.host.compute.modes import EIGHT_BITS, obstacle

    device, found = comfy.model_management.get_torch_device(), list(rows)
    for row in set(EIGHT_BITS) & set(rows):
        if reason := obstacle(row, device):
            say(f"{ROWS[row]}: not run, {reason}")
            found.remove(row)
    return found


def main() -> int:
    """Returns 1 if latents that must be equal differ on a GPU."""
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, ",".join(ROWS))
    parser.set_defaults(sizes=["768x512"])
    parser.add_argument("--layers", type=int, help="transformer blocks; default all (48, with --tiny 6)")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 20 GB free; default %(default)s")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no repetition after so many seconds")
    options = in_process.parse_options(parser, ROWS)
    facts = in_process.begin(options)
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = run(options, facts, Path(folder))
    rows = [row for found in result["sizes"].values() for row in found["rows"]]
    common.print_table(rows, {name: ".3f" for row in rows for name in row} | {"weights GB": ".1f"})
    lines = [line for found in result["sizes"].values() for line in found["latents"]]
    print("\n".join(lines))
    return int(any("DIFFERENT" in line for line in lines) and not options.cpu)


if __name__ == "__main__":
    sys.exit(main())
