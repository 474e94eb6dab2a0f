# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the blocks in a real ComfyUI: are the latents those without, what do they bring, what do they take?

LTX-2.3 with random weights, cut to --layers blocks: 8 for the cases, 48 for times and memory (`--cases plain`). Rows
are stock BF16, stock NVFP4 and this pack in `bf16` and `fp8`; this pack's are sampled with graphs and without, the
very same model (`in_process.without_graphs`). Cases, 8 distilled steps of euler each:

* plain     cfg 1; `bf16` must also equal stock NVFP4 bit for bit
* lora      a LoRA on every quantised Linear, added after a first run
* bypass    the same by ComfyUI's own bypass loader, which replaces the layers' `forward`
* hooks     the same as a hook of the positive conditioning
* cfg       cfg 3, two conditionings of different frame rates, which ComfyUI therefore does not join in one batch
* two       the same with different hooks
* override  an `optimized_attention_override` that appears in the middle of the sampling

With hooks a ComfyUI with DynamicVRAM samples a second model without it, loaded for that, whose blocks are then counted.

For each: are the latents with graphs those without; blocks captured, replayed, run by themselves; breaks and rogues of
ComfyUI's compiler; free memory of the card before, at the least at the end of a step, and after; seconds of every step,
the capturing ones included. `--waiting` has blocks captured without the GPU having been seen waiting for the CPU, so
that large clips and fast CPUs test them too. `--compiler off` starts a ComfyUI that has one with
--disable-comfy-compiler. `--two-gpus` compares a model on the second GPU, placed there by ComfyUI's SelectModelDevice
or split by MultiGPU CFG Split, with one on the first. `--tiny --cpu --sizes 64x64 --frames 9` tries it without a GPU.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import statistics
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import in_process
from lora import make_lora, with_lora
from step import ROWS, load_row, relative_error, say, write_nvfp4

CASES = ("plain", "lora", "bypass", "hooks", "cfg", "two", "override")
OURS = ("ours", "fp8")
COUNTED = ("captured", "recaptured", "replayed", "eager")
CFG = {"cfg": 3.0, "two": 3.0}
COMPILER_SWITCH = "--disable-comfy-compiler"
GIGABYTES = dict.fromkeys(("free before GB", "free least GB", "free after GB"), ".2f")
LATE = 0.95  # sigma from which on the override stands in the options


class Everything(set):
    """Contains whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


def sample(patcher: Any, config: Mapping, options: Namespace, cfg: float = 1.0, hooks: tuple = (None, None)) -> dict:
    """One sampling -> its latents, the seconds of all its steps, free GPU memory, what graphs and compiler counted."""
    import comfy.hooks
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers
    import torch
    from nvfp4_video.checkpoint.identify.signatures import context_width
    from nvfp4_video.host.compute import block_graphs

    shapes = in_process.latent_shapes(options.size, options.frames)
    generator = torch.Generator().manual_seed(1)
    nested = comfy.nested_tensor.NestedTensor
    noise = nested([torch.randn(shape, generator=generator) for shape in shapes])
    conditionings = []
    for place, hook in enumerate(hooks):
        text = torch.randn(1, 256, context_width(config), generator=generator)
        one = [[text, {"frame_rate": in_process.FRAME_RATE - place}]]
        conditionings.append(one if hook is None else comfy.hooks.set_hooks_for_conditioning(one, hook))
    ends, free = [], [free_bytes(patcher)]

    def stamp(*_: Any) -> None:
        synchronize(patcher)
        ends.append(time.perf_counter())
        free.append(free_bytes(patcher))

    sampler = comfy.samplers.sampler_object("euler")
    euler = sampler.sampler_function
    sampled = [patcher]
    counted: Counter[str] = Counter()

    def begin(model: Any, *given: Any, **named: Any) -> Any:
        sampled[0] = sampled_patcher(model)
        if options.waiting:
            block_graphs.blocks_of(sampled[0].model.diffusion_model).waits_for_cpu = Everything()
        counted.update(graph_counts(sampled[0]))
        stamp()
        return euler(model, *given, **named)

    sampler.sampler_function = begin
    result = comfy.sample.sample_custom(
        patcher, noise, cfg, sampler, torch.tensor(in_process.SIGMAS), *conditionings,
        nested([torch.zeros(shape) for shape in shapes]), callback=stamp, disable_pbar=True, seed=1,
    )  # fmt: skip
    latents = [stream.float().cpu() for stream in result.unbind()]
    compiler = compiler_counts()
    in_process.end_of_node()
    synchronize(patcher)
    gc.collect()
    after = graph_counts(sampled[0])
    steps = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    found: dict[str, Any] = {name: after[name] - counted[name] for name in COUNTED}
    found |= compiler | {"steps s": steps, "all steps s": sum(steps), "steady s": statistics.median(steps[-4:])}
    found |= {"free before GB": free[0], "free least GB": min(free[1:]), "free after GB": free_bytes(patcher)}
    found |= {"sampled": "as loaded" if sampled[0].model is patcher.model else "its own", "digest": digest(latents)}
    return found | {"finite": all(bool(stream.isfinite().all()) for stream in latents), "latents": latents}


def sampled_patcher(model: Any) -> Any:
    """What a sampler is given as its model -> the patcher that is sampled.

    For weight hooks the host exchanges a patcher under DynamicVRAM for one without it, which has a model of its own.
    """
    return model.inner_model.model_patcher


def digest(latents: list) -> str:
    """Of all bits of the latents."""
    return hashlib.sha256(b"".join(stream.contiguous().numpy().tobytes() for stream in latents)).hexdigest()[:16]


def synchronize(patcher: Any) -> None:
    import torch

    if patcher.load_device.type == "cuda":
        torch.cuda.synchronize(patcher.load_device)


def free_bytes(patcher: Any) -> float:
    """GB of the card that the driver calls free."""
    import torch

    return torch.cuda.mem_get_info(patcher.load_device)[0] / 1e9 if patcher.load_device.type == "cuda" else 0.0


def graph_counts(patcher: Any) -> Mapping[str, int]:
    """What the pack has counted of a model's blocks."""
    from nvfp4_video.host.compute import block_graphs

    model = patcher.model.diffusion_model
    return block_graphs.blocks_of(model).counts.copy() if hasattr(model, "transformer_blocks") else {}


