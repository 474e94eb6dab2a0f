# SPDX-License-Identifier: Apache-2.0
"""The second half of ``demo``: a BF16 checkpoint becomes an NVFP4 file, is verified, taken apart and given settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.file.header import read_header
from ..checkpoint.identify.components import AUDIO_VAE, DIFFUSION_MODEL, VIDEO_VAE
from ..checkpoint.identify.report import inspect_checkpoint
from ..checkpoint.identify.vae_signatures import find_vaes
from ..checkpoint.verify.verify import verify
from ..checkpoint.write.plan import QuantizeSettings
from ..checkpoint.write.quantize import quantize_checkpoint
from ..checkpoint.write.split import split
from ..measure.settings import distilled_settings
from ..samples import synthetic
from .console import Console, size, write_file

SOURCE, BEST, FAST = "whole_bf16.safetensors", "whole_nvfp4.safetensors", "whole_nvfp4_fast.safetensors"
PARTS = (VIDEO_VAE, AUDIO_VAE, DIFFUSION_MODEL)


def make_and_split(folder: Path, state: dict[str, torch.Tensor], config: dict, console: Console) -> dict[str, Any]:
    """Whole BF16 checkpoint -> NVFP4 with and without the scale search, verified -> its components in files."""
    console.title("Making the file, and taking it apart")
    source = folder / SOURCE
    synthetic.write(source, "bf16", state, config, full=True)
    rows, errors = [(SOURCE, size(source.stat().st_size), "", "the source")], {}
    for name, search in ((FAST, "amax"), (BEST, "mse")):
        with console.progress("Quantizing") as progress:
            progress.update(0, name)
            quantize_checkpoint(source, folder / name, QuantizeSettings(search=search))
            found = verify(folder / name, source)
        errors[search] = found.mean_error
        text = f"{len(found.layers)} layers, "
        verdict = (text + "verified", "green") if found.ok else (text + "WORSE THAN NVFP4 ALLOWS", "red")
        rows.append((name, size((folder / name).stat().st_size), f"{found.mean_error:.4f}", verdict))
        if not found.ok:
            errors["failed"] = name
    parts = split(folder / BEST, {part: f"whole_{part}.safetensors" for part in PARTS}, base=folder)
    for part in parts:
        rows.append((part.path.name, size(part.path.stat().st_size), "", str(part).partition(":")[0]))
    console.table(["file", "size", "error", ""], rows, "<>><")
    console.say("verified: every tensor accounted for, no layer worse than its format allows.", "dim", indent=2)
    vae = find_vaes(read_header(folder / f"whole_{VIDEO_VAE}.safetensors"))[0]
    model = inspect_checkpoint(folder / f"whole_{DIFFUSION_MODEL}.safetensors")
    console.say(f"By their tensors: the first is the {vae.title}, the last {str(model).splitlines()[0]}.", indent=2)
    gained = 1 - (errors["mse"] / errors["amax"]) ** 2
    console.say(f"The search took {gained:.0%} off the squared error, in the same bytes.", indent=2)
    made = distilled_settings(768, 500, 120, 24.0)
    console.title("Settings that fit: 768 x 500, 120 frames asked for")
    console.say(str(made), indent=2)
    return {
        "errors": errors,
        "files": [name for name, *_ in rows],
        "vae": vae.title,
        "settings": {"width": made.width, "height": made.height, "frames": made.frames, "audio": made.audio_latents},
        "ok": "failed" not in errors and errors["mse"] < errors["amax"],
    }


def leave(folder: Path, target: Path, clip: str | None, console: Console) -> list[str]:
    """To ``target``: pictures of what was made, the file by component and block and its errors; the clip -> paths."""
    from ..draw.inspect import inspection_picture
    from ..draw.verify import verification_picture
    from ..measure.media import encode_png

    pictures = {
        "inspect.png": inspection_picture(inspect_checkpoint(folder / BEST)),
        "verify.png": verification_picture(verify(folder / BEST, folder / SOURCE)),
    }
    left = [target / name for name in pictures]
    try:
        target.mkdir(exist_ok=True)
        for path, picture in zip(left, pictures.values(), strict=True):
            write_file(path, encode_png(picture))
        if clip:
            left.append(target / f"clip{Path(clip).suffix}")
            shutil.copyfile(clip, left[-1])
    except OSError as error:  # nothing that was to be shown hangs on it
        console.say(f"\nNot everything could be left to look at: {error}", "yellow")
        return []
    console.say(f"\nPictures of {BEST} are in {target}: {', '.join(pictures)}.")
    if clip:
        console.say(f"Beside them a clip of random weights, with sound: {left[-1].name}.")
    return [str(path) for path in left]
