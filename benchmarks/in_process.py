# SPDX-License-Identifier: Apache-2.0
"""ComfyUI in this process for the benchmarks: host/bench/session.py, left with a message where it cannot measure."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import common

common.import_pack()
from nvfp4_video.host.bench import session  # noqa: E402  (the pack has to be importable first)
from nvfp4_video.host.bench.session import FRAME_RATE, end_of_node, latent_shapes, sample  # noqa: E402
from nvfp4_video.measure.ltx import SIGMAS  # noqa: E402

__all__ = [
    "FRAME_RATE", "Phases", "SIGMAS", "add_options", "begin", "compiled", "end_of_node", "latent_shapes", "launch_cost",
    "parse_options", "sample", "save", "start_host", "without_fused_blocks", "without_graphs",
]  # fmt: skip


def start_host(folder: str | None, flags: Sequence[str] = (), dynamic: bool = True, allocator: bool = True) -> str:
    """``session.start``; leaves with a message without a checkout or a GPU."""
    if not folder:
        print("No ComfyUI checkout: name one with --comfyui or COMFYUI_PATH. There is nothing to do without it.")
        raise SystemExit(0)
    if not session.is_checkout(folder):
        print(f"{folder} is no ComfyUI checkout: expected comfy/sd.py in it. Correct --comfyui or COMFYUI_PATH.")
        raise SystemExit(2)
    try:
        return session.start(folder, flags, dynamic, allocator)
    except session.SessionError:
        common.need_cuda()
        raise


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Start ComfyUI as the options say -> ``common.facts`` and its version, printed."""
    flags = options.flags.split() + ["--cpu"] * options.cpu
    version = start_host(options.comfyui, flags, dynamic=not options.no_dynamic)
    found = common.facts() | {"comfyui": version}
    common.print_facts(found)
    return found


def save(name: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result file; of a run on the CPU only where --out asks for it."""
    if not options.cpu or options.out:
        common.save(name, options.out, result)


def add_options(parser: argparse.ArgumentParser, rows: str) -> None:
    """The options of a benchmark that samples LTX-2.3 with random weights, but --layers, --scratch and --limit."""

    def listed(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="checkout; default $COMFYUI_PATH")
    parser.add_argument("--tiny", action="store_true", help="the scaled-down model of the tests")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; nothing is saved without --out")
    parser.add_argument("--sizes", default="768x512,1280x704", type=listed, help="default %(default)s")
    parser.add_argument("--frames", type=int, default=121, help="8k + 1; default 121")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; default 3")
    parser.add_argument("--rows", default=rows, type=listed, help="default %(default)s")
    parser.add_argument("--backend", default="auto", help="backend of ours; default auto")
    parser.add_argument("--no-dynamic", action="store_true", help="leave DynamicVRAM off")
    parser.add_argument("--flags", default="", help="more of ComfyUI's own flags, separated by spaces")


def parse_options(parser: argparse.ArgumentParser, rows: Collection[str]) -> argparse.Namespace:
    """The command line; an error for a row that is none of ``rows``."""
    options = parser.parse_args()
    if unknown := set(options.rows) - {*rows}:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; expected some of {', '.join(rows)}")
    return options


class Phases:
    """GPU milliseconds of each step before, in and behind the blocks: a context, with ``step`` as ``sample``'s on_step.

    Each step starts on a GPU at rest, so what it takes before the blocks is mostly waiting for the CPU.
    """

    def __init__(self):
        self.events: list[Any] = []

    def __enter__(self) -> Phases:
        from comfy.ldm.lightricks import av_model

        self.model, self.kept = av_model.LTXAVModel, av_model.LTXAVModel._process_transformer_blocks

        def marked(model, *args, **kwargs):
            self._mark()
            out = self.kept(model, *args, **kwargs)
            self._mark()
            return out

        self.model._process_transformer_blocks = marked
        return self

    def __exit__(self, *_: Any) -> None:
        self.model._process_transformer_blocks = self.kept

    def _mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def step(self, done: int) -> None:
        """The end of a step, the GPU at rest."""
        self._mark()

    def medians(self, skip: int = 3) -> dict[str, float]:
        """{phase: ms}, of a sampling with one call of the model a step, but for its first steps; {} without a GPU."""
        if self.events:
            self.events[-1].synchronize()
        ends = self.events[2::3]
        triples = [(end, *self.events[3 * i + 3 : 3 * i + 6]) for i, end in enumerate(ends[:-1])][skip:]
        names = ("before the blocks ms", "blocks ms", "behind them ms")
        each = [[a.elapsed_time(b) for a, b in itertools.pairwise(one)] for one in triples]
        return {name: statistics.median(column) for name, column in zip(names, zip(*each, strict=True), strict=False)}


def launch_cost(patcher: Any, layers: list[str], rounds: int = 5) -> float:
    """Microseconds of CPU time to queue one Linear of the quantised blocks, the host's prefetch of them included."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([patcher])
    device, dtype, dit = patcher.load_device, patcher.model.get_dtype_inference(), patcher.model.diffusion_model
    prefetch = session.prefetch() if hasattr(patcher, "is_dynamic") and patcher.is_dynamic() else None
    blocks: dict[str, list] = {}
    for layer in layers:
        module = dit.get_submodule(layer)
        x = torch.randn(1, 1, module.in_features, device=device).to(dtype)
        blocks.setdefault(layer.split(".")[1], []).append((module, x))
    seconds = []
    for _ in range(rounds):
        for number, pairs in blocks.items():
            block = dit.transformer_blocks[int(number)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            if prefetch is not None:
                queue = prefetch.make_prefetch_queue([block], device, {"prefetch_dynamic_vbars": True})
                prefetch.prefetch_queue_pop(queue, device, block)
            for module, x in pairs:
                module(x)
            if prefetch is not None:
                prefetch.prefetch_queue_pop(queue, device, None)
            seconds.append((time.perf_counter() - start) / len(pairs))
    session.end_of_node()
    return statistics.median(seconds) * 1e6


def without_graphs(patcher: Any) -> None:
    """Take the pack's CUDA graphs off a loaded model."""
    from comfy.patcher_extension import WrappersMP
    from nvfp4_video.host.compute import block_graphs

    patcher.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, block_graphs.KEY)


def without_fused_blocks(patcher: Any) -> None:
    """Give a loaded model's blocks and attentions the host's own classes back; feed-forwards stay as they are."""
    for module in patcher.model.diffusion_model.modules():
        if type(module).__name__ in ("FusedAttention", "FusedBlock"):
            module.__class__ = type(module).host_class


def compiled(patcher: Any) -> Any:
    """What ComfyUI's TorchCompileModel makes of a model without DynamicVRAM."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = patcher.clone()
    guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(model=patcher, backend="inductor", options=guards)
    return patcher
