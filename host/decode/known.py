# SPDX-License-Identifier: Apache-2.0
"""Whether a decoder is made of what stream.py knows, with nobody else's hand in it."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from .. import residency

_PACKAGE = "comfy.ldm.lightricks.vae"
# Called as they are, so what is in them is their own affair.
_EMBEDDERS = ("time_embedder", "last_time_embedder")


def host_module() -> ModuleType | None:
    """The host's module of the video VAE, None on one that does not know it."""
    try:
        return importlib.import_module(f"{_PACKAGE}.causal_video_autoencoder")
    except ImportError:
        return None


@dataclass(frozen=True)
class _Classes:
    """The host's classes that stream.py stands in for."""

    block: type
    resnet: type
    upsample: type
    norm: type
    causal: type
    conv: type

    @property
    def plain(self) -> frozenset[type]:
        """All that may occur."""
        torchs = (torch.nn.Identity, torch.nn.SiLU, torch.nn.Dropout, torch.nn.ModuleList)
        return frozenset((self.block, self.resnet, self.upsample, self.norm, self.causal, self.conv, *torchs))


@functools.cache
def _classes() -> _Classes:
    host = host_module()
    causal = importlib.import_module(f"{_PACKAGE}.causal_conv3d")
    norm = importlib.import_module(f"{_PACKAGE}.pixel_norm").PixelNorm
    return _Classes(
        host.UNetMidBlock3D, host.ResnetBlock3D, host.DepthToSpaceUpsample, norm, causal.CausalConv3d, causal.ops.Conv3d
    )


def unknown(decoder: torch.nn.Module) -> str:
    """What of a decoder of the host is not as stream.py computes it, or an empty string."""
    classes = _classes()
    plain = classes.plain
    for name, module in decoder.named_modules():
        if any(part in _EMBEDDERS for part in name.split(".")):
            continue
        if residency.taken_over(module.__dict__):
            return f"`{name or 'the decoder'}` has a hook or another forward"
        if module is not decoder and type(module) not in plain:
            return f"`{name}` is of class {type(module).__name__}"
        if reason := _other(module, classes):
            return f"`{name}` has {reason}"
    ends = (decoder.conv_in, decoder.conv_out, decoder.conv_norm_out, decoder.conv_act)
    if tuple(map(type, ends)) != (classes.causal, classes.causal, classes.norm, torch.nn.SiLU):
        return "it begins or ends otherwise"
    blocks = {type(block) for block in decoder.up_blocks}
    if unexpected := blocks - {classes.block, classes.upsample}:
        return f"it has blocks of class {unexpected.pop().__name__}"
    return ""


def _other(module: torch.nn.Module, classes: _Classes) -> str:
    """What is unusual about a module of one of the host's classes, or an empty string."""
    found = type(module)
    if found is classes.causal:
        kernel, inner = module.time_kernel_size, module.conv
        usual = (kernel, module.time_stride, inner.dilation) == (3, 1, (1, 1, 1)) and type(inner) is classes.conv
        return "" if usual else "another kernel, stride or convolution"
    if found is classes.resnet:
        parts = (module.norm1, module.norm2, module.norm3, module.conv_shortcut, module.conv1, module.conv2)
        none = torch.nn.Identity
        usual = (classes.norm, classes.norm, none, none, classes.causal, classes.causal)
        if tuple(map(type, parts)) != usual or module.inject_noise:
            return "a shortcut, noise or another norm"
        return "" if type(module.non_linearity) is torch.nn.SiLU and not module.dropout.p else "another activation"
    if found is classes.block:
        return "" if all(type(inner) is classes.resnet for inner in module.res_blocks) else "other blocks"
    if found is classes.upsample:
        return "" if type(module.conv) is classes.causal else "another convolution"
    return "" if found is not classes.norm or module.dim == 1 else "another axis"
