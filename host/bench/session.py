# SPDX-License-Identifier: Apache-2.0
"""ComfyUI in this process: brought up as its main.py does it, without the server, and sampled by its own functions.

For the command line and the benchmarks; no node uses it. torch and comfy are imported inside the functions, because the
host chooses the CUDA allocator and DynamicVRAM binds to its library before the first import of either.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import PackError
from ...measure import ltx

logger = logging.getLogger(__name__)

FRAME_RATE = 25.0


class SessionError(PackError):
    """ComfyUI cannot be brought up here; the message says why and what to do."""


def is_checkout(folder: str | Path) -> bool:
    """Whether ``folder`` is one of ComfyUI."""
    return (Path(folder) / "comfy" / "sd.py").is_file()


def start(folder: str | Path, flags: Sequence[str] = (), dynamic: bool = True, allocator: bool = True) -> str:
    """Bring a ComfyUI checkout up in this process as its main.py would, without the server; returns its version.

    ``allocator``: let the host choose the CUDA allocator, which works only before torch is imported. ``dynamic``:
    switch DynamicVRAM on, where there is an NVIDIA GPU. Raises SessionError without a checkout or a GPU.
    """
    if not is_checkout(folder):
        raise SessionError(f"{folder} is no ComfyUI checkout: expected comfy/sd.py in it. Name another folder.")
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
    import torch

    if "--cpu" not in flags and not torch.cuda.is_available():
        raise SessionError("torch finds no CUDA device. Use --cpu to run on the CPU.")
    import comfyui_version

    if dynamic:
        _enable_dynamic_vram()
    return comfyui_version.__version__


def _enable_dynamic_vram() -> None:
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control
    import torch

    devices = range(torch.cuda.device_count())
    ready = _first_accepted(
        lambda: comfy_aimdo.control.init_devices([(index, 0) for index in devices]),
        lambda: comfy_aimdo.control.init_devices(list(devices)),  # comfy-aimdo up to 0.4.9
    )
    if not ready:
        logger.warning("DynamicVRAM could not be initialised; the session runs without it")
        return
    # As main.py does. Until a level is set, aimdo hands Python several lines for each allocation and each free on the
    # GPU, microseconds each, and also for those of libraries that clean up when the interpreter is gone: a crash.
    comfy_aimdo.control.set_log_info()
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
        if prefetch() is not None and hasattr(prefetch(), "cleanup_prefetch_queues"):
            prefetch().cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def prefetch() -> Any:
    """The host's module that brings weights of the next block to the GPU, or None where it has none."""
    try:
        import comfy.model_prefetch
    except ImportError:
        return None  # hosts before 0.20
    return comfy.model_prefetch


def latent_shapes(size: str, frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """"768x512", 121 -> shapes of the video latent and of the audio latent that lasts as long."""
    width, height = map(int, size.split("x"))
    video = (1, ltx.VIDEO_CHANNELS, *ltx.latent_size(width, height, frames))
    return video, (1, ltx.AUDIO_CHANNELS, ltx.audio_latents(frames, FRAME_RATE), ltx.AUDIO_BINS)


def sample(
    patcher: Any,
    size: str,
    config: Mapping,
    frames: int,
    seed: int,
    steps: int = 8,
    sigmas: Sequence[float] | None = None,
    text: Any = None,
    on_step: Callable[[int], None] | None = None,
    timed: bool = True,
) -> tuple[list[float], list]:
    """Sample the first ``steps`` of the distilled sigmas; -> the seconds of each step but the first, and the latents.

    ``sigmas``: others than those. ``text``: the conditioning, (1, tokens, width), else one of random numbers.
    ``on_step(done)`` is called outside the times. ``timed``: wait for the GPU after each step; without that there are
    no seconds of steps, and the CPU may be ahead of the GPU, as in a ComfyUI that shows no previews.
    """
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers
    import torch

    from ...checkpoint.identify.signatures import context_width

    shapes = latent_shapes(size, frames)
    generator = torch.Generator().manual_seed(seed)
    noise = comfy.nested_tensor.NestedTensor([torch.randn(shape, generator=generator) for shape in shapes])
    latent = comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in shapes])
    if text is None:
        text = torch.randn(1, 256, context_width(config), generator=generator)
    conditioning = [[text, {"frame_rate": FRAME_RATE}]]
    starts, ends = [], []

    def stamp(*_: Any) -> None:
        if timed and torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if on_step is not None:
            on_step(len(ends))
        starts.append(time.perf_counter())

    result = comfy.sample.sample_custom(
        patcher,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor(ltx.SIGMAS[: steps + 1] if sigmas is None else sigmas),
        conditioning,
        conditioning,
        latent,
        callback=stamp,
        disable_pbar=True,
        seed=seed,
    )
    end_of_node()
    seconds = [end - start for start, end in zip(starts, ends[1:], strict=False)] if timed else []
    return seconds, list(result.unbind())


def decode_sound(vae: Any, latent: Any) -> tuple[Any, int]:
    """The host's audio VAE, audio latent -> ((1, channels, samples) waveform, sample rate)."""
    model = getattr(vae, "first_stage_model", None)
    if model is None:  # hosts up to 0.15, whose audio VAE is no VAE of the host's class
        return vae.decode(latent), int(vae.output_sample_rate)
    return vae.decode(latent).movedim(-1, 1), int(model.output_sample_rate)
