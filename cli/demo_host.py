# SPDX-License-Identifier: Apache-2.0
"""The part of ``demo`` that boots a real ComfyUI, samples the small model in it through NVFP4ModelLoader, and films it.

It uses the harness of tests/real, which the repository has and the published pack leaves out.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from ..samples import released, synthetic
from .console import Cell, Console

HARNESS = Path(__file__).resolve().parent.parent / "tests" / "real"
FAMILIES = {"ltx23": "LTX-2.3", "ltx20": "LTX-2"}
STOCK = "UNETLoader"
OURS = "NVFP4ModelLoader"
# The first is the reference that all packed ones must equal, the second must differ from it.
STOCK_KINDS = ("bf16_decoded", "bf16")
KINDS = ("comfy_markers", "metadata_less", "modelopt", "modelopt_swizzled", "compressed_tensors", "lightx2v")
REPORT, STREAMS = "report", ("video", "audio")
VAES = {kind: f"{kind}_vae.safetensors" for kind in STREAMS}
CLIP = {"width": 256, "height": 160, "frames": 25}


def sample_in_comfyui(base: Path, gpu: bool, console: Console) -> dict[str, Any]:
    """Boot ComfyUI with ``base`` as its folder, queue one prompt a file -> record with `ok`, or with `skipped`.

    ``clip`` in the record: a film with sound, in ``base``.
    """
    console.title("In ComfyUI")
    obstacle = _obstacle()
    if obstacle:
        console.say(obstacle, indent=2)
        return {"skipped": obstacle}
    harness = import_module("..tests.real.harness", __package__)
    try:
        nodes = [HARNESS / "standin_nodes"]
        # One thread for the same reason as in demo.py.
        host = harness.ComfyUI(base=base, custom_nodes=nodes, cpu=not gpu, env={"OMP_NUM_THREADS": "1"})
        model = harness.small_model(host.path)
        if model is None:
            reason = "This ComfyUI builds the embeddings connectors in their released size only: no small model runs."
            console.say(reason, indent=2)
            return {"skipped": reason}
        config = _write_files(base / "models" / "diffusion_models", model)
        with ExitStack() as stack:
            with console.progress("Starting ComfyUI") as progress:
                progress.update(0, str(host.path))
                start = time.perf_counter()
                stack.enter_context(host)
                boot_seconds = time.perf_counter() - start
            if not host.object_info(OURS):
                raise harness.HostError(f"ComfyUI {host.version} does not offer {OURS}: {_import_error(host.log())}")
            runs = _sample_all(host, config, console)
            clip = _film(host, config, console)
    except (harness.HostError, OSError) as error:
        console.say(str(error), "red", indent=2)
        return {"ok": False, "error": str(error)}
    _judge(runs)
    record = {
        "ok": all(run["as_expected"] for run in runs),
        "version": host.version,
        "device": "GPU" if gpu else "CPU",
        "family": FAMILIES[model],
        "boot_seconds": boot_seconds,
        "runs": runs,
        "clip": str(clip),
    }
    _show(record, console)
    return record


def _obstacle() -> str:
    """Why no ComfyUI can be booted, or an empty string."""
    if not (HARNESS / "harness.py").is_file():
        return "No tests/ folder here: a clone of the repository also makes a clip."
    if not os.environ.get("COMFYUI_PATH"):
        return "Set COMFYUI_PATH=<ComfyUI's folder> for a clip with sound, sampled there."
    return ""


def _import_error(log: str) -> str:
    """The line in which ComfyUI says why a pack could not be imported."""
    return next((line for line in log.splitlines() if line.startswith("Cannot import")), "its log does not say why")


def _write_files(folder: Path, model: str) -> dict:
    state, config = getattr(synthetic, f"small_{model}")()
    packed = synthetic.quantize_layers(state, config)
    for kind in (*STOCK_KINDS, *KINDS):
        synthetic.write(folder / f"{kind}.safetensors", kind, state, config, packed)
    return config


def _sample_all(host, config: dict, console: Console) -> list[dict[str, Any]]:
    graphs = import_module("..tests.real.graphs", __package__)
    plans = [(STOCK, kind) for kind in STOCK_KINDS] + [(OURS, kind) for kind in KINDS]
    runs = []
    with console.progress(f"Sampling in ComfyUI {host.version}", len(plans)) as progress:
        for done, (loader, kind) in enumerate(plans):
            progress.update(done, f"{loader}, {kind}")
            make = graphs.stock_loader if loader == STOCK else graphs.nvfp4_loader
            prompt = graphs.sampling(make(f"{kind}.safetensors"), config)
            if loader == OURS:
                prompt[REPORT] = {"class_type": "PreviewAny", "inputs": {"source": [graphs.MODEL, 1]}}
            start = time.perf_counter()
            outputs = host.queue(prompt)["outputs"]
            seconds = time.perf_counter() - start
            streams = dict(zip(STREAMS, graphs.stats_of(outputs), strict=True))
            report = "".join(outputs[REPORT]["text"]) if REPORT in outputs else None
            runs.append({"loader": loader, "kind": kind, "seconds": seconds, "streams": streams, "report": report})
    return runs


def _film(host, config: dict, console: Console) -> Path:
    """A clip with sound of the small model, decoded by the pack's VAE loader from small VAEs -> the film's file."""
    graphs = import_module("..tests.real.graphs", __package__)
    for kind, name in VAES.items():
        released.write_vae(host.base / "models" / "vae" / name, f"{kind}_vae", small=True, smooth=True)
    with console.progress("Rendering a clip") as progress:
        progress.update(0, f"{CLIP['width']}x{CLIP['height']}, {CLIP['frames']} frames")
        prompt = graphs.sampling(graphs.nvfp4_loader(f"{KINDS[0]}.safetensors"), config, **CLIP)
        outputs = host.queue(graphs.film(prompt, *VAES.values()))["outputs"]
    (saved,) = outputs[graphs.FILM]["images"]
    return host.base / "output" / saved["subfolder"] / saved["filename"]


def _judge(runs: list[dict[str, Any]]) -> None:
    """Add to each run whether its latents are finite, equal to the reference's, and whether that is as it should be."""
    reference = [runs[0]["streams"][name]["sha256"] for name in STREAMS]
    for run in runs:
        streams = [run["streams"][name] for name in STREAMS]
        run["finite"] = all(stream["finite"] for stream in streams)
        run["identical"] = [stream["sha256"] for stream in streams] == reference
        run["as_expected"] = run["finite"] and run["identical"] == ((run["loader"], run["kind"]) != (STOCK, "bf16"))


