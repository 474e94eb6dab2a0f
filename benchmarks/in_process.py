"""ComfyUI in this process for the benchmarks: host/session.py, left with a message where nothing can be measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import common

common.import_pack()
from nvfp4_video.host import session  # noqa: E402  (the pack has to be importable first)
from nvfp4_video.host.session import FRAME_RATE, SIGMAS, end_of_node, latent_shapes, sample  # noqa: E402

__all__ = ["FRAME_RATE", "SIGMAS", "end_of_node", "latent_shapes", "launch_cost", "sample", "start_host"]


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
    from nvfp4_video.host import graphs

    patcher.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, graphs.KEY)


def compiled(patcher: Any) -> Any:
    """What ComfyUI's TorchCompileModel makes of a model without DynamicVRAM."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = patcher.clone()
    guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(model=patcher, backend="inductor", options=guards)
    return patcher
