# SPDX-License-Identifier: Apache-2.0
"""Facts about the ComfyUI this pack runs in, each with the place it was read from.

Behaviour is asked for, not versions: the faults that the guard knows are tried on the functions that have them
(trials.py). Importing this module imports nothing of ComfyUI and does not touch the GPU. A fact that cannot be had has
the value None and says why; nothing here raises, and no text holds a path.
"""

from __future__ import annotations

from collections.abc import Callable

from . import machine, replaced, settings, trials
from .facts import Fact, why

SOFTWARE, GPU, NVFP4, MEMORY, OFFLOADING, CRASHES = "Software", "GPU", "NVFP4", "Memory", "Offloading", "Known crashes"


def probe() -> dict[str, Fact]:
    """Id -> Fact, in the order of a report. Cheap enough for every queued prompt: only the first call imports."""
    return {fact_id: _answer(fact_id, *question) for fact_id, question in _QUESTIONS.items()}


def _answer(fact_id: str, group: str, label: str, source: str, ask: Callable[[], tuple[object, str]]) -> Fact:
    try:
        value, text = ask()
    except Exception as error:  # whatever a host of another age does, a prompt must not fail because of a question
        value, text = None, f"unknown: {why(error)}"
    return Fact(fact_id, group, label, value, text, source)


# Id -> group, label, source, question.
_QUESTIONS: dict[str, tuple[str, str, str, Callable[[], tuple[object, str]]]] = {
    "comfyui_version": (SOFTWARE, "ComfyUI", "comfyui_version.py", machine.comfyui_version),
    "frontend_version": (SOFTWARE, "Front end", "package comfyui-frontend-package", machine.frontend_version),
    "kitchen_version": (
        SOFTWARE, "comfy-kitchen", "package comfy-kitchen", lambda: machine.version_of("comfy-kitchen")
    ),
    "aimdo_version": (SOFTWARE, "comfy-aimdo", "package comfy-aimdo", lambda: machine.version_of("comfy-aimdo")),
    "torch_version": (SOFTWARE, "PyTorch", "torch.__version__", machine.torch_version),
    "torch_cuda": (SOFTWARE, "PyTorch's CUDA", "torch.version.cuda", machine.torch_cuda),
    "triton_version": (SOFTWARE, "Triton", "package triton", lambda: machine.version_of("triton", "triton-windows")),
    "platform": (SOFTWARE, "System", "platform", machine.system),
    "launch_flags": (SOFTWARE, "Launch flags", "sys.argv, comfy.cli_args", settings.launch_flags),
    "known_flags": (SOFTWARE, "Flags it knows", "comfy.cli_args.parser", settings.known_flags),
    "gpu_maker": (GPU, "GPU's maker", "the device's kind, torch.version.hip", machine.gpu_maker),
    "gpu_name": (GPU, "GPU", "torch.cuda.get_device_properties", machine.gpu_name),
    "capability": (GPU, "Compute capability", "torch.cuda.get_device_properties", machine.capability),
    "gpu_memory": (GPU, "GPU memory", "torch.cuda.mem_get_info", machine.gpu_memory),
    "unified_memory": (GPU, "Unified memory", "is_integrated, or the GPU's name", machine.unified_memory),
    "kitchen_backends": (NVFP4, "comfy-kitchen's backends", "comfy_kitchen.list_backends", settings.kitchen_backends),
    "nvfp4_compute": (
        NVFP4, "ComfyUI computes", "supports_nvfp4_compute, comfy_kitchen.registry", settings.nvfp4_compute
    ),
    "own_backend": (NVFP4, "This pack computes", "kernels.backends.pick_backend", settings.own_backend),
    "memory_total": (MEMORY, "System memory", "MemTotal of /proc/meminfo", machine.memory_total),
    "memory_available": (MEMORY, "System memory available", "MemAvailable of /proc/meminfo", machine.memory_available),
    "page_cache": (MEMORY, "Page cache", "Cached of /proc/meminfo", machine.page_cache),
    "pinned_memory": (MEMORY, "Pinned memory", "comfy.model_management.MAX_PINNED_MEMORY", settings.pinned_memory),
    "mmap": (MEMORY, "Files are mapped", "comfy.utils.DISABLE_MMAP", settings.mmap),
    "dynamic_vram": (OFFLOADING, "DynamicVRAM", "comfy.memory_management.aimdo_enabled", settings.dynamic_vram),
    "async_offload_streams": (
        OFFLOADING, "Async offload", "comfy.model_management.NUM_STREAMS", settings.async_offload_streams
    ),
    "compiler": (OFFLOADING, "Comfy Compiler", "comfy.model_prefetch.malloc_graph_enabled", settings.compiler),
    "prefetch_crash": (CRASHES, "Crash in the block prefetch", "tried: prefetch_queue_pop", trials.prefetch_crash),
    "ltxav_needs_audio": (CRASHES, "LTX-2 without audio crashes", "tried: freqs_cis_matrix", trials.ltxav_needs_audio),
    "joint_noise_crash": (
        CRASHES, "Noise for joint audio and video", "tried, if replaced: comfy.sample.prepare_noise",
        trials.joint_noise_crash,
    ),
    "joint_sampling_crash": (
        CRASHES, "Joint audio and video through other packs' functions", "tried, if replaced: comfy.sample, "
        "comfy.samplers, comfy.k_diffusion.sampling", replaced.joint_sampling_crash,
    ),
    "replaced_sampling": (
        CRASHES, "Sampling functions of other packs", "comfy.sample, comfy.samplers", trials.replaced_sampling
    ),
}  # fmt: skip
