# SPDX-License-Identifier: Apache-2.0
"""Facts about the compute modes inside a real ComfyUI process on the CPU, as JSON; run by test_compute_host.py.

usage: <the host's python> compute_in_process.py <empty folder>, in the folder of a ComfyUI checkout

A CPU has no FP8, INT8 or FP4 tensor cores: they are declared to run, the first two are then computed by the torch
backend, for any number of tokens, and FP4 by the host, which on a CPU is weight-only.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "facts: "
PARTS = ("host.compute.block_graphs", "host.compute.graph_plan", "kernels.fp8")


def load(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


def modes_of(patcher) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in patcher.model.diffusion_model.modules():
        mode = module.__dict__.get("nvfp4_mode")
        if mode:
            found[mode] = found.get(mode, 0) + 1
    return found


def sampled(scene, counts: dict, patcher) -> tuple:
    """Latents, and how often each kind of computation was entered."""
    counts.update(fp8=0, int8=0, host=0)
    out = scene.sample(patcher)
    return out, dict(counts)


def facts_of(scene) -> dict:
    matmul, fp8, compute = load("host.compute.matmul"), load("kernels.fp8"), load("host.compute.modes")
    dispatch = load("kernels.dispatch")
    counts = {"fp8": 0, "int8": 0, "host": 0}
    fp8.obstacle = load("kernels.int8").obstacle = lambda device: ""
    compute._fp4_obstacle = lambda device: ""
    matmul.least_rows = lambda *_: 1
    prepare = dispatch.prepare

    def counted(operation, *arguments):
        run = prepare(operation, *arguments)
        mode = operation.removeprefix("linear_")
        if mode not in ("fp8", "int8"):
            return run

        def call(*given):
            counts[mode] += 1
            return run(*given)

        return call

    dispatch.prepare = counted
    bf16, _ = sampled(scene, counts, scene.ours("comfy_markers"))
    found = {"modes": {}, "calls": {}, "error": {}, "finite": {}}
    for name, options in {
        "bf16": {},
        "fp8": {"compute": "fp8"},
        "int8": {"compute": "int8"},
        "fp8 with to_out kept": {"compute": "fp8", "layer_compute": "to_out=bf16"},
        "fp4": {"compute": "fp4"},
        "auto": {"compute": "auto"},
    }.items():
        patcher = scene.ours("comfy_markers", **options)
        linear_class = next(type(m) for m in patcher.model.diffusion_model.modules() if "nvfp4_mode" in m.__dict__)
        host_class = linear_class.__bases__[0]
        forward = host_class.forward

        def watched(self, *given, forward=forward, **options):
            counts["host"] += self.__dict__.get("quant_format") == "nvfp4"
            return forward(self, *given, **options)

        host_class.forward = watched
        found["modes"][name] = modes_of(patcher)
        latents, found["calls"][name] = sampled(scene, counts, patcher)
        found["error"][name] = float((latents - bf16).norm() / bf16.norm())
        found["finite"][name] = bool(latents.isfinite().all())
        if name == "fp8":
            changed, found["calls"]["lora"] = sampled(scene, counts, scene.with_lora(patcher))
            found["finite"]["lora"] = bool(changed.isfinite().all())
            found["changed by lora"] = float((changed - latents).norm() / latents.norm())
            found["restored"] = bool((sampled(scene, counts, patcher)[0] == latents).all())
    return found | {"fused": fused_against_not(scene)}


def fused_against_not(scene) -> dict:
    """How often each fused pass ran in a sampling in BF16, and what the latents are with the host's own classes."""
    patcher = scene.ours("comfy_markers", compute="fp8")
    patcher.set_model_compute_dtype(importlib.import_module("torch").bfloat16)
    fused, calls = load("kernels.fused"), {"norm_rows": 0, "gate_heads": 0, "norm_rope": 0, "rows": 0}
    kept = {name: getattr(fused, name) for name in ("norm_rows", "gate_heads", "norm_rope")}

    def counting(name):
        def call(*given, **named):
            calls[name] += 1
            out = kept[name](*given, **named)
            calls["rows"] += sum(hasattr(one, "quantized") for one in (out if isinstance(out, list) else [out]))
            return out

        return call

    for name in kept:
        setattr(fused, name, counting(name))
    latents = scene.sample(patcher, steps=8)
    for name, function in kept.items():
        setattr(fused, name, function)
    load("host.compute.fusions").release(patcher.model.diffusion_model)
    apart = scene.sample(patcher, steps=8)
    kept = load("host.compute.positions")._known_embedding() is not None
    return {"calls": calls, "error": float((latents - apart).norm() / apart.norm()), "embedding known": kept}


