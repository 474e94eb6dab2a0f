"""ComfyUI in this process: brought up as its main.py does it, sampled and timed through its own functions."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
FRAME_RATE = 25.0


def start_host(folder: str | None, flags: Sequence[str] = (), dynamic: bool = True, allocator: bool = True) -> str:
    """Bring a ComfyUI checkout up in this process as its main.py would, without the server; returns its version.

    ``allocator``: let the host choose the CUDA allocator, which works only before torch is imported. ``dynamic``:
    switch DynamicVRAM on, where there is an NVIDIA GPU. Leaves with a message without a checkout or a GPU.
    """
    if not folder:
        print("No ComfyUI checkout: name one with --comfyui or COMFYUI_PATH. There is nothing to do without it.")
        raise SystemExit(0)
    if not (Path(folder) / "comfy" / "sd.py").is_file():
        print(f"{folder} is no ComfyUI checkout: expected comfy/sd.py in it. Correct --comfyui or COMFYUI_PATH.")
        raise SystemExit(2)
    sys.argv = [sys.argv[0], *flags]
    sys.path.insert(0, str(Path(folder).resolve()))
    import comfy.options

    comfy.options.enable_args_parsing()
    if allocator and "--cpu" not in flags and "torch" not in sys.modules:
        import cuda_malloc  # noqa: F401  (its import sets PYTORCH_CUDA_ALLOC_CONF)
    dynamic = dynamic and not {"--cpu", "--disable-dynamic-vram"} & {*flags}
    dynamic = dynamic and importlib.util.find_spec("comfy_aimdo") is not None
    if dynamic:
        import comfy_aimdo.control

        # Before the first import of comfy.model_management: aimdo's other modules bind to the library when imported.
        _first_accepted(
            lambda: comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True),
            lambda: comfy_aimdo.control.init(),
        )
    if "--cpu" not in flags:
        common.need_cuda()
    import comfyui_version

    if dynamic:
        _enable_dynamic_vram()
    return comfyui_version.__version__


def _enable_dynamic_vram() -> None:
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control

    ready = _first_accepted(
        lambda: comfy_aimdo.control.init_devices([(0, 0)]),
        lambda: comfy_aimdo.control.init_devices([0]),  # comfy-aimdo up to 0.4.9
    )
    if not ready:
        print("DynamicVRAM could not be initialised; everything below runs without it.")
        return
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def _first_accepted(*calls: Callable[[], Any]) -> Any:
    """Result of the first call whose signature the installed version has."""
    for call in calls[:-1]:
        try:
            return call()
        except TypeError:
            continue
    return calls[-1]()


def end_of_node() -> None:
    """What ComfyUI's executor does after each node while DynamicVRAM is on."""
    import comfy.memory_management
    import comfy.model_management

    if getattr(comfy.memory_management, "aimdo_enabled", False):
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        if _prefetch() is not None and hasattr(_prefetch(), "cleanup_prefetch_queues"):
            _prefetch().cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def _prefetch() -> Any:
    try:
        import comfy.model_prefetch
    except ImportError:
        return None  # hosts before 0.20
    return comfy.model_prefetch


def latent_shapes(size: str, frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """"768x512", 121 -> shapes of the video latent and of the audio latent that lasts as long."""
    width, height = map(int, size.split("x"))
    return (1, 128, (frames - 1) // 8 + 1, height // 32, width // 32), (1, 8, round(frames / FRAME_RATE * 25), 16)


def sample(
    patcher: Any, size: str, config: Mapping, frames: int, seed: int, steps: int = 8
) -> tuple[list[float], list]:
    """Sample ``steps`` of the distilled sigmas; returns the seconds of each step but the first, and the latents."""
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers
    import torch

    shapes = latent_shapes(size, frames)
    generator = torch.Generator().manual_seed(seed)
    noise = comfy.nested_tensor.NestedTensor([torch.randn(shape, generator=generator) for shape in shapes])
    latent = comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in shapes])
    width = config["cross_attention_dim"] + config["audio_cross_attention_dim"]
    conditioning = [[torch.randn(1, 256, width, generator=generator), {"frame_rate": FRAME_RATE}]]
    stamps = []

    def on_step(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    result = comfy.sample.sample_custom(
        patcher,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor(SIGMAS[: steps + 1]),
        conditioning,
        conditioning,
        latent,
        callback=on_step,
        disable_pbar=True,
        seed=seed,
    )
    end_of_node()
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)], list(result.unbind())


def launch_cost(patcher: Any, layers: list[str], rounds: int = 5) -> float:
    """Microseconds of CPU time to queue one Linear of the quantised blocks, the host's prefetch of them included."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([patcher])
    device, dtype, dit = patcher.load_device, patcher.model.get_dtype_inference(), patcher.model.diffusion_model
    prefetch = _prefetch() if hasattr(patcher, "is_dynamic") and patcher.is_dynamic() else None
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
    end_of_node()
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