def compiler_counts() -> dict[str, int]:
    """Breaks and rogues of ComfyUI's compiler since the last node; nothing on a host that has none."""
    prefetch = in_process.session.prefetch()
    if not hasattr(prefetch, "MALLOC_GRAPH_BREAKS"):
        return {}
    prefetch.cleanup_malloc_graph()  # only then are the rogues counted
    return {"breaks": prefetch.MALLOC_GRAPH_BREAKS, "rogues": prefetch.MALLOC_GRAPH_ROGUES}


def with_late_override(patcher: Any) -> Any:
    """A clone whose attention changes in the middle of a sampling, by a wrapper that comes after the pack's."""
    from comfy.patcher_extension import WrappersMP

    def halved(function: Callable, *given: Any, **named: Any) -> Any:
        return function(*given, **named) * 0.5

    def later(executor: Any, *given: Any, **named: Any) -> Any:
        for one in (*given, *named.values()):
            if isinstance(one, dict) and "sample_sigmas" in one and float(one["sigmas"].max()) < LATE:
                one["optimized_attention_override"] = halved
        return executor(*given, **named)

    patcher = patcher.clone()
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "late", later)
    return patcher


def prepare(case: str, patcher: Any, loras: list) -> tuple[Any, dict]:
    """The patcher and further arguments of ``sample`` for a case."""
    import comfy.hooks
    import comfy.sd

    if case == "lora":
        return with_lora(patcher, loras[0]), {}
    if case == "bypass":
        return comfy.sd.load_bypass_lora_for_models(patcher, None, loras[0], 1.0, 0.0)[0], {}
    if case == "override":
        return with_late_override(patcher), {}
    further: dict[str, Any] = {"cfg": CFG.get(case, 1.0)}
    if case in ("hooks", "two"):
        hooks = [comfy.hooks.create_hook_lora(lora, 1.0, 0.0) for lora in loras]
        further["hooks"] = hooks[0], hooks[1] if case == "two" else None
    return patcher, further


def without_graphs(patcher: Any) -> Any:
    """A clone of a patcher whose blocks run themselves."""
    patcher = patcher.clone()
    in_process.without_graphs(patcher)
    return patcher


