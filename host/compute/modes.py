# SPDX-License-Identifier: Apache-2.0
"""How a model's NVFP4 layers compute: the mode that runs on this device and why, and which layers differ from it.

* ``bf16``  weight-only: weights are dequantised, activations left alone; exact.
* ``fp8``   W4A8: weights converted to E4M3, activations quantised row by row; compute capability 8.9 and up.
* ``fp4``   W4A4 by the host's own kernels; compute capability 10.0 and up with a torch built for CUDA 13.
* ``int8``  W4A8 as INT8 rows, for GPUs without FP8; compute capability 7.5 and up.
* ``auto``  the fastest of them that runs here, but never ``int8``: rows with outliers lose more in it than it is worth
  choosing unasked.

What a family's recipe would not quantise, its first and last blocks, and modulations stay weight-only in every mode;
the user's own choices come after that and win.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import comfy.model_management
import torch

from ...checkpoint.file.header import Header
from ...checkpoint.write.recipes import Options, find_recipe, select
from ...kernels import fp8, int8
from ...kernels.errors import PackError

MODES = ("bf16", "int8", "fp8", "fp4")  # the most exact first, for numbers without outliers
EIGHT_BITS = ("int8", "fp8")
OWN = ("bf16", *EIGHT_BITS)  # computed by this pack
AUTO, AUTOMATIC = "auto", tuple(mode for mode in MODES if mode != "int8")
_INT8_MEASURED = "H200"
# FP8 modulations turned Z-Image, Qwen-Image and FLUX into noise (vllm-project/vllm-omni pull 2795).
_MODULATION = r"(?i)(^|[._])(\w*mod|\w*modulation|\w*adaln\w*)(\.|_|$)"
_ANY_SHAPE = (4096, 4096)  # sizes have no part in what is sensitive


@dataclass(frozen=True)
class Compute:
    """A model's mode, why, and the layers (named as in its state dict) that compute in another one."""

    mode: str = "bf16"
    reason: str = "asked for"
    others: Mapping[str, str] = field(default_factory=dict)

    def of(self, layer: str) -> str:
        """Name of a layer -> its mode."""
        return self.others.get(layer, self.mode)

    def uses(self, mode: str) -> bool:
        """Whether any layer may compute in it."""
        return mode == self.mode or mode in self.others.values()


def obstacle(mode: str, device: torch.device) -> str:
    """Why ``mode`` cannot run on ``device``, or an empty string."""
    if mode == "fp8":
        return fp8.obstacle(device)
    if mode == "int8":
        return int8.obstacle(device)
    if mode == "fp4":
        return _fp4_obstacle(device)
    return ""


def _fp4_obstacle(device: torch.device) -> str:
    if device.type != "cuda" or not torch.version.cuda:
        return f"FP4 tensor cores are those of an NVIDIA GPU, the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (10, 0):
        name = torch.cuda.get_device_name(device)
        return f"FP4 needs compute capability 10.0, {name} has {capability[0]}.{capability[1]}"
    if int(torch.version.cuda.split(".")[0]) < 13:
        return f"ComfyUI's FP4 kernels need a torch built for CUDA 13, this one is for {torch.version.cuda}"
    supports = getattr(comfy.model_management, "supports_nvfp4_compute", None)
    if supports is None or not supports(device):
        return "this ComfyUI has no FP4 arithmetic for the GPU; update it"
    return ""


def pick_mode(requested: str, device: torch.device, modes: tuple[str, ...] = AUTOMATIC) -> tuple[str, str]:
    """One of MODES or "auto", which takes one of ``modes``, device -> (mode, reason).

    A mode asked for that cannot run raises PackError.
    """
    if requested not in (*MODES, AUTO):
        raise PackError(f"unknown compute mode {requested!r}; expected {', '.join(MODES)} or {AUTO}")
    if requested != AUTO:
        if found := obstacle(requested, device):
            raise PackError(f"compute {requested} cannot run: {found}; choose bf16 or auto")
        return requested, _asked_for(requested, device)
    refused = []
    for mode in reversed(modes):
        found = obstacle(mode, device)
        if not found:
            return mode, "; ".join([*refused, f"the fastest that runs on {device.type}"])
        refused.append(f"no {mode}: {found}")
    raise AssertionError("bf16 runs everywhere")


