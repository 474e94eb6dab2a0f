# SPDX-License-Identifier: Apache-2.0
"""What calibrating costs on a GPU: by how much a step gets longer while inputs are counted, and GPTQ's time and memory.

1. GPTQ's result on the GPU beside the CPU's, on a small layer: held-out error, share of equal bytes.
2. A step of LTX-2.3 in BF16 in a real ComfyUI, random weights in the released shapes, as it is and with the wrapper of
   NVFP4 Calibrate at several block widths, rows taking turns; memory of the sums; whether latents keep their bits.
3. GPTQ as ``quantize --quality calibrated`` runs it (search, trials of dampings, the whole weight, judgement) on every
   shape that the recipe packs; times, GPU memory above weight and sums, and this process's own pages above those that
   it had before part 3. Memory is polled in three runs (one with full matrices, which is then timed, too), time is
   that of the next. From the number of layers of each shape follows the time of the whole model.

`--tiny --cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import in_process
from calibration import Rows

STARTED = time.perf_counter()


class Pieces(Rows):
    """A matrix in memory, in the pieces in which the quantiser takes one from a file."""

    step = 2**25

    def __iter__(self):
        rows = max(self.step // self.shape[1] // 128, 1) * 128
        for start in range(0, self.shape[0], rows):
            yield start, self.values[start : start + rows]


def gathered(columns: int, width: int, tokens: int, device: str) -> Any:
    """Moments of inputs of which some directions are louder than others, as those of trained models are."""
    import torch
    from nvfp4_video.measure.moments import Moments

    generator = torch.Generator(device).manual_seed(columns)
    found = Moments.zeros(columns, width, device)
    mix = torch.randn(64, columns, generator=generator, device=device)
    for call in range(4):
        part = torch.randn(tokens // 4, columns, generator=generator, device=device)
        part += torch.randn(tokens // 4, 64, generator=generator, device=device) @ mix / 4
        found.add(part, call)
    return found


def packed(weight: Any, moments: Any) -> tuple[Any, dict]:
    """-> PackedWeight by GPTQ, what the packer reports."""
    from nvfp4_video.checkpoint.write.pack import Packer
    from nvfp4_video.kernels.format import PackedWeight

    packer = Packer(SimpleNamespace(moments=lambda name, device: moments), "gptq", weight.device)
    return PackedWeight(*packer.pack(Pieces(weight)), tuple(weight.shape)), packer.report()["gptq"]


def agreement(device: str) -> dict[str, float]:
    """GPTQ on a device and on the CPU of one small layer."""
    import torch
    from nvfp4_video.kernels import gptq, reference

    weight, moments = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)), gathered(512, 128, 4096, "cpu")
    made, errors = [], []
    for place in ("cpu", device):
        known = SimpleNamespace(gram=moments.gram.to(place), held_out=moments.held_out.to(place))
        record, told = packed(weight.to(place), known)
        made.append(record)
        off = reference.dequantize(record, torch.float32) - weight
        errors.append(float(gptq.output_error(off, moments.held_out)))
    equal = float((made[0].packed == made[1].packed).float().mean())
    return {"error over the CPU's": errors[1] / errors[0], "equal bytes": equal, "taken": told["taken"]}


def budget_of(columns: list[int], width: int) -> int:
    """Bytes with which blocks get this width."""
    from nvfp4_video.measure.moments import moment_bytes

    return sum(moment_bytes(count, width) for count in columns)


def collecting(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The rows of part 2."""
    import comfy.sd
    import torch
    from comfy import patcher_extension
    from nvfp4_video.checkpoint.file.header import read_header
    from nvfp4_video.host.compute import calibrate
    from nvfp4_video.samples.released import recorded_model, write_model

    keys, config = recorded_model(options.layers, options.tiny)
    source = scratch / "source.safetensors"
    write_model(source, keys, config, "cpu" if options.cpu else "cuda")
    say(f"wrote {source.stat().st_size / 1e9:.2f} GB, {config['num_layers']} blocks")
    patcher = comfy.sd.load_diffusion_model(str(source))
    _, layers, total = calibrate.watched_layers(patcher.model.diffusion_model, read_header(source), "LTX-2.3")
    columns = calibrate.columns_of(layers)
    rows: dict[str, Any] = {"as it is": patcher}
    for width in options.widths:
        rows[f"blocks of {width}"] = clone = patcher.clone()
        target = str(scratch / f"c{width}.safetensors")
        say(calibrate.collect(clone, str(source), target, budget_of(columns, width), False, "LTX-2.3"))
        if not options.save:
            clone.callbacks[patcher_extension.CallbacksMP.ON_CLEANUP].pop(calibrate.KEY)
    size, found = options.sizes[0], []
    times: dict[str, list[float]] = {name: [] for name in rows}
    plain, sums, equal = None, {}, dict.fromkeys(rows, True)
    for name in rows:
        before = _allocated()
        in_process.sample(rows[name], size, config, options.frames, seed=0, steps=2)
        sums[name] = _allocated() - before
        say(f"{name}: warm")
    for rep in range(options.reps):
        for name in list(rows)[rep % len(rows) :] + list(rows)[: rep % len(rows)]:
            taken, latents = in_process.sample(rows[name], size, config, options.frames, seed=1, steps=options.steps)
            times[name] += taken
            plain = latents if plain is None else plain
            equal[name] &= all(map(torch.equal, plain, latents))
    base = statistics.median(times["as it is"])
    for name, taken in times.items():
        median = statistics.median(taken)
        row = {"collecting": name, "step s": median, "lowest": min(taken), "highest": max(taken), "x": median / base}
        found.append(row | {"Linears": len(layers), "sums GB": sums[name] / 1e9})
        found[-1] |= {"steps": len(taken), "latents equal": equal[name]}
    del rows, patcher
    return found