def of_case(case: str, patcher: Any, loras: list, config: Mapping, options: Namespace) -> dict[str, Any]:
    """One sampling of a case; what stopped it, if something did, so that the other cases are still measured."""
    try:
        if case == "lora":
            sample(patcher, config, options)  # the run that it is added after
        changed, further = prepare(case, patcher, loras)
        return sample(changed, config, options, **further)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def compared(one: dict, other: Mapping) -> dict:
    """One sampling without its latents, and with what they are against those of another."""
    if "failed" in one or "failed" in other:
        return one
    error = max(relative_error(*pair) for pair in zip(one.pop("latents"), other["latents"], strict=True))
    return one | {"equal": one["digest"] == other["digest"], "error": error}


def run_cases(row: str, patcher: Any, loras: list, config: Mapping, options: Namespace) -> Iterator[list[dict]]:
    """All cases of one row at one size, one after the other; ours without and with graphs, in turn."""
    labels = {"row": ROWS[row], "size": options.size}
    if row not in OURS:
        sample(patcher, config, options)  # weights to the GPU, kernels loaded
        for _ in range(options.reps):
            one = sample(patcher, config, options)
            del one["latents"]
            yield [{**labels, "case": "plain", "graphs": "", **one}]
        say(f"{ROWS[row]}: {told(one)}")
        return
    ways = {"off": without_graphs(patcher), "on": patcher}
    ways = {way: ways[way] for way in options.graphs}
    sample(next(iter(ways.values())), config, options)
    for case in options.cases:
        found = []
        for rep in range(options.reps if case == "plain" else 1):
            both = {way: of_case(case, ways[way], loras, config, options) for way in list(ways)[:: (1, -1)[rep % 2]]}
            if "on" in both and "off" in both:
                both["on"] = compared(both["on"], both["off"])
            for one in both.values():
                one.pop("latents", None)
            found += [{**labels, "case": case, "graphs": way, **one} for way, one in both.items()]
        say(f"{ROWS[row]}, {case}: {told(found[-1])}")
        yield found


def short(one: Mapping) -> dict:
    """The columns of the table."""
    names = ("row", "case", "size", "graphs", "sampled", "failed", "equal", *COUNTED, "breaks", "rogues")
    names += ("all steps s", "steady s", "free before GB", "free least GB", "free after GB")
    return {name: one[name] for name in names if name in one}


def told(one: Mapping) -> str:
    """A sampling in a line."""
    if "failed" in one:
        return f"failed, {one['failed']}"
    equal = f"equal {one['equal']} (error {one['error']:.1e}), " if "equal" in one else ""
    counted = ", ".join(f"{one[name]} {name}" for name in (*COUNTED, "breaks", "rogues") if name in one)
    return f"{equal}{counted}, {one['all steps s']:.3f} s in all, {one['steady s']:.4f} s a step"


def two_gpus(path: Path, loras: list, config: Mapping, options: Namespace) -> Iterator[dict]:
    """Models that ComfyUI's own nodes put on the second GPU, or split over both, against the first GPU alone."""
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode, SelectModelDeviceNode

    second = "cpu" if options.cpu else "gpu:1"
    places = {
        "SelectModelDevice": lambda model: SelectModelDeviceNode.execute(model, second).args[0],
        "MultiGPU CFG Split": lambda model: MultiGPUCFGSplitNode.execute(model, 2).args[0],
    }
    for row in (row for row in options.rows if row in OURS):
        load = functools.partial(load_row, row, path, {}, config, options)
        for case in (case for case in options.cases if case in ("plain", "lora", *CFG)):
            right = of_case(case, without_graphs(load()), loras, config, options)
            for name, place in places.items():
                if name == "MultiGPU CFG Split" and case not in CFG:
                    continue
                for graphs in options.graphs:
                    model = place(load())
                    model = without_graphs(model) if graphs == "off" else model
                    one = {"row": f"{ROWS[row]}, {name}", "case": case, "graphs": graphs, "size": options.size}
                    one |= compared(of_case(case, model, loras, config, options), right)
                    one["device"] = str(model.load_device)
                    say(f"{one['row']}, {case}, graphs {graphs}, on {model.load_device}: {told(one)}")
                    yield one
                    end_of_models()


def end_of_models() -> None:
    import comfy.model_management

    gc.collect()
    comfy.model_management.unload_all_models()


def write(result: dict, options: Namespace) -> None:
    if not options.cpu or options.out:
        common.save("graphs", options.out, result)