def _asked_for(mode: str, device: torch.device) -> str:
    """The reason of a mode that was asked for, and on which GPU it has not been run."""
    if mode != "int8":
        return "asked for"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "asked for" + f"; not run on {name} by this pack, only on an {_INT8_MEASURED}" * (_INT8_MEASURED not in name)


def parse_overrides(text: str, device: torch.device) -> dict[str, str]:
    """ "to_out=bf16, blocks.0=bf16" -> {part of layer names: mode}. PackError for what is malformed or cannot run."""
    found: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in re.split(r"[,;\n]", text))):
        part, equals, mode = (piece.strip() for piece in item.partition("="))
        if not part or not equals:
            raise PackError(f"layer_compute: found {item!r}; expected PART=MODE, such as to_out=bf16")
        if mode not in MODES:
            close = difflib.get_close_matches(mode, MODES, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PackError(f"layer_compute: unknown mode {mode!r} for {part!r}; expected {', '.join(MODES)}{hint}")
        if reason := obstacle(mode, device):
            raise PackError(f"layer_compute: {part}={mode} cannot run: {reason}; choose bf16")
        found[part] = mode
    return found


def matches(part: str, layer: str) -> bool:
    """Whether whole components of the name, or ends of them after an underscore, are ``part``; * stands for any text.

    "blocks.0" means transformer_blocks.0 and blocks.0, not blocks.01; "to_out" any layer with that component.
    """
    return _pattern(part).search(layer) is not None


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|[._])" + re.escape(part).replace(r"\*", r".*") + r"(?:\.|$)")


def plan_layers(
    picked: tuple[str, str],
    overrides: Mapping[str, str],
    header: Header,
    layers: Collection[str],
    names: Collection[str],
) -> Compute:
    """Mode with its reason, overrides, file, its NVFP4 layers, all its matrices -> Compute; names without prefix.

    Raises PackError for an override that matches no NVFP4 layer, with the nearest names there are.
    """
    mode, reason = picked
    chosen = dict.fromkeys(sensitive(header, layers, names) if mode != "bf16" else (), "bf16")
    for part, wanted in overrides.items():
        found = [layer for layer in layers if matches(part, layer)]
        if not found:
            raise PackError(
                f"layer_compute: {part!r} is in no name of the {len(layers)} NVFP4 layers{_near(part, layers)}"
            )
        chosen |= dict.fromkeys(found, wanted)
    return Compute(mode, reason, {layer: wanted for layer, wanted in chosen.items() if wanted != mode})


def sensitive(header: Header, layers: Collection[str], names: Collection[str]) -> list[str]:
    """NVFP4 layers of a file whose activations should not be quantised.

    ``names`` are all its matrices: which block is the last does not depend on what is packed.
    """
    recipe = find_recipe(header)
    edges = None if any(recipe.first_last) else 2 if recipe.name.startswith("LTX") else 1
    options = Options(keep_first_last=edges, keep=(_MODULATION,))
    kept = select(recipe, dict.fromkeys(names, _ANY_SHAPE), options).kept
    return [layer for layer in layers if layer in kept]


def _near(part: str, layers: Collection[str]) -> str:
    """What was probably meant, as the end of a sentence."""
    pieces = {piece for layer in layers for piece in layer.split(".") if not piece.isdecimal()}
    close = difflib.get_close_matches(part.split(".")[0], sorted(pieces), 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f", such as {next(iter(layers))}" if layers else ""


def describe(modes: Mapping[str, int]) -> str:
    """Numbers of layers by mode -> "fp8 in 1,344 layers, bf16 in 56 layers"."""
    return ", ".join(f"{mode} in {count:,} layer{'s' * (count != 1)}" for mode, count in modes.items())
