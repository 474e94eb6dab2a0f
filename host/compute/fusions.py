# SPDX-License-Identifier: Apache-2.0
"""What neighbouring FP8 layers of a loaded LTX model can do together: one pass over memory less each time.

* to_q, to_k and to_v of an attention take the same tensor: it is quantised once.
* GELU before the second Linear of the feed-forward is computed while that Linear quantises its input.

The first changes no bit, the second leaves out the rounding between the two. Only LTX's own classes are prepared, of
which it is known that they do just that, and whoever replaced a ``forward`` or hooked a layer gets what he would
without: each call looks. Classes are set on the model's own modules; nothing of the host is patched.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from ...kernels.fp8 import SharedRows
from .. import residency

_PROJECTIONS = ("to_q", "to_k", "to_v")


def fuse(model: torch.nn.Module, linear: type) -> None:
    """Prepare the layers of class ``linear`` in FP8 mode; other models, classes and modes are left alone."""
    host = _host()
    for module in model.modules():
        if type(module) is getattr(host, "CrossAttention", None):
            layers = [getattr(module, name, None) for name in _PROJECTIONS]
            if all(_in_fp8(layer, linear) for layer in layers):
                shared, owns = SharedRows(), tuple(layer.__dict__ for layer in layers)
                for place, own in enumerate(owns):
                    own["_nvfp4_shared"], own["_nvfp4_sharers"] = (shared, place), owns
        elif (fused := _feed_forward(type(module))) is not None and _in_fp8(module.net[2], linear):
            module.__class__ = fused


def shared_rows(own: dict) -> tuple[SharedRows, int] | None:
    """What a Linear hands to its FP8 function so that its input is quantised once for all three that take it.

    None for any other layer, and as long as one of the three is not its own master: what runs between them might
    change the input.
    """
    shared = own.get("_nvfp4_shared")
    return None if shared is None or any(map(residency.taken_over, own["_nvfp4_sharers"])) else shared


def _in_fp8(layer: object, linear: type) -> bool:
    return isinstance(layer, linear) and layer.__dict__.get("nvfp4_mode") == "fp8"


def _host() -> ModuleType | None:
    try:
        return importlib.import_module("comfy.ldm.lightricks.model")
    except ImportError:
        return None


@functools.cache
def _feed_forward(found: type) -> type | None:
    """LTX's feed-forward -> a class derived from it, any other class -> None."""
    host = _host()
    if found is not getattr(host, "FeedForward", None) or not hasattr(host, "GELU_approx"):
        return None

    class FusedFeedForward(found):
        def forward(self, x):
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _as_built(self.net, host.GELU_approx):
                return super().forward(x)
            return self.net[2](self.net[0].proj(x), activation="gelu_tanh")

    return FusedFeedForward


def _as_built(net: torch.nn.Module, gelu: type) -> bool:
    """Whether these are still the GELU, Dropout and Linear of the pack that the host built, in nobody else's hands."""
    layers = tuple(net)
    return (
        len(layers) == 3
        and type(layers[0]) is gelu
        and type(layers[1]) is torch.nn.Dropout
        and "nvfp4_mode" in layers[2].__dict__
        and not any(residency.taken_over(module.__dict__) for module in (net, *layers))
    )