def run(options: Namespace, found: dict, scratch: Path) -> dict[str, Any]:
    """Everything between writing the file and the table; the result so far is saved after each case."""
    import torch
    from nvfp4_video.host.compute.modes import obstacle
    from nvfp4_video.samples.released import recorded_model

    device = "cpu" if options.cpu else "cuda"
    keys, config = recorded_model(options.layers, options.tiny)
    path = scratch / "ltx23-nvfp4.safetensors"
    layers = write_nvfp4(path, keys, config, device)
    loras = [make_lora(layers, keys, rank, device) for rank in (options.rank, 2 * options.rank)]
    say(f"wrote {path.stat().st_size / 1e9:.2f} GB, {config['num_layers']} blocks, {len(layers)} NVFP4 Linears")
    result: dict[str, Any] = {"facts": found, "blocks": config["num_layers"], "frames": options.frames, "rows": []}
    result |= {"waiting": options.waiting, "compiler": options.compiler, "ranks": [options.rank, 2 * options.rank]}
    if options.two_gpus:
        for one in two_gpus(path, loras, config, options):
            result["rows"].append(one)
            write(result, options)
        return result
    digests = {}
    for row in options.rows:
        if row in OURS and (reason := obstacle("fp8" if row == "fp8" else "bf16", torch.device(device))):
            say(f"{ROWS[row]} is left out: {reason}")
            continue
        patcher = load_row(row, path, keys, config, options)
        for size in options.sizes:
            options.size = size
            for rows in run_cases(row, patcher, loras, config, options):
                result["rows"] += rows
                write(result, options)
                plain = [one["digest"] for one in rows if one["case"] == "plain" and "digest" in one]
                digests |= {(row, size): plain[-1]} if plain else {}
        del patcher
        end_of_models()
    result["bf16 equals stock NVFP4"] = {
        size: digests["ours", size] == digests["stock", size]
        for size in options.sizes
        if {("ours", size), ("stock", size)} <= digests.keys()
    }
    write(result, options)
    return result


def parse() -> Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    in_process.add_options(parser, "bf16,stock,ours,fp8")
    parser.set_defaults(sizes=["768x512"], reps=1)
    parser.add_argument("--cases", default=",".join(CASES), help="default %(default)s")
    parser.add_argument("--graphs", default="off,on", help="without and with; default %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks; default %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="of the first LoRA, the second has twice that")
    parser.add_argument("--compiler", choices=("on", "off"), default="on", help="of the host; default %(default)s")
    parser.add_argument("--waiting", action="store_true", help="capture as if the GPU had been seen waiting")
    parser.add_argument("--two-gpus", action="store_true", help="only the comparison of two GPUs with one")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 18 GB free; default %(default)s")
    options = in_process.parse_options(parser, ("bf16", "stock", *OURS))
    options.cases, options.graphs = options.cases.split(","), options.graphs.split(",")
    options.size = options.sizes[0]
    if unknown := {*options.cases} - {*CASES}:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; expected some of {', '.join(CASES)}")
    return options


def main() -> int:
    """Returns 1 if latents that must be equal differ, or a sampling failed."""
    options = parse()
    flags = options.flags.split() + ["--cpu"] * options.cpu
    arguments = Path(options.comfyui or "", "comfy", "cli_args.py")
    has_compiler = arguments.is_file() and COMPILER_SWITCH in arguments.read_text(encoding="utf-8")
    if options.compiler == "off" and has_compiler:
        flags.append(COMPILER_SWITCH)
    host = in_process.start_host(options.comfyui, flags, dynamic=not options.no_dynamic)
    import torch

    common.import_pack()
    found = common.facts() | {"comfyui": host, "has compiler": has_compiler, "flags": flags}
    common.print_facts(found)
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = run(options, found, Path(scratch))
    common.print_table([short(one) for one in result["rows"]], {"all steps s": ".3f", "steady s": ".4f"} | GIGABYTES)
    say(f"bf16 equals stock NVFP4 bit for bit: {result.get('bf16 equals stock NVFP4', 'not compared')}")
    equal = [one["equal"] for one in result["rows"] if "equal" in one]
    equal += result.get("bf16 equals stock NVFP4", {}).values()
    failed = sum("failed" in one for one in result["rows"])
    say(f"{sum(equal)} of {len(equal)} comparisons equal, {failed} samplings failed")
    return int(failed > 0 or not all(equal))


if __name__ == "__main__":
    sys.exit(main())
