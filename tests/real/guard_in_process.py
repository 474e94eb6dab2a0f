# SPDX-License-Identifier: Apache-2.0
"""Facts about the guard's cure on a real model in a real ComfyUI, as one line of JSON; run by test_guard_host.py.

usage: <the host's python> guard_in_process.py <empty folder>, in the folder of a ComfyUI checkout

The small LTX-2 stays on the CPU, where the host neither has dynamic models nor prefetches. So the patcher says that it
is dynamic, and within ``prefetching`` the device says that it has streams: then the host's own prefetch runs over
blocks that need no copy, which is what a GPU that holds the whole model looks like to it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import in_process

FLAG = "prefetch_dynamic_vbars"


def flags_seen(scene, patcher) -> list:
    """The flag in the options that the transformer blocks get, step by step."""
    dit, seen = patcher.model.diffusion_model, []
    original = dit._process_transformer_blocks

    def recorded(*args, **kwargs):
        options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict) and FLAG in a), {})
        seen.append(options.get(FLAG))
        return original(*args, **kwargs)

    dit._process_transformer_blocks = recorded
    try:
        scene.sample(patcher)
    finally:
        del dit._process_transformer_blocks
    return seen


def video_result(scene, patcher) -> str:
    """ "runs", or the error of sampling without an audio latent."""
    try:
        sample_video(scene, patcher)
    except (AttributeError, RuntimeError) as error:
        return str(error)
    return "runs"


@contextlib.contextmanager
def prefetching():
    """The host takes the CPU for a device with two offload streams."""
    management = in_process.comfy("model_management")
    # A stream that nothing waits for: on a CPU there is none.
    replaced = {
        "NUM_STREAMS": 2,
        "is_device_cpu": lambda device: False,
        "device_supports_non_blocking": lambda device: True,
        "current_stream": lambda device: None,
    }
    before = {name: getattr(management, name) for name in replaced}
    for name, value in replaced.items():
        setattr(management, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(management, name, value)


def sample_video(scene, patcher):
    """As ``Scene.sample``, without an audio latent."""
    torch = importlib.import_module("torch")
    graphs = importlib.import_module("nvfp4_video.tests.real.graphs")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 128, 2, 2, 2, generator=generator)
    text = torch.randn(1, 32, graphs.context_width(scene.config), generator=generator)
    conditioning = [[text, {"frame_rate": 25.0}]]
    sigmas = torch.tensor([float(sigma) for sigma in graphs.SIGMAS.split(",")][:3])
    sampler = in_process.comfy("samplers").sampler_object("euler")
    given = (patcher, noise, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(noise))
    return in_process.comfy("sample").sample_custom(*given, disable_pbar=True, seed=1)


def results_of(scene, models: dict) -> dict[str, str]:
    """Name of the model -> "equal" to a run without prefetch, "different", or the error of sampling with it.

    Joint audio and video only: on a GPU a video-only prompt leaves the audio branch's weights unused and therefore not
    resident, so that the prefetch always has something to copy (benchmarks/launch_crash.py).
    """
    torch = importlib.import_module("torch")
    found = {}
    for name, patcher in models.items():
        try:
            expected = scene.sample(patcher)
            with prefetching():
                found[name] = "equal" if torch.equal(scene.sample(patcher), expected) else "different"
        except (AttributeError, RuntimeError) as error:
            found[name] = str(error)
    return found


def gather(scene) -> dict:
    """What the model is told, and how sampling ends, with the cure and without it."""
    cure = importlib.import_module("nvfp4_video.host.guard.cure")
    probe = importlib.import_module("nvfp4_video.host.doctor.probe").probe()
    plain = scene.stock("comfy_markers")
    type(plain).is_dynamic = lambda self: True
    cured = cure.cure(plain)
    models = {"plain": plain, "cured": cured}
    proof = cure.prove(cured)
    guarded, report = cure.guard_model(plain, "cure", {})
    try:
        doubt = cure.prove(plain)
    except cure.CureError as error:
        doubt = str(error)
    return {
        "prefetch_crash": probe["prefetch_crash"].value,
        "ltxav_needs_audio": probe["ltxav_needs_audio"].value,
        "proof": {"plain": doubt, "cured": proof},
        "flags": {name: flags_seen(scene, patcher) for name, patcher in models.items()},
        "joint": results_of(scene, models),
        "video": video_result(scene, plain),
        "guard": {"same": guarded is plain, "report": report},
    }


def main(folder: Path) -> None:
    version = in_process.bring_up_host()
    scene = in_process.Scene(folder)
    facts: dict[str, object] = {"version": version, "ltx": scene.ltx}
    if scene.ltx is not None:
        with importlib.import_module("torch").inference_mode():
            facts |= gather(scene)
    sys.stdout.write(f"\n{in_process.MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