def _show(record: dict[str, Any], console: Console) -> None:
    runs = record["runs"]
    shapes = " and ".join(f"{name} {tuple(runs[0]['streams'][name]['shape'])}" for name in STREAMS)
    console.say(
        f"ComfyUI {record['version']} on the {record['device']}, up in {record['boot_seconds']:.0f} s; "
        f"{record['family']}, 8 distilled steps, euler, cfg 1. Latents: {shapes}.",
        indent=2,
    )
    console.say()
    head = ["loader", "file", "time", "std", "sha256", "latents"]
    console.table(head, [_row(run) for run in runs], "<<><<<")
    loaders = f"stock: {STOCK}; ours: {OURS}. std and sha256: of the video latent, then of the audio latent."
    console.say(f"\n{loaders}", "dim", indent=2)
    last = runs[-1]
    console.say(f"\nReport of {OURS} on the last file:", indent=2)
    console.say(last["report"], indent=4)


def _row(run: dict[str, Any]) -> list[Cell]:
    video, audio = (run["streams"][name] for name in STREAMS)
    if (run["loader"], run["kind"]) == (STOCK, STOCK_KINDS[0]):
        verdict: Cell = "reference"
    elif not run["finite"]:
        verdict = ("NOT FINITE", "red")
    else:
        verdict = ("identical" if run["identical"] else "different", "green" if run["as_expected"] else "red")
    return [
        "stock" if run["loader"] == STOCK else "ours",
        run["kind"],
        f"{run['seconds']:.1f} s",
        f"{video['std']:.3f} {audio['std']:.3f}",
        f"{video['sha256'][:8]} {audio['sha256'][:8]}",
        verdict,
    ]