class FakeGraph:
    """What a captured block does: run on the plan's own tensors."""

    def __init__(self, plan, run):
        self.plan, self.run = plan, run

    def replay(self):
        self.run(self.plan.arguments)

    def reset(self):
        pass


def graphs_of(scene) -> dict:
    """Sampling with every block replaced by a fake graph, against sampling without; fused layers in FP8 mode."""
    torch, graphs, plans, fp8 = importlib.import_module("torch"), *map(load, PARTS)
    contextlib, extension = importlib.import_module("contextlib"), importlib.import_module("comfy.patcher_extension")
    kept, is_host_s = graphs.obstacle, load("host.compute.graph_key").is_host_s
    plain = scene.ours("comfy_markers")
    right = scene.sample(plain, steps=8)
    counts = {"captured": 0, "replayed": 0}
    patcher = None

    def capture(self, number, branches, weights, options, original):
        # The host's own closure means another block as soon as its loop goes on.
        block, rest = patcher.model.diffusion_model.transformer_blocks[number], {"transformer_options": dict(options)}

        def replayed(arguments):
            counts["replayed"] += 1
            return block(**{"x" if name == "img" else name: value for name, value in (arguments | rest).items()})

        counts["captured"] += 1
        self.graphs.setdefault(number, {})[branches] = plans.Captured(FakeGraph(self, replayed), weights)
        return self.graphs[number][branches]

    fakes = {"record": lambda self, stream: None, "query": lambda self: True}
    graphs.obstacle = lambda model, device: "" if is_host_s(model, "LTXAVModel") else "other"
    graphs._is_out_of_question = lambda model, device: False
    plans.Plan.capture, torch.cuda.Event = capture, type("Event", (), fakes)
    plans.apart, plans.give_back = lambda device: contextlib.nullcontext(), lambda device: None
    torch.cuda.current_stream = lambda device: None
    torch.cuda.graph_pool_handle = lambda: None
    torch.cuda.mem_get_info = lambda device: (80 << 30, 80 << 30)
    patcher = scene.ours("comfy_markers")
    found = {"equal": bool((scene.sample(patcher, steps=8) == right).all()), "first": dict(counts)}
    found["again"] = bool((scene.sample(patcher, steps=8) == right).all())
    found["second"] = dict(counts)
    found["blocks"] = len(patcher.model.diffusion_model.transformer_blocks)
    found["left"] = len(graphs.blocks_of(patcher.model.diffusion_model).plans)
    clone = patcher.clone()
    clone.remove_wrappers_with_key(extension.WrappersMP.DIFFUSION_MODEL, graphs.KEY)
    found["without"] = bool((scene.sample(clone, steps=8) == right).all()) and counts == found["second"]
    graphs.obstacle = kept
    fused = [m for m in scene.ours("comfy_markers", compute="fp8").model.diffusion_model.modules()]
    found["feed-forward"] = sum(type(m).__name__ == "FusedFeedForward" for m in fused)
    shares = [m.__dict__["_nvfp4_shared"] for m in fused if "_nvfp4_shared" in m.__dict__]
    found["places"] = [sum(place == at for _, place in shares) for at in range(3)]
    found["sharing"] = len({id(shared) for shared, _ in shares if isinstance(shared, fp8.SharedRows)})
    return found


def main(folder: Path) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = importlib.import_module("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    scene = in_process.Scene(folder)
    facts["ltx"] = scene.ltx
    if scene.ltx is not None:
        try:
            facts["compute"] = facts_of(scene)
            facts["compute"]["graphs"] = graphs_of(scene)
        except Exception:
            facts["compute"] = {"failed": traceback.format_exc()}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
