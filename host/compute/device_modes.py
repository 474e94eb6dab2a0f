# SPDX-License-Identifier: Apache-2.0
"""How layers compute, chosen again for the device on which a model is loaded.

ComfyUI's SelectModelDevice and multi-GPU nodes read a model again through the loader's factory, which is not told of a
device, and set it afterwards. So the modes that a GPU of another kind can run are known only when the patcher loads the
model there, which is when ``settle`` is called. Backends need no second choice: each call looks at its input's device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .fusions import fuse
from .linear import choose_mode, modes_of
from .modes import Compute, describe

logger = logging.getLogger(__name__)

_NAME = "nvfp4_modes"


@dataclass
class _Modes:
    device: torch.device
    linear: type
    choose: Callable[[torch.device], Compute]


def remember(
    model: torch.nn.Module, device: torch.device, linear: type, choose: Callable[[torch.device], Compute]
) -> None:
    """Note for which device a model's layers of class ``linear`` were set up, and how to do it for another."""
    model.__dict__[_NAME] = _Modes(device, linear, choose)


def settle(model: torch.nn.Module | None, device: torch.device) -> None:
    """Have the layers compute as ``device`` can; nothing happens on the device they were set up for.

    Raises PackError where a mode was asked for by name that cannot run there.
    """
    modes = getattr(model, "__dict__", {}).get(_NAME)
    if modes is None or modes.device == device:
        return
    how = modes.choose(device)
    for name, module in model.named_modules():
        if isinstance(module, modes.linear) and module.__dict__.get("nvfp4_mode"):
            choose_mode(module, how.of(name))
    modes.device = device
    fuse(model, modes.linear)
    logger.info("NVFP4 layers on %s: %s (%s)", device, describe(modes_of(model)), how.reason)