def _allocated() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def rounding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of part 3."""
    import torch
    from nvfp4_video.checkpoint.write.recipes import RECIPES, select
    from nvfp4_video.host.bench.meter import PeakMemory
    from nvfp4_video.samples.released import recorded_model

    keys, _ = recorded_model(None, options.tiny)
    matrices = {key: tuple(shape) for key, shape in keys.items() if key.endswith(".weight") and len(shape) > 1}
    shapes = {key.removesuffix(".weight"): shape for key, shape in matrices.items()}
    counts = Counter(shapes[layer] for layer in select(RECIPES["LTX-2.3"], shapes).quantized)
    device, found = "cpu" if options.cpu else "cuda", []
    cases = [(shape, options.gptq_width) for shape in counts]
    cases += [(shape, shape[1]) for shape in sorted(counts, key=lambda s: s[1]) if options.full]
    with PeakMemory(poll=False) as start:
        pass
    for shape, width in cases:
        if time.perf_counter() - STARTED > options.limit:
            say(f"{options.limit:.0f} s are over: {shape} with blocks of {width} was not run")
            continue
        weight = torch.randn(shape, device=device) / shape[1] ** 0.5
        moments = gathered(shape[1], width, 8192, device)
        before, full = _allocated() / 1e9, width == shape[1]
        with PeakMemory() as peak:
            for _ in range(1 if full else 3):
                seconds, report = timed(weight, moments)
        if not full:
            seconds, report = timed(weight, moments)
        row = {"shape": "x".join(map(str, shape)), "width": width, "layers": counts[shape], "s a layer": seconds}
        row |= {"s all": seconds * counts[shape], "peak GB": max(peak.torch - before, 0.0)}
        row |= {"with weight and sums": peak.torch, "host GB": peak.host - start.host}
        found.append(row | {"held-out error": report["error"]})
        say(str(found[-1]))
        del weight, moments
    return found


def timed(weight: Any, moments: Any) -> tuple[float, dict]:
    """-> seconds of packing a weight by GPTQ, what the packer reports."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    report = packed(weight, moments)[1]
    return time.perf_counter() - started, report


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def main() -> int:
    """Returns 1 if GPTQ on the GPU is further off than on the CPU by more than a hundredth."""
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, "")
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks of the step; default %(default)s")
    parser.add_argument("--widths", type=lambda text: [int(n) for n in text.split(",")], default=[16, 64, 128])
    parser.add_argument("--steps", type=int, default=4, help="steps of a sampling; default %(default)s")
    parser.add_argument("--save", action="store_true", help="also write the calibration files, as the node does")
    parser.add_argument("--gptq-width", type=int, default=128, help="blocks of part 3; default %(default)s")
    parser.add_argument("--full", action="store_true", help="in part 3 also full matrices")
    parser.add_argument("--only", choices=("collecting", "rounding"), help="part 1 and this one")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 10 GB free; default %(default)s")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = parser.parse_args()
    found = in_process.begin(options)
    import torch

    result: dict[str, Any] = {"facts": found, "blocks": options.layers, "size": options.sizes[0]}
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result["agreement"] = agreement("cpu" if options.cpu else "cuda")
        say(str(result["agreement"]))
        if options.only != "rounding":
            result["collecting"] = collecting(options, Path(scratch))
            in_process.save("calibrate", options, result)
            common.print_table(result["collecting"], {"x": ".3f", "sums GB": ".2f"})
        if options.only != "collecting":
            result["rounding"] = rounding(options)
            in_process.save("calibrate", options, result)
            common.print_table(result["rounding"], {"s all": ".1f"})
            total = sum(row["s all"] for row in result["rounding"] if row["width"] == options.gptq_width)
            print(f"the whole model with blocks of {options.gptq_width}: {total / 60:.1f} min of GPTQ")
    return int(abs(result["agreement"]["error over the CPU's"] - 1) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
