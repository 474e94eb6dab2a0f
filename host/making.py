# SPDX-License-Identifier: Apache-2.0
"""The NVFP4 file of a BF16, FP16, FP32 or FP8 checkpoint: found where it was made before, or made now, once.

It lies where NVFP4 Quantize writes a diffusion model of that name, so that either finds what the other made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path, PurePath

from comfy_api.v0_0_2 import io

from ..checkpoint.file.header import CheckpointError
from ..checkpoint.file.shards import open_checkpoint
from ..checkpoint.identify.components import DIFFUSION_MODEL, find_components
from ..checkpoint.identify.dialects import packed_layers
from ..checkpoint.write.plan import QuantizeSettings
from ..checkpoint.write.quantize import is_made_of, quantize_checkpoint
from . import files
from .show import tell, tell_files, telling

logger = logging.getLogger(__name__)

SETTINGS = QuantizeSettings(only_model=True)


def nvfp4_of(node: type[io.ComfyNode], name: str, folders: Iterable[str]) -> str:
    """Name on a widget of ``node`` -> path of the file in NVFP4, made now if it is not there; the node tells how far.

    A file that is quantised to four bits already is its own. Raises CheckpointError for one that cannot be quantised,
    or where another file has the name of the one to make.
    """
    source = files.file_path(name, folders)
    header = open_checkpoint(source).header
    part = find_components(header).get(DIFFUSION_MODEL)
    if part is not None and packed_layers(header, part.prefix):
        return source
    target = Path(files.output_folder(), files.output_nvfp4(name, "", DIFFUSION_MODEL))
    if target.exists():
        if not is_made_of(target, source, SETTINGS) or target.stat().st_mtime < os.stat(source).st_mtime:
            found = f"it was not made from {PurePath(source).name} as that is now, with the settings of this node"
            remedy = "move it away, or choose the file that you want and switch `make_nvfp4` off"
            raise CheckpointError(found, where=str(target), remedy=remedy)
        return str(target)
    logger.info("making %s from %s, once", target, source)
    on_step = telling(node, files.progress())
    base, device = files.output_folder(), files.restore_device()
    quantize_checkpoint(source, target.relative_to(base), SETTINGS, base=base, device=device, on_step=on_step)
    tell(node, f"Wrote {target.relative_to(base)}")
    tell_files()
    return str(target)


def missing(name: str, folders: Iterable[str]) -> str:
    """What to say of a file that is in none of the folders: where it would lie, and what it can be made from."""
    folders = tuple(folders)
    text = f"{name} is in none of {', '.join(f'models/{folder}' for folder in folders)}"
    source = files.source_of(name, folders)
    if source is None:
        return f"{text}; put it into one of them, then press R"
    return (
        f"{text}, but {source} is, the same model by its name: choose that and switch `make_nvfp4` on. "
        "The NVFP4 file is then written once, which takes minutes, and found again ever after"
    )
