# SPDX-License-Identifier: Apache-2.0
"""Collects calibration statistics while a model samples: a wrapper of the diffusion model, a file when a sampling ends.

The sums (measure/moments.py) lie on the GPU beside the model. Each sampling adds to them and writes the file anew, so
that several jobs add up as long as ComfyUI keeps the node's output; what a cancelled one has seen counts too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from comfy import patcher_extension

from ...checkpoint.file.header import CheckpointError
from ...checkpoint.file.shards import open_checkpoint
from ...checkpoint.identify.components import DIFFUSION_MODEL, find_components
from ...checkpoint.write.calibration import is_calibration_file, model_identity, write_calibration
from ...checkpoint.write.recipes import AUTO, find_recipe, select
from ...measure.moments import Collector, block_width
from ...measure.text import size_text

logger = logging.getLogger(__name__)

KEY = "nvfp4_video.calibrate"


class Session:
    """One calibration file in the making. ``width``: columns of a block of the Gram matrices; ``on_new``: called when
    the file is there for the first time.
    """

    def __init__(
        self, source: str, target: Path, layers: Mapping[str, torch.nn.Module], budget: int, recipe: str,
        on_new: Callable[[], None],
    ) -> None:  # fmt: skip
        self.target, self.layers, self.recipe, self._on_new = target, layers, recipe, on_new
        self.model = model_identity(open_checkpoint(source))
        self.width = block_width(columns_of(layers), budget)
        self.collector = Collector(layers, self.width)
        self.prompts = 0
        self._ran = False

    def watch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A DIFFUSION_MODEL wrapper: the Linears' inputs are counted during this call; hooks stay for a sampling."""
        self.collector.attach()
        self.collector.counting = True
        try:
            found = executor(*args, **kwargs)
        finally:
            self.collector.counting = False
        self._ran = True
        return found

    def save(self, patcher: Any) -> None:
        """The host's ON_CLEANUP: a sampling is over, and what was seen so far goes into the file."""
        self.collector.detach()
        if not self._ran:
            return
        self._ran = False
        if not self.collector.moments:
            logger.warning("Calibration: no layer was reached, %s is not written; connect the node before whatever "
                           "compiles or replaces the model's layers.", self.target.name)  # fmt: skip
            return
        self.prompts += 1
        new = not self.target.exists()
        write_calibration(
            self.target, self.collector.moments, self.collector.inputs, model=self.model, recipe=self.recipe,
            prompts=self.prompts, overwrite=True,
        )  # fmt: skip
        if new:
            self._on_new()
        seen = max(found.tokens + found.held_tokens for found in self.collector.moments.values())
        logger.info(
            "Calibration: %d samplings, %d of %d layers reached, up to %s tokens, in %s.",
            self.prompts, len(self.collector.inputs), len(self.layers), f"{seen:,}", self.target.name,
        )  # fmt: skip


def columns_of(layers: Mapping[str, torch.nn.Module]) -> list[int]:
    """Columns of each input that is expected: queries, keys and values of one attention mostly share one."""
    found = {(name.rpartition(".")[0], layer.in_features): layer.in_features for name, layer in layers.items()}
    return list(found.values())


def collect(
    patcher: Any, source: str, target: str, budget: int, overwrite: bool, recipe: str = AUTO,
    on_new: Callable[[], None] = lambda: None,
) -> str:  # fmt: skip
    """Have a patcher's model counted whenever it samples -> what to expect, in words.

    ``source``: the checkpoint it was loaded from; ``target``: the file to write; ``budget``: bytes of GPU memory for
    the sums; ``on_new``: called when the file is there for the first time. Raises CheckpointError for a file that may
    not be replaced, a model that is not that of the source, and a budget that is too small.
    """
    path = Path(target)
    if os.path.lexists(path) and not (overwrite and is_calibration_file(path)):
        remedy = "choose another name" if overwrite else "choose another name, or allow overwriting (`overwrite`)"
        raise CheckpointError("the target exists", where=path.name, remedy=remedy)
    checkpoint = open_checkpoint(source)
    name, layers, total = watched_layers(patcher.model.diffusion_model, checkpoint.header, recipe)
    if not layers:
        found = f"none of its {total:,} layers that would be quantized is a Linear of this model"
        remedy = "choose the checkpoint that the model was loaded from, and connect the node before torch.compile"
        raise CheckpointError(found, where=checkpoint.header.path.name, remedy=remedy)
    try:
        session = Session(source, path, layers, budget, name, on_new)
    except ValueError as error:
        raise CheckpointError(str(error), where=path.name, remedy="allow more memory") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    patcher.add_wrapper_with_key(patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, session.watch)
    patcher.add_callback_with_key(patcher_extension.CallbacksMP.ON_CLEANUP, KEY, session.save)
    return (
        f"{len(layers):,} of {total:,} layers (recipe {name}), Gram matrices of blocks of {session.width} columns, "
        f"at most {size_text(budget)}; {path.name} is written at the end of each sampling"
    )


def watched_layers(model: torch.nn.Module, header: Any, requested: str) -> tuple[str, dict[str, torch.nn.Module], int]:
    """-> name of the recipe; its layers, by name without prefix, that are Linears of the model; how many it has."""
    recipe, component = find_recipe(header, requested), find_components(header).get(DIFFUSION_MODEL)
    shapes = {
        own.removesuffix(".weight"): header.tensors[name].shape
        for name, own in (component.names if component else {}).items()
        if own.endswith(".weight") and len(header.tensors[name].shape) > 1
    }
    wanted = select(recipe, shapes).quantized
    modules = dict(model.named_modules())  # the host's Linear for stored FP8 and NVFP4 is no torch.nn.Linear
    found = {
        name: modules[name]
        for name in wanted
        if getattr(modules.get(name), "in_features", None) == shapes[name][1]
    }
    return recipe.name, found, len(wanted)
